"""Where a stored conversation lies along an axis, token by token and turn by turn.

    (one,) = traced(subject, chat, axis, [Conversation("chat", messages)])
    [turn.projection for turn in one.turns]          # mean over each answer's tokens at the axis's layer

One forward reads a whole conversation, several of them in a batch; whose a token is comes from the template's own spans. What
does not fit into the model's context is left out from the end, and said: `left_out` turns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from personaxis.persona.axis import Axis
from personaxis.persona.chat import ChatFormat
from personaxis.persona.errors import KnownError
from personaxis.persona.rollouts import Rollout
from personaxis.persona.spans import Spans, conversation_spans
from personaxis.persona.subject import Subject
from personaxis.steering.calm import Calm, CalmConversation
from personaxis.steering.conversations import Conversation
from personaxis.steering.projected import projected


@dataclass(frozen=True)
class Turn:
    """An answer in a conversation: its message's number, its tokens [start, stop), and their mean projection (residual units)."""

    message: int
    start: int
    stop: int
    projection: float


@dataclass(frozen=True)
class Traced:
    """A conversation with the projection of each of its T tokens at `layer`, and its answers in order."""

    name: str
    spans: Spans
    layer: int
    projection: Float[Tensor, " T"]
    turns: tuple[Turn, ...]
    left_out: int


def traced(
    subject: Subject,
    chat: ChatFormat,
    axis: Axis,
    conversations: Sequence[Conversation],
    advance: Callable[[int], None] = lambda _: None,
) -> list[Traced]:
    """All conversations in their order; `advance` counts them.

    Raises `KnownError` for an axis of another model, and for a conversation without an answer that fits into the context.
    """
    axis.require_model(subject.describe())
    room = subject.context
    spans = [conversation_spans(chat, list(one.messages)) for one in conversations]
    texts = []
    for (name, *_), own in zip(conversations, spans, strict=True):
        ids = own.ids[:room]
        if not any(span.speaker == "assistant" and span.stop <= len(ids) for span in own.spans):
            fits = f" that fits into the {room} tokens of {subject.id}" if len(own.ids) > len(ids) else ""
            raise KnownError(f"{name} has no answer of an assistant{fits}: there is nothing to trace")
        texts.append(Rollout(name, (), ids[:1], ids[1:], "", 0, "end"))
    found: dict[int, Tensor] = {}
    for batch, places in projected(subject, texts, [], axis.layer, axis.at(axis.layer)):
        for row, place in enumerate(batch.places):
            found[place] = places[row, : int(batch.lengths[row])]
        advance(len(batch.places))
    return [
        _with_turns(one.name, own, axis.layer, found[place])
        for place, (one, own) in enumerate(zip(conversations, spans, strict=True))
    ]


def calm_of(
    subject: Subject,
    chat: ChatFormat,
    axis: Axis,
    conversations: Sequence[Conversation],
    advance: Callable[[int], None] = lambda _: None,
) -> Calm:
    """Stored conversations that do not drift, as what an alarm is calibrated on. Raises like `traced`."""
    found = traced(subject, chat, axis, conversations, advance)
    rows = [
        CalmConversation(one.name, told.domain, tuple(turn.projection for turn in one.turns))
        for one, told in zip(found, conversations, strict=True)
    ]
    return Calm(tuple(rows), {"how": "stored conversations, read again"})


def require_calm(conversations: Sequence[Conversation]) -> None:
    """`KnownError` for too few of them, before a model is loaded to read them."""
    Calm(tuple(CalmConversation(one.name, one.domain, ()) for one in conversations), {}).require_enough()


def _with_turns(name: str, spans: Spans, layer: int, projection: Tensor) -> Traced:
    answers = [span for span in spans.spans if span.speaker == "assistant"]
    turns = tuple(
        Turn(span.message, span.start, span.stop, float(projection[span.start : span.stop].mean()))
        for span in answers
        if span.stop <= len(projection)
    )
    return Traced(name, spans, layer, projection, turns, len(answers) - len(turns))
