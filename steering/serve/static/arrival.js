// Connecting: the server may not be up yet, and may require a key.

import { getAxis, setKey } from "./api.js";
import { byId } from "./dom.js";

const RETRY = 2000; // milliseconds between attempts

// Asks for the key. Escape does not close the dialog: without a key the page can do nothing.
export const askForKey = (wrong) => {
  byId("key-wrong").hidden = !wrong;
  byId("key-wrong").textContent = wrong ? "The server does not accept this key." : "";
  const dialog = byId("ask-key");
  if (!dialog.open) dialog.showModal();
  // the key too: browsers let a second Escape close the dialog whatever the handler of "cancel" does
  dialog.onkeydown = (event) => {
    if (event.key === "Escape") event.preventDefault();
  };
  dialog.oncancel = (event) => event.preventDefault();
  return new Promise((done) => {
    byId("key-form").addEventListener("submit", () => (setKey(byId("key").value), done()), { once: true });
  });
};

// The server's axis, once it answers; `showLine` says why it does not yet.
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
      byId("model").textContent = "waiting for the server";
      showLine(`${error.message} Trying again every two seconds.`);
      await new Promise((done) => setTimeout(done, RETRY));
    }
  }
};
