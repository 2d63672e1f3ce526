// Streams one answer. `changed` is called after every chunk; errors are put into the answer, and "denied" is returned where the
// server wants another key.

import { chat, ServerError } from "./api.js";
import { historyOf, runningMean, zOf } from "./conversation.js";
import { applyPersona, finite } from "./persona.js";

export const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

// The body of a request: OpenAI's fields and the `persona` object.
export const requestOf = (model, messages, answer, sampling) => ({
  model,
  messages,
  ...sampling,
  seed: answer.seed,
  persona: { arm: answer.arm, mode: answer.mode, per_token: true },
});

export const stream = async (conversation, turn, answer, side, { axis, sampling, signal, changed }) => {
  const { messages, answers } = historyOf(conversation, side, conversation.turns.indexOf(turn));
  if (turn.user !== null) messages.push({ role: "user", content: turn.user });
  answer.turn = answers.size; // of the answers that this side has read
  answers.set(messages.length, answer);
  answer.live = true;
  answer.problem = null;
  changed(answer);
  try {
    for await (const chunk of chat(requestOf(axis.model.name, messages, answer, sampling), signal)) {
      takeChunk(answer, chunk, answers);
      changed(answer);
    }
    answer.ended ??= "stop";
  } catch (error) {
    if (error.name === "AbortError") answer.ended ??= "you";
    else if (error instanceof ServerError) {
      answer.problem = error.message;
      if (error.status === 401) return "denied";
    } else throw error;
  } finally {
    answer.live = false;
    answer.projection ??= runningMean(answer.tokens); // stopped before the server sent its persona object
    answer.z ??= zOf(axis, answer.projection, answer.turn);
    answer.acted ||= answer.tokens.some((token) => token.fired > 0);
    changed(answer);
  }
};

const takeChunk = (answer, chunk, answers) => {
  const choice = chunk.choices?.[0];
  if (typeof choice?.delta?.content === "string") answer.text += choice.delta.content;
  if (choice?.finish_reason) answer.ended = choice.finish_reason === "length" ? "length" : "stop";
  const persona = chunk.persona;
  if (!persona) return;
  if (Array.isArray(persona.tokens)) answer.tokens.push(...persona.tokens.map(token));
  else {
    if (persona.per_token?.length > answer.tokens.length) answer.tokens = persona.per_token.map(token);
    applyPersona(answer, persona, answers);
  }
};

const token = ({ text, projection, fired }) => ({
  text: String(text ?? ""),
  projection: finite(projection),
  fired: fired || 0,
});
