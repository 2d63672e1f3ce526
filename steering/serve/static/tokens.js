// An answer's tokens: one span each, coloured on a fixed scale, so that a shade means the same projection in every answer.

import { el, fixed, hideTip, showTip, signed } from "./dom.js";
import { quantileAt, hasQuantiles } from "./chart.js";
import { zOf } from "./conversation.js";
import { blocksOf } from "./markdown.js";

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

// A token, or the part of it that lies in a piece.
const spanOf = (token, text, scale) => {
  const space = text.trim() === "" ? "" : text.match(/^\s*/)[0]; // stays bare, so that no colour hangs at a line's end
  const span = el("span", { class: token.fired ? "t fired" : "t" }, space, el("b", {}, text.slice(space.length)));
  span.token = token;
  if (token.projection === null) span.classList.add("unread");
  else {
    const away = Math.min(Math.max((token.projection - scale.middle) / scale.reach, -1), 1);
    span.style.setProperty("--side", away < 0 ? "var(--token-low)" : "var(--token-high)");
    span.style.setProperty("--depth", `${Math.round(Math.abs(away) * MAX_DEPTH)}%`);
  }
  return span;
};

// Fills a box with an answer as Markdown, its tokens laid into the blocks. Marks stay in the page and are hidden unless tokens are
// coloured. A token's projection is known only when the model has read it, so the last words may come before their colour; where
// the tokens do not spell the text, the text is shown without them. While an answer streams, blocks that are whole stay as they are.
export const fillTokens = (box, answer, scale) => {
  const { text, tokens } = answer;
  const spelled = tokens.map((token) => token.text).join("");
  const known = spelled !== "" && text.startsWith(spelled) ? spelled.length : 0;
  const offsets = [0];
  for (const token of known ? tokens : []) offsets.push(offsets.at(-1) + token.text.length);
  const blocks = blocksOf(text);
  const keys = blocks.map((block) => `${block.kind} ${Math.min(known, block.end)} ${text.slice(block.start, block.end)}`);
  const shown = box.shown && box.shown.first === tokens[0] ? box.shown.keys : [];
  let same = 0;
  while (same < keys.length && keys[same] === shown[same]) same += 1;
  while (box.childNodes.length > same) box.lastChild.remove();
  let next = 0; // the token that the next piece begins in
  const nodesOf = (start, end) => {
    const nodes = [];
    while (next < offsets.length - 1 && offsets[next + 1] <= start) next += 1;
    for (let at = next; at < offsets.length - 1 && offsets[at] < end; at += 1)
      nodes.push(spanOf(tokens[at], text.slice(Math.max(offsets[at], start), Math.min(offsets[at + 1], end)), scale));
    if (end > known) nodes.push(text.slice(Math.max(known, start), end));
    return nodes;
  };
  box.append(...blocks.slice(same).map((block) => blockOf(block, nodesOf)));
  box.shown = { first: tokens[0], keys };
  box.answer = answer;
};

const blockOf = ({ kind, level, bullet, pieces }, nodesOf) => {
  const inside = pieces.map(({ start, end, style }) => {
    const nodes = nodesOf(start, end);
    if (style === "mark") return [el("span", { class: "mark" }, ...nodes)];
    for (const name of style.split(" ").filter(Boolean).reverse()) nodes.splice(0, nodes.length, el(name, {}, ...nodes));
    return nodes;
  });
  const name = `block ${kind}${bullet ? " bullet" : ""}`;
  const block = el(kind === "code" ? "pre" : "div", { class: name, dir: kind === "code" ? "ltr" : "auto" }, ...inside.flat());
  if (kind === "heading") block.setAttribute("role", "heading"), block.setAttribute("aria-level", 3);
  if (level) block.style.setProperty("--level", level);
  return block;
};

const describeToken = (box, span, layersOf, scale) => {
  const { token } = span;
  const z = zOf(scale.axis, token.projection, box.answer.turn ?? null);
  const lines = [
    token.projection === null
      ? `no projection: the answer ${box.answer.ended === "you" ? "was stopped" : "reached its longest length"} here, and the model never read this token`
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
    if (!span?.token) return hideTip();
    describeToken(span.closest(".tokens"), span, layersOf, scale);
  });
  root.addEventListener("pointerleave", hideTip);
  root.addEventListener("focusout", leave);
  root.addEventListener("keydown", (event) => {
    const box = event.target.closest?.(".tokens");
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!box || step === undefined || !box.querySelector(".t") || event.altKey || event.metaKey || event.ctrlKey) return;
    event.preventDefault();
    const parts = [...box.querySelectorAll(".t")].filter((span) => span.getClientRects().length); // marks may be hidden
    const spans = parts.filter((span, place) => span.token !== parts[place - 1]?.token);
    const here = spans.indexOf(current);
    const next = spans[Math.min(Math.max(here < 0 ? (step > 0 ? 0 : spans.length - 1) : here + step, 0), spans.length - 1)];
    leave();
    if (!next) return;
    current = next;
    next.classList.add("here");
    next.scrollIntoView({ block: "nearest" });
    const lines = describeToken(box, next, layersOf, scale);
    if (lines) speak(`${next.token.text.trim() || "space"}: ${lines.join(", ")}`);
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
      ": changed by the arm at one layer or more. ",
      el("span", { class: "t unread sample" }, el("b", {}, "Dotted")),
      ": written last and never read by the model, so without a projection.",
    ),
  ];
};
