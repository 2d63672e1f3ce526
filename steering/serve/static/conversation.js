// A conversation is a list of turns: what the user said, and one answer or two (0 as it is, 1 capped).
//
//   turn   = { user: text | null, answers: [answer] | [answer, answer], kept: null | 0 | 1, run }
//   answer = { text, tokens: [{ text, projection, fired }], cap, mode, acted, seed, projection, z, floor, fired, alarm, raised, drift, ended, problem, live }
//            `cap` is what was asked for, `acted` whether it did; `drift` is "calm", "drifting" or null (not said); `ended` is "stop", "length", "you" (stopped by the user) or null
//
// Each side reads its own history: its own answers where there are two, the only one where there is one. `kept` says that both go
// on from one of the two; the other stays to be read and is no longer part of what the model sees. `run` numbers the stretches
// between such choices, so that a choice reaches back to the last one and no further.

export const PLAIN = 0;
export const CAPPED = 1;

export const newConversation = () => ({ system: "", turns: [], run: 0 });

export const newAnswer = (given = {}) => ({
  text: "",
  tokens: [],
  cap: null,
  mode: "always",
  acted: false,
  seed: null,
  projection: null,
  z: null,
  floor: null,
  fired: null,
  alarm: false,
  raised: false,
  drift: null,
  ended: null,
  problem: null,
  live: false,
  ...given,
});

// the answer of a turn that a side reads, or null
export const answerOn = (turn, side) => turn.answers[turn.kept ?? Math.min(side, turn.answers.length - 1)] ?? null;

// An answer with something in it, or that ended by itself (models do answer with nothing).
export const isSaid = (answer) => answer !== null && (answer.text !== "" || answer.ended === "stop");
export const isLeftOut = (turn, side) => turn.answers.length > 0 && !isSaid(answerOn(turn, side));

// What the model reads on a side before turn `end`, and which answer each message of the assistant is.
export const historyOf = (conversation, side, end = conversation.turns.length) => {
  const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const answers = new Map();
  for (const turn of conversation.turns.slice(0, end)) {
    const answer = answerOn(turn, side);
    if (isLeftOut(turn, side)) continue; // it failed: the question goes with it
    if (turn.user !== null) messages.push({ role: "user", content: turn.user });
    if (answer) {
      answers.set(messages.length, answer);
      messages.push({ role: "assistant", content: answer.text });
    }
  }
  return { messages, answers };
};

export const isSplit = (turn) => turn.answers.length > 1 && turn.kept === null;
export const sidesOf = (conversation) => (conversation.turns.some(isSplit) ? [PLAIN, CAPPED] : [PLAIN]);

// Both sides go on from one answer of the last turn.
export const keepSide = (conversation, side) => {
  const last = conversation.turns.at(-1);
  for (const turn of conversation.turns) {
    if (turn.run === last.run && turn.answers.length > 1) turn.kept = side;
  }
};

// A new turn; with one answer to come where there were two, the conversation goes on as it is unless it was said otherwise.
export const addTurn = (conversation, user, compare) => {
  if (!compare) for (const turn of conversation.turns) if (isSplit(turn)) turn.kept = PLAIN;
  const last = conversation.turns.at(-1);
  if (last && last.kept !== null && last.run === conversation.run) conversation.run += 1;
  const turn = { user, answers: [], kept: null, run: conversation.run };
  conversation.turns.push(turn);
  return turn;
};

// What the server said of an answer and, where this page does not know them (a loaded conversation), of those before it.
export const takePersona = (answer, persona, answers) => {
  for (const key of ["projection", "z", "floor", "fired"]) answer[key] = persona[key] ?? null;
  answer.drift = persona.drift?.state ?? null;
  answer.acted = typeof persona.cap === "string"; // an adaptive cap may rest
  for (const turn of persona.turns ?? []) {
    const known = answers.get(turn.message);
    if (!known) continue;
    known.projection ??= turn.projection;
    known.z ??= turn.z;
    known.alarm = turn.alarm === true;
    known.raised = turn.raised === true;
  }
};

// Points of the trajectories: one a turn and side, joined where the two sides are the same.
export const trajectories = (conversation) =>
  sidesOf(conversation).map((side) => ({
    side,
    points: conversation.turns.flatMap((turn, place) => {
      const answer = answerOn(turn, side);
      if (!answer) return [];
      const value = answer.live ? runningMean(answer.tokens) : answer.projection;
      return value === null ? [] : [{ turn: place, value, answer, shared: !isSplit(turn) }];
    }),
  }));

export const runningMean = (tokens) => {
  const values = tokens.map((token) => token.projection).filter(Number.isFinite);
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
};

export const zOf = ({ baseline }, value) => (baseline && value !== null ? (value - baseline.mean) / baseline.spread : null);
