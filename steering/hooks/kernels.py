"""The steering step as one GPU kernel (Triton), imported only on a GPU; `step.apply_bounds` is the same in
plain torch.

One program per token holds the whole residual row in registers, so h is read once and written once. With one
token a row (decoding) the program also writes the row's account, and nothing else is launched; with more, it
writes what was done to each token, which is added up afterwards for all layers at once.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from personatlas.steering.hooks.account import Account, Batch, StepResult
from personatlas.steering.hooks.tables import Table


@triton.jit
def _apply_steps(h_row, vectors, bounds, entry, real, d, inside, d_model, K: tl.constexpr):
    """A row after K steps with the triples of `entry`; whether any changed it; the whole correction's
    length.
    """
    before = h_row.to(tl.float32)
    moved = before
    changed = False
    length = 0.0
    for k in tl.static_range(K):
        bound = bounds + (entry * K + k) * 3
        low, high, add = tl.load(bound), tl.load(bound + 1), tl.load(bound + 2)
        vector = tl.load(vectors + k * d_model + d, mask=inside, other=0.0)
        projection = tl.sum(moved * vector, 0)
        delta = tl.where(real, tl.minimum(tl.maximum(projection, low), high) - projection + add, 0.0)
        changed = changed | (delta != 0.0)
        length = tl.abs(delta)
        moved = moved + delta * vector
    if K > 1:
        length = tl.where(changed, tl.sqrt(tl.sum((moved - before) * (moved - before), 0)), 0.0)
    return moved, changed, length


@triton.jit
def _apply_table(
    h, out, vectors, bounds, active, slots, plans, lengths, starts, opening,
    seen, fired, total, largest, out_length, out_seen,
    tokens, d_model, h_b, h_t,
    K: tl.constexpr, BLOCK: tl.constexpr, ONE_TOKEN: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """ONE_TOKEN: one token a row, whose account is written here; otherwise `out_length` and `out_seen` (B, T)
    are. IN_ORDER: row b's account is in slot b."""
    row, t = tl.program_id(0), tl.program_id(1)
    # all that depends on nothing is loaded first: a program lives for a few memory latencies, one after
    # another
    entry = tl.load(plans + row).to(tl.int32) * 4
    opens = tl.load(opening + row).to(tl.int32)
    start = tl.load(starts + row)
    stop = tl.load(lengths + row)
    d = tl.arange(0, BLOCK)
    inside = d < d_model
    h_row = tl.load(h + row.to(tl.int64) * h_b + t.to(tl.int64) * h_t + d, mask=inside, other=0.0)
    if ONE_TOKEN:
        slot = row.to(tl.int64) if IN_ORDER else tl.load(slots + row)
        seen_before, fired_before = tl.load(seen + slot), tl.load(fired + slot)
        total_before, largest_before = tl.load(total + slot), tl.load(largest + slot)
    entry += (t >= start).to(tl.int32) + 2 * tl.where(t == 0, opens, 0)
    real = t < stop
    counts = tl.where(real, tl.load(active + entry).to(tl.int64), 0)
    moved, changed, length = _apply_steps(h_row, vectors, bounds, entry, real, d, inside, d_model, K)
    token = row.to(tl.int64) * tokens + t
    tl.store(out + token * d_model + d, tl.where(changed, moved.to(h_row.dtype), h_row), mask=inside)
    if ONE_TOKEN:
        tl.store(seen + slot, seen_before + counts)
        tl.store(fired + slot, fired_before + tl.where(length > 0.0, 1, 0))
        tl.store(total + slot, total_before + length)
        tl.store(largest + slot, tl.maximum(largest_before, length))
    else:
        tl.store(out_length + token, length)
        tl.store(out_seen + token, counts.to(tl.int8))


def apply_table_on_gpu(
    h: Float[Tensor, "B T D"], table: Table, batch: Batch, account: Account
) -> tuple[Float[Tensor, "B T D"], StepResult | None]:
    """`step.apply_table` in one kernel; with one token a row it brings the layer's account up to date
    itself.
    """
    rows, tokens, d_model = h.shape
    if h.stride(2) != 1:
        h = h.contiguous()
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    one_token = tokens == 1 and account.seen.device == h.device
    length = account.total if one_token else torch.empty(rows, tokens, device=h.device)
    seen = account.seen if one_token else torch.empty(rows, tokens, dtype=torch.int8, device=h.device)
    columns = account.columns if one_token else (length,) * 4  # pointers that are not read
    in_order = batch.slots is None
    slots = batch.plans if in_order else batch.slots
    block = triton.next_power_of_2(d_model)
    with torch.cuda.device_of(h):  # Triton launches on the current device
        _apply_table[(rows, tokens)](
            h, out, table.vectors, table.bounds, table.active, slots, batch.plans, batch.lengths, batch.starts,
            batch.opening, *columns, length, seen, tokens, d_model, h.stride(0), h.stride(1),
            K=len(table.vectors), BLOCK=block, ONE_TOKEN=one_token, IN_ORDER=in_order,
            num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return out, None if one_token else StepResult(length, seen.bool())
