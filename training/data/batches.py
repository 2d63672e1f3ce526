"""The tokens of a training step: a function of the step alone, so nothing needs to be saved to resume.

    batches = CorpusBatches(tokens.train, context=2048, rows=64, seed=0)
    batch = batches.rows_at(step, first=0, count=32)      # batch.ids, batch.targets (32, 2048)
    loss = model(batch.ids, batch.targets, None, batch.documents) / batches.counted(step)

The stream is a ring: its end is followed by its first document. Epoch e cuts it into windows of `context`
tokens (and the next one, as a target) from an offset drawn for e, and goes through them in an order drawn for
e: no token is a target twice in an epoch, and windows differ from epoch to epoch, which matters where a small
corpus is repeated. Rows are numbered over all ranks and micro-batches: a step has the same rows whatever the
world size. Documents are not cropped to let every row begin with one, since a small corpus has no text to
spare.
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


class TokenBatch(NamedTuple):
    """Some rows of a step."""

    ids: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    "the ids one position later; -100 is not counted"
    documents: Int64[Tensor, "B T"] | None
    "which text each token is in; None where every token sees all earlier ones of its row"


@runtime_checkable
class BatchSource(Protocol):
    """Where the rows of training steps come from."""

    @property
    def context(self) -> int:
        """Tokens of a row."""

    @property
    def rows(self) -> int:
        """Rows of a step, over all ranks and micro-batches."""

    def rows_at(self, step: int, first: int, count: int) -> TokenBatch:
        """Rows [first, first + count) of a step, 0-based."""

    def counted(self, step: int) -> int:
        """Targets that count in the whole step: what its summed loss is divided by."""


@dataclass(frozen=True)
class CorpusBatches:
    """Windows of a stream; every target counts. Raises `UserError` for less than one window."""

    stream: Stream
    context: int
    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.context < 1 or self.rows < 1:
            raise ValueError(f"context {self.context} and rows {self.rows} must be 1 or more")
        if len(self.stream) < self.context + 1:
            raise UserError(
                f"the training text has {len(self.stream):,} tokens, fewer than one row of "
                f"{self.context + 1:,}; give more text or a shorter context"
            )

    @property
    def windows(self) -> int:
        """Rows in an epoch."""
        return len(self.stream) // self.context

    def rows_at(self, step: int, first: int, count: int) -> TokenBatch:
        """Rows [first, first + count) of a step, 0-based."""
        start = step * self.rows + first
        ids = torch.stack([self.window(start + i) for i in range(count)])  # (B, T + 1)
        return TokenBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)

    def counted(self, step: int) -> int:
        """Targets that count in the whole step: all of them."""
        return self.rows * self.context

    def window(self, number: int) -> Int64[Tensor, "width"]:
        """Row `number` of the whole run: `context` + 1 ids."""
        epoch, index = divmod(number, self.windows)
        size = len(self.stream)
        offset, order = _epoch(self.seed, epoch, self.windows, size)
        start = (offset + int(order[index]) * self.context) % size
        stop = start + self.context + 1
        if stop <= size:
            return torch.from_numpy(self.stream.read(start, stop))
        ring = np.concatenate([self.stream.read(start, size), self.stream.read(0, stop - size)])
        return torch.from_numpy(ring)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, windows: int, size: int) -> tuple[int, np.ndarray]:
    """An epoch's offset and the order of its windows."""
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(size)), generator.permutation(windows)


def held_out_rows(
    stream: Stream, context: int, rows: int, rank: int = 0, world: int = 1, every: int = 1
) -> Iterator[tuple[Int64[Tensor, "B width"], Bool[Tensor, "B T"]]]:
    """The held-out stream in order: ids and which targets count, every token but the first once over all
    ranks.

    With `every` above 1 only each such row, spread over all of the text. All ranks give equally many batches
    of equal shape, so that they can sum together; what lies beyond the end does not count.
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
