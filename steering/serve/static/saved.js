// Conversations as files: OpenAI's form, with measurements under "personatlas". What is read is checked field by field and built
// anew, so that a file can bring in nothing but text and numbers.

import { historyOf, isSplit, newAnswer, newConversation, BASELINE } from "./conversation.js";
import { checkedPersona, finite, storedPersona } from "./persona.js";

export const MAX_BYTES = 8 * 1024 * 1024; // bytes of a file
const MAX_CHARACTERS = 400000; // characters of a message
const MAX_MESSAGES = 2000; // messages
const ROLES = {
  system: "system",
  developer: "system",
  user: "user",
  human: "user",
  prompter: "user",
  assistant: "assistant",
  gpt: "assistant",
  bot: "assistant",
  model: "assistant",
  chatgpt: "assistant",
};

export class FileError extends Error {}

// ---- writing

// `messages` is what a model would read; of two answers side by side the baseline.
export const toSaved = (conversation, axis, now = new Date()) => ({
  messages: historyOf(conversation, BASELINE).messages,
  personatlas: {
    format: 1,
    saved: now.toISOString(),
    ...originOf(axis),
    baseline: axis.baseline,
    compared: conversation.turns.some(isSplit),
    system: conversation.system,
    turns: conversation.turns.map((turn) => ({ user: turn.user, kept: turn.kept, run: turn.run, answers: turn.answers.map(toAnswer) })),
  },
});

const originOf = (axis) => ({ model: axis.model.id, fingerprint: axis.model.fingerprint ?? null, layer: axis.layer, poles: axis.poles });

const toAnswer = (answer) => {
  const { text, tokens, arm, mode, seed, problem } = answer;
  const ended = answer.live ? "you" : answer.ended; // as if it had been stopped here
  return { content: text, cap: arm, mode, seed, ...storedPersona(answer), ended, problem, per_token: tokens };
};

// ---- reading

// The conversation of a file's text, and a remark where some of it is left out.
export const fromSaved = (text, axis) => {
  let content;
  try {
    content = JSON.parse(text.replace(/^\uFEFF/, ""));
  } catch {
    throw new FileError("This file is not JSON.");
  }
  if (Array.isArray(content) && content.length && !isMessage(content[0])) {
    if (content.length > 1) throw new FileError(`This file holds ${content.length} conversations; the page shows one. Take one out of it.`);
    content = content[0];
  }
  const rows = Array.isArray(content) ? content : (content?.messages ?? content?.conversations);
  if (!Array.isArray(rows)) throw new FileError('This file is no conversation: {"messages": [{"role", "content"}]} is needed.');
  if (rows.length > MAX_MESSAGES) throw new FileError(`This file holds ${rows.length} messages; at most ${MAX_MESSAGES} are read.`);
  const messages = rows.map(message);
  const stored = content.personatlas;
  if (!stored || stored.format !== 1 || !Array.isArray(stored.turns)) return { conversation: fromMessages(messages), remark: null };
  return withStored(messages, stored, axis);
};

const withStored = (messages, stored, axis) => {
  const conversation = newConversation();
  conversation.system = string(stored.system ?? "", "the system prompt");
  conversation.turns = list(stored.turns, "turns").map(turn);
  conversation.run = Math.max(0, ...conversation.turns.map((one) => one.run));
  const same = JSON.stringify(historyOf(conversation, BASELINE).messages) === JSON.stringify(messages);
  if (!same)
    return {
      conversation: fromMessages(messages),
      remark: "The messages of this file were changed after it was saved, so its stored projections are left out.",
    };
  const origin = originOf(axis);
  const here = ["fingerprint", "layer"].every((name) => stored[name] === origin[name]) && String(stored.poles) === String(origin.poles);
  if (!here) {
    const where = `${string(stored.model ?? "another model", "the model")}, layer ${finite(stored.layer) ?? "?"}`;
    return { conversation: fromMessages(messages), remark: `Saved with ${where}: its projections lie on another axis and are left out.` };
  }
  return { conversation, remark: null };
};

const isMessage = (value) => value !== null && typeof value === "object" && ("role" in value || "from" in value);

const message = (value, index) => {
  const where = `message ${index + 1}`;
  if (!isMessage(value)) throw new FileError(`${where} has no role.`);
  const speaker = value.role ?? value.from;
  if (typeof speaker !== "string" || !Object.hasOwn(ROLES, speaker))
    throw new FileError(`${where}: its role is not one of ${Object.keys(ROLES).join(", ")}.`);
  return { role: ROLES[speaker], content: string(value.content ?? value.value, where) };
};

const fromMessages = (messages) => {
  const conversation = newConversation();
  for (const [index, { role, content }] of messages.entries()) {
    const last = conversation.turns.at(-1);
    if (role === "system") {
      if (index > 0)
        throw new FileError(`message ${index + 1} is a system prompt after the beginning; the page has one, at the beginning.`);
      conversation.system = content;
    } else if (role === "user") conversation.turns.push({ user: content, answers: [], kept: null, run: 0 });
    else {
      const answer = newAnswer({ text: content, ended: "stop" });
      if (last && !last.answers.length) last.answers.push(answer);
      else conversation.turns.push({ user: null, answers: [answer], kept: null, run: 0 });
    }
  }
  if (!conversation.turns.some((one) => one.user !== null)) throw new FileError("This file has no message of a user.");
  return conversation;
};

const turn = (value) => {
  const answers = list(value?.answers ?? [], "answers").map(answerOf);
  if (answers.length > 2) throw new FileError("A turn of this file has more than two answers.");
  const kept = answers.length > 1 && (value.kept === 0 || value.kept === 1) ? value.kept : null;
  return {
    user: value.user === null ? null : string(value.user, "a message"),
    answers,
    kept,
    run: Number.isInteger(value.run) && value.run >= 0 ? value.run : 0,
  };
};

const answerOf = (value) => {
  if (value === null || typeof value !== "object") throw new FileError("An answer of this file is not an object.");
  return newAnswer({
    text: string(value.content, "an answer"),
    tokens: list(value.per_token ?? [], "tokens").map(tokenOf),
    arm: value.cap === null || value.cap === undefined ? null : string(value.cap, "an arm’s name"),
    mode: value.mode === "adaptive" ? "adaptive" : "always",
    seed: Number.isInteger(value.seed) ? value.seed : null,
    ...checkedPersona(value),
    ended: ["stop", "length", "you"].includes(value.ended) ? value.ended : null,
    problem: typeof value.problem === "string" ? value.problem.slice(0, 500) : null,
  });
};

const tokenOf = (value) => ({
  text: string(value?.text, "a token"),
  projection: finite(value.projection),
  fired: finite(value.fired) ?? 0,
});
const list = (value, name) => {
  if (!Array.isArray(value)) throw new FileError(`The ${name} of this file are not a list.`);
  return value;
};
const string = (value, where) => {
  if (typeof value !== "string") throw new FileError(`${where} is not text.`);
  if (value.length > MAX_CHARACTERS) throw new FileError(`${where} has ${value.length} characters; at most ${MAX_CHARACTERS} are read.`);
  return value;
};

// ---- the browser's own memory

const KEY = "personatlas.conversation";

export const remember = (conversation, axis) => {
  try {
    localStorage.setItem(KEY, JSON.stringify(toSaved(conversation, axis)));
    return true;
  } catch {
    return false; // storage is full or forbidden: the page goes on without it
  }
};
export const forget = () => {
  try {
    localStorage.removeItem(KEY);
  } catch {
    // nothing was kept
  }
};
export const remembered = (axis) => {
  try {
    const text = localStorage.getItem(KEY);
    return text === null ? { conversation: null, remark: null } : fromSaved(text, axis);
  } catch {
    return { conversation: null, remark: null };
  }
};

// Preferences, kept from visit to visit.
export const choice = (name, fallback = null) => {
  try {
    return localStorage.getItem(`personatlas.${name}`) ?? fallback;
  } catch {
    return fallback;
  }
};
export const choose = (name, value) => {
  try {
    localStorage.setItem(`personatlas.${name}`, value);
  } catch {
    // the preference lasts as long as the page
  }
};
