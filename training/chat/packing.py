"""Conversations as token ids, and packed into rows: the batches of chat tuning, a function of the step alone.

    encoder = ChatEncoder.load(Path("tokenizer"))
    encoder.encode([messages])[0]      # ids (T,), marked (T,): what the assistant says, with its <|im_end|>
    batches = ChatBatches(encoded, context=2048, rows=16, pad=3, seed=0)
    batches.rows_at(step, first=0, count=8)             # ids, targets and documents (8, 2048)
    batches.counted(step)                               # the assistant's tokens in the step's 16 rows

On text without markup ids and marks are those of `apply_chat_template(...,
return_assistant_tokens_mask=True)`. Text that spells a special token stays text, and an answer is tokenised
by itself: the model begins it after the ids of a prompt, so a newline in front of it must not join the
newline that ends the prompt.

A row holds whole conversations and padding; `documents` numbers them, and no token sees another conversation.
Every epoch shuffles the conversations, packs them anew and shuffles the rows. Packing is best fit over the
`OPEN_ROWS` rows that are begun. Rows follow one another over epochs without end and are numbered over all
ranks, so a step has the same rows whatever the world size.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from numpy import ndarray as Array
from tokenizers import Tokenizer

from personatlas.persona.errors import UserError
from personatlas.persona.formats import Exclusions, Message
from personatlas.persona.records import JsonObject
from personatlas.training.chat.conversations import ChatExample
from personatlas.training.data.batches import TokenBatch
from personatlas.training.data.tokenizer import (
    BOS,
    END,
    PAD,
    START,
    TEMPLATE,
    chunked,
    encode,
    load_corpus_tokenizer,
)
from personatlas.training.model.cross_entropy import IGNORED

ENCODED_AT_ONCE = 256  # conversations, over all cores
OPEN_ROWS = 64  # more fill better and tie a long conversation to ever more of the short ones around it
CACHED_EPOCHS = 2


@dataclass(frozen=True)
class ChatEncoder:
    """A tokenizer of `personatlas train tokenizer`, for conversations."""

    tokenizer: Tokenizer

    @staticmethod
    def load(folder: Path) -> "ChatEncoder":
        """Raises `UserError` for a folder without such a tokenizer, or with another chat template."""
        tokenizer = load_corpus_tokenizer(folder)
        missing = [mark for mark in (START, END, PAD) if tokenizer.token_to_id(mark) is None]
        path = folder / "chat_template.jinja"
        if missing or not path.is_file() or path.read_text(encoding="utf-8") != TEMPLATE:
            fault = f"no token {missing[0]}" if missing else "another chat template"
            raise UserError(f"{folder} has {fault}; use a tokenizer of `personatlas train tokenizer`")
        return ChatEncoder(tokenizer)

    @cached_property
    def marks(self) -> dict[str, int]:
        """Ids of the special tokens."""
        return {mark: int(self.tokenizer.token_to_id(mark) or 0) for mark in (BOS, START, END, PAD)}

    @cached_property
    def _opening(self) -> list[int]:
        return encode(self.tokenizer, ["assistant\n"])[0]

    @cached_property
    def _newline(self) -> list[int]:
        return encode(self.tokenizer, ["\n"])[0]

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]:
        """Ids of whole conversations and which of them are the assistant's."""
        said = [
            message["content"]
            if message["role"] == "assistant"
            else f"{message['role']}\n{message['content']}"
            for messages in conversations
            for message in messages
        ]
        texts, encoded = iter(encode(self.tokenizer, said)), []
        for messages in conversations:
            ids, marked = [self.marks[BOS]], [False]
            for message in messages:
                text, answers = next(texts), message["role"] == "assistant"
                front = [self.marks[START], *(self._opening if answers else ())]
                ids += [*front, *text, self.marks[END], *self._newline]
                marked += [False] * len(front) + [answers] * (len(text) + 1) + [False] * len(self._newline)
            encoded.append((ids, marked))
        return encoded

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What the model reads before it answers."""
        return [*self.encode([messages])[0][0], self.marks[START], *self._opening]


@dataclass(frozen=True)
class EncodedExamples:
    """N conversations one after the other, each up to its last marked token: what follows teaches nothing."""

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

    def inputs_and_targets(self, number: int) -> tuple[Int64[Array, "L"], Int64[Array, "L"]]:
        """Inputs and targets of a conversation, -100 where the assistant does not speak next."""
        part = slice(self.starts[number], self.ends[number])
        ids, marked = self.ids[part].astype(np.int64), self.marked[part]
        return ids[:-1], np.where(marked[1:], ids[1:], IGNORED)

    @staticmethod
    def concatenate(parts: "Sequence[EncodedExamples]") -> "EncodedExamples":
        """Several in one."""
        offsets = np.cumsum([0, *(len(part.ids) for part in parts)])
        return EncodedExamples(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.marked for part in parts]),
            np.concatenate([part.ends + offset for part, offset in zip(parts, offsets, strict=False)]),
        )


def encode_examples(
    examples: Sequence[ChatExample], encoder: ChatEncoder, context: int, left_out: Exclusions
) -> tuple[EncodedExamples, list[ChatExample]]:
    """The examples that fit into `context` tokens, and their ids. Longer ones go into `left_out`."""
    ids, marked = [np.empty(0, np.int32)], [np.empty(0, bool)]
    fitting = []
    for chunk in chunked(examples, ENCODED_AT_ONCE):
        encoded = encoder.encode([example.messages for example in chunk])
        for example, (tokens, marks) in zip(chunk, encoded, strict=True):
            last = len(marks) - 1 - marks[::-1].index(True)
            if last > context:
                left_out.add(f"longer than the context of {context:,} tokens", example.place)
                continue
            fitting.append(example)
            ids.append(np.array(tokens[: last + 1], np.int32))
            marked.append(np.array(marks[: last + 1], bool))
    ends = np.cumsum([len(part) for part in ids[1:]], dtype=np.int64)
    return EncodedExamples(np.concatenate(ids), np.concatenate(marked), ends), fitting


def pack(lengths: Sequence[int] | Array, order: Iterable[int], context: int) -> list[list[int]]:
    """Rows of conversation numbers, by best fit; none is longer than `context`."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # room and row, the least room first
    for number in order:
        length = int(lengths[number])
        best = bisect_left(open_rows, (length, -1))
        if best < len(open_rows):
            room, row = open_rows.pop(best)
        else:
            room, row = context, len(rows)
            rows.append([])
            if len(open_rows) == OPEN_ROWS:
                open_rows.pop(0)
        rows[row].append(number)
        if room > length:
            insort(open_rows, (room - length, row))
    return rows


@dataclass(frozen=True)
class PackedEpoch:
    """The rows of one reading: conversation numbers, tokens in all, and targets by row."""

    rows: list[list[int]]
    tokens: int
    counted: Int64[Array, "R"]


class ChatBatches:
    """Rows of conversations, a `BatchSource` of the training loop.

    `times` is how often an epoch reads each conversation: its whole part always, the rest so that over epochs
    every conversation has its share and no epoch is more than one conversation off. Raises `UserError` for no
    conversations.
    """

    def __init__(
        self,
        train: EncodedExamples,
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
        if (longest := train.lengths.max()) > context:
            raise ValueError(f"a conversation of {longest} tokens does not fit into a row of {context}")
        self.train, self.pad, self.seed = train, pad, seed
        self.times = np.ones(len(train)) if times is None else times
        self.context, self.rows = context, rows
        # where in 0..1 each conversation begins to count: evenly over those of the same `times`, shuffled
        self._offset, generator = np.empty(len(train)), np.random.default_rng([seed, 0])
        for value in np.unique(self.times):
            same = np.flatnonzero(self.times == value)
            self._offset[generator.permutation(same)] = (np.arange(len(same)) + 0.5) / len(same)
        self._firsts = [0]  # row at which each epoch begins
        self._epochs: OrderedDict[int, PackedEpoch] = OrderedDict()

    def rows_at(self, step: int, first: int, count: int) -> TokenBatch:
        """Rows [first, first + count) of a step: conversations side by side, each seeing itself alone."""
        shape = (count, self.context)
        ids, targets = np.full(shape, self.pad), np.full(shape, IGNORED)
        documents = np.zeros(shape, np.int64)
        for row in range(count):
            start = 0
            members = self._row(step * self.rows + first + row)[0]
            for document, number in enumerate(members):
                inputs, wanted = self.train.inputs_and_targets(number)
                part = slice(start, start + len(inputs))
                ids[row, part], targets[row, part], documents[row, part] = inputs, wanted, document
                start += len(inputs)
            documents[row, start:] = len(members)
        return TokenBatch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(documents))

    def counted(self, step: int) -> int:
        """Targets that count in the whole step: the assistant's tokens."""
        return sum(self._row(step * self.rows + row)[1] for row in range(self.rows))

    def rows_in(self, epochs: int | float) -> int:
        """Rows of the first so many epochs, a part of one counted as part of its rows."""
        whole = int(epochs)
        self._pack_up_to(whole)
        part = epochs - whole
        return self._firsts[whole] + (round(part * len(self.epoch(whole).rows)) if part else 0)

    def epochs_in(self, steps: int) -> float:
        """How many epochs that many steps read."""
        row = steps * self.rows
        epoch = self._epoch_of(row)
        return epoch + (row - self._firsts[epoch]) / len(self.epoch(epoch).rows)

    def describe(self) -> JsonObject:
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

    def epoch(self, number: int) -> PackedEpoch:
        """An epoch's rows, from the cache or packed."""
        if number not in self._epochs:
            generator = np.random.default_rng([self.seed, 1 + number])
            read = [
                np.floor(self.times * n + self._offset) for n in (number, number + 1)
            ]  # up to and with it
            copies = (read[1] - read[0]).astype(int)
            order = generator.permutation(np.repeat(np.arange(len(self.train)), copies))
            packed = pack(self.train.lengths, order.tolist(), self.context)
            rows = [packed[row] for row in generator.permutation(len(packed))]
            counted = np.array([self.train.counted[row].sum() for row in rows], np.int64)
            self._epochs[number] = PackedEpoch(rows, int(self.train.lengths[order].sum()), counted)
            while len(self._epochs) > CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(number)
        return self._epochs[number]

    def _row(self, number: int) -> tuple[list[int], int]:
        """The conversations of a row of the whole run, and how many targets they have."""
        index = self._epoch_of(number)
        row, epoch = number - self._firsts[index], self.epoch(index)
        return epoch.rows[row], int(epoch.counted[row])

    def _epoch_of(self, row: int) -> int:
        while self._firsts[-1] <= row:
            self._pack_up_to(len(self._firsts))
        return bisect_left(self._firsts, row + 1) - 1

    def _pack_up_to(self, epochs: int) -> None:
        """Finds where the first `epochs` epochs end: each has as many rows as its packing makes."""
        while len(self._firsts) <= epochs:
            self._firsts.append(self._firsts[-1] + len(self.epoch(len(self._firsts) - 1).rows))
