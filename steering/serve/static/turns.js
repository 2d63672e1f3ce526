// The messages: a turn is an article with one answer, or two side by side.

import { el, fixed, percent, signed } from "./dom.js";
import { CAPPED, isLeftOut, BASELINE } from "./conversation.js";
import { fillTokens } from "./tokens.js";

const ENDS = {
  length: ({ tokens }) => (tokens.length ? `cut at ${tokens.length} tokens, the longest answer allowed` : "cut short"),
  you: () => "stopped by you",
};

export const newLog = (box, scale, actions) => {
  const boxes = new Map(); // answer -> its elements, filled while it streams
  const draw = (conversation) => {
    boxes.clear();
    box.replaceChildren(...conversation.turns.map((turn, number) => turnOf(conversation, turn, number, { scale, actions, boxes })));
    for (const answer of boxes.keys()) fill(answer);
  };
  const fill = (answer) => {
    const own = boxes.get(answer);
    if (!own) return;
    own.article.classList.toggle("live", answer.live);
    fillTokens(own.text, answer, scale);
    if (answer.text === "")
      own.text.append(
        el(
          "em",
          {},
          answer.live ? "…" : answer.problem ? "" : answer.ended === "you" ? "stopped before its first token" : "an empty answer",
        ),
      );
    own.facts.replaceChildren(
      ...factsOf(answer).map((fact) => el("span", { class: fact.alarm ? "alarmed" : null }, fact.text)),
    );
    own.problem.hidden = !answer.problem;
    own.problem.firstChild.textContent = answer.problem ? `${answer.problem} ` : "";
  };
  return { draw, fill };
};

const turnOf = (conversation, turn, number, context) => {
  const last = number === conversation.turns.length - 1;
  const { actions } = context;
  const message =
    turn.user === null
      ? null
      : el(
          "div",
          { class: "user" },
          el("p", { class: "text", dir: "auto" }, turn.user),
          last && el("div", { class: "acts" }, el("button", { type: "button", class: "quiet", onclick: actions.edit }, "Edit")),
        );
  const answers = turn.answers.map((answer, side) => answerOf(turn, answer, side, last, context));
  const unanswered =
    !answers.length &&
    last &&
    el(
      "p",
      { class: "problem" },
      "This message has no answer yet. ",
      el("button", { type: "button", class: "quiet", onclick: actions.again }, "Answer it"),
    );
  const out =
    !last &&
    isLeftOut(turn, BASELINE) &&
    isLeftOut(turn, CAPPED) &&
    el("p", { class: "note" }, "Left out: the model does not see this message.");
  return el(
    "article",
    {
      class: `turn${answers.length > 1 ? " pair" : ""}${out ? " out" : ""}`,
      id: `turn-${number}`,
      tabindex: -1,
      "aria-label": `Turn ${number + 1}`,
    },
    message,
    el("div", { class: "answers" }, ...answers),
    unanswered,
    out,
  );
};

const answerOf = (turn, answer, side, last, { actions, boxes }) => {
  const aside = turn.kept !== null && turn.answers.length > 1 && turn.kept !== side;
  const pair = turn.answers.length > 1;
  const name = answer.arm === null ? "Baseline" : `Arm “${answer.arm}”${answer.mode === "adaptive" ? ", only while drifting" : ""}`;
  const text = el("div", { class: "tokens", tabindex: 0, "aria-label": `${name}, answer` });
  const facts = el("p", { class: "facts" });
  const problem = el(
    "p",
    { class: "problem", role: "alert", hidden: true },
    "",
    el("button", { type: "button", class: "quiet", onclick: () => actions.retry(turn, side) }, "Retry"),
  );
  const button = (label, act) => el("button", { type: "button", class: "quiet", onclick: act }, label);
  const copy = button("Copy", () => actions.copy(answer, copy));
  const article = el(
    "div",
    { class: `answer ${answer.arm === null ? "plain" : "capped"}${aside ? " aside" : ""}` },
    (pair || answer.arm !== null) &&
      el("p", { class: "who" }, el("i", { "aria-hidden": "true" }), name, aside && el("small", {}, "set aside")),
    text,
    problem,
    el(
      "div",
      { class: "below" },
      facts,
      el(
        "div",
        { class: "acts" },
        copy,
        last && side === (turn.kept ?? 0) && button("Try again", actions.again),
        last && pair && turn.kept !== side && button("Continue from this answer", () => actions.keep(side)),
      ),
    ),
  );
  boxes.set(answer, { article, text, facts, problem });
  return article;
};

const factsOf = (answer) => {
  if (answer.live) return [];
  const facts = answer.projection === null ? [] : [{ text: `projection ${fixed(answer.projection)}` }];
  if (answer.z !== null) facts.push({ text: `z ${signed(answer.z)}` });
  if (answer.acted) facts.push({ text: answer.fired === null ? "arm acted" : `arm acted on ${percent(answer.fired)}` });
  else if (answer.arm !== null && answer.z !== null && answer.drift !== null) facts.push({ text: "arm at rest" });
  if (answer.raised) facts.push({ text: "drift alarm", alarm: true });
  if (ENDS[answer.ended]) facts.push({ text: ENDS[answer.ended](answer) });
  return facts;
};
