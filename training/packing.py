"""Conversations packed into rows: the batches of chat tuning, a function of the step alone.

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
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray as Array

from personaxis.persona.errors import KnownError
from personaxis.training.chat_tokens import Encoded
from personaxis.training.loss import IGNORED
from personaxis.training.source import Rows

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
    conversation has its share and no epoch is more than one conversation off. Raises `KnownError` for no conversations.
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
            raise KnownError("no conversation is left to train on")
        if train.lengths.max() > context:
            raise ValueError(f"a conversation of {train.lengths.max()} tokens does not fit into a row of {context}")
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
        copies = np.floor(self.times * (number + 1) + self._offset) - np.floor(self.times * number + self._offset)
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
