"""Conversations as token ids, written as the tokenizer's chat template writes them, with the assistant's tokens marked.

    encoder = ChatEncoder.load(Path("tokenizer"))
    encoder.encode([messages])[0]          # ids (T,), marked (T,): what the assistant says and the <|im_end|> after it

On text without markup the ids and marks are those of `apply_chat_template(..., return_assistant_tokens_mask=True)`. Two things differ on
purpose. Text that spells a special token stays text. And an answer is tokenised by itself: the model begins it after the ids of a
prompt, so a newline in front of it must not join the newline that ends the prompt.

Conversations packed into rows: the batches of chat tuning, a function of the step alone.

    source = ChatSource(train, context=2048, rows=16, pad=3, seed=0)
    rows = source.rows_at(step, first=0, count=8)       # ids, targets and documents (8, 2048)
    source.counted(step)                                # the assistant's tokens in the step's 16 rows

A row holds whole conversations and padding; `documents` numbers them, and no token sees another conversation. Every epoch
shuffles the conversations, packs them anew and shuffles the rows. Packing is best fit over the `OPEN` rows that are
begun: a conversation goes where it leaves the least room. Rows follow one another over epochs without end and are
numbered over all ranks, so a step has the same rows whatever the world size.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from numpy import ndarray as Array
from tokenizers import Tokenizer

from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message
from personatlas.training.chat.conversations import Conversation, Faults
from personatlas.training.data.batches import Rows
from personatlas.training.data.tokenizer import (
    BOS,
    END,
    PAD,
    START,
    TEMPLATE,
    batches,
    encode,
    load_tokenizer,
)
from personatlas.training.model.cross_entropy import IGNORED

BATCH = 256  # conversations encoded at once, over all cores


@dataclass(frozen=True)
class ChatEncoder:
    """A tokenizer of `personatlas train tokenizer`, for conversations."""

    tokenizer: Tokenizer

    @staticmethod
    def load(folder: Path) -> "ChatEncoder":
        """Raises `UserError` for a folder without such a tokenizer, or with another chat template."""
        tokenizer = load_tokenizer(folder)
        missing = [mark for mark in (START, END, PAD) if tokenizer.token_to_id(mark) is None]
        path = folder / "chat_template.jinja"
        if missing or not path.is_file() or path.read_text(encoding="utf-8") != TEMPLATE:
            raise UserError(
                f"{folder} has {f'no token {missing[0]}' if missing else 'another chat template'}; conversations are "
                "written as the template of `personatlas train tokenizer` writes them, so only its tokenizers can be used"
            )
        return ChatEncoder(tokenizer)

    @cached_property
    def marks(self) -> dict[str, int]:
        """Ids of the special tokens."""
        return {
            mark: int(self.tokenizer.token_to_id(mark) or 0) for mark in (BOS, START, END, PAD)
        }  # `load` has seen them

    @cached_property
    def _opening(self) -> list[int]:
        return encode(self.tokenizer, ["assistant\n"])[0]

    @cached_property
    def _newline(self) -> list[int]:
        return encode(self.tokenizer, ["\n"])[0]

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]:
        """Ids of whole conversations and which of them are the assistant's."""
        spoken = [message for messages in conversations for message in messages]
        texts = iter(encode(self.tokenizer, [_text(message) for message in spoken]))
        return [self._joined(messages, [next(texts) for _ in messages]) for messages in conversations]

    def _joined(
        self, messages: Sequence[Message], texts: Sequence[list[int]]
    ) -> tuple[list[int], list[bool]]:
        ids, marked = [self.marks[BOS]], [False]
        for message, text in zip(messages, texts, strict=True):
            answers = message["role"] == "assistant"
            front = [self.marks[START], *(self._opening if answers else ())]
            ids += [*front, *text, self.marks[END], *self._newline]
            marked += [False] * len(front) + [answers] * (len(text) + 1) + [False] * len(self._newline)
        return ids, marked

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What the model reads before it answers."""
        return [*self.encode([messages])[0][0], self.marks[START], *self._opening]


def _text(message: Message) -> str:
    return (
        message["content"] if message["role"] == "assistant" else f"{message['role']}\n{message['content']}"
    )


@dataclass(frozen=True)
class Encoded:
    """Conversations one after the other, N of them. Each ends with its last marked token: what follows teaches nothing."""

    ids: Int32[Array, "T"]
    marked: Bool[Array, "T"]
    ends: Int64[Array, "N"]

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def starts(self) -> Int64[Array, "N"]:
        """Where each begins."""
        return np.concatenate([np.zeros(1, np.int64), self.ends])[: len(self.ends)]

    @cached_property
    def lengths(self) -> Int64[Array, "N"]:
        """Inputs of each: all tokens but the last, which is only a target."""
        return self.ends - self.starts - 1

    @cached_property
    def counted(self) -> Int64[Array, "N"]:
        """Targets of each."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.marked, dtype=np.int64)])
        return before[self.ends] - before[self.starts]

    def one(self, number: int) -> tuple[Int64[Array, "L"], Int64[Array, "L"]]:
        """Inputs and targets of a conversation, -100 where the assistant does not speak next."""
        part = slice(self.starts[number], self.ends[number])
        ids, marked = self.ids[part].astype(np.int64), self.marked[part]
        return ids[:-1], np.where(marked[1:], ids[1:], -100)


def encoded(
    conversations: Sequence[Conversation], encoder: ChatEncoder, context: int, faults: Faults
) -> tuple[Encoded, list[Conversation]]:
    """Tokenise; the conversations that fit into `context` tokens, and which they are. Longer ones go into `faults`."""
    ids: list[Array] = []
    marked: list[Array] = []
    kept = []
    for batch in batches(conversations, BATCH):
        for one, (tokens, marks) in zip(batch, encoder.encode([one.messages for one in batch]), strict=True):
            last = len(marks) - 1 - marks[::-1].index(True)
            if last > context:
                faults.add(f"longer than the context of {context:,} tokens", one.where)
                continue
            kept.append(one)
            ids.append(np.array(tokens[: last + 1], np.int32))
            marked.append(np.array(marks[: last + 1], bool))
    ends = np.cumsum([len(part) for part in ids], dtype=np.int64)
    nothing = [np.empty(0, np.int32)], [np.empty(0, bool)]
    return Encoded(np.concatenate(ids or nothing[0]), np.concatenate(marked or nothing[1]), ends), kept


# Rows that are open at a time. More fill better and tie a long conversation to ever more of the short ones around it.
OPEN = 64
KEPT = 2  # epochs whose rows are held


def pack(lengths: Sequence[int] | Array, order: Iterable[int], context: int) -> list[list[int]]:
    """Rows of conversation numbers, by best fit; none is longer than `context`."""
    rows: list[list[int]] = []
    open: list[tuple[int, int]] = []  # room and row, the least room first
    for number in order:
        length = int(lengths[number])
        at = bisect_left(open, (length, -1))
        if at < len(open):
            room, row = open.pop(at)
        else:
            room, row = context, len(rows)
            rows.append([])
            if len(open) == OPEN:
                open.pop(0)
        rows[row].append(number)
        if room > length:
            insort(open, (room - length, row))
    return rows


@dataclass(frozen=True)
class Epoch:
    """The rows of one reading."""

    rows: list[list[int]]
    tokens: int
    counted: Int64[Array, "R"]


class ChatSource:
    """Rows of conversations for the training loop (`training/source.py`).

    `times` is how often an epoch reads each conversation: its whole part always, the rest so that over epochs every
    conversation has its share and no epoch is more than one conversation off. Raises `UserError` for no conversations.
    """

    def __init__(
        self,
        train: Encoded,
        *,
        context: int,
        rows: int,
        pad: int,
        seed: int = 0,
        times: Float[Array, "N"] | None = None,
    ) -> None:
        if context < 1 or rows < 1:
            raise ValueError(f"context {context} and rows {rows} must be 1 or more")
        if not len(train):
            raise UserError("no conversation is left to train on")
        if train.lengths.max() > context:
            raise ValueError(
                f"a conversation of {train.lengths.max()} tokens does not fit into a row of {context}"
            )
        self.train, self.pad, self.seed = train, pad, seed
        self.times = np.ones(len(train)) if times is None else times
        self.context, self.rows = context, rows
        self._offset = _offsets(self.times, np.random.default_rng([seed, 0]))
        self._firsts = [0]  # row at which each epoch begins
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()

    def rows_at(self, step: int, first: int, count: int) -> Rows:
        shape = (count, self.context)
        ids, targets = np.full(shape, self.pad), np.full(shape, IGNORED)
        documents = np.zeros(shape, np.int64)
        for place in range(count):
            start = 0
            members = self._row(step * self.rows + first + place)[0]
            for document, number in enumerate(members):
                inputs, wanted = self.train.one(number)
                part = slice(start, start + len(inputs))
                ids[place, part], targets[place, part], documents[place, part] = inputs, wanted, document
                start += len(inputs)
            documents[place, start:] = len(members)
        return Rows(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(documents))

    def counted(self, step: int) -> int:
        return sum(self._row(step * self.rows + place)[1] for place in range(self.rows))

    def rows_in(self, epochs: int | float) -> int:
        """Rows of the first so many epochs, a part of one counted as part of its rows."""
        whole = int(epochs)
        self._reach(whole)
        part = epochs - whole
        return self._firsts[whole] + (round(part * len(self.epoch(whole).rows)) if part else 0)

    def epochs_in(self, steps: int) -> float:
        """How many epochs that many steps read."""
        row = steps * self.rows
        epoch = self._epoch_of(row)
        return epoch + (row - self._firsts[epoch]) / len(self.epoch(epoch).rows)

    def describe(self) -> dict[str, Any]:
        """What the first epoch is made of."""
        first = self.epoch(0)
        size = len(first.rows) * self.context
        return {
            "conversations": sum(map(len, first.rows)),
            "rows": len(first.rows),
            "fill": first.tokens / size,
            "counted": int(first.counted.sum()),
            "counted_share": float(first.counted.sum() / size),
        }

    def epoch(self, number: int) -> Epoch:
        """An epoch's rows, from the cache or packed."""
        if number not in self._epochs:
            self._epochs[number] = self._packed(number)
            while len(self._epochs) > KEPT:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(number)
        return self._epochs[number]

    def _packed(self, number: int) -> Epoch:
        drawn = np.random.default_rng([self.seed, 1 + number])
        copies = np.floor(self.times * (number + 1) + self._offset) - np.floor(
            self.times * number + self._offset
        )
        order = drawn.permutation(np.repeat(np.arange(len(self.train)), copies.astype(int)))
        packed = pack(self.train.lengths, order.tolist(), self.context)
        rows = [packed[place] for place in drawn.permutation(len(packed))]
        counted = np.array([self.train.counted[row].sum() for row in rows], np.int64)
        return Epoch(rows, int(self.train.lengths[order].sum()), counted)

    def _row(self, number: int) -> tuple[list[int], int]:
        """The conversations of a row of the whole run, and how many targets they have."""
        epoch = self._epoch_of(number)
        place = number - self._firsts[epoch]
        found = self.epoch(epoch)
        return found.rows[place], int(found.counted[place])

    def _epoch_of(self, row: int) -> int:
        while self._firsts[-1] <= row:
            self._reach(len(self._firsts))
        return bisect_left(self._firsts, row + 1) - 1

    def _reach(self, epochs: int) -> None:
        """Know where the first `epochs` epochs end: each has as many rows as its packing makes."""
        while len(self._firsts) <= epochs:
            self._firsts.append(self._firsts[-1] + len(self.epoch(len(self._firsts) - 1).rows))


def _offsets(times: Float[Array, "N"], drawn: np.random.Generator) -> Float[Array, "N"]:
    """Where in 0..1 each conversation begins to count: evenly spread over those of the same `times`, in a drawn order."""
    offset = np.empty(len(times))
    for value in np.unique(times):
        same = np.flatnonzero(times == value)
        offset[drawn.permutation(same)] = (np.arange(len(same)) + 0.5) / len(same)
    return offset
