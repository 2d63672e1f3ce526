// Does a message speak of suicide or self-harm? The phrases and the notice are in distress.json, which Python reads too.

import { el } from "./dom.js";

let list = null;

export const loadDistress = async () => {
  const found = await (await fetch(new URL("distress.json", import.meta.url))).json();
  const read = (patterns, flags) => patterns.map((pattern) => new RegExp(pattern, flags));
  list = { except: read(found.except, "g"), patterns: read(found.patterns, ""), notice: found.notice };
};

export const showsDistress = (text) => {
  if (!list) return false;
  let plain = text
    .toLowerCase()
    .replace(/[\u2018\u2019\u02bc]/g, "'")
    .replace(/\s+/g, " ");
  for (const pattern of list.except) plain = plain.replace(pattern, " ");
  return list.patterns.some((pattern) => pattern.test(plain));
};

// Shows the notice above the message field; it blocks nothing and can be closed.
export const showNotice = (box) => {
  if (!box.hidden || !list) return;
  const { title, text } = list.notice;
  const close = el("button", { type: "button", class: "quiet", onclick: () => (box.hidden = true) }, "Close");
  box.replaceChildren();
  box.hidden = false; // the region before its words, so that screen readers announce them
  box.append(el("p", { class: "notice-title" }, title), ...text.map((line) => el("p", {}, line)), close);
};
