"""Token ids of texts in which what people write is text, also where it spells a control token.

    encoder = TextEncoder(tokenizer, template)
    encoder.encode("<|user|>Say <|end|>!<|end|>", [((8, 21), "user")]).ids    # one <|end|> token, the last

Control tokens are those that steer a conversation: the tokenizer's special tokens, the tokens that end an
answer, and added tokens that the chat template mentions. Written by the template they are tokens; inside a
content their spelling is tokenised like any other text. An answer may hold the template's unflagged markup
(`<think>`), as models write it. Other added tokens (runs of blanks, HTML tags) are ordinary text and stay
tokens everywhere.

Text without such a spelling is tokenised by the tokenizer as it is. Otherwise a second tokenizer is made from
the first: the same rules and vocabulary, but control tokens have names of private characters and a random
number, by which the template's own are put into the text. Names in its vocabulary change too, for models that
would find `<s>` among their words.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from personatlas.persona.errors import UserError
from personatlas.persona.models.content_regions import Region, SpanError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how vocabularies name bytes: never markup, whatever their flags


@dataclass(frozen=True)
class Tokenized:
    """Token ids, and the characters of each: no gap but what the tokenizer leaves out, no overlap."""

    text: str
    ids: tuple[int, ...]
    ranges: tuple[Region, ...]


class TextEncoder:
    """A tokenizer that tells the template's control tokens from their spelling in a content."""

    def __init__(self, tokenizer: Any, template: str = "", end_ids: frozenset[int] = frozenset()) -> None:
        self.tokenizer = tokenizer
        added = {id: token for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        special = set(tokenizer.all_special_ids) | end_ids
        self._always = {id: token.content for id, token in added.items() if token.special or id in special}
        self._names = self._always | {
            id: token.content
            for id, token in added.items()
            if token.content in template and not token.content.isalnum()
        }
        silent = {id for id, name in self._names.items() if BYTE.fullmatch(name)} | {tokenizer.unk_token_id}
        self._control = frozenset(self._names) - silent  # the others also stand for ordinary characters
        spelled = "|".join(re.escape(self._names[id]) for id in silent & set(self._names))
        self._silent = re.compile(spelled or "(?!)")
        nonce = secrets.token_hex(8)  # not to be guessed; it is in no result
        self._private = {id: f"\U000f0000{nonce}{id}\U000f0001" for id in self._names}

    def ids(self, text: str) -> list[int]:
        """The tokenizer's own ids, in which spelled control tokens are tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def controls(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The control tokens among ids."""
        return tuple(id for id in ids if id in self._control)

    def spells(self, text: str) -> bool:
        """Whether a content spells a special token that also stands for characters, as `<unk>` does."""
        return self._silent.search(text) is not None

    def spells_control(self, text: str) -> bool:
        """Whether the tokenizer by itself would find a special token in a content."""
        return self.spells(text) or bool(self.controls(self.ids(text)))

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text that is content from its beginning to its end."""
        if self.spells_control(text):
            return list(self.encode(text, [((0, len(text)), "user")]).ids)
        return self.ids(text)

    def encode(self, text: str, contents: Sequence[tuple[Region, str]]) -> Tokenized:
        """Ids of a rendered conversation, whose contents stand in these regions with their roles.

        Raises `SpanError` for a tokenizer without offsets, `UserError` for one that cannot write a control
        token as text.
        """
        if not self.tokenizer.is_fast:
            kind = type(self.tokenizer).__name__
            raise SpanError(f"{kind} gives no character offsets; a fast tokenizer (tokenizer.json) is needed")
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(found["input_ids"]), list(found["offset_mapping"])
        roles: list[str | None] = [None] * len(text)  # of each character, None for the template's
        for (start, stop), role in contents:
            roles[start:stop] = [role] * (stop - start)
        kept, spelled = [], any(self._silent.search(text, *region) for region, _ in contents)
        for id, (start, stop) in zip(ids, offsets, strict=True):
            if id not in self._control:
                continue
            owners = {roles[i] for i in range(start, stop) if not text[i].isspace()}
            if owners <= ({None} if id in self._always else {None, "assistant"}):
                kept.append((id, start, stop))
            else:
                spelled = True
        if spelled:
            ids, offsets = self._as_text(text, kept)
        return Tokenized(text, tuple(ids), tuple(_without_overlap(text, offsets)))

    def _as_text(self, text: str, kept: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[Region]]:
        """Ids and offsets in which only these control tokens (id, start, stop) are tokens."""
        pieces, places, done = [], [0], 0  # `places[i]` is where in `text` character i of the new text stands
        for id, start, stop in kept:
            mark = text[start:stop].strip()
            start = text.index(mark, start)
            stop = start + len(mark)
            pieces += [text[done:start], self._private[id]]
            places += [*range(done + 1, start + 1), *[stop] * len(self._private[id])]
            done = stop
        places += range(done + 1, len(text) + 1)
        encoded = self._renamed.encode("".join(pieces) + text[done:], add_special_tokens=False)
        own = {self._renamed.token_to_id(name): id for id, name in self._private.items()}
        ids = [own.get(id, id) for id in encoded.ids]
        if list(self.controls(ids)) != [id for id, _, _ in kept]:
            raise UserError(
                "this tokenizer cannot write a control token as text; take it out of the messages"
            )
        return ids, [(places[start], places[stop]) for start, stop in encoded.offsets]

    @cached_property
    def _renamed(self) -> "Tokenizer":
        """The tokenizer with those names: the spelling of a control token is ordinary text to it."""
        from tokenizers import Tokenizer

        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = {self._names[id]: name for id, name in self._private.items()}
        for token in content["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False, "single_word": False}
        names = {old: new for old, new in names.items() if not BYTE.fullmatch(old)}
        model = content["model"]
        if isinstance(model["vocab"], list):  # pieces with their scores
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        else:
            model["vocab"] = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:
            pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
            model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & set(names)]
        return Tokenizer.from_str(json.dumps(content))


def _without_overlap(text: str, offsets: Sequence[Region]) -> list[Region]:
    """Offsets as tokenizers give them overlap where tokens share a character (an emoji in bytes), which goes
    to the first of them here, and leave blanks out (`trim_offsets` of byte-level tokenizers), which go to the
    token after them."""
    ranges, end = [], 0
    for start, stop in offsets:
        start, stop = max(start, end), max(stop, end)
        while start > end and text[start - 1].isspace():
            start -= 1
        ranges.append((start, stop))
        end = stop
    return ranges
