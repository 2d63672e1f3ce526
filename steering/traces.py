"""Traces of stored conversations: the projection of every token and answer on the axis.

    (trace,) = trace_conversations(model, axis, [Conversation("chat", messages)])
    [turn.projection for turn in trace.turns]        # mean over each answer's tokens at the axis's layer

One forward reads a whole conversation, several of them in a batch. Who says a token comes from the template's
own spans."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Conversation
from personatlas.persona.models.load import Model
from personatlas.persona.models.token_spans import conversation_spans
from personatlas.persona.rollout import Rollout
from personatlas.steering.session import load_chat
from personatlas.steering.teacher_forcing import projected


@dataclass(frozen=True)
class TurnProjection:
    """An answer: the index of its message, its tokens [start, stop), and their mean projection (residual
    units).
    """

    message: int
    start: int
    stop: int
    projection: float


@dataclass(frozen=True)
class Trace:
    """A conversation's token ids and texts, the projections of its first T tokens at `layer`, and its answers
    in order.

    `left_out` counts answers beyond the model's context, which are not read.
    """

    name: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    layer: int
    projection: Float[Tensor, " T"]
    turns: tuple[TurnProjection, ...]
    left_out: int = 0


def trace_conversations(
    model: Model,
    axis: Axis,
    conversations: Sequence[Conversation],
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Trace, ...]:
    """Traces conversations in their order; `advance` counts them.

    Raises `UserError` for an axis of another model, and for a conversation without an answer that fits into
    the context."""
    axis.require_model(model.describe())
    chat, room, texts = load_chat(model), model.context, []
    spans = [conversation_spans(chat, list(conversation.messages)) for conversation in conversations]
    for conversation, own in zip(conversations, spans, strict=True):
        ids = own.ids[:room]
        if not any(span.speaker == "assistant" and span.stop <= len(ids) for span in own.spans):
            fits = f" that fits into the {room} tokens of {model.id}" if len(own.ids) > len(ids) else ""
            raise UserError(
                f"{conversation.name} has no answer of an assistant{fits}: there is nothing to trace"
            )
        texts.append(Rollout(conversation.name, (), ids[:1], ids[1:], "", 0, "end"))
    projections: dict[int, Tensor] = {}
    for batch, values in projected(model, texts, [], axis.layer, axis.at(axis.layer)):
        for row, index in enumerate(batch.places):
            projections[index] = values[row, : int(batch.lengths[row])]
        advance(len(batch.places))
    traces = []
    for index, (conversation, own) in enumerate(zip(conversations, spans, strict=True)):
        projection = projections[index]
        answers = [span for span in own.spans if span.speaker == "assistant"]
        turns = tuple(
            TurnProjection(
                span.message, span.start, span.stop, float(projection[span.start : span.stop].mean())
            )
            for span in answers
            if span.stop <= len(projection)
        )
        left_out = len(answers) - len(turns)
        pieces = tuple(own.pieces)
        traces.append(
            Trace(conversation.name, tuple(own.ids), pieces, axis.layer, projection, turns, left_out)
        )
    return tuple(traces)
