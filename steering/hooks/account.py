"""What steering did, by layer and row: kept on the model's device while it runs, and read out as a
`SteeringTally`.

account = Account.empty(layers=6, rows=32, device)
accumulate(account, None, [(0, result), (1, result), ...])     # after a forward, all layers at once
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class HookDidNotFire(RuntimeError):
    """A hook did not fire in a forward: something goes around the blocks, and what was made is not
    steered.
    """


@dataclass(frozen=True)
class Account:
    """What was done at C layers (or at one, without the first axis), by row of the batch.

    `seen` tokens were in a phase of the row's plan, `fired` were changed; `total` and `largest` are the sum
    and the maximum of the corrections' lengths (residual units).
    """

    seen: Int[Tensor, "*C R"]
    fired: Int[Tensor, "*C R"]
    total: Float[Tensor, "*C R"]
    largest: Float[Tensor, "*C R"]

    @classmethod
    def empty(cls, layers: int, rows: int, device: torch.device) -> "Account":
        """An account in which nothing was seen yet."""
        counts = [torch.zeros(layers, rows, dtype=torch.long, device=device) for _ in range(2)]
        return cls(*counts, *(torch.zeros(layers, rows, device=device) for _ in range(2)))

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors."""
        return self.seen, self.fired, self.total, self.largest

    def at(self, index: int) -> "Account":
        """The account of one layer, on the same memory."""
        return Account(*(column[index] for column in self.columns))


@dataclass(frozen=True)
class Batch:
    """The rows (B,) of the next forward.

    `plans` is the plan that each row follows, `lengths` how many of its columns are real, `starts` the column
    at which its answer begins, `opening` whether its sequence begins with the first column, `slots` its place
    in the account (None: 0, 1, ...).
    """

    plans: Int[Tensor, " B"]
    lengths: Int[Tensor, " B"]
    starts: Int[Tensor, " B"]
    opening: Int[Tensor, " B"]
    slots: Int[Tensor, " B"] | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        slots = None if self.slots is None else self.slots.to(device)
        described = (self.plans, self.lengths, self.starts, self.opening)
        plans, lengths, starts, opening = (column.to(device) for column in described)
        return Batch(plans, lengths, starts, opening, slots)


@dataclass(frozen=True)
class StepResult:
    """What one layer did to tokens: the length of each one's correction (0: left alone), and which were
    seen.
    """

    length: Float[Tensor, "B T"]
    seen: Bool[Tensor, "B T"]


def accumulate(
    account: Account, slots: Int[Tensor, " B"] | None, results: Sequence[tuple[int, StepResult]]
) -> None:
    """Adds what a forward did at layers (by index) to the rows' account, in place and all of them in one
    pass.
    """
    device = account.seen.device
    length = torch.stack([result.length.to(device) for _, result in results])  # (C, B, T)
    seen = torch.stack([result.seen.to(device) for _, result in results])
    sums = seen.sum(2), (length > 0).sum(2), length.sum(2)
    largest = length.amax(2)
    if slots is None and len(results) == len(account.seen):  # no scattering, so that compilers can fuse it
        before = tuple(column[:, : length.shape[1]] for column in account.columns)
        for column, value in zip(before[:3], sums, strict=True):
            column.add_(value)
        before[3].copy_(torch.maximum(before[3], largest))
        return
    layers = torch.tensor([index for index, _ in results], device=device)[:, None]
    rows = torch.arange(length.shape[1], device=device) if slots is None else slots.to(device)
    for column, value in zip(account.columns[:3], sums, strict=True):
        column[layers, rows] += value  # no row is there twice
    account.largest[layers, rows] = torch.maximum(account.largest[layers, rows], largest)


@dataclass(frozen=True)
class SteeringTally:
    """An account as it was read: what was done at C steered `layers` to B rows of a batch or prompts of a
    chunk.

    A layer with several steps counts a token once, with the whole correction's length.
    """

    layers: tuple[int, ...]
    seen: Int[Tensor, "C B"]
    fired: Int[Tensor, "C B"]
    total: Float[Tensor, "C B"]
    largest: Float[Tensor, "C B"]

    @classmethod
    def from_columns(cls, layers: tuple[int, ...], columns: Float[Tensor, "C 4 N"]) -> "SteeringTally":
        """A tally of an account's columns, stacked in fp64."""
        seen, fired, total, largest = columns.unbind(1)
        return cls(layers, seen.long(), fired.long(), total.float(), largest.float())

    @classmethod
    def concatenate(cls, tallies: Sequence["SteeringTally"]) -> "SteeringTally":
        """Tallies of the same layers, row after row."""
        columns = zip(*((own.seen, own.fired, own.total, own.largest) for own in tallies), strict=True)
        return cls(tallies[0].layers, *(torch.cat(column, dim=1) for column in columns))

    @property
    def share(self) -> float:
        """Fired tokens among those seen, over all layers and rows; NaN when none was seen."""
        seen = int(self.seen.sum())
        return int(self.fired.sum()) / seen if seen else float("nan")

    @property
    def mean(self) -> float:
        """Mean length of the correction of a seen token at a layer (0 where it did not fire), in residual
        units.
        """
        seen = int(self.seen.sum())
        return float(self.total.sum()) / seen if seen else float("nan")

    def rows(self, rows: Sequence[int], layers: Collection[int] | None = None) -> "SteeringTally":
        """The tally of some rows only, and of some layers: an arm's, where other arms act at more."""
        kept = [i for i, layer in enumerate(self.layers) if layers is None or layer in layers]
        index = torch.tensor(list(rows), dtype=torch.long)
        columns = (self.seen, self.fired, self.total, self.largest)
        own = tuple(self.layers[i] for i in kept)
        return SteeringTally(own, *(column[kept][:, index] for column in columns))
