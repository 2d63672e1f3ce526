"""Token ids to text piece by piece: the pieces, joined, are what the tokenizer makes of all ids at once.

    detokenizer = Detokenizer(tokenizer, stops=("\\n\\n",))
    detokenizer.add(4093)              # text that no later token changes: often one token's, sometimes ""
    detokenizer.flush()                # what was held back, when no token follows

Text is held back while a later token can still change it:
- a token of a byte-level vocabulary ends inside a character, which the next ones complete;
- a run of byte tokens (`<0xE4>` in SentencePiece's vocabularies) is text if all of it is UTF-8, and one
  replacement character for each byte otherwise, so it is held until another token ends it;
- a tokenizer that cleans up removes the blank in "do n't" and "end .", so its last word is held;
- the last characters may be the beginning of a stop text.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from os.path import commonprefix
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 8  # tokens of a prefix that are decoded with those after it: some write a blank only behind others
INCOMPLETE = "\ufffd"  # what a tokenizer writes for a part of a character
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
UNSETTLED_WORDS = ("'", "n", "n'", "'v", "'r")  # beginnings of what a clean-up joins to the word before


class Detokenizer:
    """Token ids to text as they come: nothing that a later token changes, and nothing from a stop text on.

    `prefix` are tokens before the text, `stopped` says whether a stop text came. `pieces` has the text of
    each token before any clean-up and stop text: characters that several tokens make are the last one's. That
    of the newest token is known with the next one. `prefix_tail` is the text of an incomplete character at
    the prefix's end, `prefix_kept` what of it the first tokens left as it was.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        stops: tuple[str, ...] = (),
        prefix: Sequence[int] = (),
        *,
        skip_special: bool = True,
    ) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.text, self.stopped = "", False
        self.pieces: list[str] = []
        self._skip_special, self._special = skip_special, _special_ids(tokenizer)
        forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        kind = type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)).__name__
        self._cleans_up = bool(tokenizer.clean_up_tokenization_spaces)
        if kind == "BPE":  # for which `transformers` ignores the setting
            self._cleans_up &= bool(getattr(tokenizer, forced, False))
        self._ids = [token for token in prefix if not self._is_skipped(token)]
        end = len(self._ids)
        while end and is_byte_token(tokenizer, self._ids[end - 1]):
            end -= 1
        for _ in range(min(end, 3)):  # so many tokens may lack the last byte of a character
            if self._decode(self._ids[max(end - CONTEXT, 0) : end]).endswith(INCOMPLETE):
                end -= 1
        self._in_run = end < len(self._ids)  # the last tokens are bytes that others may follow
        self._ids = self._ids[max(end - CONTEXT, 0) :]
        self._n_returned = len(self._decode(self._ids[: min(end, CONTEXT)]))  # characters of `_ids`' text
        self._n_settled = min(end, CONTEXT)  # tokens of `_ids`
        self.prefix_tail, self.prefix_kept = self._decode(self._ids)[self._n_returned :], ""
        self._has_begun = False
        self._unclean = ""  # a clean-up may still change it
        self._held_back = ""  # it may be the beginning of a stop text

    def add(self, token: int) -> str:
        """The text that one more token makes final."""
        self.pieces.append("")
        if self.stopped or self._is_skipped(token):
            return ""
        self._ids.append(token)
        if is_byte_token(self.tokenizer, token):
            self._in_run = True
        elif self._in_run and self._decode([token]):
            self._in_run = False
        if self._in_run and not self.stops:
            return ""
        text = self._decode(self._ids)[self._n_returned :]
        if not self._in_run and not text.endswith(INCOMPLETE):
            return self._release(self._settle(text))
        released = self._release("", text[len(_common(text, self.prefix_tail)) :].rstrip(INCOMPLETE))
        if self.stopped:
            self.pieces[-1] = text
        return released

    def flush(self) -> str:
        """The text that was held back."""
        text = self._decode(self._ids)[self._n_returned :]
        return self._release(self._settle(text, last=True), last=True)

    def _settle(self, text: str, *, last: bool = False) -> str:
        """Takes the text of all tokens that are not settled as final; returns it without the prefix's own."""
        new = text
        if not self._has_begun:
            self._has_begun, self.prefix_kept = True, _common(text, self.prefix_tail)
            new = text[len(self.prefix_kept) :]
        if self.pieces and new:
            before = "" if last else self._decode(self._ids[:-1])[self._n_returned :][len(text) - len(new) :]
            n_before = len(_common(before, new)) if len(self.pieces) > 1 else 0
            if n_before:
                self.pieces[-2] += new[:n_before]
            self.pieces[-1] += new[n_before:]
        if text:
            self._ids = self._ids[self._n_settled :]
        self._n_settled = len(self._ids)
        self._n_returned = len(self._decode(self._ids))
        return new

    def _release(self, new: str, pending: str = "", *, last: bool = False) -> str:
        """What may be shown of final text; a stop text may reach into `pending`, final if it does."""
        if self.stopped:
            return ""
        if self._cleans_up:
            raw, pending = self._unclean + new, ""
            end = len(raw) if last else _settled_length(raw)
            new, self._unclean = self.tokenizer.clean_up_tokenization(raw[:end]), raw[end:]
        text = self._held_back + new
        starts = [start for stop in self.stops if (start := (text + pending).find(stop)) >= 0]
        if starts:
            self.stopped, text, end = True, text + pending, min(starts)
        else:
            # held back are last characters that could be the beginning of a stop text
            beginnings = [] if last else [stop[:n] for stop in self.stops for n in range(1, len(stop))]
            end = len(text) - max((len(own) for own in beginnings if text.endswith(own)), default=0)
        self._held_back = "" if self.stopped else text[end:]
        self.text += text[:end]
        return text[:end]

    def _is_skipped(self, token: int) -> bool:
        return self._skip_special and token in self._special

    def _decode(self, ids: Sequence[int]) -> str:
        options = {"skip_special_tokens": self._skip_special, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(ids), **options))


def token_pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token, special ones too: joined, the text of all of them."""
    detokenizer = Detokenizer(tokenizer, skip_special=False)
    for token in ids:
        detokenizer.add(token)
    detokenizer.flush()
    return tuple(detokenizer.pieces)


def is_byte_token(tokenizer: "PreTrainedTokenizerBase", token: int) -> bool:
    """Whether a token is one byte of a character, as `<0xE4>` in SentencePiece's vocabularies."""
    name = tokenizer.convert_ids_to_tokens(token)
    return (
        isinstance(name, str) and BYTE_TOKEN.fullmatch(name) is not None and tokenizer.decode([token]) != name
    )


@lru_cache(maxsize=2**16)
def token_bytes(tokenizer: "PreTrainedTokenizerBase", token: int, *, first: bool = False) -> bytes:
    """The bytes of a token by itself, special ones too: with those of its neighbours, the text in UTF-8.

    `first`: as the first token of a text, which some tokenizers write without its blank.
    """
    before = [] if first else _visible_token(tokenizer)
    options = {"clean_up_tokenization_spaces": False}
    text = str(tokenizer.decode([*before, token], **options))[len(str(tokenizer.decode(before, **options))) :]
    name = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(name, str):
        return text.encode("utf-8", "surrogatepass")
    if (found := BYTE_TOKEN.fullmatch(name)) and text != name:
        return bytes([int(found[1], 16)])
    if INCOMPLETE in text and all(character in _byte_of_character() for character in name):
        own = bytes(_byte_of_character()[character] for character in name)
        if own.decode("utf-8", "replace") == text:
            return own
    return text.encode("utf-8", "surrogatepass")


@lru_cache(maxsize=8)
def _byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


@lru_cache(maxsize=8)
def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The tokens that are left out of a text."""
    candidates = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    candidates |= set(tokenizer.all_special_ids)
    return frozenset(token for token in candidates if not tokenizer.decode([token], skip_special_tokens=True))


@lru_cache(maxsize=8)
def _visible_token(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A token with text of its own to put before others, none where the vocabulary has only parts of
    characters.
    """
    candidates = [*tokenizer("a", add_special_tokens=False)["input_ids"][-1:], *range(len(tokenizer))]
    for token in candidates:
        text = str(tokenizer.decode([token], skip_special_tokens=True))
        if text.strip() and INCOMPLETE not in text and not is_byte_token(tokenizer, token):
            return [token]
    return []


def _common(a: str, b: str) -> str:
    return commonprefix([a, b])  # noqa: RUF071 (characters are meant)


def _settled_length(text: str) -> int:
    """How many characters a clean-up changes no more, whatever follows: up to a blank behind a whole word."""
    end = len(text)
    while (end := text.rfind(" ", 0, end)) > 0:
        if text[end - 1] != " " and text[:end].rpartition(" ")[2] not in UNSETTLED_WORDS:
            return end
    return 0
