"""One answer as it comes out of the engine: text, tokens with their projections, why it ended.

A step tells of the token that it fed, so a token's projection comes with the step after the one that drew it; the last token of an
answer that was cut is never fed, and has none.

Token ids to text as they come: whole characters only, and nothing beyond a stop text.

spoken = Spoken(tokenizer, stops=("\n\n",))
spoken.add(4093), spoken.add(11), ...          # text that is safe to show, often one token's, sometimes ""
spoken.ended, spoken.rest()                    # whether a stop text came; what was held back at the end
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from personatlas.persona.errors import UserError
from personatlas.steering.serve.engine.batch import TokenEvent
from personatlas.steering.serve.engine.scheduler import EngineEvent, FinishEvent, PrefillEvent, RequestHandle

KEPT = 8  # tokens that are decoded together: what one of them shows may depend on those before it
UNFINISHED = "\ufffd"  # what a tokenizer shows for part of a character


class Detokenizer:
    """An answer's text. Held back are parts of a character, and the beginnings of stop texts.

    `before` are tokens that it goes on from: some tokenizers write a first token's blank only where something is before it.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = (), before: Sequence[int] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.text, self.ended = "", False  # what was given out; whether a stop text came
        self._ids = list(before)[-KEPT:]
        self._shown = len(self._ids)  # of `_ids`, those whose text was taken
        self._held = ""

    def add(self, id: int) -> str:
        """The text that one token more makes safe to show."""
        self._ids.append(id)
        before = self._decoded(self._ids[: self._shown])
        whole = self._decoded(self._ids)
        if whole.endswith(UNFINISHED) and len(self._ids) - self._shown < KEPT:
            return ""
        self._shown = len(self._ids)
        if self._shown > 2 * KEPT:
            self._ids = self._ids[KEPT:]
            self._shown = len(self._ids)
        return self._given(whole[len(before) :], last=False)

    def rest(self) -> str:
        """What was held back, when no token follows."""
        whole = self._decoded(self._ids)
        return self._given(whole[len(self._decoded(self._ids[: self._shown])) :], last=True)

    def _given(self, new: str, *, last: bool) -> str:
        if self.ended:
            return ""
        text = self._held + new
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.ended, self._held = True, ""
            out = text[: min(places)]
        else:
            held = 0 if last else max((_beginning(text, stop) for stop in self.stops), default=0)
            out, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += out
        return out

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _beginning(text: str, stop: str) -> int:
    """How many last characters of the text could be the beginning of the stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


Reason = Literal["stop", "length"]


class EngineFailure(RuntimeError):
    """The engine could not do what was asked, and it is not the asker's fault."""


@dataclass(eq=False)
class StreamedAnswer:
    """What one ticket said so far. `seen[i]` are projection and fired layers of answer token i, as far as they are known."""

    number: int
    ticket: RequestHandle
    spoken: Detokenizer
    end_ids: frozenset[int]
    read: PrefillEvent | None = None
    asked: TokenEvent | None = None  # the step that fed the prompt's last token
    ids: list[int] = field(default_factory=list)
    seen: list[tuple[float, int]] = field(default_factory=list)
    likely: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    closing: tuple[int, tuple[float, dict[int, float]] | None] | None = (
        None  # the token that ended it, in no text
    )
    reason: Reason | None = None
    error: BaseException | None = None
    done: bool = False

    def require_whole(self) -> None:
        """Raise what ended it, if that was an error: a `UserError` as it is, anything else as `EngineFailure`."""
        if isinstance(self.error, UserError):
            raise self.error
        if self.error is not None:
            raise EngineFailure(
                (str(self.error).splitlines() or [type(self.error).__name__])[0][:200]
            ) from self.error

    def take(self, event: EngineEvent) -> str:
        """The text that an event adds."""
        if self.done:
            return ""
        if isinstance(event, PrefillEvent):
            self.read = event
            return ""
        if isinstance(event, FinishEvent):
            return self._end(event)
        return self._step(event)

    @property
    def prompt_projections(self) -> list[float]:
        """Of the prompt's tokens; without the last one's while nothing was fed."""
        read = list(self.read.projections) if self.read is not None else []
        return [*read, self.asked.projection] if self.asked is not None else read

    @property
    def projection(self) -> float | None:
        """Mean over the answer's tokens, None where none was fed."""
        return sum(value for value, _ in self.seen) / len(self.seen) if self.seen else None

    @property
    def fired(self) -> float | None:
        """Share of the answer's tokens times capped layers that were changed; None where no cap acts on answers."""
        cap = self.ticket.ask.cap
        if cap is None or cap.cap.phase == "prompt" or not self.seen:
            return None
        return sum(fired for _, fired in self.seen) / (len(self.seen) * len(cap.cap.layers))

    def tokens(self, first: int, last: int) -> list[dict[str, Any]]:
        """Answer tokens [first, last) as they are told."""
        told = []
        for at in range(first, last):
            projection, fired = self.seen[at] if at < len(self.seen) else (None, 0)
            text = self.spoken.tokenizer.decode([self.ids[at]], skip_special_tokens=True)
            told.append({"id": self.ids[at], "text": text, "projection": projection, "fired": fired})
        return told

    def _step(self, step: TokenEvent) -> str:
        if self.asked is None:
            self.asked = step
        else:
            self.seen.append((step.projection, step.fired))
        if self.ticket.ask.limit == 0:
            return ""
        if step.token in self.end_ids:
            self.closing = step.token, step.likely
            return ""  # it is not part of the answer
        self.ids.append(step.token)
        if step.likely is not None:
            self.likely.append(step.likely)
        text = self.spoken.add(step.token)
        if self.spoken.ended:
            self.reason, self.done = "stop", True
            self.ticket.cancel()
        return text

    def _end(self, ended: FinishEvent) -> str:
        self.done, self.error = True, ended.error
        self.reason = "length" if ended.reason == "length" else "stop"
        text = self.spoken.rest()
        if self.spoken.ended:
            self.reason = "stop"
        return text
