"""SwiGLU's gate: silu(gate) · up, of the two halves that one product gives side by side (Shazeer 2020).

    y = gated(together(x, gate_proj, up_proj))       # (B, T, 2I) -> (B, T, I)

On a GPU a kernel of our own each way: a compiler makes y a second time in the backward pass, to save memory, and writes
it out for the product that needs it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def gated(both: Float[Tensor, "*B J"]) -> Float[Tensor, "*B I"]:
    """silu of the first half of the features times the second."""
    if for_kernels(both):
        y: Tensor = _Gated.apply(both)
        return y
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def for_kernels(x: Tensor) -> bool:
    """Whether the kernels of `training/kernels.py` are for it: on a GPU, and no wider than the fp32 that they compute in."""
    return x.is_cuda and x.dtype != torch.float64


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both):
        from personaxis.training.kernels import gated_on_gpu

        ctx.save_for_backward(both)
        return gated_on_gpu(both)

    @staticmethod
    def backward(ctx, to_y):
        from personaxis.training.kernels import ungated_on_gpu

        (both,) = ctx.saved_tensors
        return ungated_on_gpu(both, to_y)
