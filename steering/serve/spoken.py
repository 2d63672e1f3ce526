"""Token ids to text as they come: whole characters only, and nothing beyond a stop text.

spoken = Spoken(tokenizer, stops=("\\n\\n",))
spoken.add(4093), spoken.add(11), ...          # text that is safe to show, often one token's, sometimes ""
spoken.ended, spoken.rest()                    # whether a stop text came; what was held back at the end
"""

from collections.abc import Sequence
from typing import Any

KEPT = 8  # tokens that are decoded together: what one of them shows may depend on those before it
UNFINISHED = "\ufffd"  # what a tokenizer shows for part of a character


class Spoken:
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
