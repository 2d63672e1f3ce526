"""Which token belongs to whom in a conversation, exactly, from character offsets and never by searching for
text.

    spans = conversation_spans(format, messages)
    [(span.speaker, spans.ids[span.start : span.stop]) for span in spans.spans]

`content_regions.py` finds where each content stands in the text. A token belongs to whoever owns its visible
characters. So whitespace goes with the text that it shares a token with: a template's blank before an answer
is in the answer's first token ("▁Hello"), and a user's newlines that a marker token swallows are in no span,
as the model does not see them either. A token of whitespace alone that the template and a content share is
the content's (of two contents, the first one's). A token with visible characters of two owners is a
`SpanError`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from personatlas.persona.models.chat_template import ChatFormat, Messages
from personatlas.persona.models.content_regions import Region, SpanError

TEMPLATE = -1  # the owner of what no message says


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

    `spans` are in the order of the tokens and do not overlap. `pieces` is the text of each token, "" for one
    that only continues the character of the token before it. `absent` are the messages without a span: empty,
    dropped by the template, or swallowed whitespace.
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

    Where `format.prompt_is_prefix` and the answer does not begin with whitespace,
    `format.prompt_ids(messages[:-1])` is a prefix of the ids of a one-turn chat, and the answer's span starts
    right after it (after the template's blank, where that is a token of its own). Raises `SpanError`, and
    `UserError` for messages that the template refuses.
    """
    return _spans(format, messages, generation=False)


def prompt_spans(format: ChatFormat, messages: Messages) -> Spans:
    """Spans of a prompt: the ids are exactly `format.prompt_ids(messages)`. Raises like
    `conversation_spans`."""
    return _spans(format, messages, generation=True)


def answer_span(prompt_ids: Sequence[int], answer_ids: Sequence[int], message: int = -1) -> Span:
    """The span of a generated answer in prompt + answer ids. An empty answer has no span: `SpanError`."""
    if not answer_ids:
        raise SpanError(f"the answer is empty: nothing follows the {len(prompt_ids)} tokens of the prompt")
    return Span(message, "assistant", len(prompt_ids), len(prompt_ids) + len(answer_ids))


def _spans(format: ChatFormat, messages: Messages, *, generation: bool) -> Spans:
    tokens, regions = format.tokenize(messages, generation=generation)
    owners = _owners(tokens.text, tokens.ranges, regions)
    spans, start = [], 0
    for owner, run in groupby(owners):
        stop = start + len(list(run))
        if owner != TEMPLATE:
            spans.append(Span(owner, messages[owner]["role"], start, stop))
        start = stop
    said = {span.message for span in spans}
    assert len(said) == len(spans), "a message's tokens are one run"
    absent = tuple(number for number in range(len(messages)) if number not in said)
    pieces = tuple(tokens.text[start:stop] for start, stop in tokens.ranges)
    return Spans(tokens.ids, tuple(spans), pieces, absent)


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
