// Light or dark: the system's setting, or the one chosen here.

import { byId } from "./dom.js";
import { choice, choose } from "./saved.js";

const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

const name = () => {
  const other = isDark() ? "Light" : "Dark";
  byId("theme").textContent = other;
  byId("theme").setAttribute("aria-label", `Switch to ${other.toLowerCase()} colours`);
};

export const startTheme = () => {
  const chosen = choice("theme");
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    choose("theme", root.dataset.theme);
    name();
  });
  system.addEventListener("change", name);
  name();
};
