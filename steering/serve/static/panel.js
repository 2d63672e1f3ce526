// The panel beside the chat: the conversation's position on the axis as a chart, in words and in numbers.

import { BAND, chartTable, newChart } from "./chart.js";
import { answerOn, CAPPED, runningMean, sidesOf, trajectories, zOf } from "./conversation.js";
import { byId, el, fixed, percent, signed } from "./dom.js";
import { scaleLegend } from "./tokens.js";

export const newPanel = (axis, scale, onpick) => {
  if (axis.layer === null) return unmeasured(axis);
  const chart = newChart(byId("chart"), { onpick });
  byId("explain").textContent = explanation(axis);
  byId("scale").replaceChildren(...scaleLegend(scale));
  return {
    draw: (conversation, arm) => {
      const series = trajectories(conversation);
      const floor = floorOf(conversation, axis, arm);
      chart.draw(series, axis, floor);
      const words = stateOf(conversation, axis);
      byId("state").replaceChildren(...words.map(({ text, alarm }) => el("span", { class: alarm ? "alarmed" : null }, text)));
      byId("strip-state").textContent = shortState(conversation, axis);
      byId("legend").replaceChildren(...legend(conversation, axis, arm, floor));
      byId("readouts").replaceChildren(readouts(conversation, axis, arm));
      byId("table").replaceChildren(chartTable(series, series.length > 1));
    },
  };
};

// Without an axis there is nothing to show but how to make one.
const unmeasured = (axis) => {
  byId("state").textContent = "Not measured";
  byId("explain").textContent = `${axis.no_axis[0].toUpperCase()}${axis.no_axis.slice(1).replaceAll("`", "")}.`;
  for (const id of ["chart", "legend", "readouts", "table-toggle", "table", "scale"]) byId(id).remove();
  return { draw: () => {} };
};

const explanation = ({ layer, poles, model, baseline, alarm }) =>
  `Each point is one answer: the mean projection of its tokens at layer ${layer} of ${model.n_layers}, before any arm’s step, onto the axis from “${poles[1]}” to “${poles[0]}”.` +
  (baseline
    ? ` The band is where ${baseline.of} lie (mean ± 2 spreads); z counts spreads from their mean, so an answer far below zero has left the model’s default character.`
    : "") +
  (alarm?.rule === "cusum" ? " The alarm’s sum grows with answers that lie low and shrinks with others; beyond its limit the alarm is on." : "") +
  (alarm ? ` The alarm is raised in ${percent(alarm.false_alarms)} of reference conversations${alarm.per_turn ? `, once in ${Math.round(1 / alarm.per_turn)} answers` : ""}.` : " No alarm is calibrated on this server.");

const floorOf = (conversation, axis, arm) => {
  if (arm) return axis.arms[arm]?.floor ?? null;
  const answers = conversation.turns.flatMap((turn) => turn.answers).filter((answer) => answer.floor !== null);
  return answers.at(-1)?.floor ?? null;
};

const answersOn = (conversation, side) =>
  conversation.turns.map((turn) => answerOn(turn, side)).filter((answer) => answer !== null && (answer.projection !== null || answer.live));

const sideName = (side) => (side === CAPPED ? "Steered" : "Baseline");

const stateOf = (conversation, axis) => {
  const sides = sidesOf(conversation);
  return sides.map((side) => {
    const { text, long, alarm } = stateOn(conversation, axis, side);
    return { text: sides.length > 1 ? `${sideName(side)}: ${text[0].toLowerCase()}${text.slice(1)}` : (long ?? text), alarm };
  });
};

const stateOn = (conversation, axis, side) => {
  const answers = answersOn(conversation, side);
  const last = answers.at(-1);
  if (!last) return { text: conversation.turns.some(({ answers }) => answers.length) ? "These answers are measured with the next one." : "No answer yet." };
  if (last.live) {
    const mean = runningMean(last.tokens);
    return { text: mean === null ? "Answering." : `Answering: ${fixed(mean)} so far.` };
  }
  const judged = answers.findLast((answer) => answer.drift !== null); // a stopped answer has no alarm state
  if (judged?.drift === "drifting") {
    const since = answers.findLastIndex((answer) => answer.raised);
    return {
      text:
        since < 0
          ? "Drifting."
          : `Drifting since answer ${1 + conversation.turns.findIndex((turn) => answerOn(turn, side) === answers[since])}.`,
      alarm: true,
    };
  }
  if (last.z === null) return { text: `Last answer at ${fixed(last.projection)}.` };
  const place = last.z < -BAND ? "Below" : last.z > BAND ? "Above" : "Within";
  const sum = alarmSum(judged, axis);
  if (sum === null) return { text: `${place} the band.`, long: `The last answer lies ${place.toLowerCase()} the band.` };
  return { text: `${place} the calm band, the alarm’s ${axis.alarm.rule === "cusum" ? "sum" : "statistic"} at ${sum}.` };
};

// Where the alarm stands: "6.1 of 8.3".
const alarmSum = (answer, { alarm }) =>
  alarm && Number.isFinite(answer?.statistic) ? `${fixed(answer.statistic)} of ${fixed(alarm.limit)}` : null;

// Beside the name of the closed panel.
const shortState = (conversation, axis) => {
  const lasts = sidesOf(conversation).map((side) => answersOn(conversation, side).at(-1));
  if (!lasts.every(Boolean)) return "";
  const values = lasts.map((last, side) => {
    const z = zOf(axis, last.live ? runningMean(last.tokens) : last.projection, answersOn(conversation, side).length - 1);
    return z === null ? "–" : signed(z);
  });
  const sum = lasts.length > 1 ? null : alarmSum(lasts[0], axis);
  return `z ${values.join(", steered ")}${lasts[0].alarm ? ", drifting" : sum === null ? "" : `, alarm ${sum}`}`;
};

const legend = (conversation, axis, arm, floor) => {
  const answers = conversation.turns.flatMap((turn) => turn.answers);
  const key = (name, text) => el("span", {}, el("i", { class: name, "aria-hidden": "true" }), text);
  const anyPlain = answers.some((answer) => answer.arm === null) || !answers.length;
  return [
    anyPlain && key("key-plain", "baseline"),
    (answers.some((answer) => answer.arm !== null) || arm) && key("key-capped", "steered"),
    axis.baseline && key("key-band", axis.baseline.of),
    floor !== null && key("key-floor", "floor"),
    answers.some((answer) => answer.alarm) && key("key-alarm", "alarm on"),
  ].filter(Boolean);
};

const readouts = (conversation, axis, arm) => {
  const sides = sidesOf(conversation);
  const lasts = sides.map((side) => answersOn(conversation, side).at(-1));
  const value = (show) => lasts.map((last, side) => el("td", {}, last ? show(last, side) : "–"));
  const place = (last) => (last.live ? runningMean(last.tokens) : last.projection);
  const z = (last, side) => zOf(axis, place(last), answersOn(conversation, side).length - 1);
  const capped = lasts.some((last) => last?.acted) || arm !== null;
  const rows = [
    ["Projection", (last) => fixed(place(last))],
    ["z", (last, side) => (z(last, side) === null ? "–" : signed(z(last, side)))],
    ...(capped
      ? [
          ["Floor", (last) => fixed(last.floor ?? (last.live && last.arm ? axis.arms[last.arm]?.floor : null))],
          ["Changed by the arm", (last) => percent(last.fired), "share of tokens times steered layers"],
        ]
      : []),
    ...(axis.alarm ? [["Alarm", (last) => (last.drift === "drifting" ? "on" : (alarmSum(last, axis) ?? "–")), "the rule’s statistic and the limit that raises the alarm"]] : []),
  ];
  const head =
    sides.length > 1 && el("thead", {}, el("tr", {}, el("td"), ...sides.map((side) => el("th", { scope: "col" }, sideName(side)))));
  return el(
    "table",
    { class: "readouts" },
    el("caption", {}, conversation.turns.length ? "The last answer" : "The next answer"),
    head,
    el("tbody", {}, ...rows.map(([name, show, title]) => el("tr", {}, el("th", { scope: "row", title }, name), ...value(show)))),
  );
};
