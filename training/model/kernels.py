"""GPU kernels (Triton) of training: the gate of the MLP, the norm and turn of queries and keys. Imported only on a GPU.

Each is an operator of its own, so that a compiler takes it as it is, and has a twin in plain torch beside its caller, which
the tests compare it with. In half precision the twins round once more on the way (the normed head, silu(gate)).
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

# what a program reads at a time, and its warps, as measured on an H100
GATE_BLOCK = (1024, 4)  # features
HEAD_BLOCK = (16, 2)  # tokens of one head


@triton.jit
def _gated(both, out, inner, BLOCK: tl.constexpr):
    """One program per token and block of features: silu(gate) · up, of two halves side by side."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(both + row * 2 * inner + at, mask=inside).to(tl.float32)
    up = tl.load(both + row * 2 * inner + inner + at, mask=inside).to(tl.float32)
    tl.store(out + row * inner + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _ungated(both, to_y, out, inner, BLOCK: tl.constexpr):
    """The same backward."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(both + row * 2 * inner + at, mask=inside).to(tl.float32)
    up = tl.load(both + row * 2 * inner + inner + at, mask=inside).to(tl.float32)
    slope = tl.load(to_y + row * inner + at, mask=inside).to(tl.float32)
    share = tl.sigmoid(gate)
    to_gate = slope * up * share * (1 + gate * (1 - share))
    tl.store(out + row * 2 * inner + at, to_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * 2 * inner + inner + at, (slope * gate * share).to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("personatlas::gated", mutates_args=(), schema="(Tensor both) -> Tensor")
def gated_on_gpu(both: Float[Tensor, "*B 2*I"]) -> Float[Tensor, "*B I"]:
    """silu(gate) · up."""
    both, inner = both.contiguous(), both.shape[-1] // 2
    out = torch.empty(*both.shape[:-1], inner, dtype=both.dtype, device=both.device)
    block, warps = GATE_BLOCK
    with torch.cuda.device_of(both):  # Triton launches on the current device, whichever that is
        _gated[(out.numel() // inner, triton.cdiv(inner, block))](
            both, out, inner, BLOCK=block, num_warps=warps
        )
    return out


@gated_on_gpu.register_fake
def _(both):
    return both.new_empty(*both.shape[:-1], both.shape[-1] // 2)


@torch.library.custom_op(
    "personatlas::ungated", mutates_args=(), schema="(Tensor both, Tensor to_y) -> Tensor"
)
def ungated_on_gpu(both: Float[Tensor, "*B 2*I"], to_y: Float[Tensor, "*B I"]) -> Float[Tensor, "*B 2*I"]:
    """The gradient to both halves."""
    both, to_y, inner = both.contiguous(), to_y.contiguous(), to_y.shape[-1]
    out = torch.empty_like(both)
    block, warps = GATE_BLOCK
    grid = (to_y.numel() // inner, triton.cdiv(inner, block))
    with torch.cuda.device_of(both):
        _ungated[grid](both, to_y, out, inner, BLOCK=block, num_warps=warps)
    return out


@ungated_on_gpu.register_fake
def _(both, to_y):
    return both.new_empty(both.shape)  # contiguous, as the kernel's is


@triton.jit
def _tile(qkv, gains, turn, row, head, heads, stride, context, eps, d, W: tl.constexpr):
    """A head's numbers of some tokens, in fp32, 1 / RMS, gain, cosine and sine."""
    t = (row % context)[:, None]
    x = tl.load(qkv + row[:, None] * stride + head * W + d).to(tl.float32)
    gain = tl.load(gains + (head >= heads).to(tl.int32) * W + d)
    cosine, sine = tl.load(turn + t * W + d), tl.load(turn + (context + t) * W + d)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / W + eps)[:, None]
    return x, inverse, gain, cosine, sine


@triton.jit
def _turned(qkv, gains, turn, out, heads, kv_heads, context, eps, W: tl.constexpr, ROWS: tl.constexpr):
    """One program per some tokens and head of queries or keys."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, W)[None, :]
    swapped = (d + W // 2) % W
    stride = (heads + 2 * kv_heads) * W
    x, inverse, gain, cosine, sine = _tile(qkv, gains, turn, row, head, heads, stride, context, eps, d, W)
    other = tl.load(qkv + row[:, None] * stride + head * W + swapped).to(tl.float32)
    other = other * tl.load(gains + (head >= heads).to(tl.int32) * W + swapped)
    y = (x * gain * cosine + other * sine) * inverse
    at = out + row[:, None] * (heads + kv_heads) * W + head * W + d
    tl.store(at, y.to(out.dtype.element_ty))


@triton.jit
def _unturned(
    qkv, gains, turn, to_q, to_k, to_v, out, to_gains, heads, kv_heads, context, eps,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same backward, a program also for each head of values, whose gradient it copies."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)  # times a head's stride it may be more than an int32 holds
    d = tl.arange(0, W)[None, :]
    swapped = (d + W // 2) % W
    stride = (heads + 2 * kv_heads) * W
    b, t = (row // context)[:, None], (row % context)[:, None]
    at = out + row[:, None] * stride + head * W + d
    if head >= heads + kv_heads:
        values = tl.load(to_v + b * v_b + (head - heads - kv_heads) * v_h + t * v_t + d)
        tl.store(at, values.to(out.dtype.element_ty))
    else:
        if head < heads:
            start = to_q + b * q_b + head * q_h + t * q_t
        else:
            start = to_k + b * k_b + (head - heads) * k_h + t * k_t
        to_y, to_other = tl.load(start + d).to(tl.float32), tl.load(start + swapped).to(tl.float32)
        x, inverse, gain, cosine, sine = _tile(qkv, gains, turn, row, head, heads, stride, context, eps, d, W)
        to_normed = (
            to_y * cosine - to_other * sine
        )  # the sine of the other half is the negative of this one's
        normed = x * inverse
        slope = to_normed * gain
        along = tl.sum(slope * normed, 1)[:, None] / W
        tl.store(at, ((slope - normed * along) * inverse).to(out.dtype.element_ty))
        part = to_gains + (tl.program_id(0) * (heads + kv_heads) + head) * W
        tl.store(part + tl.arange(0, W), tl.sum(to_normed * normed, 0))


@torch.library.custom_op(
    "personatlas::turned",
    mutates_args=(),
    schema="(Tensor qkv, Tensor gains, Tensor turn, int heads, int kv_heads, float eps) -> Tensor",
)
def turned_on_gpu(
    qkv: Float[Tensor, "B T QKV"],
    gains: Float[Tensor, "2 W"],
    turn: Float[Tensor, "2 T W"],
    heads: int,
    kv_heads: int,
    eps: float,
) -> Float[Tensor, "B T QK W"]:
    """Queries and keys normed with `gains` (queries', keys') and turned by cosine and sine `turn`."""
    batch, tokens, _ = qkv.shape
    width = turn.shape[-1]
    assert turn.shape[1] == tokens, turn.shape
    qkv, turn = qkv.contiguous(), turn.contiguous()
    out = torch.empty(batch, tokens, heads + kv_heads, width, dtype=qkv.dtype, device=qkv.device)
    rows, warps = _rows(batch * tokens)
    grid = (batch * tokens // rows, heads + kv_heads)
    with torch.cuda.device_of(qkv):
        _turned[grid](
            qkv, gains, turn, out, heads, kv_heads, tokens, eps, W=width, ROWS=rows, num_warps=warps
        )
    return out


@turned_on_gpu.register_fake
def _(qkv, gains, turn, heads, kv_heads, eps):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], heads + kv_heads, turn.shape[-1])


@torch.library.custom_op(
    "personatlas::unturned",
    mutates_args=(),
    schema="(Tensor qkv, Tensor gains, Tensor turn, Tensor to_q, Tensor to_k, Tensor to_v, float eps) -> (Tensor, Tensor)",
)
def unturned_on_gpu(
    qkv: Float[Tensor, "B T QKV"],
    gains: Float[Tensor, "2 W"],
    turn: Float[Tensor, "2 T W"],
    to_q: Float[Tensor, "B H T W"],
    to_k: Float[Tensor, "B K T W"],
    to_v: Float[Tensor, "B K T W"],
    eps: float,
) -> tuple[Float[Tensor, "B T QKV"], Float[Tensor, "2 W"]]:
    """Gradients to `qkv` and to the gains."""
    heads, kv_heads, width = to_q.shape[1], to_k.shape[1], turn.shape[-1]
    assert turn.shape[1] == qkv.shape[1], turn.shape
    tokens = qkv.shape[0] * qkv.shape[1]
    qkv, turn = qkv.contiguous(), turn.contiguous()
    to_q, to_k, to_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (to_q, to_k, to_v))
    rows, warps = _rows(tokens)
    out = torch.empty_like(qkv)
    to_gains = torch.empty(tokens // rows, heads + kv_heads, width, dtype=torch.float32, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _unturned[(tokens // rows, heads + 2 * kv_heads)](
            qkv, gains, turn, to_q, to_k, to_v, out, to_gains, heads, kv_heads, qkv.shape[1], eps,
            *to_q.stride()[:3], *to_k.stride()[:3], *to_v.stride()[:3], W=width, ROWS=rows, num_warps=warps,
        )  # fmt: skip
    of_heads = to_gains.sum(0)  # (H + K, W)
    return out, torch.stack([of_heads[:heads].sum(0), of_heads[heads:].sum(0)])


@unturned_on_gpu.register_fake
def _(qkv, gains, turn, to_q, to_k, to_v, eps):
    return qkv.new_empty(qkv.shape), gains.new_empty(gains.shape)


def _rows(tokens: int) -> tuple[int, int]:
    """Tokens of one program, a power of two that divides all of them, and its warps."""
    rows, warps = HEAD_BLOCK
    while tokens % rows:
        rows //= 2
    return rows, warps
