"""The step that an engine runs at a steered layer.

    h' = h + v * (clamp(p, floor, ceiling) - p + add),     p = <h, v> in fp32 whatever h is

`apply_table` picks the Triton kernel for tensors on a GPU, and otherwise `apply_bounds` in plain torch; the
latter too while `torch.compile` traces: inductor fuses it into the normalisation that follows, which on a GPU
costs less than any kernel of its own. A token that no step changes is bitwise what it was. Both are compared
with the reference, `personatlas.persona.interventions.apply_steps`.

    moved, result = apply_bounds(h, table.vectors, gather_bounds(table, batch, h.shape[1]))
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personatlas.steering.hooks.account import Account, Batch, StepResult
from personatlas.steering.hooks.tables import OPENING, Table, Tables


@dataclass(frozen=True)
class TokenBounds:
    """The triples (floor, ceiling, add) of every token at C layers (or at one, without the first axis), and
    who is seen.

    They are gathered for all layers at once: layer by layer it was a tenth of a decoding step on a CPU
    (LOG.md).
    """

    bounds: Float[Tensor, "*C B T K 3"]
    seen: Bool[Tensor, "*C B T"]

    def at(self, index: int) -> "TokenBounds":
        """The bounds at one layer."""
        return TokenBounds(self.bounds[index], self.seen[index])


def gather_bounds(tables: Table | Tables, batch: Batch, length: int) -> TokenBounds:
    """The bounds of every token of a forward of `length` columns; padding follows the plan that does
    nothing.
    """
    column = torch.arange(length, device=batch.plans.device)
    opening = (column == 0) * batch.opening[:, None]
    side = (column >= batch.starts[:, None]).long() + OPENING * opening  # (B, T)
    plans, sides = tables.active.shape[-2:]
    row = torch.where(
        column < batch.lengths[:, None], batch.plans[:, None] * sides + side, (plans - 1) * sides
    )
    bounds = tables.bounds.flatten(-4, -3)[..., row.flatten(), :, :].unflatten(-3, side.shape)
    return TokenBounds(bounds, tables.active.flatten(-2)[..., row.flatten()].unflatten(-1, side.shape))


def apply_bounds(
    h: Float[Tensor, "B T D"], vectors: Float[Tensor, "K D"], tokens: TokenBounds
) -> tuple[Float[Tensor, "B T D"], StepResult]:
    """h after the K steps of one layer, each with the bounds of its token, and what was done."""
    # where nothing fires there is no pass over h; but a branch would break a compiled graph, and cut a
    # gradient off
    skips = not (torch.compiler.is_compiling() or tokens.bounds.requires_grad)
    before = moved = h.float()
    changed = torch.zeros_like(tokens.seen)
    length = torch.zeros_like(moved[..., 0])
    unchanged = skips
    for k, vector in enumerate(vectors.unbind(0)):
        floor, ceiling, add = tokens.bounds[..., k, :].unbind(-1)
        # (B, T); not a matrix product, whose precision is the user's choice on a GPU
        projection = (moved * vector).sum(-1)
        delta = torch.minimum(torch.maximum(projection, floor), ceiling) - projection + add
        fires = delta != 0
        if skips and not bool(fires.any()):
            continue
        unchanged, changed, length = False, changed | fires, delta.abs()
        moved = moved + delta[..., None] * vector
    if unchanged:
        return h, StepResult(length, tokens.seen)
    if len(vectors) > 1:
        length = torch.where(changed, (moved - before).norm(dim=-1), torch.zeros_like(length))
    return torch.where(changed[..., None], moved.to(h.dtype), h), StepResult(length, tokens.seen)


def apply_table(
    h: Float[Tensor, "B T D"], table: Table, batch: Batch, account: Account, tokens: TokenBounds | None = None
) -> tuple[Float[Tensor, "B T D"], StepResult | None]:
    """h after the rows' steps, and what was done; None where the layer's account has been brought up to date
    already.

    `tokens` are the batch's bounds, where they are at hand.
    """
    if tokens is None and h.is_cuda and not torch.compiler.is_compiling():
        from personatlas.steering.hooks.kernels import apply_table_on_gpu

        return apply_table_on_gpu(h, table, batch, account)
    return apply_bounds(h, table.vectors, tokens or gather_bounds(table, batch, h.shape[1]))
