// What answers: cap, when it acts, both side by side, sampling. Reads the fields; keeps no state of its own beside them.

import { at, el } from "./dom.js";
import { ROLES } from "./examples.js";

const LIMITS = {
  temperature: ["Temperature", 0, 2],
  top_p: ["Top p", 0.01, 1],
  max_tokens: ["Most tokens", 1, Infinity],
  seed: ["Seed", 0, 2 ** 32 - 1],
};

export const isPressed = (id) => at(id).getAttribute("aria-pressed") === "true";
export const press = (id, on) => at(id).setAttribute("aria-pressed", String(on));

export const chosenCap = () => at("cap").value || null;
export const chosenMode = () => (chosenCap() ? at("mode").value : "always");

// Fills the header from the axis. `changed` runs after every choice.
export const startControls = (axis, changed) => {
  const caps = Object.entries(axis.caps ?? {});
  at("model").textContent = axis.model.id;
  at("model").title = `${axis.model.name}, ${axis.model.n_layers} layers, ${axis.dtype} on ${axis.device}`;
  document.title = `${axis.model.id} · personatlas`;
  at("cap").append(...caps.map(([name, cap]) => el("option", { value: name, title: `layers ${cap.layers}` }, name)));
  at("cap").disabled = at("compare").disabled = caps.length === 0;
  if (!caps.length) at("compare").title = at("cap").title = "This server has no cap: start it with one to compare";
  at("cap").value = axis.default_cap ?? "";
  at("mode").value = axis.default_mode ?? "always";
  const adaptive = at("mode").querySelector('[value="adaptive"]');
  adaptive.disabled = !axis.alarm;
  if (!axis.alarm) adaptive.title = "needs an alarm calibrated on calm conversations";
  for (const id of ["temperature", "top_p", "max_tokens"]) at(id).placeholder = axis[id] ?? "the server’s";
  const show = () => {
    at("mode-label").hidden = !chosenCap();
    at("how-now").textContent = summary();
    changed();
  };
  at("cap").addEventListener("change", () => {
    if (!chosenCap()) press("compare", false);
    show();
  });
  at("mode").addEventListener("change", show);
  at("compare").addEventListener("click", () => {
    press("compare", !isPressed("compare"));
    if (isPressed("compare") && !chosenCap()) at("cap").value = axis.default_cap ?? caps[0][0];
    show();
  });
  at("colours").addEventListener("click", () => {
    press("colours", !isPressed("colours"));
    show();
  });
  for (const id of [...Object.keys(LIMITS), "system"]) at(id).addEventListener("input", show);
  const fill = (text) => () => {
    at("system").value = text;
    at("system").dispatchEvent(new Event("input"));
    at("system").focus();
  };
  at("roles").append(
    ...ROLES.map(([name, text]) => el("button", { type: "button", class: "quiet", onclick: fill(text) }, name)),
    el("button", { type: "button", class: "quiet", onclick: fill("") }, "None"),
  );
  show();
};

const summary = () => {
  const said = [];
  const system = at("system").value.trim();
  if (system) said.push(`“${system.length > 40 ? `${system.slice(0, 39)}…` : system}”`);
  for (const [id, [name]] of Object.entries(LIMITS)) if (at(id).value !== "") said.push(`${name.toLowerCase()} ${at(id).value}`);
  return said.length ? `: ${said.join(", ")}` : "";
};

// Fields that are filled in; throws a RangeError that says what is allowed. The seed is apart: every answer has one.
export const sampling = (axis) => {
  const found = {};
  for (const [id, [name, low, most]] of Object.entries(LIMITS)) {
    const field = at(id);
    if (field.value === "" && !field.validity.badInput) continue;
    const high = id === "max_tokens" ? (axis.max_tokens ?? most) : most;
    const value = Number(field.value);
    const whole = id === "max_tokens" || id === "seed";
    if (field.validity.badInput || !(value >= low && value <= high) || (whole && !Number.isInteger(value))) {
      throw new RangeError(`${name} must be a ${whole ? "whole number" : "number"} from ${low} to ${high}.`);
    }
    found[id] = value;
  }
  const { seed = null, ...rest } = found;
  return { seed, sampling: rest };
};
