"""Where each message's content stands in a rendered conversation, exactly and never by searching for text.

    regions = content_regions(write, ["Who?", "I am."], template)
    text[slice(*regions[1])]                   # what the template shows of the second content

How the boundaries are found. The template writes the conversation once with a private-use character in place
of every content: the skeleton. Then, message by message, only this message's real content is put back. What
the template writes is then `before + shown + after`, where `before` and `after` are known from the skeleton,
so `shown` is what it makes of this content: the content itself, trimmed, without its think block. Filling all
of them into the skeleton must give, character for character, what the template writes for the real
conversation; otherwise `SpanError`. Nothing that a user types can move a boundary: a copy of the answer or of
the template's own markup is nowhere looked for.

Some templates write other marks around a message because of its content (Qwen3 around an answer with a think
block). Such a message is masked again, but for the strings that the template itself mentions, such as
`</think>`, so that the skeleton has the same marks; those that the content has itself belong to it.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from os.path import commonprefix

from personatlas.persona.errors import UserError

FIRST_MASK, LAST_MASK = 0xF0000, 0x10EFFF  # the private-use planes, less what chat_template.py probes with
Region = tuple[int, int]  # characters [start, stop)


class SpanError(UserError):
    """The tokens of a conversation cannot be given to its speakers without guessing."""


def content_regions(
    write: Callable[[Sequence[str]], str], contents: Sequence[str], template: str
) -> dict[int, Region]:
    """Where each content stands in `write(contents)`; one that is not shown has no region.

    `write` renders the conversation with other contents. Raises `SpanError` where that cannot be told.
    """
    text = write(contents)
    choices = _masks(contents, template_marks(template))
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
            return _filled(text, skeleton, masks, holes, shown)
        for number in odd:
            level[number] += 1
            if level[number] == len(choices[number]):
                raise SpanError(
                    f"the chat template writes something else around message {number} because of its content"
                )


def _masks(contents: Sequence[str], marks: Sequence[str]) -> list[list[str]]:
    """The masks to try for each content: one character; then its marks, with one character for each text
    between them.

    A blank content may stand for itself instead: trimmed away, it can take whitespace of the template with
    it.
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
            # A mark at either end stays there, without a character outside: templates ask what a content
            # starts with.
            for i in range(0, len(parts), 2):
                parts[i] = mask() if parts[i] or 0 < i < len(parts) - 1 else ""
            choice.append("".join(parts) if len(parts) > 3 or parts[0] or parts[2] else parts[1] + mask())
    return choices


@lru_cache(16)
def template_marks(template: str) -> tuple[str, ...]:
    """The markup that the template mentions as strings, longest first: `</think>`, but not `user`."""
    from jinja2 import Environment

    strings = {value[1:-1] for _, kind, value in Environment().lex(template) if kind == "string"}
    marks = {mark for string in strings for mark in re.split(r"\\.|\s+", string)}  # without \n and the like
    return tuple(
        sorted((mark for mark in marks if len(mark) > 1 and not mark.isalnum()), key=len, reverse=True)
    )


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
    """What the template makes of one content among masks: "" if nothing, None if it changes more than its
    hole."""
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
    """A region with the marks that its content has around what the mask characters show, where the text has
    them too.

    Only a content masked with its marks needs it: in `<think>A</think>` the mask reaches no further than A,
    and the template may write newlines between. `room` is what lies between the neighbours.
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
