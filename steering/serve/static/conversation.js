// A conversation is a list of turns: a message of the user, and one answer or two (0 baseline, 1 in the arm).
//
//   turn   = { user: text | null, answers: [answer] | [answer, answer], kept: null | 0 | 1, run }
//   answer = { text, tokens: [{ text, projection, fired }], arm, mode, seed, ended, problem, live, ...fields of persona.js }
//            `arm` is the chosen one, `acted` whether it acted; `ended` is "stop", "length", "you" (stopped by the user) or null
//
// Each side has a history of its own: its own answers where there are two, the only one where there is one. `kept` says that both
// sides continue from one of the two; the other stays visible and is no longer part of what the model reads. `run` numbers the
// stretches between such choices: a choice reaches back to the one before.

import { emptyPersona } from "./persona.js";

export const BASELINE = 0;
export const CAPPED = 1;

export const newConversation = () => ({ system: "", turns: [], run: 0 });

export const newAnswer = (values = {}) => ({
  text: "",
  tokens: [],
  arm: null,
  mode: "always",
  seed: null,
  ...emptyPersona(),
  ended: null,
  problem: null,
  live: false,
  ...values,
});

// the answer of a turn that a side reads, or null
export const answerOn = (turn, side) => turn.answers[turn.kept ?? Math.min(side, turn.answers.length - 1)] ?? null;

// An answer with text, or that ended by itself: models do answer with nothing.
export const isComplete = (answer) => answer !== null && (answer.text !== "" || answer.ended === "stop");
export const isLeftOut = (turn, side) => turn.answers.length > 0 && !isComplete(answerOn(turn, side));

// What the model reads on a side before turn `end`, and which answer each message of the assistant is.
export const historyOf = (conversation, side, end = conversation.turns.length) => {
  const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const answers = new Map();
  for (const turn of conversation.turns.slice(0, end)) {
    const answer = answerOn(turn, side);
    if (isLeftOut(turn, side)) continue; // the answer failed, and its message is left out with it
    if (turn.user !== null) messages.push({ role: "user", content: turn.user });
    if (answer) {
      answers.set(messages.length, answer);
      messages.push({ role: "assistant", content: answer.text });
    }
  }
  return { messages, answers };
};

export const isSplit = (turn) => turn.answers.length > 1 && turn.kept === null;
export const sidesOf = (conversation) => (conversation.turns.some(isSplit) ? [BASELINE, CAPPED] : [BASELINE]);

// Lets both sides continue from one answer of the last turn.
export const chooseSide = (conversation, side) => {
  const last = conversation.turns.at(-1);
  for (const turn of conversation.turns) {
    if (turn.run === last.run && turn.answers.length > 1) turn.kept = side;
  }
};

// A new turn. With one answer to come where there were two, the conversation continues from the baseline unless a side was chosen.
export const addTurn = (conversation, user, compare) => {
  if (!compare) for (const turn of conversation.turns) if (isSplit(turn)) turn.kept = BASELINE;
  const last = conversation.turns.at(-1);
  if (last && last.kept !== null && last.run === conversation.run) conversation.run += 1;
  const turn = { user, answers: [], kept: null, run: conversation.run };
  conversation.turns.push(turn);
  return turn;
};

// Points of the trajectories: one a turn and side, joined where the two sides are the same.
export const trajectories = (conversation) =>
  sidesOf(conversation).map((side) => ({
    side,
    points: conversation.turns.flatMap((turn, index) => {
      const answer = answerOn(turn, side);
      if (!answer) return [];
      const value = answer.live ? runningMean(answer.tokens) : answer.projection;
      return value === null ? [] : [{ turn: index, value, answer, shared: !isSplit(turn) }];
    }),
  }));

export const runningMean = (tokens) => {
  const values = tokens.map((token) => token.projection).filter(Number.isFinite);
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
};

// The baseline's mean at an answer (from 0) of a conversation: reference conversations do not stay where they begin.
export const meanAt = ({ mean, by_turn: byTurn }, turn) =>
  byTurn?.length && turn !== null && turn >= 0 ? byTurn[Math.min(turn, byTurn.length - 1)] : mean;

export const zOf = ({ baseline }, value, turn) =>
  baseline && value !== null ? (value - meanAt(baseline, turn)) / baseline.spread : null;
