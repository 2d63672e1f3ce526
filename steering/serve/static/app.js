// The page: waits for the server's axis, then holds one conversation and streams its answers.

import { newSeed, stream } from "./answering.js";
import { askForKey, findServer } from "./arrival.js";
import { chosenCap, chosenMode, isPressed, sampling, startControls } from "./controls.js";
import { addTurn, keepSide, newAnswer, newConversation } from "./conversation.js";
import { loadDistress, showNotice, showsDistress } from "./distress.js";
import { at, el, fixed, speak } from "./dom.js";
import { STARTERS } from "./examples.js";
import { download, startFiles } from "./files.js";
import { newPanel } from "./panel.js";
import { choice, choose, forget, remember, remembered } from "./saved.js";
import { startTheme } from "./theme.js";
import { scaleOf, watchTokens } from "./tokens.js";
import { newLog } from "./turns.js";

let axis, log, panel;
let conversation = newConversation();
let stopper = null; // of the round that is being answered
let editing = false;

// ---- lines under the messages

const showLine = (text, action = null) => {
  const line = at("line");
  line.hidden = !text;
  line.replaceChildren(text ?? "");
  if (action)
    line.append(" ", el("button", { type: "button", class: "quiet", onclick: () => (showLine(null), action.act()) }, action.name));
};

// ---- drawing: whole turns when their number or choice changes, and once a frame what a stream adds

const draw = () => {
  log.draw(conversation);
  at("empty").hidden = conversation.turns.length > 0;
  at("save").disabled = conversation.turns.length === 0;
  drawPanel();
};
const drawPanel = () => panel.draw(conversation, chosenCap());

const pending = new Set();
const changed = (answer) => {
  if (!pending.size) requestAnimationFrame(frame);
  pending.add(answer);
};
const frame = () =>
  following(() => {
    for (const answer of pending) log.fill(answer);
    pending.clear();
    drawPanel();
  });

// Who reads at the end stays at the end; who has scrolled up is left there.
const following = (act) => {
  const box = at("log");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  act();
  if (follows) box.scrollTop = box.scrollHeight;
};

const setBusy = (busy) => {
  document.body.classList.toggle("busy", busy);
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  at("log").setAttribute("aria-busy", String(busy));
};

const keepHere = () => {
  if (!at("keep").checked) return;
  if (conversation.turns.length || conversation.system) remember(conversation, axis);
  else forget();
};

const notice = () => {
  showNotice(at("notice"));
  makeRoom();
};
// On a narrow page the chart folds away before what needs its room.
const makeRoom = () => matchMedia("(max-width: 56rem)").matches && toggle("strip", "panel-body", false);

// ---- asking

// One answer as chosen in the header, or two in a comparison; both of one seed.
const newAnswers = (seed) => {
  const capped = () => newAnswer({ cap: chosenCap(), mode: chosenMode(), seed });
  return isPressed("compare") ? [newAnswer({ seed }), capped()] : [capped()];
};

const ask = async (turn, answers) => {
  let chosen;
  try {
    chosen = sampling(axis);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return showLine(error.message);
  }
  showLine(null);
  stopper = new AbortController();
  const mine = stopper;
  setBusy(true);
  draw();
  at("log").scrollTop = at("log").scrollHeight;
  const how = { axis, sampling: chosen.sampling, signal: mine.signal, changed };
  let ends = [];
  try {
    ends = await Promise.all(answers.map((answer) => stream(conversation, turn, answer, turn.answers.indexOf(answer), how)));
  } finally {
    if (stopper === mine) endRound();
  }
  if (!conversation.turns.includes(turn)) return; // another conversation has taken its place
  if (ends.includes("denied")) return askForKey(true).then(again);
  speak(
    answers
      .map(
        (answer) =>
          answer.problem ??
          `Answer complete, projection ${fixed(answer.projection)}${answer.raised ? ", the drift alarm was raised" : ""}.`,
      )
      .join(" "),
  );
};

const endRound = () => {
  stopper = null;
  setBusy(false);
  following(draw);
  keepHere();
};

const seedOf = () => {
  const value = at("seed").value;
  return value === "" ? newSeed() : Number(value);
};

const send = async () => {
  const text = at("say").value;
  if (!text.trim() || stopper || !axis) return;
  try {
    sampling(axis);
  } catch (error) {
    return showLine(error.message);
  }
  if (showsDistress(text)) notice();
  if (editing) {
    conversation.turns.pop();
    stopEditing();
  }
  at("say").value = "";
  fit();
  const turn = addTurn(conversation, text, isPressed("compare"));
  turn.answers = newAnswers(seedOf());
  keepHere();
  await ask(turn, turn.answers);
};

// The last message again, with a new seed and what the header says now. If that fails, what was there before stays.
const again = async () => {
  const turn = conversation.turns.at(-1);
  if (!turn || stopper) return;
  const before = [turn.answers, turn.kept];
  turn.kept = null;
  turn.answers = newAnswers(newSeed());
  await ask(turn, turn.answers);
  const failed = turn.answers.find((answer) => answer.problem && answer.text === "");
  if (failed && before[0].some((answer) => answer.text !== "")) {
    [turn.answers, turn.kept] = before;
    draw();
    showLine(`${failed.problem} The answer before it is still here.`, { name: "Retry", act: again });
  }
};

const retry = async (turn, side) => {
  if (stopper) return;
  const { cap, mode, seed } = turn.answers[side];
  turn.answers[side] = newAnswer({ cap, mode, seed });
  await ask(turn, [turn.answers[side]]);
};

const stop = () => stopper?.abort();

// ---- editing the last message

const edit = () => {
  const last = conversation.turns.at(-1);
  if (!last || last.user === null || stopper) return;
  editing = true;
  at("editing").hidden = false;
  at("say").value = last.user;
  fit();
  at("say").focus();
};
const stopEditing = () => {
  editing = false;
  at("editing").hidden = true;
};

// ---- another conversation

const replaceBy = (next, said) => {
  stop();
  stopper = null;
  setBusy(false);
  const before = conversation;
  conversation = next;
  at("system").value = next.system;
  at("system").dispatchEvent(new Event("input"));
  stopEditing();
  draw();
  keepHere();
  const undo = before.turns.length ? { name: "Undo", act: () => replaceBy(before, null) } : null;
  showLine(said, said ? undo : null);
  if (conversation.turns.some((turn) => turn.user !== null && showsDistress(turn.user))) notice();
};

const load = (next, remark) => {
  replaceBy(next, remark ?? (conversation.turns.length ? "Another conversation was loaded in place of yours." : null));
  at("log").scrollTop = at("log").scrollHeight;
};

const copy = async (answer, button) => {
  try {
    await navigator.clipboard.writeText(answer.text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed by the browser";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
};

const goTo = (turn) => {
  const article = at(`turn-${turn}`);
  article?.scrollIntoView({ block: "start" });
  article?.focus({ preventScroll: true });
  article?.classList.add("found");
  setTimeout(() => article?.classList.remove("found"), 1400);
};

// ---- the field and the keys

const fit = () => {
  const field = at("say");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight / 3)}px`;
};

const escape = () => {
  if (stopper) return stop();
  if (editing) {
    at("say").value = "";
    fit();
    return stopEditing();
  }
  toggle("menu", "actions", false);
};

const toggle = (button, target, open) => {
  at(button).setAttribute("aria-expanded", String(open));
  at(target).classList.toggle("open", open);
};

const startKeys = () => {
  at("form").addEventListener("submit", (event) => (event.preventDefault(), send()));
  at("say").addEventListener("input", fit);
  at("say").addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) (event.preventDefault(), send());
    if (event.key === "ArrowUp" && at("say").value === "") (event.preventDefault(), edit());
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !at("ask-key").open) escape();
    if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) (event.preventDefault(), at("say").focus());
  });
  at("stop").addEventListener("click", stop);
  at("how").addEventListener("toggle", () => at("how").open && makeRoom());
  for (const [button, target] of [
    ["menu", "actions"],
    ["strip", "panel-body"],
  ]) {
    at(button).addEventListener("click", () => toggle(button, target, at(button).getAttribute("aria-expanded") !== "true"));
  }
  at("table-toggle").addEventListener("click", () => {
    at("table").hidden = !at("table").hidden;
    at("table-toggle").setAttribute("aria-expanded", String(!at("table").hidden));
    at("table-toggle").textContent = at("table").hidden ? "Show as a table" : "Hide the table";
  });
};

const startKeeping = () => {
  at("keep").checked = choice("keep", "yes") === "yes";
  at("keep").addEventListener("change", () => {
    choose("keep", at("keep").checked ? "yes" : "no");
    if (at("keep").checked) keepHere();
    else forget();
  });
  const empty = () =>
    replaceBy(newConversation(), conversation.turns.length ? "A new conversation. The one before is gone from this page." : null);
  at("clear").addEventListener("click", () => (empty(), forget()));
  at("new").addEventListener("click", () => (empty(), at("say").focus()));
  addEventListener("pagehide", keepHere); // also in the middle of an answer
  at("save").addEventListener("click", () => download(conversation, axis));
};

const startEmpty = () => {
  const begin = (text) => () => {
    at("say").value = text;
    fit();
    at("say").focus();
  };
  at("empty").replaceChildren(
    el(
      "p",
      { class: "lead" },
      `Talk with ${axis.model.id} and watch where its answers lie between “${axis.poles[1]}” and “${axis.poles[0]}”.`,
    ),
    el(
      "p",
      { class: "note" },
      "Begin with a message of your own or with one of these. Compare answers each message twice, as it is and capped: two conversations side by side to the same words, each with its own history.",
    ),
    el(
      "div",
      { class: "starters" },
      ...STARTERS.map(([name, text]) => el("button", { type: "button", onclick: begin(text) }, el("small", {}, name), text)),
    ),
  );
};

const start = async () => {
  startTheme();
  startKeys();
  toggle("strip", "panel-body", innerHeight >= 700);
  loadDistress().catch(() => showLine("The list of words that speak of distress could not be read."));
  axis = await findServer(showLine);
  showLine(null);
  const scale = scaleOf(axis);
  const acts = { edit, again, retry, copy, keep: (side) => (keepSide(conversation, side), draw(), keepHere(), at("say").focus()) };
  log = newLog(at("turns"), scale, acts);
  panel = newPanel(axis, scale, goTo);
  watchTokens(at("turns"), (cap) => countLayers(axis.caps?.[cap]?.layers), scale, speak);
  startEmpty();
  const { conversation: known, remark } = remembered(axis);
  conversation = known ?? newConversation();
  at("system").value = conversation.system;
  startKeeping();
  startControls(axis, () => {
    conversation.system = at("system").value;
    at("log").classList.toggle("coloured", isPressed("colours"));
    at("scale").hidden = !isPressed("colours");
    drawPanel();
    keepHere();
  });
  startFiles(axis, { loaded: load, refused: (message) => showLine(message) });
  at("send").disabled = false;
  draw();
  showLine(remark);
  if (conversation.turns.length) at("log").scrollTop = at("log").scrollHeight;
  if (conversation.turns.some((turn) => turn.user !== null && showsDistress(turn.user))) notice();
  if (matchMedia("(hover: hover)").matches) at("say").focus(); // on a phone the keyboard would cover the page
};

// "8-26" or "3,5,8-10" in words that the server uses; null where it cannot be counted
const countLayers = (layers) => {
  if (typeof layers !== "string") return null;
  let count = 0;
  for (const part of layers.split(",")) {
    const [first, last = first] = part.trim().split("-").map(Number);
    if (!Number.isInteger(first) || !Number.isInteger(last)) return null;
    count += last - first + 1;
  }
  return count;
};

start();
