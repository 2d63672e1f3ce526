// The page: waits for the server's axis, then keeps one conversation and streams its answers.

import { newSeed, stream } from "./answering.js";
import { askForKey, findServer } from "./arrival.js";
import { chosenArm, chosenMode, isPressed, sampling, startControls } from "./controls.js";
import { addTurn, chooseSide, newAnswer, newConversation } from "./conversation.js";
import { loadDistress, showNotice, showsDistress } from "./distress.js";
import { byId, el, fixed, speak } from "./dom.js";
import { STARTERS } from "./examples.js";
import { download, startFiles } from "./files.js";
import { newPanel } from "./panel.js";
import { choice, choose, forget, remember, remembered } from "./saved.js";
import { startTheme } from "./theme.js";
import { scaleOf, watchTokens } from "./tokens.js";
import { newLog } from "./turns.js";

let axis, log, panel;
let conversation = newConversation();
let controller = null; // aborts the answers under way
let editing = false;

// ---- lines under the messages

const showLine = (text, action = null) => {
  const line = byId("line");
  line.hidden = !text;
  line.replaceChildren(text ?? "");
  if (action)
    line.append(" ", el("button", { type: "button", class: "quiet", onclick: () => (showLine(null), action.act()) }, action.name));
};

// ---- drawing: all turns when one is added or changed, and once a frame what a stream adds

const draw = () => {
  log.draw(conversation);
  byId("empty").hidden = conversation.turns.length > 0;
  byId("save").disabled = conversation.turns.length === 0;
  drawPanel();
};
const drawPanel = () => panel.draw(conversation, chosenArm());

const pending = new Set();
const changed = (answer) => {
  if (!pending.size) requestAnimationFrame(frame);
  pending.add(answer);
};
const frame = () =>
  keepScrolled(() => {
    for (const answer of pending) log.fill(answer);
    pending.clear();
    drawPanel();
  });

// Stays at the end for readers who are there; others keep their position.
const keepScrolled = (change) => {
  const box = byId("log");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  change();
  if (follows) box.scrollTop = box.scrollHeight;
};

const setBusy = (busy) => {
  document.body.classList.toggle("busy", busy);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("log").setAttribute("aria-busy", String(busy));
};

const storeConversation = () => {
  if (!byId("keep").checked) return;
  if (conversation.turns.length || conversation.system) remember(conversation, axis);
  else forget();
};

const notifyDistress = () => {
  showNotice(byId("notice"));
  foldChart();
};
// On a narrow page the chart is folded away for what needs its space.
const foldChart = () => matchMedia("(max-width: 56rem)").matches && toggle("strip", "panel-body", false);

// ---- asking

// One answer as set in the header, or two with one seed in a comparison.
const newAnswers = (seed) => {
  const capped = () => newAnswer({ arm: chosenArm(), mode: chosenMode(), seed });
  return isPressed("compare") ? [newAnswer({ seed }), capped()] : [capped()];
};

const ask = async (turn, answers) => {
  let settings;
  try {
    settings = sampling(axis);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return showLine(error.message);
  }
  showLine(null);
  controller = new AbortController();
  const own = controller;
  setBusy(true);
  draw();
  byId("log").scrollTop = byId("log").scrollHeight;
  const options = { axis, sampling: settings.sampling, signal: own.signal, changed };
  let outcomes = [];
  try {
    outcomes = await Promise.all(answers.map((answer) => stream(conversation, turn, answer, turn.answers.indexOf(answer), options)));
  } finally {
    if (controller === own) endAnswering();
  }
  if (!conversation.turns.includes(turn)) return; // another conversation has taken its place
  if (outcomes.includes("denied")) return askForKey(true).then(again);
  speak(
    answers
      .map(
        (answer) =>
          answer.problem ??
          `Answer complete${answer.projection === null ? "" : `, projection ${fixed(answer.projection)}`}${answer.raised ? ", the drift alarm was raised" : ""}.`,
      )
      .join(" "),
  );
};

const endAnswering = () => {
  controller = null;
  setBusy(false);
  keepScrolled(draw);
  storeConversation();
};

const currentSeed = () => {
  const value = byId("seed").value;
  return value === "" ? newSeed() : Number(value);
};

const send = async () => {
  const text = byId("say").value;
  if (!text.trim() || controller || !axis) return;
  try {
    sampling(axis);
  } catch (error) {
    return showLine(error.message);
  }
  if (showsDistress(text)) notifyDistress();
  if (editing) {
    conversation.turns.pop();
    stopEditing();
  }
  byId("say").value = "";
  resizeField();
  const turn = addTurn(conversation, text, isPressed("compare"));
  turn.answers = newAnswers(currentSeed());
  storeConversation();
  await ask(turn, turn.answers);
};

// Answers the last message again with a new seed and the header's settings. If that fails, the answer before stays.
const again = async () => {
  const turn = conversation.turns.at(-1);
  if (!turn || controller) return;
  const before = [turn.answers, turn.kept];
  turn.kept = null;
  turn.answers = newAnswers(newSeed());
  await ask(turn, turn.answers);
  const failed = turn.answers.find((answer) => answer.problem && answer.text === "");
  if (failed && before[0].some((answer) => answer.text !== "")) {
    [turn.answers, turn.kept] = before;
    draw();
    showLine(`${failed.problem} The answer before it is still here.`, { name: "Retry", act: again });
  }
};

const retry = async (turn, side) => {
  if (controller) return;
  const { arm, mode, seed } = turn.answers[side];
  turn.answers[side] = newAnswer({ arm, mode, seed });
  await ask(turn, [turn.answers[side]]);
};

const stop = () => controller?.abort();

// ---- editing the last message

const edit = () => {
  const last = conversation.turns.at(-1);
  if (!last || last.user === null || controller) return;
  editing = true;
  byId("editing").hidden = false;
  byId("say").value = last.user;
  resizeField();
  byId("say").focus();
};
const stopEditing = () => {
  editing = false;
  byId("editing").hidden = true;
};

// ---- another conversation

const replaceConversation = (next, message) => {
  stop();
  controller = null;
  setBusy(false);
  byId("notice").hidden = true; // it was about the conversation before
  const before = conversation;
  conversation = next;
  byId("system").value = next.system;
  byId("system").dispatchEvent(new Event("input"));
  stopEditing();
  draw();
  storeConversation();
  const undo = before.turns.length ? { name: "Undo", act: () => replaceConversation(before, null) } : null;
  showLine(message, message ? undo : null);
  if (conversation.turns.some((turn) => turn.user !== null && showsDistress(turn.user))) notifyDistress();
};

const load = (next, remark) => {
  replaceConversation(next, remark ?? (conversation.turns.length ? "Another conversation was loaded in place of yours." : null));
  byId("log").scrollTop = byId("log").scrollHeight;
};

const copy = async (answer, button) => {
  try {
    await navigator.clipboard.writeText(answer.text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed by the browser";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
};

const goTo = (turn) => {
  const article = byId(`turn-${turn}`);
  article?.scrollIntoView({ block: "start" });
  article?.focus({ preventScroll: true });
  article?.classList.add("found");
  setTimeout(() => article?.classList.remove("found"), 1400);
};

// ---- the field and the keys

const resizeField = () => {
  const field = byId("say");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight / 3)}px`;
};

const escape = () => {
  if (controller) return stop();
  if (editing) {
    byId("say").value = "";
    resizeField();
    return stopEditing();
  }
  toggle("menu", "actions", false);
};

const toggle = (button, target, open) => {
  byId(button).setAttribute("aria-expanded", String(open));
  byId(target).classList.toggle("open", open);
};

const startKeys = () => {
  byId("form").addEventListener("submit", (event) => (event.preventDefault(), send()));
  byId("say").addEventListener("input", resizeField);
  byId("say").addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) (event.preventDefault(), send());
    if (event.key === "ArrowUp" && byId("say").value === "") (event.preventDefault(), edit());
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("ask-key").open) escape();
    if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) (event.preventDefault(), byId("say").focus());
  });
  byId("stop").addEventListener("click", stop);
  byId("how").addEventListener("toggle", () => byId("how").open && foldChart());
  for (const [button, target] of [
    ["menu", "actions"],
    ["strip", "panel-body"],
  ]) {
    byId(button).addEventListener("click", () => toggle(button, target, byId(button).getAttribute("aria-expanded") !== "true"));
  }
  byId("table-toggle").addEventListener("click", () => {
    byId("table").hidden = !byId("table").hidden;
    byId("table-toggle").setAttribute("aria-expanded", String(!byId("table").hidden));
    byId("table-toggle").textContent = byId("table").hidden ? "Show as a table" : "Hide the table";
  });
};

const startKeeping = () => {
  byId("keep").checked = choice("keep", "yes") === "yes";
  byId("keep").addEventListener("change", () => {
    choose("keep", byId("keep").checked ? "yes" : "no");
    if (byId("keep").checked) storeConversation();
    else forget();
  });
  const empty = () =>
    replaceConversation(newConversation(), conversation.turns.length ? "A new conversation. The one before is gone from this page." : null);
  byId("clear").addEventListener("click", () => (empty(), forget()));
  byId("new").addEventListener("click", () => (empty(), byId("say").focus()));
  addEventListener("pagehide", storeConversation); // also in the middle of an answer
  byId("save").addEventListener("click", () => download(conversation, axis));
};

const startEmpty = () => {
  const begin = (text) => () => {
    byId("say").value = text;
    resizeField();
    byId("say").focus();
  };
  byId("empty").replaceChildren(
    el(
      "p",
      { class: "lead" },
      `Talk with ${axis.model.id}${axis.layer === null ? "" : ` and see where its answers lie between “${axis.poles[1]}” and “${axis.poles[0]}”`}.`,
    ),
    el(
      "p",
      { class: "note" },
      "Begin with a message of your own or with one of these. Compare answers each message twice, at baseline and in the chosen arm: two conversations side by side with the same messages, each with its own history.",
    ),
    el(
      "div",
      { class: "starters" },
      ...STARTERS.map(([name, text]) => el("button", { type: "button", onclick: begin(text) }, el("small", {}, name), text)),
    ),
  );
};

const start = async () => {
  startTheme();
  startKeys();
  toggle("strip", "panel-body", innerHeight >= 700);
  loadDistress().catch(() => showLine("The list of phrases of distress could not be loaded."));
  axis = await findServer(showLine);
  showLine(null);
  const scale = scaleOf(axis);
  const actions = { edit, again, retry, copy, keep: (side) => (chooseSide(conversation, side), draw(), storeConversation(), byId("say").focus()) };
  log = newLog(byId("turns"), scale, actions);
  panel = newPanel(axis, scale, goTo);
  watchTokens(byId("turns"), (arm) => countLayers(axis.arms?.[arm]?.layers), scale, speak);
  startEmpty();
  const { conversation: known, remark } = remembered(axis);
  conversation = known ?? newConversation();
  byId("system").value = conversation.system;
  startKeeping();
  startControls(axis, () => {
    conversation.system = byId("system").value;
    byId("log").classList.toggle("coloured", isPressed("colours"));
    if (byId("scale")) byId("scale").hidden = !isPressed("colours");
    drawPanel();
    storeConversation();
  });
  startFiles(axis, { loaded: load, refused: (message) => showLine(message) });
  byId("send").disabled = false;
  draw();
  showLine(remark);
  if (conversation.turns.length) byId("log").scrollTop = byId("log").scrollHeight;
  if (conversation.turns.some((turn) => turn.user !== null && showsDistress(turn.user))) notifyDistress();
  if (matchMedia("(hover: hover)").matches) byId("say").focus(); // on a phone the keyboard would cover the page
};

// The number of layers in "8-26" or "3, 5, 8-10"; null where it cannot be counted.
const countLayers = (layers) => {
  if (typeof layers !== "string") return null;
  let count = 0;
  for (const part of layers.split(",")) {
    const [first, last = first] = part.trim().split("-").map(Number);
    if (!Number.isInteger(first) || !Number.isInteger(last)) return null;
    count += last - first + 1;
  }
  return count;
};

start();
