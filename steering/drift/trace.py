"""Where a stored conversation lies along an axis, token by token and turn by turn.

    (one,) = traced(model, chat, axis, [Conversation("chat", messages)])
    [turn.projection for turn in one.turns]          # mean over each answer's tokens at the axis's layer

One forward reads a whole conversation, several of them in a batch; whose a token is comes from the template's own spans. What
does not fit into the model's context is left out from the end, and said: `left_out` turns.

The page of `personatlas trace --html`: conversations with their turns and tokens coloured, and their trajectory with its alarms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from personatlas.analysis.html.page import write_page
from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Conversation
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model
from personatlas.persona.models.token_spans import Spans, conversation_spans
from personatlas.persona.rollout import Rollout
from personatlas.steering.drift.page import conversation, shaded
from personatlas.steering.drift_monitor import ReferenceConversation, ReferenceConversations
from personatlas.steering.generate import placed
from personatlas.steering.teacher_forcing import projected


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
    model: Model,
    chat: ChatFormat,
    axis: Axis,
    conversations: Sequence[Conversation],
    advance: Callable[[int], None] = lambda _: None,
) -> list[Traced]:
    """All conversations in their order; `advance` counts them.

    Raises `UserError` for an axis of another model, and for a conversation without an answer that fits into the context.
    """
    axis.require_model(model.describe())
    room = model.context
    spans = [conversation_spans(chat, list(one.messages)) for one in conversations]
    texts = []
    for (name, *_), own in zip(conversations, spans, strict=True):
        ids = own.ids[:room]
        if not any(span.speaker == "assistant" and span.stop <= len(ids) for span in own.spans):
            fits = f" that fits into the {room} tokens of {model.id}" if len(own.ids) > len(ids) else ""
            raise UserError(f"{name} has no answer of an assistant{fits}: there is nothing to trace")
        texts.append(Rollout(name, (), ids[:1], ids[1:], "", 0, "end"))
    found: dict[int, Tensor] = {}
    for batch, places in projected(model, texts, [], axis.layer, axis.at(axis.layer)):
        for row, place in enumerate(batch.places):
            found[place] = places[row, : int(batch.lengths[row])]
        advance(len(batch.places))
    return [
        _with_turns(one.name, own, axis.layer, found[place])
        for place, (one, own) in enumerate(zip(conversations, spans, strict=True))
    ]


def calm_of(
    model: Model,
    chat: ChatFormat,
    axis: Axis,
    conversations: Sequence[Conversation],
    advance: Callable[[int], None] = lambda _: None,
) -> ReferenceConversations:
    """Stored conversations that do not drift, as what an alarm is calibrated on. Raises like `traced`."""
    found = traced(model, chat, axis, conversations, advance)
    rows = [
        ReferenceConversation(one.name, told.domain, tuple(turn.projection for turn in one.turns))
        for one, told in zip(found, conversations, strict=True)
    ]
    return ReferenceConversations(tuple(rows), {"how": "stored conversations, read again"})


def require_calm(conversations: Sequence[Conversation]) -> None:
    """`UserError` for too few of them, before a model is loaded to read them."""
    ReferenceConversations(
        tuple(ReferenceConversation(one.name, one.domain, ()) for one in conversations), {}
    ).require_enough()


def _with_turns(name: str, spans: Spans, layer: int, projection: Tensor) -> Traced:
    answers = [span for span in spans.spans if span.speaker == "assistant"]
    turns = tuple(
        Turn(span.message, span.start, span.stop, float(projection[span.start : span.stop].mean()))
        for span in answers
        if span.stop <= len(projection)
    )
    return Traced(name, spans, layer, projection, turns, len(answers) - len(turns))


HERE = Path(__file__).parent
MOST = 20  # conversations on one page


def write_trace_page(
    path: Path,
    content: Mapping[str, Any],
    found: Sequence[Traced],
    told: Sequence[Conversation],
    poles: Sequence[str],
) -> None:
    """Write the page of what `trace` prints. Tokens are coloured from the lowest to the highest of all answers' on the page, the
    2% at either end cut off."""
    shown = list(zip(content["conversations"], found, told, strict=True))[:MOST]
    values = sorted(
        value
        for _, one, _ in shown
        for turn in one.turns
        for value in one.projection[turn.start : turn.stop].tolist()
    )
    low, high = values[len(values) // 50], values[-1 - len(values) // 50]
    figures = {
        f"turns-{number}": conversation(
            {"answers": [{**turn, "turn": n} for n, turn in enumerate(row["turns"], 1)]}, content["baseline"]
        )
        for number, (row, _, _) in enumerate(shown)
    }
    page = {
        "c": content,
        "poles": poles,
        "low": low,
        "high": high,
        "conversations": [_conversation(*one, low, high) for one in shown],
        "more": len(content["conversations"]) - len(shown),
    }
    write_page(path, HERE / "trace.html.jinja", page, figures, {})


def _conversation(
    row: Mapping[str, Any], one: Traced, told: Conversation, low: float, high: float
) -> dict[str, Any]:
    """Its messages in order: what users said, and answers with their tokens."""
    turns = {turn["message"]: turn for turn in row["turns"]}
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(told.messages):
        if number not in turns:
            messages.append({"speaker": message["role"], "text": message["content"]})
            continue
        start, stop = turns[number]["tokens"]
        tokens = [
            _token(one.spans.pieces[at], float(one.projection[at]), low, high) for at in range(start, stop)
        ]
        messages.append(
            {"speaker": "assistant", "cell": shaded({**turns[number], "acted": False}), "tokens": tokens}
        )
    return {"name": row["name"], "domain": told.domain, "messages": messages, "left_out": row["left_out"]}


def _token(text: str, projection: float, low: float, high: float) -> dict[str, Any]:
    place = placed(projection, low, high)
    side = "positive" if place >= 0.5 else "others"
    return {
        "text": text,
        "side": side,
        "depth": round(abs(place - 0.5) * 2 * 62),
        "said": f"projection {projection:.1f}",
    }
