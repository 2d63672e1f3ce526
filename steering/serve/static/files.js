// Saving and loading conversations: a download, a file picker, a file dropped on the page.

import { byId, el } from "./dom.js";
import { FileError, fromSaved, MAX_BYTES, toSaved } from "./saved.js";

export const download = (conversation, axis) => {
  const now = new Date();
  const blob = new Blob([JSON.stringify(toSaved(conversation, axis, now), null, 1)], { type: "application/json" });
  const link = el("a", {
    href: URL.createObjectURL(blob),
    download: `conversation-${now.toISOString().slice(0, 19).replace(/[:T]/g, "-")}.json`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

export const startFiles = (axis, { loaded, refused }) => {
  const take = async (file) => {
    if (!file) return;
    try {
      if (file.size > MAX_BYTES)
        throw new FileError(`This file has ${Math.round(file.size / 2 ** 20)} MiB; at most ${MAX_BYTES / 2 ** 20} are read.`);
      const { conversation, remark } = fromSaved(await file.text(), axis);
      loaded(conversation, remark);
    } catch (error) {
      if (!(error instanceof FileError) && error.name !== "NotReadableError") throw error;
      refused(error instanceof FileError ? error.message : "This file cannot be read.");
    }
  };
  byId("load").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => {
    take(byId("file").files[0]);
    byId("file").value = "";
  });
  const carriesFile = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && document.body.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    document.body.classList.remove("dropping");
    take(event.dataTransfer.files[0]);
  });
};
