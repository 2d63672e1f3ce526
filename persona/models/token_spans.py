"""Which token belongs to whom in a conversation, exactly, from character offsets and never by searching for text.

    spans = conversation_spans(format, messages)
    [(span.speaker, spans.ids[span.start : span.stop]) for span in spans.spans]

How the boundaries are found. The template writes the conversation once with a private-use character in place of every
content: the skeleton. Then, message by message, only this message's real content is put back. What the template writes
is then `before + shown + after`, where `before` and `after` are known from the skeleton, so `shown` is what it makes of
this content: the content itself, trimmed, without its think block. Filling all of them into the skeleton must give,
character for character, what the template writes for the real conversation; otherwise `SpanError`. Nothing that a user
types can move a boundary: a copy of the answer or of the template's own markup is nowhere looked for.

Some templates write other marks around a message because of its content (Qwen3 around an answer with a think block).
Such a message is masked again, but for the strings that the template itself mentions, such as `</think>`, so that the
skeleton has the same marks; those that the content has itself belong to it.

From characters to tokens. A token belongs to whoever owns its visible characters. So whitespace goes with the text that
it shares a token with: a template's blank before an answer is in the answer's first token ("▁Hello"), and a user's
newlines that a marker token swallows are in no span, as the model does not see them either. A token of whitespace alone
that the template and a content share is the content's (of two contents, the first one's). A token with visible
characters of two owners is a `SpanError`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from os.path import commonprefix
from typing import Any

from personatlas.persona.errors import UserError
from personatlas.persona.models.chat_template import ChatFormat, Messages

TEMPLATE = -1  # the owner of what no message says
FIRST_MASK, LAST_MASK = 0xF0000, 0x10EFFF  # the private-use planes, less what persona/chat.py probes with
Region = tuple[int, int]  # characters [start, stop)


class SpanError(UserError):
    """The tokens of a conversation cannot be given to its speakers without guessing."""


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of one message's content, without the end-of-turn token; never empty."""

    message: int
    speaker: str
    start: int
    stop: int


@dataclass(frozen=True)
class Spans:
    """A tokenised conversation. Tokens in no span are the template's.

    `spans` are in the order of the tokens and do not overlap. `pieces` is the text of each token, "" for one that only
    continues the character of the token before it. `absent` are the messages without a span: empty, dropped by the
    template, or swallowed whitespace.
    """

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    pieces: tuple[str, ...]
    absent: tuple[int, ...]

    def speakers(self) -> list[str]:
        """Per token: "system", "user", "assistant", "tool" or "template"."""
        said = ["template"] * len(self.ids)
        for span in self.spans:
            said[span.start : span.stop] = [span.speaker] * (span.stop - span.start)
        return said


def conversation_spans(format: ChatFormat, messages: Messages) -> Spans:
    """Spans of a whole conversation as the template writes it, without a generation prompt.

    Where `format.prompt_is_prefix` and the answer does not begin with whitespace, `format.prompt_ids(messages[:-1])` is
    a prefix of the ids of a one-turn chat, and the answer's span starts right after it (after the template's blank,
    where that is a token of its own). Raises `SpanError`, and `UserError` for messages that the template refuses.
    """
    return _spans(format, messages, generation=False)


def prompt_spans(format: ChatFormat, messages: Messages) -> Spans:
    """Spans of a prompt: the ids are exactly `format.prompt_ids(messages)`. Raises like `conversation_spans`."""
    return _spans(format, messages, generation=True)


def answer_span(prompt_ids: Sequence[int], answer_ids: Sequence[int], message: int = -1) -> Span:
    """The span of a generated answer in prompt + answer ids. An empty answer has no span: `SpanError`."""
    if not answer_ids:
        raise SpanError(f"the answer is empty: nothing follows the {len(prompt_ids)} tokens of the prompt")
    return Span(message, "assistant", len(prompt_ids), len(prompt_ids) + len(answer_ids))


def _spans(format: ChatFormat, messages: Messages, *, generation: bool) -> Spans:
    text, regions = _regions(format, messages, generation)
    ids, ranges = _tokens(format.tokenizer, text)
    owners = _owners(text, ranges, regions)
    spans, start = [], 0
    for owner, run in groupby(owners):
        stop = start + len(list(run))
        if owner != TEMPLATE:
            spans.append(Span(owner, messages[owner]["role"], start, stop))
        start = stop
    said = {span.message for span in spans}
    assert len(said) == len(spans), "a message's tokens are one run"
    absent = tuple(number for number in range(len(messages)) if number not in said)
    return Spans(tuple(ids), tuple(spans), tuple(text[start:stop] for start, stop in ranges), absent)


# Characters: where each content stands in the rendered text


def _regions(format: ChatFormat, messages: Messages, generation: bool) -> tuple[str, dict[int, Region]]:
    """The rendered text, and where in it each message's content stands; a message that is not shown has no region."""

    def write(said: Sequence[str]) -> str:
        replaced = [{"role": m["role"], "content": c} for m, c in zip(messages, said, strict=True)]
        return format.render(replaced, generation=generation)

    text = format.render(messages, generation=generation)
    contents = [message["content"] for message in messages]
    choices = _masks(contents, _marks(format.template))
    level = [0] * len(contents)
    while True:  # ends: every round takes the next choice of at least one message
        masks = [choice[at] for choice, at in zip(choices, level, strict=True)]
        skeleton = write(masks)
        holes = _holes(skeleton, masks)
        shown = [
            _shown(write, contents, masks, skeleton, holes.get(number), number)
            for number in range(len(masks))
        ]
        odd = [number for number, piece in enumerate(shown) if piece is None]
        if not odd:
            return text, _filled(text, skeleton, masks, holes, shown)
        for number in odd:
            level[number] += 1
            if level[number] == len(choices[number]):
                raise SpanError(
                    f"the chat template writes something else around message {number} because of its content"
                )


def _masks(contents: Sequence[str], marks: Sequence[str]) -> list[list[str]]:
    """The masks to try for each content: one character; then its marks, with one character for each text between them.

    A blank content may stand for itself instead: trimmed away, it can take whitespace of the template with it.
    """
    codes = iter(range(FIRST_MASK, LAST_MASK))

    def mask() -> str:
        if (code := next(codes, None)) is None:
            raise SpanError(
                f"more than {LAST_MASK - FIRST_MASK} messages and pieces of the chat template's own markup"
            )
        return chr(code)

    choices = [[mask()] for _ in contents]
    for content, choice in zip(contents, choices, strict=True):
        parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", content) if marks else [content]
        if not content.strip():
            choice.append(content)
        elif len(parts) > 1:
            # A mark at either end stays there, without a character outside: templates ask what a content starts with.
            for i in range(0, len(parts), 2):
                parts[i] = mask() if parts[i] or 0 < i < len(parts) - 1 else ""
            choice.append("".join(parts) if len(parts) > 3 or parts[0] or parts[2] else parts[1] + mask())
    return choices


def _marks(template: str) -> list[str]:
    """The markup that the template mentions as strings, longest first: `</think>`, but not `user`."""
    from jinja2 import Environment

    strings = {value[1:-1] for _, kind, value in Environment().lex(template) if kind == "string"}
    marks = {mark for string in strings for mark in re.split(r"\\.|\s+", string)}  # without \n and the like
    return sorted((mark for mark in marks if len(mark) > 1 and not mark.isalnum()), key=len, reverse=True)


def _is_mask(character: str) -> bool:
    return ord(character) >= FIRST_MASK


def _holes(skeleton: str, masks: Sequence[str]) -> dict[int, Region]:
    """From the first to the last mask character of each message in the skeleton."""
    holes: dict[int, Region] = {}
    for number, mask in enumerate(masks):
        places = []
        for character in filter(_is_mask, mask):
            if skeleton.count(character) > 1:
                raise SpanError(
                    f"the chat template writes message {number} {skeleton.count(character)} times"
                )
            places += [skeleton.index(character)] if character in skeleton else []
        if places:
            holes[number] = (min(places), max(places) + 1)
    ordered = sorted(holes.items(), key=lambda item: item[1])
    for (number, (_, stop)), (other, (start, _)) in pairwise(ordered):
        if start < stop:
            raise SpanError(f"the chat template interleaves messages {number} and {other}")
    return holes


def _shown(
    write: Callable[[Sequence[str]], str],
    contents: Sequence[str],
    masks: Sequence[str],
    skeleton: str,
    hole: Region | None,
    number: int,
) -> str | None:
    """What the template makes of one content among masks: "" if nothing, None if it changes more than its hole."""
    real = write([*masks[:number], contents[number], *masks[number + 1 :]])
    if hole is None:
        return "" if real == skeleton else None
    before, after = skeleton[: hole[0]], skeleton[hole[1] :]
    room = len(real) - len(before) - len(after)
    return (
        real[len(before) :][:room] if room >= 0 and real.startswith(before) and real.endswith(after) else None
    )


def _filled(
    text: str, skeleton: str, masks: Sequence[str], holes: dict[int, Region], shown: Sequence[str | None]
) -> dict[int, Region]:
    """Where the contents stand once all are put into the skeleton's holes, which must give `text`."""
    filled, regions, done = "", {}, 0
    ordered = sorted(holes, key=lambda number: holes[number])
    for number in ordered:
        filled += skeleton[done : holes[number][0]]
        start, done = len(filled), holes[number][1]
        filled += shown[number] or ""
        regions[number] = (start, len(filled))
    filled += skeleton[done:]
    if filled != text:
        at = len(commonprefix([filled, text]))  # noqa: RUF071 (characters are meant)
        near = max((n for n in ordered if regions[n][0] <= at), key=lambda n: regions[n], default=0)
        raise SpanError(
            f"the chat template writes the conversation otherwise than its messages one by one, at or after message "
            f"{near}: {text[at : at + 30]!r} instead of {filled[at : at + 30]!r}"
        )
    edges = [0, *(edge for number in ordered for edge in regions[number]), len(text)]
    for i, number in enumerate(ordered):
        room = (edges[2 * i], edges[2 * i + 3])
        regions[number] = _widened(text, regions[number], room, masks[number], skeleton)
    return regions


def _widened(text: str, region: Region, room: Region, mask: str, skeleton: str) -> Region:
    """A region with the marks that its content has around what the mask characters show, where the text has them too.

    Only a content masked with its marks needs it: in `<think>A</think>` the mask reaches no further than A, and the
    template may write newlines between. `room` is what lies between the neighbours.
    """
    start, stop = region
    kept = [i for i, character in enumerate(mask) if _is_mask(character) and character in skeleton]
    head = re.split(f"[{chr(FIRST_MASK)}-{chr(LAST_MASK)}]", mask[: kept[0]])[-1]
    tail = re.split(f"[{chr(FIRST_MASK)}-{chr(LAST_MASK)}]", mask[kept[-1] + 1 :])[0]
    before, after = text[room[0] : start].rstrip(), text[stop : room[1]].lstrip()
    if head and before.endswith(head):
        start = room[0] + len(before) - len(head)
    if tail and after.startswith(tail):
        stop = room[1] - len(after) + len(tail)
    return start, stop


# Tokens: who owns which


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[Region]]:
    """Ids, and the characters of each: no gap but what the tokenizer leaves out, no overlap.

    Offsets as tokenizers give them overlap where tokens share a character (an emoji in bytes), which goes to the first
    of them here, and leave blanks out (`trim_offsets` of byte-level tokenizers), which go to the token after them.
    """
    if not tokenizer.is_fast:
        raise SpanError(
            f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer (tokenizer.json) is needed"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ranges, end = [], 0
    for start, stop in encoded["offset_mapping"]:
        start, stop = max(start, end), max(stop, end)
        while start > end and text[start - 1].isspace():
            start -= 1
        ranges.append((start, stop))
        end = stop
    return list(encoded["input_ids"]), ranges


def _owners(text: str, ranges: Sequence[Region], regions: dict[int, Region]) -> list[int]:
    """The message, or `TEMPLATE`, that each token belongs to."""
    characters = [TEMPLATE] * len(text)
    for number, (start, stop) in regions.items():
        characters[start:stop] = [number] * (stop - start)
    owners: list[int] = []
    for start, stop in ranges:
        if start == stop:  # a token without a character of its own continues the token before it
            owners.append(owners[-1] if owners else TEMPLATE)
            continue
        owning = set(characters[start:stop])
        if len(owning) > 1:
            contents = [owner for owner in characters[start:stop] if owner != TEMPLATE]
            owning = {characters[i] for i in range(start, stop) if not text[i].isspace()} or {contents[0]}
        if len(owning) > 1:
            names = " and ".join("the template" if n == TEMPLATE else f"message {n}" for n in sorted(owning))
            raise SpanError(f"the token {text[start:stop]!r} (character {start}) belongs to {names}")
        owners.append(owning.pop())
    return owners


# For people
