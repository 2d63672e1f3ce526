// Elements without markup: text becomes text nodes, never HTML, so that nothing from a model or a file can become a tag.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

// el("p", { class: "note", onclick: act }, "text", child): attributes by name, listeners by on…; null and false are left out
const build = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
};

export const el = (name, attributes = {}, ...children) => build(document.createElement(name), attributes, children);
export const svg = (name, attributes = {}, ...children) => build(document.createElementNS(SVG, name), attributes, children);

export const fixed = (value, digits = 1) => {
  if (value === null || value === undefined) return "–";
  const text = Math.abs(value).toFixed(digits);
  return value < 0 && Number(text) !== 0 ? `−${text}` : text;
};
export const signed = (value, digits = 1) =>
  value > 0 && Number(value.toFixed(digits)) !== 0 ? `+${fixed(value, digits)}` : fixed(value, digits);
export const percent = (share) =>
  share === null || share === undefined ? "–" : `${share > 0 && share < 0.005 ? "<1" : Math.round(100 * share)}%`;

// one tooltip for tokens and points; it never takes the pointer or the focus
export const showTip = (lines, box) => {
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((line) => el("span", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(box.left + box.width / 2 - width / 2, 8), innerWidth - width - 8);
  const above = box.top - height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above < 8 ? box.bottom + 8 : above}px`;
};
export const hideTip = () => {
  byId("tip").hidden = true;
};

export const speak = (text) => {
  byId("spoken").textContent = text;
};
