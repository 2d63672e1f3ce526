"""The one operation of steering, and its account: what an engine runs at a steered layer.

    h' = h + v * (clamp(p, floor, ceiling) - p + add),     p = <h, v> in fp32 whatever h is

`act` picks the Triton kernel for tensors on a GPU and the plain twin elsewhere, and the twin too while `torch.compile`
traces: inductor fuses it into the normalisation that follows, which on a GPU costs less than any kernel of its own. A token
that no step changes is bitwise what it was. The account (tokens seen and fired, sum and maximum of the corrections, by layer
and row) comes out of the same operation: the kernel writes it when it decodes, and otherwise `book` does for all layers of a
forward at once. Both write in place, so a captured graph keeps it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from personatlas.steering.hooks.tables import OPENING, Table, Tables

ENDLESS = 2**31 - 1


@dataclass(frozen=True)
class Account:
    """What was done at C layers (or at one, without the first axis), by row: tokens in a phase of the row's plan, tokens
    changed, and the corrections' length (residual units), summed and the largest."""

    seen: Int[Tensor, "*C R"]
    fired: Int[Tensor, "*C R"]
    total: Float[Tensor, "*C R"]
    most: Float[Tensor, "*C R"]

    @classmethod
    def empty(cls, layers: int, rows: int, device: torch.device) -> "Account":
        """Nothing seen yet."""
        counts = [torch.zeros(layers, rows, dtype=torch.long, device=device) for _ in range(2)]
        return cls(*counts, *(torch.zeros(layers, rows, device=device) for _ in range(2)))

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors."""
        return self.seen, self.fired, self.total, self.most

    def at(self, place: int) -> "Account":
        """The account of one layer, on the same memory."""
        return Account(*(column[place] for column in self.columns))


@dataclass(frozen=True)
class Batch:
    """What the rows (B,) of the next forward are: the plan they follow, how many of their columns are real, the column at
    which the answer begins, whether the sequence begins with the first column, and their places in the account (None: 0, 1,
    ...)."""

    plans: Int[Tensor, " B"]
    lengths: Int[Tensor, " B"]
    starts: Int[Tensor, " B"]
    opening: Int[Tensor, " B"]
    slots: Int[Tensor, " B"] | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        slots = None if self.slots is None else self.slots.to(device)
        plans, lengths, starts, opening = (
            value.to(device) for value in (self.plans, self.lengths, self.starts, self.opening)
        )
        return Batch(plans, lengths, starts, opening, slots)


@dataclass(frozen=True)
class Done:
    """What one layer did to tokens: the length of each one's correction (0: left alone), and which ones were seen."""

    length: Float[Tensor, "B T"]
    seen: Bool[Tensor, "B T"]


@dataclass(frozen=True)
class Looked:
    """What layers do to the tokens of one forward (C layers, or one without the first axis), looked up for all of them at once: on
    a CPU, looking it up layer by layer was a tenth of a decoding step (LOG.md)."""

    bounds: Float[Tensor, "*C B T K 3"]
    seen: Bool[Tensor, "*C B T"]

    def at(self, place: int) -> "Looked":
        """Of one layer."""
        return Looked(self.bounds[place], self.seen[place])


def act(
    h: Float[Tensor, "B T D"], table: Table, batch: Batch, account: Account, looked: Looked | None = None
) -> tuple[Float[Tensor, "B T D"], Done | None]:
    """h after the plans' steps, and what was done; None when the layer's account has been brought up to date already."""
    if looked is not None:
        moved, length = act_as_looked(h, table.vectors, looked.bounds)
        return moved, Done(length, looked.seen)
    if h.is_cuda and not torch.compiler.is_compiling():
        from personatlas.steering.hooks.kernels import act_on_gpu

        return act_on_gpu(h, table, batch, account)
    return act_plainly(h, table, batch)


def act_plainly(h: Float[Tensor, "B T D"], table: Table, batch: Batch) -> tuple[Float[Tensor, "B T D"], Done]:
    """In plain torch: h after the steps, and what was done."""
    at = torch.arange(h.shape[1], device=h.device)
    side = (at >= batch.starts[:, None]).long() + OPENING * (at == 0) * batch.opening[:, None]  # (B, T)
    real = at < batch.lengths[:, None]
    plans = batch.plans[:, None].expand_as(side)
    bounds = table.bounds[plans, side]  # (B, T, K, 3)
    seen = table.active[plans, side] & real
    before = moved = h.float()
    changed = torch.zeros_like(real)
    length = torch.zeros_like(moved[..., 0])
    for k, vector in enumerate(table.vectors.unbind(0)):
        low, high, add = bounds[..., k, :].unbind(-1)
        # (B, T); not a matrix product, whose precision is the user's choice on a GPU
        projection = (moved * vector).sum(-1)
        delta = torch.minimum(torch.maximum(projection, low), high) - projection + add
        delta = torch.where(real, delta, torch.zeros_like(delta))
        changed = changed | (delta != 0)
        length = delta.abs()
        moved = moved + delta[..., None] * vector
    if len(table.vectors) > 1:
        length = torch.where(changed, (moved - before).norm(dim=-1), torch.zeros_like(length))
    return torch.where(changed[..., None], moved.to(h.dtype), h), Done(length, seen)


def look(tables: Tables, batch: Batch, length: int) -> Looked:
    """The bounds of every token of a forward of `length` columns; padding and rows at rest follow the plan that does nothing."""
    at = torch.arange(length, device=batch.plans.device)
    side = (at >= batch.starts[:, None]).long() + OPENING * (at == 0) * batch.opening[:, None]  # (B, T)
    _, plans, sides, _, _ = tables.bounds.shape
    idle = (plans - 1) * sides
    place = torch.where(at < batch.lengths[:, None], batch.plans[:, None] * sides + side, idle).flatten()
    bounds = tables.bounds.flatten(1, 2)[:, place].unflatten(1, side.shape)
    return Looked(bounds, tables.active.flatten(1)[:, place].unflatten(1, side.shape))


def act_as_looked(
    h: Float[Tensor, "B T D"], vectors: Float[Tensor, "K D"], bounds: Float[Tensor, "B T K 3"]
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T"]]:
    """`act_plainly` with the bounds at hand: h after the steps, and the length of each token's correction."""
    before = moved = h.float()
    length, changed = h.new_zeros(h.shape[:2], dtype=torch.float32), None
    for k, vector in enumerate(vectors.unbind(0)):
        low, high, add = bounds[:, :, k].unbind(-1)
        projection = (moved * vector).sum(-1)
        delta = torch.minimum(torch.maximum(projection, low), high) - projection + add
        now = delta != 0
        if bool(now.any()):
            moved = moved + delta[..., None] * vector
            length, changed = delta.abs(), now if changed is None else changed | now
    if changed is None:
        return h, length
    if len(vectors) > 1:
        length = torch.where(changed, (moved - before).norm(dim=-1), torch.zeros_like(length))
    return torch.where(changed[..., None], moved.to(h.dtype), h), length


def book(account: Account, slots: Int[Tensor, " B"] | None, done: Sequence[tuple[int, Done]]) -> None:
    """Add what a forward did at layers (by place) to the rows' account, all of them in one pass."""
    device = account.seen.device
    length = torch.stack([one.length.to(device) for _, one in done])  # (C, B, T)
    seen = torch.stack([one.seen.to(device) for _, one in done])
    now = seen.sum(2), (length > 0).sum(2), length.sum(2), length.amax(2)
    if slots is None and len(done) == len(account.seen):  # no scattering, so that compilers can fuse it
        before = tuple(column[:, : length.shape[1]] for column in account.columns)
        for column, value in zip(before[:3], now[:3], strict=True):
            column.add_(value)
        before[3].copy_(torch.maximum(before[3], now[3]))
        return
    layers = torch.tensor([place for place, _ in done], device=device)[:, None]
    rows = torch.arange(length.shape[1], device=device) if slots is None else slots.to(device)
    for column, value in zip(account.columns[:3], now[:3], strict=True):
        column[layers, rows] += value  # no row is there twice
    account.most[layers, rows] = torch.maximum(account.most[layers, rows], now[3])
