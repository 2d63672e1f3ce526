// Conversations as files: OpenAI's form, with what this page knows under "personatlas". Whatever is read is checked field by field
// and built anew, so that a file can bring in nothing but text and numbers.

import { historyOf, isSplit, newAnswer, newConversation, PLAIN } from "./conversation.js";

export const LARGEST = 8 * 1024 * 1024; // bytes of a file
const LONGEST = 400000; // characters of a message
const MOST = 2000; // messages
const SPEAKERS = {
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

// `messages` is what a model would read: where two answers stand side by side, the one as it is.
export const toSaved = (conversation, axis, now = new Date()) => ({
  messages: historyOf(conversation, PLAIN).messages,
  personatlas: {
    format: 1,
    saved: now.toISOString(),
    ...placeOf(axis),
    baseline: axis.baseline,
    compared: conversation.turns.some(isSplit),
    system: conversation.system,
    turns: conversation.turns.map((turn) => ({ user: turn.user, kept: turn.kept, run: turn.run, answers: turn.answers.map(toAnswer) })),
  },
});

const placeOf = (axis) => ({ model: axis.model.id, fingerprint: axis.model.fingerprint ?? null, layer: axis.layer, poles: axis.poles });

const toAnswer = (answer) => {
  const { text, tokens, cap, mode, acted, seed, projection, z, floor, fired, alarm, raised, drift, problem } = answer;
  const ended = answer.live ? "you" : answer.ended; // as if it had been stopped here
  return { content: text, cap, mode, acted, seed, projection, z, floor, fired, alarm, raised, drift, ended, problem, per_token: tokens };
};

// ---- reading

// The conversation of a file's text, and a line to show where something of it is not taken over.
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
  const told = Array.isArray(content) ? content : (content?.messages ?? content?.conversations);
  if (!Array.isArray(told)) throw new FileError('This file is no conversation: {"messages": [{"role", "content"}]} is needed.');
  if (told.length > MOST) throw new FileError(`This file holds ${told.length} messages; at most ${MOST} are read.`);
  const messages = told.map(message);
  const stored = content.personatlas;
  if (!stored || stored.format !== 1 || !Array.isArray(stored.turns)) return { conversation: fromMessages(messages), remark: null };
  return withStored(messages, stored, axis);
};

const withStored = (messages, stored, axis) => {
  const conversation = newConversation();
  conversation.system = string(stored.system ?? "", "the system prompt");
  conversation.turns = list(stored.turns, "turns").map(turn);
  conversation.run = Math.max(0, ...conversation.turns.map((one) => one.run));
  const same = JSON.stringify(historyOf(conversation, PLAIN).messages) === JSON.stringify(messages);
  if (!same)
    return {
      conversation: fromMessages(messages),
      remark: "The messages of this file were changed after it was saved, so its stored projections are left out.",
    };
  const place = placeOf(axis);
  const here = ["fingerprint", "layer"].every((name) => stored[name] === place[name]) && String(stored.poles) === String(place.poles);
  if (!here) {
    const where = `${string(stored.model ?? "another model", "the model")}, layer ${number(stored.layer) ?? "?"}`;
    return { conversation: fromMessages(messages), remark: `Saved with ${where}: its projections lie on another axis and are left out.` };
  }
  return { conversation, remark: null };
};

const isMessage = (value) => value !== null && typeof value === "object" && ("role" in value || "from" in value);

const message = (value, place) => {
  const where = `message ${place + 1}`;
  if (!isMessage(value)) throw new FileError(`${where} has no role.`);
  const speaker = value.role ?? value.from;
  if (typeof speaker !== "string" || !Object.hasOwn(SPEAKERS, speaker))
    throw new FileError(`${where}: its role is not one of ${Object.keys(SPEAKERS).join(", ")}.`);
  return { role: SPEAKERS[speaker], content: string(value.content ?? value.value, where) };
};

const fromMessages = (messages) => {
  const conversation = newConversation();
  for (const [place, { role, content }] of messages.entries()) {
    const last = conversation.turns.at(-1);
    if (role === "system") {
      if (place > 0)
        throw new FileError(`message ${place + 1} is a system prompt after the beginning; the page has one, at the beginning.`);
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
    cap: value.cap === null || value.cap === undefined ? null : string(value.cap, "a cap’s name"),
    mode: value.mode === "adaptive" ? "adaptive" : "always",
    acted: value.acted === true,
    seed: Number.isInteger(value.seed) ? value.seed : null,
    projection: number(value.projection),
    z: number(value.z),
    floor: number(value.floor),
    fired: number(value.fired),
    alarm: value.alarm === true,
    raised: value.raised === true,
    drift: ["calm", "drifting"].includes(value.drift) ? value.drift : null,
    ended: ["stop", "length", "you"].includes(value.ended) ? value.ended : null,
    problem: typeof value.problem === "string" ? value.problem.slice(0, 500) : null,
  });
};

const tokenOf = (value) => ({
  text: string(value?.text, "a token"),
  projection: number(value.projection),
  fired: number(value.fired) ?? 0,
});
const number = (value) => (Number.isFinite(value) ? value : null);
const list = (value, name) => {
  if (!Array.isArray(value)) throw new FileError(`The ${name} of this file are not a list.`);
  return value;
};
const string = (value, where) => {
  if (typeof value !== "string") throw new FileError(`${where} is not text.`);
  if (value.length > LONGEST) throw new FileError(`${where} has ${value.length} characters; at most ${LONGEST} are read.`);
  return value;
};

// ---- the browser's own memory

const HERE = "personatlas.conversation";

export const remember = (conversation, axis) => {
  try {
    localStorage.setItem(HERE, JSON.stringify(toSaved(conversation, axis)));
    return true;
  } catch {
    return false; // storage is full or forbidden: the page goes on without it
  }
};
export const forget = () => {
  try {
    localStorage.removeItem(HERE);
  } catch {
    // nothing was kept
  }
};
export const remembered = (axis) => {
  try {
    const text = localStorage.getItem(HERE);
    return text === null ? { conversation: null, remark: null } : fromSaved(text, axis);
  } catch {
    return { conversation: null, remark: null };
  }
};

// What the user chose here, kept from visit to visit.
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
    // it lasts as long as the page
  }
};
