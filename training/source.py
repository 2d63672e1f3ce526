"""What a training step is fed with: rows of tokens, a function of the step alone, so nothing needs to be saved to go on.

    source = BooksSource(Batches(tokens.train, context=2048, rows=64, seed=0))
    rows = source.rows_at(step, first=0, count=32)      # rows.ids, rows.targets (32, 2048)
    loss = model(rows.ids, rows.targets, None, rows.documents) / source.counted(step)

Rows are numbered over all ranks and micro-batches: a step has the same rows whatever the world size.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from personaxis.training.batches import Batches


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
