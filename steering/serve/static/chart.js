// The trajectory: answers along x, projection along y (up is toward the assistant), drawn by hand as SVG in the box's own pixels.
//
//   const chart = newChart(box, { onpick: (turn, side) => … });
//   chart.draw(trajectories(conversation), axis, floor);

import { el, fixed, hideTip, percent, showTip, signed, svg } from "./dom.js";
import { CAPPED } from "./conversation.js";

const WIDE = 2; // spreads on either side of the baseline's mean
const SHORTEST = 6; // answers that the empty chart has room for

export const newChart = (box, { onpick }) => {
  let drawn = null;
  let focused = null; // index of the point that the keyboard is at
  const redraw = () => {
    if (!drawn || !box.clientWidth) return;
    const active = box.contains(document.activeElement);
    box.replaceChildren(picture(box, drawn, onpick));
    const points = [...box.querySelectorAll(".point")];
    if (!points.length) return;
    focused = focused === null ? points.length - 1 : Math.min(focused, points.length - 1);
    points.forEach((point, place) => point.setAttribute("tabindex", place === focused ? 0 : -1));
    if (active) points[focused].focus({ preventScroll: true });
  };
  box.addEventListener("keydown", (event) => {
    const points = [...box.querySelectorAll(".point")];
    const here = points.indexOf(document.activeElement);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1, Home: -points.length, End: points.length }[event.key];
    if (here < 0 || step === undefined) return;
    event.preventDefault();
    focused = Math.min(Math.max(here + step, 0), points.length - 1);
    points.forEach((point, place) => point.setAttribute("tabindex", place === focused ? 0 : -1));
    points[focused].focus();
  });
  new ResizeObserver(redraw).observe(box);
  return {
    draw: (series, axis, floor) => {
      drawn = { series, axis, floor };
      redraw();
    },
  };
};

// What the y axis spans: the band, most answers under roles and of the default, and every point.
const domain = ({ series, axis, floor }) => {
  const values = series.flatMap((one) => one.points.map((point) => point.value));
  const { mean, spread } = axis.baseline ?? {};
  if (Number.isFinite(mean)) values.push(mean - WIDE * spread, mean + WIDE * spread);
  for (const rows of [axis.quantiles?.roles, axis.quantiles?.default]) if (rows?.length) values.push(at(axis, rows, 0.05), at(axis, rows, 0.95));
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (!Number.isFinite(low)) [low, high] = [-1, 1];
  const reach = high - low || 1;
  if (floor !== null && floor > low - reach / 2 && floor < high + reach / 2) [low, high] = [Math.min(low, floor), Math.max(high, floor)];
  return [low - 0.06 * (high - low || 1), high + 0.06 * (high - low || 1)];
};

// A quantile of the axis at a level that it keeps, or the nearest one.
export const at = (axis, row, level) => {
  const { levels } = axis.quantiles;
  let best = 0;
  for (const [place, one] of levels.entries()) if (Math.abs(one - level) < Math.abs(levels[best] - level)) best = place;
  return row[best];
};

const ticks = (low, high, most) => {
  const rough = (high - low) / most;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((times) => times * unit >= rough) * unit;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(Number(value.toPrecision(12)));
  return found;
};

const picture = (box, drawn, onpick) => {
  const { series, axis, floor } = drawn;
  const [width, height] = [box.clientWidth, box.clientHeight];
  const [low, high] = domain(drawn);
  const strips = axis.quantiles?.roles?.length && axis.quantiles?.default?.length && width >= 300;
  const [left, right, top, bottom] = [42, strips ? width - 78 : width - 12, 22, height - 30];
  const turns = Math.max(SHORTEST, ...series.flatMap((one) => one.points.map((point) => point.turn + 1)));
  const x = (turn) => left + ((right - left) * (turn + 0.5)) / turns;
  const y = (value) => bottom - ((bottom - top) * (value - low)) / (high - low);
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "Projection of each answer; the arrow keys go from answer to answer, Enter to its text" });
  root.append(...grid(axis, { left, right, top, bottom, low, high, y, x, turns, height }));
  if (axis.baseline) root.append(...band(axis.baseline, left, right, y));
  if (floor !== null) root.append(...floorLine(floor, { left, right, top, bottom, y, low, high }));
  if (strips) root.append(...reference(axis, right, bottom, y));
  for (const one of series) root.append(...alarmBars(one, x, bottom, (right - left) / turns));
  for (const one of series) root.append(...line(one, x, y));
  const points = series.flatMap((one) => one.points.filter((point) => one.side === 0 || !point.shared).map((point) => ({ ...point, side: one.side })));
  points.sort((a, b) => a.turn - b.turn || a.side - b.side);
  root.append(...points.map((point) => mark(point, x(point.turn), y(point.value), turns, series.length > 1, onpick)));
  return root;
};

const grid = (axis, { left, right, top, bottom, low, high, y, x, turns, height }) => {
  const every = Math.ceil(turns / Math.max(4, Math.floor((right - left) / 30)));
  const numbers = [...Array(turns).keys()].filter((turn) => turn % every === 0);
  const labels = ticks(low, high, Math.max(3, Math.floor((bottom - top) / 48)));
  return [
    ...labels.map((value) => svg("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) })),
    ...labels.map((value) => svg("text", { class: "tick", x: left - 8, y: y(value) + 4, "text-anchor": "end" }, fixed(value, 0))),
    ...numbers.map((turn) => svg("text", { class: "tick", x: x(turn), y: bottom + 16, "text-anchor": "middle" }, String(turn + 1))),
    svg("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }),
    svg("text", { class: "pole up", x: left, y: 12 }, `↑ ${axis.poles[0]}`),
    svg("text", { class: "pole down", x: left + 6, y: bottom - 8 }, `↓ ${axis.poles[1]}`),
    svg("text", { class: "tick", x: 2, y: height - 3 }, "answer"),
  ];
};

const band = ({ mean, spread }, left, right, y) => [
  svg("rect", { class: "band", x: left, width: right - left, y: y(mean + WIDE * spread), height: y(mean - WIDE * spread) - y(mean + WIDE * spread) }),
  svg("line", { class: "mean", x1: left, x2: right, y1: y(mean), y2: y(mean) }),
];

const floorLine = (floor, { left, right, bottom, y, low, high }) => {
  if (floor < low || floor > high) return [svg("text", { class: "floor-name", x: right - 4, y: floor < low ? bottom - 8 : 34, "text-anchor": "end" }, `floor ${fixed(floor)}, outside`)];
  return [
    svg("line", { class: "floor", x1: left, x2: right, y1: y(floor), y2: y(floor) }),
    svg("text", { class: "floor-name", x: right - 4, y: y(floor) - 5, "text-anchor": "end" }, `floor ${fixed(floor)}`),
  ];
};

// Beside the plot, where answers lie that were made for the axis: 5 to 95% thin, the middle half thick, the median a line.
const reference = (axis, right, bottom, y) =>
  [["roles", "others"], ["default", "positive"]].flatMap(([name, side], place) => {
    const middle = right + 21 + 37 * place;
    const [least, lower, half, upper, most] = [0.05, 0.25, 0.5, 0.75, 0.95].map((level) => y(at(axis, axis.quantiles[name], level)));
    const title = svg("title", {}, `Answers ${name === "roles" ? "under role prompts" : "without a role"}: 5 to 95%, the middle half, the median`);
    return [
      svg("g", { class: `reference ${side}` }, title,
        svg("rect", { class: "hit", x: middle - 14, width: 28, y: most, height: Math.max(least - most, 1) }),
        svg("line", { x1: middle, x2: middle, y1: least, y2: most }),
        svg("rect", { x: middle - 4, width: 8, y: upper, height: Math.max(lower - upper, 1), rx: 2 }),
        svg("line", { class: "median", x1: middle - 7, x2: middle + 7, y1: half, y2: half })),
      svg("text", { class: "tick", x: middle, y: bottom + 16, "text-anchor": "middle" }, name),
    ]; // prettier-ignore
  });

// The stretch of turns after which the alarm was on.
const alarmBars = (one, x, bottom, step) =>
  one.points.filter((point) => point.answer.alarm).map((point) => svg("rect", { class: "alarm-bar", x: x(point.turn) - step / 2, width: step, y: bottom - 4 + 0 * one.side, height: 4 }));

const line = (one, x, y) => {
  const settled = one.points.filter((point) => !point.answer.live);
  const live = one.points.find((point) => point.answer.live);
  const path = (points) => points.map((point, place) => `${place ? "L" : "M"}${x(point.turn).toFixed(1)} ${y(point.value).toFixed(1)}`).join("");
  const name = one.side === CAPPED ? "second" : "first";
  return [
    svg("path", { class: `line ${name}`, d: path(settled) }),
    live && settled.length ? svg("path", { class: `line ${name} coming`, d: path([settled.at(-1), live]) }) : null,
  ].filter(Boolean);
};

const mark = (point, px, py, turns, several, onpick) => {
  const { answer, turn, side, value } = point;
  const capped = answer.cap !== null;
  const size = turns > 24 ? 3 : 5;
  const said = words(point, several);
  const shape = capped
    ? svg("rect", { class: "dot", x: px - size, y: py - size, width: 2 * size, height: 2 * size, transform: `rotate(45 ${px} ${py})` })
    : svg("circle", { class: "dot", cx: px, cy: py, r: size });
  const show = (event) => showTip(said, event.currentTarget.getBoundingClientRect());
  const pick = () => onpick(turn, side);
  return svg(
    "g",
    {
      class: `point ${capped ? "capped" : "plain"}${answer.live ? " live" : ""}${answer.raised ? " raised" : ""}`,
      role: "button", "aria-label": said.join(", "), "data-turn": turn, "data-side": side, "data-value": value.toFixed(2),
      onpointerenter: show, onpointerleave: hideTip, onfocus: show, onblur: hideTip, onclick: pick,
      onkeydown: (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), pick()),
    },
    svg("circle", { class: "hit", cx: px, cy: py, r: 14 }),
    answer.raised && svg("circle", { class: "ring", cx: px, cy: py, r: 10 }),
    answer.raised && svg("text", { class: "alarm-name", x: px, y: py + (py > 48 ? -16 : 26), "text-anchor": "middle" }, "alarm"),
    shape,
  ); // prettier-ignore
};

const words = ({ answer, turn, value }, several) => [
  `Answer ${turn + 1}${several || answer.cap ? `, ${answer.cap ? `cap “${answer.cap}”` : "as it is"}` : ""}`,
  answer.live ? `${fixed(value)} so far` : `projection ${fixed(value)}${answer.z === null ? "" : `, z ${signed(answer.z)}`}`,
  ...(answer.fired === null ? [] : [`the cap acted on ${percent(answer.fired)} of tokens × layers`]),
  ...(answer.raised ? ["the drift alarm was raised here"] : answer.alarm ? ["the drift alarm is on"] : []),
];

// The same as a table, for reading aloud and for copying.
export const chartTable = (series, several) => {
  const head = el("tr", {}, ...["answer", ...(several ? ["side"] : []), "projection", "z", "cap acted", "alarm"].map((name) => el("th", { scope: "col" }, name)));
  const rows = series.flatMap((one) => one.points.filter((point) => one.side === 0 || !point.shared).map((point) => ({ ...point, side: one.side })));
  rows.sort((a, b) => a.turn - b.turn || a.side - b.side);
  const cells = ({ answer, turn, value }) => [
    el("th", { scope: "row" }, String(turn + 1)),
    ...(several ? [el("td", { class: "text" }, answer.cap ?? "as it is")] : []),
    ...[fixed(value), answer.z === null ? "–" : signed(answer.z), percent(answer.fired), answer.raised ? "raised" : answer.alarm ? "on" : "–"].map((text) => el("td", {}, text)),
  ];
  return el("table", { class: "plain" }, el("thead", {}, head), el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells(row)))));
};
