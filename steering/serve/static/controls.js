// The controls: arm, when it acts, comparison, sampling. Their state is in the fields alone.

import { byId, el } from "./dom.js";
import { ROLES } from "./examples.js";

const LIMITS = {
  temperature: ["Temperature", 0, 2],
  top_p: ["Top p", 0.01, 1],
  max_tokens: ["Longest answer", 1, Infinity],
  seed: ["Seed", 0, 2 ** 32 - 1],
};

export const isPressed = (id) => byId(id).getAttribute("aria-pressed") === "true";
export const press = (id, on) => byId(id).setAttribute("aria-pressed", String(on));

export const chosenArm = () => byId("arm").value || null;
export const chosenMode = () => (chosenArm() ? byId("mode").value : "always");

// Fills the header from the axis. `changed` runs after every choice.
export const startControls = (axis, changed) => {
  const arms = Object.entries(axis.arms ?? {});
  byId("model").textContent = axis.model.id;
  byId("model").title = `${axis.model.name}, ${axis.model.n_layers} layers, ${axis.dtype} on ${axis.device}`;
  document.title = `${axis.model.id} · personatlas`;
  byId("arm").append(...arms.map(([name, arm]) => el("option", { value: name, title: `layers ${arm.layers}` }, name)));
  byId("arm").disabled = byId("compare").disabled = arms.length === 0;
  if (!arms.length) byId("compare").title = byId("arm").title = "This server has no arm: start it with one to compare";
  byId("colours").hidden = axis.layer === null;
  if (axis.injected_system) byId("system").placeholder = `none of yours; the chat template adds: ${axis.injected_system}`;
  byId("arm").value = axis.default_arm ?? "";
  byId("mode").value = axis.default_mode ?? "always";
  const adaptive = byId("mode").querySelector('[value="adaptive"]');
  adaptive.disabled = !axis.alarm;
  if (!axis.alarm) adaptive.title = "needs an alarm calibrated on reference conversations";
  for (const id of ["temperature", "top_p", "max_tokens"]) byId(id).placeholder = axis[id] ?? "the server’s";
  const show = () => {
    byId("mode-label").hidden = !chosenArm();
    byId("how-now").textContent = summary();
    changed();
  };
  byId("arm").addEventListener("change", () => {
    if (!chosenArm()) press("compare", false);
    show();
  });
  byId("mode").addEventListener("change", show);
  byId("compare").addEventListener("click", () => {
    press("compare", !isPressed("compare"));
    if (isPressed("compare") && !chosenArm()) byId("arm").value = axis.default_arm ?? arms[0][0];
    show();
  });
  byId("colours").addEventListener("click", () => {
    press("colours", !isPressed("colours"));
    show();
  });
  for (const id of [...Object.keys(LIMITS), "system"]) byId(id).addEventListener("input", show);
  const fill = (text) => () => {
    byId("system").value = text;
    byId("system").dispatchEvent(new Event("input"));
    byId("system").focus();
  };
  byId("roles").append(
    ...ROLES.map(([name, text]) => el("button", { type: "button", class: "quiet", onclick: fill(text) }, name)),
    el("button", { type: "button", class: "quiet", onclick: fill("") }, "None"),
  );
  show();
};

const summary = () => {
  const parts = [];
  const system = byId("system").value.trim();
  if (system) parts.push(`“${system.length > 40 ? `${system.slice(0, 39)}…` : system}”`);
  for (const [id, [name]] of Object.entries(LIMITS)) if (byId(id).value !== "") parts.push(`${name.toLowerCase()} ${byId(id).value}`);
  return parts.length ? `: ${parts.join(", ")}` : "";
};

// The values of filled-in fields; throws a RangeError that says what is allowed. The seed is apart: every answer has one.
export const sampling = (axis) => {
  const found = {};
  for (const [id, [name, low, most]] of Object.entries(LIMITS)) {
    const field = byId(id);
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
