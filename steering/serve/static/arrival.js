// Arriving: the server may not be there yet, and may want a key.

import { getAxis, setKey } from "./api.js";
import { at } from "./dom.js";

const AGAIN = 2000; // milliseconds between two looks for the server

// A key must be given: without one the page can do nothing, so Escape does not close the question.
export const askForKey = (wrong) => {
  at("key-wrong").hidden = !wrong;
  at("key-wrong").textContent = wrong ? "The server does not take this key." : "";
  const dialog = at("ask-key");
  if (!dialog.open) dialog.showModal();
  // Escape as a key, since a browser lets a second one close the dialog whatever is said to "cancel"
  dialog.onkeydown = (event) => {
    if (event.key === "Escape") event.preventDefault();
  };
  dialog.oncancel = (event) => event.preventDefault();
  return new Promise((done) => {
    at("key-form").addEventListener("submit", () => (setKey(at("key").value), done()), { once: true });
  });
};

// The server's axis, as soon as there is one. `showLine` says why there is none yet.
export const findServer = async (showLine) => {
  for (let asked = false; ;) {
    try {
      return await getAxis();
    } catch (error) {
      if (error.status === 401) {
        await askForKey(asked);
        asked = true;
        continue;
      }
      at("model").textContent = "waiting for the server";
      showLine(`${error.message} Trying again every two seconds.`);
      await new Promise((done) => setTimeout(done, AGAIN));
    }
  }
};
