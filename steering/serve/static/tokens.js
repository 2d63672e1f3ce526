// An answer's tokens: one span each, coloured on a fixed scale, so that a shade means the same projection in every answer.

import { el, fixed, hideTip, showTip, signed } from "./dom.js";
import { quantileAt, hasQuantiles } from "./chart.js";
import { zOf } from "./conversation.js";

const MAX_DEPTH = 62; // percent of the side's colour at either end

// The middle is the baseline's mean. Both ends are as far from it as the outermost of: the lowest tenth of answers under roles, the
// default's 5% and 95% (with the roles' lower quartile an answer under a role was one flat shade). Equal depth is equal distance.
export const scaleOf = (axis) => {
  const { baseline } = axis;
  const wanted = [
    ["roles", 0.1],
    ["default", 0.05],
    ["default", 0.95],
  ];
  const places = wanted.filter(([name]) => hasQuantiles(axis, name)).map(([name, level]) => quantileAt(axis, name, level));
  const middle = baseline?.mean ?? 0;
  const reach = Math.max(...places.map((place) => Math.abs(place - middle)), baseline ? 2 * baseline.spread : 0) || 1;
  return { middle, reach, low: middle - reach, high: middle + reach, axis };
};

const spanOf = (token, scale) => {
  const space = token.text.trim() === "" ? "" : token.text.match(/^\s*/)[0]; // stays bare, so that no colour hangs at a line's end
  const span = el("span", { class: token.fired ? "t fired" : "t" }, space, el("b", {}, token.text.slice(space.length)));
  if (token.projection !== null) {
    const away = Math.min(Math.max((token.projection - scale.middle) / scale.reach, -1), 1);
    span.style.setProperty("--side", away < 0 ? "var(--token-low)" : "var(--token-high)");
    span.style.setProperty("--depth", `${Math.round(Math.abs(away) * MAX_DEPTH)}%`);
  }
  return span;
};

// Fills a box with an answer. A token's projection is known only when the model has read it, so the last words may come before
// their colour; where the tokens do not spell the text, the text is shown without them.
export const fillTokens = (box, answer, scale) => {
  const { text, tokens } = answer;
  const spelled = tokens.map((token) => token.text).join("");
  const count = spelled !== "" && text.startsWith(spelled) ? tokens.length : 0;
  const shown = box.shown ?? { first: null, count: 0 };
  box.rest?.remove();
  const from = shown.first === tokens[0] && shown.count <= count ? shown.count : 0; // while it streams only what is new is added
  if (from === 0) box.replaceChildren();
  box.append(...tokens.slice(from, count).map((token) => spanOf(token, scale)));
  box.rest =
    count < tokens.length || spelled.length < text.length ? document.createTextNode(count ? text.slice(spelled.length) : text) : null;
  if (box.rest) box.append(box.rest);
  box.shown = { first: tokens[0], count };
  box.answer = answer;
};

const describeToken = (box, span, layersOf, scale) => {
  const place = [...box.children].indexOf(span);
  const token = box.answer?.tokens[place];
  if (!token) return null;
  const z = zOf(scale.axis, token.projection, box.answer.turn ?? null);
  const lines = [
    token.projection === null
      ? "not measured: the answer was cut here"
      : `projection ${fixed(token.projection)}${z === null ? "" : `, z ${signed(z)}`}`,
  ];
  if (token.fired) {
    const all = layersOf(box.answer.arm);
    lines.push(`changed by the arm at ${token.fired}${all ? ` of ${all}` : ""} layer${token.fired === 1 && !all ? "" : "s"}`);
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
    describeToken(span.parentElement, span, layersOf, scale);
  });
  root.addEventListener("pointerleave", hideTip);
  root.addEventListener("focusout", leave);
  root.addEventListener("keydown", (event) => {
    const box = event.target.closest?.(".tokens");
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!box || step === undefined || !box.shown?.count || event.altKey || event.metaKey || event.ctrlKey) return;
    event.preventDefault();
    const spans = [...box.children].filter((span) => span.textContent !== "");
    const here = spans.indexOf(current);
    const next = spans[Math.min(Math.max(here < 0 ? (step > 0 ? 0 : spans.length - 1) : here + step, 0), spans.length - 1)];
    leave();
    if (!next) return;
    current = next;
    next.classList.add("here");
    next.scrollIntoView({ block: "nearest" });
    const lines = describeToken(box, next, layersOf, scale);
    if (lines) speak(`${next.textContent.trim() || "space"}: ${lines.join(", ")}`);
  });
};

export const scaleLegend = (scale) => {
  const { poles } = scale.axis;
  return [
    el("i", {
      role: "img",
      "aria-label": `Colours run from ${fixed(scale.low, 0)} (${poles[1]}) over ${fixed(scale.middle, 0)} to ${fixed(scale.high, 0)} (${poles[0]})`,
    }),
    el(
      "p",
      { class: "scale-words" },
      el("span", {}, `${fixed(scale.low, 0)} ${poles[1]}`),
      el("span", {}, fixed(scale.middle, 0)),
      el("span", {}, `${poles[0]} ${fixed(scale.high, 0)}`),
    ),
    el(
      "p",
      { class: "note" },
      "Each token’s projection before the arm’s step. ",
      el("span", { class: "t fired sample" }, el("b", {}, "Underlined")),
      ": changed by the arm at one layer or more.",
    ),
  ];
};
