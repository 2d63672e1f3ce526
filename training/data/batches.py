"""Which tokens a step trains on: a function of the step alone, so nothing needs to be saved to go on.

    rows = Batches(tokens.train, context=2048, rows=64, seed=0)
    rows.batch(step, rank=0, world=2)         # (32, 2049) ids: inputs [:, :-1], targets [:, 1:]
    document_index(ids[:, :-1], bos)          # (32, 2048) which document of its row a token is in

The stream is a ring: its end is followed by its first document. Epoch e cuts it into windows of `context` tokens (and the
next one, as a target) from an offset drawn for e, and goes through them in an order drawn for e. So no token is a
target twice in an epoch, fewer than `context` are none, and windows differ from epoch to epoch, which matters where a
small corpus is repeated. Rows are numbered over all ranks: a step has the same rows whatever the world size, so a run
can go on with another one.

Documents are not cropped to let every row begin with one, since a small corpus has no text to spare; the price is rows
that begin inside a document.

What a training step is fed with: rows of tokens, a function of the step alone, so nothing needs to be saved to go on.

    source = BooksSource(Batches(tokens.train, context=2048, rows=64, seed=0))
    rows = source.rows_at(step, first=0, count=32)      # rows.ids, rows.targets (32, 2048)
    loss = model(rows.ids, rows.targets, None, rows.documents) / source.counted(step)

Rows are numbered over all ranks and micro-batches: a step has the same rows whatever the world size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from personatlas.persona.errors import UserError
from personatlas.training.data.token_shards import Stream


@dataclass(frozen=True)
class Batches:
    """Batches of `rows` windows over all ranks. Raises `UserError` for a stream shorter than one window."""

    stream: Stream
    context: int
    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.context < 1 or self.rows < 1:
            raise ValueError(f"context {self.context} and rows {self.rows} must be 1 or more")
        if len(self.stream) < self.context + 1:
            raise UserError(
                f"the training text has {len(self.stream):,} tokens, fewer than one row of {self.context + 1:,}; "
                "give more text or a shorter context"
            )

    @property
    def windows(self) -> int:
        """Rows in an epoch."""
        return len(self.stream) // self.context

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Int64[Tensor, "B width"]:
        """This rank's rows of a step, each `context` + 1 ids. Raises ValueError if ranks cannot share the rows evenly."""
        if step < 0 or not 0 <= rank < world:
            raise ValueError(f"step {step}, rank {rank} of {world}")
        if self.rows % world:
            raise ValueError(f"{self.rows} rows cannot be shared evenly by {world} ranks")
        share = self.rows // world
        first = step * self.rows + rank * share
        return torch.stack([self.row(first + i) for i in range(share)])

    def row(self, number: int) -> Int64[Tensor, "width"]:
        """Row `number` of the whole run."""
        epoch, place = divmod(number, self.windows)
        offset, order = _epoch(self.seed, epoch, self.windows, len(self.stream))
        return torch.from_numpy(self._ring(offset + int(order[place]) * self.context, self.context + 1))

    def epochs(self, steps: int) -> float:
        """How often that many steps go through the corpus."""
        return steps * self.rows / self.windows

    def _ring(self, start: int, length: int) -> np.ndarray:
        size = len(self.stream)
        start %= size
        stop = start + length
        if stop <= size:
            return self.stream.read(start, stop)
        return np.concatenate([self.stream.read(start, size), self.stream.read(0, stop - size)])


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, windows: int, size: int) -> tuple[int, np.ndarray]:
    """An epoch's offset and the order of its windows."""
    drawn = np.random.default_rng([seed, epoch])
    return int(drawn.integers(size)), drawn.permutation(windows)


def held_out_rows(
    stream: Stream, context: int, rows: int, rank: int = 0, world: int = 1, every: int = 1
) -> Iterator[tuple[Int64[Tensor, "B width"], Bool[Tensor, "B T"]]]:
    """The held-out stream in order: ids and which targets count. Over all ranks every token but the first is a target once.

    With `every` above 1 only each such row, so that a part of a text is spread over all of it. The last row is filled
    with the document mark, which does not count. All ranks give equally many batches of equal
    shape, so that they can sum together; a rank that has run out gives rows of which nothing counts.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    if every < 1:
        raise ValueError(f"every {every} must be 1 or more")
    total = -(-(len(stream) - 1) // context)  # rows, rounded up
    total = -(-total // every)
    for first in range(0, total, rows * world):
        ids = torch.full((rows, context + 1), stream.bos)
        counts = torch.zeros((rows, context), dtype=torch.bool)
        for row in range(rows):
            start = (first + rank * rows + row) * every * context
            stop = min(start + context + 1, len(stream))
            if stop - start > 1:
                ids[row, : stop - start] = torch.from_numpy(stream.read(start, stop))
                counts[row, : stop - start - 1] = True
        yield ids, counts


def document_index(ids: Int64[Tensor, "B T"], bos: int) -> Int64[Tensor, "B T"]:
    """Which document of its row each token is in, for attention that stays inside documents; 0 began before the row."""
    return (ids == bos).cumsum(1)


class Rows(NamedTuple):
    """Some rows of a step."""

    ids: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    "the ids one place later; -100 is not counted"
    documents: Int64[Tensor, "B T"] | None
    "which text each token is in; None where every token sees all earlier ones of its row"


@runtime_checkable
class Source(Protocol):
    """Where rows come from."""

    @property
    def context(self) -> int:
        """Tokens of a row."""

    @property
    def rows(self) -> int:
        """Rows of a step, over all ranks and micro-batches."""

    def rows_at(self, step: int, first: int, count: int) -> Rows:
        """Rows [first, first + count) of a step, 0-based."""

    def counted(self, step: int) -> int:
        """Targets that count in the whole step: what its summed loss is divided by."""


@dataclass(frozen=True)
class BooksSource:
    """A corpus, window after window; every target counts."""

    batches: Batches

    @property
    def context(self) -> int:
        return self.batches.context

    @property
    def rows(self) -> int:
        return self.batches.rows

    def rows_at(self, step: int, first: int, count: int) -> Rows:
        start = step * self.rows + first
        ids = torch.stack([self.batches.row(start + i) for i in range(count)])  # (B, T + 1)
        return Rows(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)

    def counted(self, step: int) -> int:
        return self.rows * self.context
