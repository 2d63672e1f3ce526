"""GPU kernels (Triton): the span sum of recording, attention of one new token, and the draw. Imported only on
a GPU.

Each has a twin in plain torch beside its caller, which the tests compare it with.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

# tokens and features that a program adds at a time, and its warps: many small programs hide the memory's
# latency
SPAN_BLOCK = (16, 64, 1)


@triton.jit
def _span_sum(h, start, stop, out, stride_b, stride_t, d_model, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program per row and block of features: add the span's tokens in fp32. Only the span is read."""
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(start + row), tl.load(stop + row)
    inside = columns < d_model
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    base = h + row.to(tl.int64) * stride_b
    for t in range(first, last, BLOCK_T):
        tokens = t + tl.arange(0, BLOCK_T)
        mask = (tokens < last)[:, None] & inside[None, :]
        total += tl.load(base + tokens[:, None] * stride_t + columns[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(out + row * d_model + columns, tl.sum(total, 0), mask=inside)


def span_sum_on_gpu(
    h: Float[Tensor, "B T D"], start: Int[Tensor, " B"], stop: Int[Tensor, " B"]
) -> Float[Tensor, "B D"]:
    """Sum of the tokens start <= t < stop of each row, fp32. It reads h once, and of h only the spans."""
    rows, _, d_model = h.shape
    if h.stride(2) != 1:
        h = h.contiguous()
    out = torch.empty(rows, d_model, device=h.device)
    tokens, columns, warps = SPAN_BLOCK
    block = min(columns, triton.next_power_of_2(d_model))
    grid = (rows, triton.cdiv(d_model, block))
    with torch.cuda.device_of(h):  # Triton launches on the current device, whichever that is
        _span_sum[grid](
            h, start, stop, out, h.stride(0), h.stride(1), d_model,
            BLOCK_T=tokens, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return out


@triton.jit
def _attend(
    q, k, v, position, out, scale, window, groups,
    q_b, q_h, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h,
    D: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and key head: online softmax over the row's own columns, for all query heads of
    that key head.

    The few query heads are padded to the 16 rows of a matrix instruction. Multiplying and adding without it,
    in registers, was ten times slower on an H200, although the kernel has hardly any arithmetic.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = tl.load(position + row)
    first = tl.where(window > 0, tl.maximum(last - window + 1, 0), 0)
    d, g = tl.arange(0, D), tl.arange(0, G)
    inside = g < groups
    query = tl.load(
        q + row * q_b + (head * groups + g)[:, None] * q_h + d[None, :], mask=inside[:, None], other=0.0
    )
    top = tl.full((G,), float("-inf"), tl.float32)
    mass = tl.zeros((G,), tl.float32)
    total = tl.zeros((G, D), tl.float32)
    for t in range(first, last + 1, BLOCK):
        column = t + tl.arange(0, BLOCK)
        seen = column <= last
        key = tl.load(
            k + row * k_b + head * k_h + column[:, None] * k_t + d[None, :], mask=seen[:, None], other=0.0
        )
        value = tl.load(
            v + row * v_b + head * v_h + column[:, None] * v_t + d[None, :], mask=seen[:, None], other=0.0
        )
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # (G, BLOCK)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        fade = tl.exp(top - higher)
        weight = tl.exp(score - higher[:, None])
        total = total * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        mass = mass * fade + tl.sum(weight, 1)
        top = higher
    place = out + row * o_b + (head * groups + g)[:, None] * o_h + d[None, :]
    tl.store(place, (total / mass[:, None]).to(out.dtype.element_ty), mask=inside[:, None])


def attend_on_gpu(
    query: Float[Tensor, "B H D"],
    keys: Float[Tensor, "B K T D"],
    values: Float[Tensor, "B K T D"],
    positions: Int[Tensor, " B"],
    scale: float,
    window: int = 0,
) -> Float[Tensor, "B H D"]:
    """Attention of one token per row to columns 0..position of its own slot (the last `window` of them, if
    not 0).

    Columns beyond a row's position are never read, so a batch of uneven rows costs what its tokens cost. D is
    a power of two, at least 16.
    """
    rows, heads, d_head = query.shape
    key_heads = keys.shape[1]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    groups = heads // key_heads
    with torch.cuda.device_of(query):
        _attend[(rows, key_heads)](
            query, keys, values, positions, out, scale, window, groups,
            *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], *out.stride()[:2],
            D=d_head, G=max(16, triton.next_power_of_2(groups)), BLOCK=64 if d_head <= 128 else 32, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _ordered(x):
    """A float's bits as an int32 that sorts as the float does."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _key(x, inverse_temperature, SHIFT: tl.constexpr):
    """A key that sorts as the scaled logit does. Half-precision logits leave the low bits empty: they need no
    bisecting.
    """
    if SHIFT == 0:
        key = _ordered(x * inverse_temperature)
    else:
        key = _ordered(x) >> SHIFT
    return key.to(tl.int64)


@triton.jit
def _threshold(
    line, vocabulary, highest, inverse_temperature, top_p, reach, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The key of the nucleus's least token, by bisecting the floats themselves: exact, and without a sort."""
    at, top = tl.arange(0, BLOCK), highest * inverse_temperature
    mass = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        x = tl.load(line + first + at, mask=first + at < vocabulary, other=float("-inf")).to(tl.float32)
        mass += tl.exp(x * inverse_temperature - top)
    wanted = tl.sum(mass, 0) * top_p
    # the largest threshold whose set {x >= threshold} holds the wanted mass lies in [low, high)
    low = _key(highest - reach / inverse_temperature, inverse_temperature, SHIFT) - 1
    high = _key(highest, inverse_temperature, SHIFT) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        held = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vocabulary, BLOCK):
            x = tl.load(line + first + at, mask=first + at < vocabulary, other=float("-inf")).to(tl.float32)
            inside = _key(x, inverse_temperature, SHIFT) >= middle
            held += tl.where(inside, tl.exp(x * inverse_temperature - top), 0.0)
        enough = tl.sum(held, 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _draw(
    logits, noise, out, stride, vocabulary, inverse_temperature, top_p, reach,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """One program per row: the nucleus's threshold, then Gumbel-max above it. BY_ROW: the three numbers are
    one a row.
    """
    row = tl.program_id(0)
    if BY_ROW:
        inverse_temperature = tl.load(inverse_temperature + row)
        top_p = tl.load(top_p + row)
        reach = tl.load(reach + row)
    line = logits + row.to(tl.int64) * stride
    at = tl.arange(0, BLOCK)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        x = tl.load(line + first + at, mask=first + at < vocabulary, other=float("-inf")).to(tl.float32)
        high = tl.maximum(high, x)
    threshold = _threshold(line, vocabulary, tl.max(high, 0), inverse_temperature, top_p, reach, SHIFT, BLOCK)
    seed = tl.load(noise + row).to(tl.uint32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    chosen = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocabulary, BLOCK):
        ids = first + at
        x = tl.load(line + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
        hashed = _mix(seed + ids.to(tl.uint32) * 0x9E3779B1)
        uniform = ((hashed >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
        score = x * inverse_temperature - tl.log(-tl.log(uniform))
        score = tl.where(_key(x, inverse_temperature, SHIFT) >= threshold, score, float("-inf"))
        better = score > best
        best = tl.where(better, score, best)
        chosen = tl.where(better, ids, chosen)
    winner = tl.argmax(best, 0)
    tl.store(out + row, tl.sum(tl.where(at == winner, chosen, 0), 0).to(tl.int64))


EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13}  # low bits of a float32 that such a value leaves zero


def draw_on_gpu(
    logits: Float[Tensor, "B V"],
    noise: Int[Tensor, " B"],
    temperature: float | Float[Tensor, " B"],
    top_p: float | Float[Tensor, " B"],
) -> Int[Tensor, " B"]:
    """`personatlas.persona.sampling.next_token.draw_plainly` in one kernel: some ten passes over a row that
    stays in the cache.

    Tokens more than `reach` below the best hold less than 1 - top_p together, so the threshold is above them.
    """
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    out = torch.empty(rows, dtype=torch.long, device=logits.device)
    by_row = isinstance(temperature, Tensor) or isinstance(top_p, Tensor)
    if by_row:
        temperature, top_p = (
            value if isinstance(value, Tensor) else logits.new_full((rows,), value, dtype=torch.float32)
            for value in (temperature, top_p)
        )
        reach: float | Tensor = (vocabulary / (1 - top_p)).log() + 1  # infinite for top_p 1
    else:
        assert isinstance(top_p, float)
        reach = math.log(vocabulary / (1 - top_p)) + 1 if top_p < 1 else math.inf
    with torch.cuda.device_of(logits):
        _draw[(rows,)](
            logits, noise, out, logits.stride(0), vocabulary, 1.0 / temperature, top_p, reach,
            SHIFT=EMPTY_BITS.get(logits.dtype, 0), BLOCK=4096, BY_ROW=by_row, num_warps=8,
        )  # fmt: skip
    return out
