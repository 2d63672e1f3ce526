// Beside the chat: where the conversation lies, in a chart, in words and in numbers.

import { chartTable, newChart } from "./chart.js";
import { answerOn, CAPPED, PLAIN, runningMean, sidesOf, trajectories } from "./conversation.js";
import { at, el, fixed, percent, signed } from "./dom.js";
import { scaleLegend } from "./tokens.js";

export const newPanel = (axis, scale, onpick) => {
  const chart = newChart(at("chart"), { onpick });
  at("explain").textContent = explanation(axis);
  at("scale").replaceChildren(...scaleLegend(scale));
  return {
    draw: (conversation, cap) => {
      const series = trajectories(conversation);
      const floor = floorOf(conversation, axis, cap);
      chart.draw(series, axis, floor);
      const words = stateOf(conversation, axis);
      at("state").replaceChildren(...words.map(({ text, alarm }) => el("span", { class: alarm ? "alarmed" : null }, text)));
      at("strip-state").textContent = shortState(conversation);
      at("legend").replaceChildren(...legend(conversation, axis, cap, floor));
      at("readouts").replaceChildren(readouts(conversation, axis));
      at("table").replaceChildren(chartTable(series, series.length > 1));
    },
  };
};

const explanation = ({ layer, poles, model, baseline }) =>
  `Each point is one answer: the mean projection of its tokens at layer ${layer} of ${model.n_layers}, before any cap’s step, onto the axis from “${poles[1]}” to “${poles[0]}”.` +
  (baseline ? ` The band is where ${baseline.of} lie (mean ± 2 spreads); z counts spreads from their mean, so an answer far below zero has left the model’s default character.` : "");

const floorOf = (conversation, axis, cap) => {
  if (cap) return axis.caps[cap]?.floor ?? null;
  const answers = conversation.turns.flatMap((turn) => turn.answers).filter((answer) => answer.floor !== null);
  return answers.at(-1)?.floor ?? null;
};

const answersOn = (conversation, side) => conversation.turns.map((turn) => answerOn(turn, side)).filter((answer) => answer !== null && (answer.projection !== null || answer.live));

const sideName = (side) => (side === CAPPED ? "Capped" : "As it is");

const stateOf = (conversation, axis) => {
  const sides = sidesOf(conversation);
  return sides.map((side) => {
    const { text, alarm } = stateOn(conversation, axis, side);
    return { text: sides.length > 1 ? `${sideName(side)}: ${text[0].toLowerCase()}${text.slice(1)} ` : text, alarm };
  });
};

const stateOn = (conversation, axis, side) => {
  const answers = answersOn(conversation, side);
  const last = answers.at(-1);
  if (!last) return { text: "No answer yet." };
  if (last.live) {
    const mean = runningMean(last.tokens);
    return { text: mean === null ? "Answering." : `Answering: ${fixed(mean)} so far.` };
  }
  if (last.alarm) {
    const since = answers.findLastIndex((answer) => answer.raised);
    return { text: since < 0 ? "Drifting." : `Drifting since answer ${1 + conversation.turns.findIndex((turn) => answerOn(turn, side) === answers[since])}.`, alarm: true };
  }
  if (axis.alarm) return { text: "Calm." };
  if (last.z === null) return { text: `Last answer at ${fixed(last.projection)}.` };
  return { text: last.z < -2 ? "The last answer lies below the band." : last.z > 2 ? "The last answer lies above the band." : "The last answer lies within the band." };
};

const shortState = (conversation) => {
  const last = answersOn(conversation, PLAIN).at(-1);
  if (!last) return "";
  if (last.live) return fixed(runningMean(last.tokens));
  return `${last.z === null ? fixed(last.projection) : `z ${signed(last.z)}`}${last.alarm ? ", drifting" : ""}`;
};

const legend = (conversation, axis, cap, floor) => {
  const answers = conversation.turns.flatMap((turn) => turn.answers);
  const key = (name, text) => el("span", {}, el("i", { class: name, "aria-hidden": "true" }), text);
  const anyPlain = answers.some((answer) => answer.cap === null) || !answers.length;
  return [
    anyPlain && key("key-plain", "as it is"),
    (answers.some((answer) => answer.cap !== null) || cap) && key("key-capped", "capped"),
    axis.baseline && key("key-band", axis.baseline.of),
    floor !== null && key("key-floor", "floor"),
    answers.some((answer) => answer.alarm) && key("key-alarm", "alarm on"),
  ].filter(Boolean);
};

const readouts = (conversation, axis) => {
  const sides = sidesOf(conversation);
  const lasts = sides.map((side) => answersOn(conversation, side).at(-1));
  const value = (show) => lasts.map((last) => el("td", {}, last ? show(last) : "–"));
  const drift = (last) => (!axis.alarm ? "no alarm calibrated" : last.alarm ? "drifting" : last.live ? "–" : "calm");
  const rows = [
    ["Projection", (last) => fixed(last.live ? runningMean(last.tokens) : last.projection)],
    ["z", (last) => (last.z === null ? "–" : signed(last.z))],
    ["Floor", (last) => fixed(last.floor)],
    ["Cap acted on", (last) => (last.fired === null ? "–" : `${percent(last.fired)} of tokens × layers`)],
    ["Drift", drift],
  ];
  const head = sides.length > 1 && el("thead", {}, el("tr", {}, el("td"), ...sides.map((side) => el("th", { scope: "col" }, sideName(side)))));
  return el("table", { class: "readouts" }, el("caption", { class: "unseen" }, "The last answer"), head, el("tbody", {}, ...rows.map(([name, show]) => el("tr", {}, el("th", { scope: "row" }, name), ...value(show)))));
};
