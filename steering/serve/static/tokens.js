// An answer's tokens: one span each, its colour from a fixed scale, so that the same shade means the same place in every answer.

import { el, fixed, hideTip, showTip, signed } from "./dom.js";
import { at } from "./chart.js";

const DEEPEST = 62; // percent of the side's colour at either end

// The middle is the baseline's mean. Either end is as far from it as the outermost of: the lower quartile of answers under roles,
// the default's 5 and 95%. Both sides have one reach, so that equal depth is equal distance.
export const scaleOf = (axis) => {
  const { quantiles, baseline } = axis;
  const places = quantiles ? [at(axis, quantiles.roles, 0.25), at(axis, quantiles.default, 0.05), at(axis, quantiles.default, 0.95)] : [];
  const middle = baseline?.mean ?? 0;
  const reach = Math.max(...places.map((place) => Math.abs(place - middle)), baseline ? 2 * baseline.spread : 0) || 1;
  return { middle, reach, low: middle - reach, high: middle + reach, axis };
};

const spanOf = (token, scale) => {
  const span = el("span", { class: token.fired ? "t fired" : "t" }, token.text);
  if (token.projection !== null) {
    const away = Math.min(Math.max((token.projection - scale.middle) / scale.reach, -1), 1);
    span.style.setProperty("--side", away < 0 ? "var(--others)" : "var(--positive)");
    span.style.setProperty("--depth", `${Math.round(Math.abs(away) * DEEPEST)}%`);
  }
  return span;
};

// Text of an answer into a box. Tokens are used where they spell the text; otherwise the text stands alone.
export const fillTokens = (box, answer, scale) => {
  const spelled = answer.tokens.length > 0 && answer.tokens.map((token) => token.text).join("") === answer.text;
  if (!spelled) {
    box.replaceChildren(answer.text);
    box.tokens = null;
    return;
  }
  // while it streams only the new ones are added
  const before = box.tokens && answer.tokens.length >= box.tokens.length && box.tokens.first === answer.tokens[0] ? box.tokens.length : 0;
  if (before === 0) box.replaceChildren();
  box.append(...answer.tokens.slice(before).map((token) => spanOf(token, scale)));
  box.tokens = { first: answer.tokens[0], length: answer.tokens.length };
  box.answer = answer;
};

const tell = (box, span, layersOf, scale) => {
  const place = [...box.children].indexOf(span);
  const token = box.answer?.tokens[place];
  if (!token || token.projection === null) return null;
  const { baseline } = scale.axis;
  const z = baseline ? `, z ${signed((token.projection - baseline.mean) / baseline.spread)}` : "";
  const lines = [`projection ${fixed(token.projection)}${z}`];
  if (token.fired) {
    const all = layersOf(box.answer.cap);
    lines.push(`changed by the cap at ${token.fired}${all ? ` of ${all}` : ""} layer${token.fired === 1 && !all ? "" : "s"}`);
  }
  showTip(lines, span.getClientRects()[0] ?? span.getBoundingClientRect());
  return lines;
};

// Pointing at a token shows its numbers; in a focused answer the arrow keys go from token to token.
export const watchTokens = (root, layersOf, scale, speak) => {
  let current = null;
  const leave = () => {
    current?.classList.remove("here");
    current = null;
    hideTip();
  };
  root.addEventListener("pointerover", (event) => {
    const span = event.target.closest?.(".t");
    if (!span) return hideTip();
    tell(span.parentElement, span, layersOf, scale);
  });
  root.addEventListener("pointerleave", hideTip);
  root.addEventListener("focusout", leave);
  root.addEventListener("keydown", (event) => {
    const box = event.target.closest?.(".tokens");
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!box || step === undefined || !box.tokens || event.altKey || event.metaKey || event.ctrlKey) return;
    event.preventDefault();
    const spans = [...box.children].filter((span) => span.textContent !== "");
    const here = spans.indexOf(current);
    const next = spans[Math.min(Math.max(here < 0 ? (step > 0 ? 0 : spans.length - 1) : here + step, 0), spans.length - 1)];
    leave();
    if (!next) return;
    current = next;
    next.classList.add("here");
    next.scrollIntoView({ block: "nearest" });
    const lines = tell(box, next, layersOf, scale);
    if (lines) speak(`${next.textContent.trim() || "space"}: ${lines.join(", ")}`);
  });
};

export const scaleLegend = (scale) => {
  const { poles } = scale.axis;
  return [
    el("i", { role: "img", "aria-label": `Colours run from ${fixed(scale.low, 0)} (${poles[1]}) over ${fixed(scale.middle, 0)} to ${fixed(scale.high, 0)} (${poles[0]})` }),
    el("p", { class: "scale-words" }, el("span", {}, `${fixed(scale.low, 0)} ${poles[1]}`), el("span", {}, fixed(scale.middle, 0)), el("span", {}, `${poles[0]} ${fixed(scale.high, 0)}`)),
    el("p", { class: "note" }, "Each token’s projection before the cap’s step. ", el("span", { class: "t fired sample" }, "Underlined"), ": changed by the cap at one layer or more."),
  ];
};
