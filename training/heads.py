"""From one product to heads: queries and keys normed head by head and turned by their position (rotary), values as they are.

    turn = rotation(shape)                                     # once, a model's table
    q, k, v = heads_of(qkv, q_gain, k_gain, eps, turn_of(turn, tokens))

    normed = gain · x / √(mean(x²) + eps);   y_i = normed_i cos(tθ_i) - normed_{i+W/2} sin(tθ_i), and the other half with +

On a GPU both are one kernel forward and one backward (training/kernels.py): between them the heads would be written to
memory and read again some times, and a step of a small model waits for memory more than for products.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from personaxis.training.gate import for_kernels
from personaxis.training.shape import Shape


def rotation(shape: Shape) -> Int[Tensor, "2 C W"]:
    """Cosine and sine of position / base^(2i/W) for a whole context; halves i and i + W/2 turn together, and the sine's
    first half is negative, as `rotated` wants it.

    A table, since a compiler makes cosines anew in every block, for every head: 8 of 135 ms of a step of depth 12 on an H100. Given as the
    int32 with the bits of the fp32 numbers: `model.bfloat16()` rounds every float buffer, and bf16 cannot tell position
    2,047 from 2,048. On the CPU also where models are made on the meta device: a checkpoint does not hold it.
    """
    steps = torch.arange(0, shape.head_width, 2, device="cpu", dtype=torch.float32) / shape.head_width
    angles = torch.arange(shape.context, device="cpu", dtype=torch.float32)[:, None] / shape.rope_base**steps
    cosine, sine = angles.cos(), angles.sin()
    both = torch.stack([torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)])
    return both.contiguous().view(torch.int32)


def turn_of(table: Int[Tensor, "2 C W"], tokens: int) -> Float[Tensor, "2 T W"]:
    """The table's first tokens, as numbers again; put together once, for all blocks."""
    return table.view(torch.float32)[:, :tokens].contiguous()


def normed(x: Float[Tensor, "*B W"], gain: Float[Tensor, " W"], eps: float) -> Float[Tensor, "*B W"]:
    """RMSNorm with a gain, in fp32 whatever comes in."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), gain.shape, gain.to(wide), eps).to(x.dtype)


def rotated(x: Float[Tensor, "B T H W"], turn: Float[Tensor, "2 T W"]) -> Float[Tensor, "B T H W"]:
    """Turn each head by its position, in fp32. Halves are swapped by a flip: a compiler reads it at other places, while what
    is put together of two halves is worked out twice and half of it thrown away."""
    cosine, sine = turn[:, :, None]  # (T, 1, W) each
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x * cosine + swapped * sine).to(x.dtype)


def heads_of(
    qkv: Float[Tensor, "B T QKV"],
    q_gain: Float[Tensor, " W"],
    k_gain: Float[Tensor, " W"],
    eps: float,
    turn: Float[Tensor, "2 T W"],
    heads: int,
) -> tuple[Float[Tensor, "B H T W"], Float[Tensor, "B K T W"], Float[Tensor, "B K T W"]]:
    """Queries and keys, normed and turned, and values, from their features side by side; `heads` are those of queries."""
    width = q_gain.shape[0]
    kv_heads = (qkv.shape[-1] // width - heads) // 2
    if for_kernels(qkv) and width & (width - 1) == 0:
        q, k, v = _Heads.apply(qkv, torch.stack([q_gain, k_gain]).float(), turn, heads, kv_heads, eps)
    else:
        q, k, v = qkv.unflatten(-1, (-1, width)).split([heads, kv_heads, kv_heads], dim=2)
        q, k = rotated(normed(q, q_gain, eps), turn), rotated(normed(k, k_gain, eps), turn)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _Heads(torch.autograd.Function):
    """Values pass through it as they are, so that one kernel fills the whole gradient of `qkv` and nothing is put together."""

    @staticmethod
    def forward(ctx, qkv, gains, turn, heads, kv_heads, eps):
        from personaxis.training.kernels import turned_on_gpu

        turned = turned_on_gpu(qkv, gains, turn, heads, kv_heads, eps)  # (B, T, H + K, W)
        values = qkv[..., (heads + kv_heads) * turn.shape[-1] :].unflatten(-1, (kv_heads, -1))
        ctx.save_for_backward(qkv, gains, turn)
        ctx.eps = eps
        return turned[:, :, :heads], turned[:, :, heads:], values

    @staticmethod
    def backward(ctx, to_q, to_k, to_v):
        from personaxis.training.kernels import unturned_on_gpu

        to_qkv, to_gains = unturned_on_gpu(
            *ctx.saved_tensors, *(x.transpose(1, 2) for x in (to_q, to_k, to_v)), ctx.eps
        )
        return to_qkv, to_gains, None, None, None, None
