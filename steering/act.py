"""The one operation of steering, and its account: what an engine runs at a steered layer.

    h' = h + v * (clamp(p, floor, ceiling) - p + add),     p = <h, v> in fp32 whatever h is

`act` picks the Triton kernel for tensors on a GPU and the plain twin elsewhere, and the twin too while `torch.compile`
traces: inductor fuses it into the normalisation that follows, which on a GPU costs less than any kernel of its own. A token
that no step changes is bitwise what it was. The account (tokens seen and fired, sum and maximum of the corrections, by row)
is written by the same operation, in place, so a captured graph keeps it too.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from personaxis.steering.tables import Table

ENDLESS = 2**31 - 1


@dataclass(frozen=True)
class Account:
    """What was done at one layer, by row: tokens in a phase of the row's plan, tokens changed, and the corrections' length
    (residual units), summed and the largest."""

    seen: Int[Tensor, " R"]
    fired: Int[Tensor, " R"]
    total: Float[Tensor, " R"]
    most: Float[Tensor, " R"]

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "Account":
        """Nothing seen yet."""
        counts = [torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2)]
        return cls(*counts, *(torch.zeros(rows, device=device) for _ in range(2)))

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors."""
        return self.seen, self.fired, self.total, self.most


@dataclass(frozen=True)
class Batch:
    """What the rows (B,) of the next forward are: the plan they follow, how many of their columns are real, the column at
    which the answer begins, and their places in the account (None: 0, 1, ...)."""

    plans: Int[Tensor, " B"]
    lengths: Int[Tensor, " B"]
    starts: Int[Tensor, " B"]
    slots: Int[Tensor, " B"] | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        slots = None if self.slots is None else self.slots.to(device)
        return Batch(self.plans.to(device), self.lengths.to(device), self.starts.to(device), slots)


def act(h: Float[Tensor, "B T D"], table: Table, batch: Batch, account: Account) -> Float[Tensor, "B T D"]:
    """h after the plans' steps, with the account brought up to date."""
    if h.is_cuda and not torch.compiler.is_compiling():
        from personaxis.steering.kernels import act_on_gpu

        return act_on_gpu(h, table, batch, account)
    moved, length, seen = act_plainly(h, table, batch)
    book(account, batch.slots, length, seen)
    return moved


def act_plainly(
    h: Float[Tensor, "B T D"], table: Table, batch: Batch
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """In plain torch: h after the steps, the length of each token's correction, and whether the token was seen (B, T)."""
    at = torch.arange(h.shape[1], device=h.device)
    side = (at >= batch.starts[:, None]).long()  # (B, T)
    real = at < batch.lengths[:, None]
    plans = batch.plans[:, None].expand_as(side)
    bounds = table.bounds[plans, side]  # (B, T, K, 3)
    seen = table.active[plans, side] & real
    before = moved = h.float()
    changed = torch.zeros_like(real)
    length = torch.zeros_like(moved[..., 0])
    for k, vector in enumerate(table.vectors.unbind(0)):
        low, high, add = bounds[..., k, :].unbind(-1)
        projection = (moved * vector).sum(
            -1
        )  # (B, T); not a matrix product, whose precision is the user's choice on a GPU
        delta = torch.minimum(torch.maximum(projection, low), high) - projection + add
        delta = torch.where(real, delta, torch.zeros_like(delta))
        changed = changed | (delta != 0)
        length = delta.abs()
        moved = moved + delta[..., None] * vector
    if len(table.vectors) > 1:
        length = torch.where(changed, (moved - before).norm(dim=-1), torch.zeros_like(length))
    return torch.where(changed[..., None], moved.to(h.dtype), h), length, seen


def book(
    account: Account, slots: Int[Tensor, " B"] | None, length: Float[Tensor, "B T"], seen: Shaped[Tensor, "B T"]
) -> None:
    """Add what happened to tokens (B, T) to the rows' account."""
    now = seen.sum(1), (length > 0).sum(1), length.sum(1), length.amax(1)
    if slots is None:  # the same place in every forward: no scattering, so that compilers can fuse it
        for column, value in zip(account.columns[:3], now[:3], strict=True):
            column[: len(value)].add_(value)
        largest = account.most[: len(now[3])]
        largest.copy_(torch.maximum(largest, now[3]))
        return
    for column, value in zip(account.columns[:3], now[:3], strict=True):
        column[slots] += value  # no slot is there twice
    account.most[slots] = torch.maximum(account.most[slots], now[3])
