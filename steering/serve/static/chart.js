// The trajectory as SVG: answers along x, projection along y (up is toward the first pole).
//
//   const chart = newChart(box, { onpick: (turn, side) => … });
//   chart.draw(trajectories(conversation), axis, floor);

import { el, fixed, hideTip, percent, showTip, signed, svg } from "./dom.js";
import { CAPPED, meanAt } from "./conversation.js";

export const BAND = 2; // spreads on either side of the baseline's mean
const MIN_TURNS = 6; // answers that an empty chart has room for

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
  if (axis.baseline) {
    const { mean, spread, by_turn: byTurn } = axis.baseline;
    for (const one of byTurn?.length ? byTurn : [mean]) values.push(one - BAND * spread, one + BAND * spread);
  }
  for (const name of ["roles", "default"]) if (hasQuantiles(axis, name)) values.push(quantileAt(axis, name, 0.05), quantileAt(axis, name, 0.95));
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (!Number.isFinite(low)) [low, high] = [-1, 1];
  const reach = high - low || 1;
  if (floor !== null && floor > low - reach / 2 && floor < high + reach / 2) [low, high] = [Math.min(low, floor), Math.max(high, floor)];
  return [low - 0.04 * (high - low || 1), high + 0.05 * (high - low || 1)];
};

// Whether the axis has quantiles of answers under roles, or of the default's.
export const hasQuantiles = ({ quantiles }, name) => quantiles?.[name]?.length > 0 && quantiles[name].every(Number.isFinite);

// A quantile of the axis at a level, or at the nearest one that it has.
export const quantileAt = (axis, name, level) => {
  const { levels, [name]: row } = axis.quantiles;
  let best = 0;
  for (const [place, one] of levels.entries()) if (Math.abs(one - level) < Math.abs(levels[best] - level)) best = place;
  return row[best];
};

const ticks = (low, high, most) => {
  const rough = (high - low) / most;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((times) => times * unit >= rough) * unit;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(Number(value.toPrecision(12)));
  return found;
};

const picture = (box, drawn, onpick) => {
  const { series, axis, floor } = drawn;
  const [width, height] = [box.clientWidth, box.clientHeight];
  const [low, high] = domain(drawn);
  const strips = hasQuantiles(axis, "roles") && hasQuantiles(axis, "default") && width >= 300;
  const [left, right, top, bottom] = [48, strips ? width - 80 : width - 12, 20, height - 22];
  const turns = Math.max(MIN_TURNS, ...series.flatMap((one) => one.points.map((point) => point.turn + 1)));
  const x = (turn) => left + ((right - left) * (turn + 0.5)) / turns;
  const y = (value) => bottom - 18 - ((bottom - 18 - top) * (value - low)) / (high - low); // room for the name of the lower pole
  const root = svg("svg", {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "group",
    "aria-label": "Projection of each answer; the arrow keys go from answer to answer, Enter to its text",
  });
  root.append(...grid(axis, { left, right, top, bottom, low, high, y, x, turns }));
  if (axis.baseline) root.append(...band(axis.baseline, { left, right, x, y, turns }));
  if (floor !== null) root.append(...floorLine(floor, series, { left, right, bottom, y, x, low, high }));
  if (strips) root.append(...reference(axis, right, bottom, y));
  for (const one of series) root.append(...alarmBars(one, x, bottom, (right - left) / turns));
  for (const one of series) root.append(...line(one, x, y));
  const points = series.flatMap((one) =>
    one.points.filter((point) => one.side === 0 || !point.shared).map((point) => ({ ...point, side: one.side })),
  );
  points.sort((a, b) => a.turn - b.turn || a.side - b.side);
  const placed = points.map((point) => [point, x(point.turn), y(point.value)]);
  for (const [point, px, py] of placed) if (point.answer.raised) root.append(...alarm(point, series, px, py, right));
  root.append(...placed.map(([point, px, py]) => mark(point, px, py, (right - left) / turns, series.length > 1, onpick)));
  return root;
};

const grid = (axis, { left, right, top, bottom, low, high, y, x, turns }) => {
  const every = Math.ceil(turns / Math.max(4, Math.floor((right - left) / 30)));
  const numbers = [...Array(turns).keys()].filter((turn) => turn % every === 0);
  const labels = ticks(low, high, Math.max(3, Math.floor((bottom - top) / 48)));
  return [
    ...labels.map((value) => svg("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) })),
    ...labels.map((value) => svg("text", { class: "tick", x: left - 8, y: y(value) + 4, "text-anchor": "end" }, fixed(value, 0))),
    ...numbers.map((turn) => svg("text", { class: "tick", x: x(turn), y: bottom + 16, "text-anchor": "middle" }, String(turn + 1))),
    svg("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }),
    svg("text", { class: "pole up", x: left, y: 12 }, `↑ ${axis.poles[0]}`),
    svg("text", { class: "pole down", x: left + 6, y: bottom - 9 }, `↓ ${axis.poles[1]}`),
    svg("text", { class: "tick", x: left - 8, y: bottom + 16, "text-anchor": "end" }, "answer"),
  ];
};

// The band follows the baseline's mean from answer to answer.
const band = (baseline, { left, right, x, y, turns }) => {
  const places = [...Array(turns).keys()].map((turn) => [x(turn), meanAt(baseline, turn)]);
  const all = [[left, meanAt(baseline, 0)], ...places, [right, meanAt(baseline, turns - 1)]];
  const edge = (shift) => all.map(([px, mean]) => `${px},${y(mean + shift)}`);
  const reach = BAND * baseline.spread;
  return [
    svg("polygon", { class: "band", points: [...edge(reach), ...edge(-reach).reverse()].join(" ") }),
    svg("polyline", { class: "mean", points: edge(0).join(" "), fill: "none" }),
  ];
};

const floorLine = (floor, series, { left, right, bottom, y, x, low, high }) => {
  if (floor < low || floor > high)
    return [
      svg(
        "text",
        { class: "floor-name", x: right - 4, y: floor < low ? bottom - 8 : 34, "text-anchor": "end" },
        `floor ${fixed(floor)}, outside`,
      ),
    ];
  const line = svg("line", { class: "floor", x1: left, x2: right, y1: y(floor), y2: y(floor) });
  // the label: at either end, above or below the line, where it hides the fewest points and labels of alarms
  const taken = series
    .flatMap((one) => one.points)
    .flatMap((point) => {
      const [px, py] = [x(point.turn), y(point.value)];
      const away = px + 48 < right ? 1 : -1;
      return [
        [px, py],
        ...(point.answer.raised
          ? [20, 40].flatMap((by) => [
              [px + away * by, py - 8],
              [px + away * by, py + 12],
            ])
          : []),
      ];
    });
  const places = [
    [right - 70, -14],
    [right - 70, 4],
    [left, -14],
    [left, 4],
  ].map(([from, shift]) => {
    const top = y(floor) + shift;
    const hidden = taken.filter(([px, py]) => px > from - 8 && px < from + 78 && py > top - 8 && py < top + 18).length;
    return { from, shift, hidden };
  });
  const best = places.reduce((one, other) => (other.hidden < one.hidden ? other : one));
  const side = best.from === left ? { x: left + 6 } : { x: right - 4, "text-anchor": "end" };
  return [line, svg("text", { class: "floor-name", ...side, y: y(floor) + (best.shift < 0 ? -5 : 14) }, `floor ${fixed(floor)}`)];
};

// Beside the plot, the distributions of the axis's own answers: 5 to 95% thin, the middle half thick, the median a line.
const reference = (axis, right, bottom, y) =>
  [
    ["roles", "others"],
    ["default", "positive"],
  ].flatMap(([name, side], place) => {
    const middle = right + 22 + 38 * place;
    const [least, lower, half, upper, most] = [0.05, 0.25, 0.5, 0.75, 0.95].map((level) => y(quantileAt(axis, name, level)));
    const title = svg(
      "title",
      {},
      `Answers ${name === "roles" ? "under role prompts" : "without a role"}: 5 to 95%, the middle half, the median`,
    );
    return [
      svg(
        "g",
        { class: `reference ${side}` },
        title,
        svg("rect", { class: "hit", x: middle - 14, width: 28, y: most, height: Math.max(least - most, 1) }),
        svg("line", { x1: middle, x2: middle, y1: least, y2: most }),
        svg("rect", { x: middle - 4, width: 8, y: upper, height: Math.max(lower - upper, 1), rx: 2 }),
        svg("line", { class: "median", x1: middle - 7, x2: middle + 7, y1: half, y2: half }),
      ),
      svg("text", { class: "tick", x: middle, y: bottom + 16, "text-anchor": "middle" }, name),
    ];
  });

// The turns after which the alarm was on.
const alarmBars = (one, x, bottom, step) =>
  one.points
    .filter((point) => point.answer.alarm)
    .map((point) => svg("rect", { class: "alarm-bar", x: x(point.turn) - step / 2, width: step, y: bottom - 4, height: 4 }));

const line = (one, x, y) => {
  const settled = one.points.filter((point) => !point.answer.live);
  const live = one.points.find((point) => point.answer.live);
  const path = (points) =>
    points.map((point, place) => `${place ? "L" : "M"}${x(point.turn).toFixed(1)} ${y(point.value).toFixed(1)}`).join("");
  const name = one.side === CAPPED ? "second" : "first";
  return [
    svg("path", { class: `line ${name}`, d: path(settled) }),
    live && settled.length ? svg("path", { class: `line ${name} coming`, d: path([settled.at(-1), live]) }) : null,
  ].filter(Boolean);
};

// A ring and a label beside the line: above right or below left of a falling line, the other way round for a rising one.
const alarm = (point, series, px, py, right) => {
  const before = series[point.side]?.points.findLast((one) => one.turn < point.turn);
  const falling = !before || before.value > point.value;
  const room = px + 48 < right;
  const label = { x: px + (room ? 13 : -13), y: py + (falling === room ? -7 : 16), "text-anchor": room ? "start" : "end" };
  return [svg("circle", { class: "ring", cx: px, cy: py, r: 10 }), svg("text", { class: "alarm-name", ...label }, "alarm")];
};

const mark = (point, px, py, step, several, onpick) => {
  const { answer, turn, side, value } = point;
  const capped = answer.arm !== null;
  const size = step < 14 ? 3 : 5;
  const lines = words(point, several);
  const shape = capped
    ? svg("rect", { class: "dot", x: px - size, y: py - size, width: 2 * size, height: 2 * size, transform: `rotate(45 ${px} ${py})` })
    : svg("circle", { class: "dot", cx: px, cy: py, r: size });
  const show = (event) => showTip(lines, event.currentTarget.getBoundingClientRect());
  const pick = () => onpick(turn, side);
  return svg(
    "g",
    {
      class: `point ${capped ? "capped" : "plain"}${answer.live ? " live" : ""}${answer.raised ? " raised" : ""}`,
      role: "button",
      "aria-label": lines.join(", "),
      "data-turn": turn,
      "data-side": side,
      "data-value": value.toFixed(2),
      onpointerenter: show,
      onpointerleave: hideTip,
      onfocus: show,
      onblur: hideTip,
      onclick: pick,
      onkeydown: (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), pick()),
    },
    svg("circle", { class: "hit", cx: px, cy: py, r: Math.min(Math.max(step / 2, 5), 14) }), // half the distance to the next point
    shape,
  );
};

const words = ({ answer, turn, value }, several) => [
  `Answer ${turn + 1}${several || answer.arm ? `, ${answer.arm ? `arm “${answer.arm}”` : "baseline"}` : ""}`,
  answer.live ? `${fixed(value)} so far` : `projection ${fixed(value)}${answer.z === null ? "" : `, z ${signed(answer.z)}`}`,
  ...(answer.fired === null ? [] : [`the arm acted on ${percent(answer.fired)} of tokens × layers`]),
  ...(answer.raised ? ["the drift alarm was raised here"] : answer.alarm ? ["the drift alarm is on"] : []),
];

// The same as a table, for screen readers and for copying.
export const chartTable = (series, several) => {
  const head = el(
    "tr",
    {},
    ...["answer", ...(several ? ["side"] : []), "projection", "z", "arm acted", "alarm"].map((name) => el("th", { scope: "col" }, name)),
  );
  const rows = series.flatMap((one) =>
    one.points.filter((point) => one.side === 0 || !point.shared).map((point) => ({ ...point, side: one.side })),
  );
  rows.sort((a, b) => a.turn - b.turn || a.side - b.side);
  const cells = ({ answer, turn, value }) => [
    el("th", { scope: "row" }, String(turn + 1)),
    ...(several ? [el("td", { class: "text" }, answer.arm ?? "baseline")] : []),
    ...[
      fixed(value),
      answer.z === null ? "–" : signed(answer.z),
      percent(answer.fired),
      answer.raised ? "raised" : answer.alarm ? "on" : "–",
    ].map((text) => el("td", {}, text)),
  ];
  return el("table", { class: "plain" }, el("thead", {}, head), el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells(row)))));
};
