"""Where a conversation lies along an axis, token by token and turn by turn.

    trace = project(model, messages, axis)
    [turn.projection for turn in trace.turns]      # mean <h, v> over each answer's tokens at the axis's layer

One forward reads a whole conversation, several of them in a batch; whose a token is comes from the template's
own spans. What does not fit into the model's context is left out from the end: `left_out` turns.
`trace_answer` reads one answer with interventions on, and what they did to each token.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Conversation, Exclusions, read_messages
from personatlas.persona.interventions import Interventions, apply_steps, steps_by_layer
from personatlas.persona.models.chat_template import Messages
from personatlas.persona.models.detokenizer import token_pieces
from personatlas.persona.models.hooks import capture
from personatlas.persona.models.load import Model
from personatlas.persona.models.token_spans import conversation_spans
from personatlas.persona.progress import Advance, no_advance
from personatlas.persona.rollout import Rollout
from personatlas.steering.hooks.steering import steer
from personatlas.steering.teacher_forcing import project_batches


@dataclass(frozen=True)
class TurnProjection:
    """An answer in a conversation: its message's index, its tokens [start, stop), and their mean
    projection.
    """

    message: int
    start: int
    stop: int
    projection: float


@dataclass(frozen=True)
class Trace:
    """Projections (residual units) of one conversation's T tokens at `layer`, before any step there, and its
    answers.

    `ids` and `pieces` (the tokens' texts) are those of the whole conversation, also where the rest did not
    fit; `corrections` are the lengths of what was done to each token at the C steered `layers`; `left_out`
    counts the answers that did not fit into the model's context.
    """

    name: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    layer: int
    projection: Float[Tensor, " T"]
    turns: tuple[TurnProjection, ...]
    layers: tuple[int, ...]
    corrections: Float[Tensor, "C T"]
    left_out: int = 0

    @property
    def answer_from(self) -> int:
        """The first token of the last answer."""
        return self.turns[-1].start

    @property
    def answer(self) -> Float[Tensor, " A"]:
        """The last answer's projections."""
        return self.projection[self.answer_from : self.turns[-1].stop]

    @property
    def fired_layers(self) -> Int[Tensor, " T"]:
        """At how many layers each token was changed."""
        return (self.corrections > 0).sum(0)


def project(model: Model, messages: Messages, axis: Axis) -> Trace:
    """The trace of a stored conversation, read once without interventions. Raises like
    `trace_conversations`.
    """
    return trace_conversations(model, axis, [Conversation("conversation", read_messages(messages))])[0]


def trace_conversations(
    model: Model,
    axis: Axis,
    conversations: Sequence[Conversation],
    advance: Advance = no_advance,
    left_out: Exclusions | None = None,
) -> tuple[Trace, ...]:
    """Traces of stored conversations, in their order; `advance` counts them.

    Raises `UserError` for an axis of another model. A conversation that the chat template refuses, or without
    an answer that fits into the context, goes into `left_out`, or is raised where none is given.
    """
    axis.require_model(model.describe())
    spans, texts = [], []
    for conversation in conversations:
        try:
            own = conversation_spans(model.chat, list(conversation.messages))
            ids = own.ids[: model.context]
            if not any(span.speaker == "assistant" and span.stop <= len(ids) for span in own.spans):
                is_cut = len(own.ids) > len(ids)
                fits = f" that fits into the {model.context} tokens of {model.id}" if is_cut else ""
                raise UserError(f"no answer of an assistant{fits}: there is nothing to trace")
        except UserError as error:
            if left_out is None:
                raise UserError(f"{conversation.name}: {error}") from None
            left_out.add(
                f"with {error}" if str(error).startswith("no answer") else f"because {error}",
                conversation.name,
            )
            advance(1)
            continue
        spans.append(own)
        texts.append(Rollout(conversation.name, (), ids[:1], ids[1:], "", 0, "end"))
    projections: dict[int, Tensor] = {}
    for batch, values in project_batches(model, texts, [], axis.layer, axis.at(axis.layer)):
        for row, index in enumerate(batch.indices):
            projections[index] = values[row, : int(batch.lengths[row])]
        advance(len(batch.indices))
    traces = []
    for index, own in enumerate(spans):
        projection, answers = projections[index], [span for span in own.spans if span.speaker == "assistant"]
        n_tokens = len(projection)
        turns = tuple(
            TurnProjection(
                span.message, span.start, span.stop, float(projection[span.start : span.stop].mean())
            )
            for span in answers
            if span.stop <= n_tokens
        )
        ids, pieces = tuple(own.ids), tuple(own.pieces)
        unchanged, beyond = torch.zeros(0, n_tokens), len(answers) - len(turns)
        name = texts[index].key
        traces.append(Trace(name, ids, pieces, axis.layer, projection, turns, (), unchanged, beyond))
    return tuple(traces)


@torch.no_grad()
def trace_answer(
    model: Model, prompt: tuple[int, ...], answer: tuple[int, ...], interventions: Interventions, axis: Axis
) -> Trace:
    """Reads an answer after its prompt once more with the interventions on. Raises `UserError` for another
    model's axis.
    """
    axis.require_model(model.describe())
    steps = steps_by_layer(interventions)
    ids = torch.tensor([prompt + answer], device=model.device)

    def to_float(_layer: int, h: Tensor) -> Tensor:
        return h.float()

    with (
        steer(model, interventions) if interventions else nullcontext() as steering,
        capture(model, sorted({axis.layer, *steps}), to_float, before_others=True) as entered,
    ):
        if steering is not None:
            steering.describe(answer_from=torch.tensor([len(prompt)]))
        model.base(input_ids=ids, use_cache=False)
    is_answer = (torch.arange(ids.shape[1]) >= len(prompt))[None]
    corrections = torch.zeros(len(steps), ids.shape[1])
    for row, layer in enumerate(sorted(steps)):
        side = is_answer.to(entered[layer].device)
        corrections[row] = apply_steps(entered[layer], steps[layer], ~side, side)[1][0]
    h = entered[axis.layer][0]
    projection = (h @ axis.at(axis.layer).to(h.device)).cpu()
    turn = TurnProjection(0, len(prompt), ids.shape[1], float(projection[len(prompt) :].mean()))
    pieces = token_pieces(model.tokenizer, prompt + answer)
    layers = tuple(sorted(steps))
    return Trace("answer", prompt + answer, pieces, axis.layer, projection, (turn,), layers, corrections)


class ShadedToken(TypedDict):
    """A token on a page: its text, the side of the colour scale and its depth, and what its tooltip says."""

    text: str
    side: str
    depth: int
    said: str


def colour_range(traces: Iterable[Trace]) -> tuple[float, float]:
    """The lowest and highest projection of any answer's token, 2% at either end cut off."""
    turns = [(trace, turn) for trace in traces for turn in trace.turns]
    values = sorted(
        value for trace, turn in turns for value in trace.projection[turn.start : turn.stop].tolist()
    )
    return (values[len(values) // 50], values[-1 - len(values) // 50]) if values else (0.0, 1.0)


def scale_position(value: float, low: float, high: float) -> float:
    """Where a value lies between two others, from 0 to 1."""
    return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)


def shade_token(trace: Trace, index: int, low: float, high: float) -> ShadedToken:
    """A token with its colour on the scale from `low` to `high`."""
    projection = float(trace.projection[index])
    position = scale_position(projection, low, high)
    side, depth = "positive" if position >= 0.5 else "others", round(abs(position - 0.5) * 2 * 62)
    return {"text": trace.pieces[index], "side": side, "depth": depth, "said": f"projection {projection:.1f}"}
