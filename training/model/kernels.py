"""Triton kernels of training: SwiGLU, and the norm and rotary embedding of queries and keys. Imported on a
GPU only.

Each is an operator of its own, which a compiler takes as it is, and has a twin in plain torch beside its
caller, which the tests compare it with. In half precision the twins round once more (the normalised head,
silu(gate)).
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

# what a program reads at a time, and its warps, as measured on an H100
SWIGLU_BLOCK = (1024, 4)  # features
ROTARY_BLOCK = (16, 2)  # tokens of one head


@triton.jit
def _swiglu(gate_up, out, inner, BLOCK: tl.constexpr):
    """One program per token and block of features: silu(gate) · up, of two halves side by side."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside).to(tl.float32)
    tl.store(out + row * inner + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate_up, to_y, out, inner, BLOCK: tl.constexpr):
    """The same backward."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside).to(tl.float32)
    slope = tl.load(to_y + row * inner + at, mask=inside).to(tl.float32)
    share = tl.sigmoid(gate)
    to_gate = slope * up * share * (1 + gate * (1 - share))
    tl.store(out + row * 2 * inner + at, to_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * 2 * inner + inner + at, (slope * gate * share).to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("personatlas::swiglu", mutates_args=(), schema="(Tensor gate_up) -> Tensor")
def swiglu_on_gpu(gate_up: Float[Tensor, "*B 2*I"]) -> Float[Tensor, "*B I"]:
    """silu(gate) · up."""
    gate_up, inner = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], inner, dtype=gate_up.dtype, device=gate_up.device)
    block, warps = SWIGLU_BLOCK
    with torch.cuda.device_of(gate_up):  # Triton launches on the current device, whichever that is
        _swiglu[(out.numel() // inner, triton.cdiv(inner, block))](
            gate_up, out, inner, BLOCK=block, num_warps=warps
        )
    return out


@swiglu_on_gpu.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op(
    "personatlas::swiglu_backward", mutates_args=(), schema="(Tensor gate_up, Tensor to_y) -> Tensor"
)
def swiglu_backward_on_gpu(
    gate_up: Float[Tensor, "*B 2*I"], to_y: Float[Tensor, "*B I"]
) -> Float[Tensor, "*B 2*I"]:
    """The gradient to gate and up."""
    gate_up, to_y, inner = gate_up.contiguous(), to_y.contiguous(), to_y.shape[-1]
    out = torch.empty_like(gate_up)
    block, warps = SWIGLU_BLOCK
    grid = (to_y.numel() // inner, triton.cdiv(inner, block))
    with torch.cuda.device_of(gate_up):
        _swiglu_backward[grid](gate_up, to_y, out, inner, BLOCK=block, num_warps=warps)
    return out


@swiglu_backward_on_gpu.register_fake
def _(gate_up, to_y):
    return gate_up.new_empty(gate_up.shape)  # contiguous, as the kernel's is


@triton.jit
def _load_head(qkv, weights, rotary, row, head, heads, stride, context, eps, d, W: tl.constexpr):
    """A head's numbers of some tokens, in fp32, 1 / RMS, gain, cosine and sine."""
    t = (row % context)[:, None]
    x = tl.load(qkv + row[:, None] * stride + head * W + d).to(tl.float32)
    gain = tl.load(weights + (head >= heads).to(tl.int32) * W + d)
    cosine, sine = tl.load(rotary + t * W + d), tl.load(rotary + (context + t) * W + d)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / W + eps)[:, None]
    return x, inverse, gain, cosine, sine


@triton.jit
def _qk_norm_rotary(
    qkv, weights, rotary, out, heads, kv_heads, context, eps, W: tl.constexpr, ROWS: tl.constexpr
):
    """One program per some tokens and head of queries or keys."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, W)[None, :]
    swapped = (d + W // 2) % W
    stride = (heads + 2 * kv_heads) * W
    x, inverse, gain, cosine, sine = _load_head(
        qkv, weights, rotary, row, head, heads, stride, context, eps, d, W
    )
    other = tl.load(qkv + row[:, None] * stride + head * W + swapped).to(tl.float32)
    other = other * tl.load(weights + (head >= heads).to(tl.int32) * W + swapped)
    y = (x * gain * cosine + other * sine) * inverse
    at = out + row[:, None] * (heads + kv_heads) * W + head * W + d
    tl.store(at, y.to(out.dtype.element_ty))


@triton.jit
def _qk_norm_rotary_backward(
    qkv, weights, rotary, to_q, to_k, to_v, out, to_weights, heads, kv_heads, context, eps,
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
        x, inverse, gain, cosine, sine = _load_head(
            qkv, weights, rotary, row, head, heads, stride, context, eps, d, W
        )
        to_normed = (
            to_y * cosine - to_other * sine
        )  # the sine of the other half is the negative of this one's
        normed = x * inverse
        slope = to_normed * gain
        along = tl.sum(slope * normed, 1)[:, None] / W
        tl.store(at, ((slope - normed * along) * inverse).to(out.dtype.element_ty))
        part = to_weights + (tl.program_id(0) * (heads + kv_heads) + head) * W
        tl.store(part + tl.arange(0, W), tl.sum(to_normed * normed, 0))


@torch.library.custom_op(
    "personatlas::qk_norm_rotary",
    mutates_args=(),
    schema="(Tensor qkv, Tensor weights, Tensor rotary, int heads, int kv_heads, float eps) -> Tensor",
)
def qk_norm_rotary_on_gpu(
    qkv: Float[Tensor, "B T QKV"],
    weights: Float[Tensor, "2 W"],
    rotary: Float[Tensor, "2 T W"],
    heads: int,
    kv_heads: int,
    eps: float,
) -> Float[Tensor, "B T QK W"]:
    """Queries and keys, normalised with their weights and rotated by cosine and sine."""
    batch, tokens, _ = qkv.shape
    width = rotary.shape[-1]
    assert rotary.shape[1] == tokens, rotary.shape
    qkv, rotary = qkv.contiguous(), rotary.contiguous()
    out = torch.empty(batch, tokens, heads + kv_heads, width, dtype=qkv.dtype, device=qkv.device)
    rows, warps = _rows(batch * tokens)
    grid = (batch * tokens // rows, heads + kv_heads)
    with torch.cuda.device_of(qkv):
        _qk_norm_rotary[grid](
            qkv, weights, rotary, out, heads, kv_heads, tokens, eps, W=width, ROWS=rows, num_warps=warps
        )
    return out


@qk_norm_rotary_on_gpu.register_fake
def _(qkv, weights, rotary, heads, kv_heads, eps):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], heads + kv_heads, rotary.shape[-1])


@torch.library.custom_op(
    "personatlas::qk_norm_rotary_backward",
    mutates_args=(),
    schema="(Tensor qkv, Tensor weights, Tensor rotary, Tensor to_q, Tensor to_k, Tensor to_v, float eps)"
    " -> (Tensor, Tensor)",
)
def qk_norm_rotary_backward_on_gpu(
    qkv: Float[Tensor, "B T QKV"],
    weights: Float[Tensor, "2 W"],
    rotary: Float[Tensor, "2 T W"],
    to_q: Float[Tensor, "B H T W"],
    to_k: Float[Tensor, "B K T W"],
    to_v: Float[Tensor, "B K T W"],
    eps: float,
) -> tuple[Float[Tensor, "B T QKV"], Float[Tensor, "2 W"]]:
    """Gradients to `qkv` and to the norm weights."""
    heads, kv_heads, width = to_q.shape[1], to_k.shape[1], rotary.shape[-1]
    assert rotary.shape[1] == qkv.shape[1], rotary.shape
    tokens = qkv.shape[0] * qkv.shape[1]
    qkv, rotary = qkv.contiguous(), rotary.contiguous()
    to_q, to_k, to_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (to_q, to_k, to_v))
    rows, warps = _rows(tokens)
    out = torch.empty_like(qkv)
    to_weights = torch.empty(tokens // rows, heads + kv_heads, width, dtype=torch.float32, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _qk_norm_rotary_backward[(tokens // rows, heads + 2 * kv_heads)](
            qkv, weights, rotary, to_q, to_k, to_v, out, to_weights, heads, kv_heads, qkv.shape[1], eps,
            *to_q.stride()[:3], *to_k.stride()[:3], *to_v.stride()[:3], W=width, ROWS=rows, num_warps=warps,
        )  # fmt: skip
    of_heads = to_weights.sum(0)  # (H + K, W)
    return out, torch.stack([of_heads[:heads].sum(0), of_heads[heads:].sum(0)])


@qk_norm_rotary_backward_on_gpu.register_fake
def _(qkv, weights, rotary, to_q, to_k, to_v, eps):
    return qkv.new_empty(qkv.shape), weights.new_empty(weights.shape)


def _rows(tokens: int) -> tuple[int, int]:
    """Tokens of one program, a power of two that divides all of them, and its warps."""
    rows, warps = ROTARY_BLOCK
    while tokens % rows:
        rows //= 2
    return rows, warps
