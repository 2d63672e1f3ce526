"""Cross-entropy of a linear head in pieces: the logits of all tokens are never held at once.

    loss = Σ_i w_i (logsumexp(W h_i) - (W h_i)[target_i]),   ∂loss/∂h_i = w_i Wᵀ(p_i - onehot(target_i))

At 65,536 tokens and a vocabulary of 32,768 the logits in fp32 are 8.6 GB, and their gradient as much again.
Here a piece of them is made, its loss and both of its gradients are taken, and it is dropped. The gradients
are made in the forward pass, when the piece is there anyway, so nothing is computed twice: the same three
products as without pieces.

    linear_cross_entropy(hidden, model.lm_head.weight, targets).backward()  # targets of -100 are not counted
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from personatlas.training.model.config import tokens_per_piece

IGNORED = -100


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    targets: Int[Tensor, "N"],
    weights: Float[Tensor, "N"] | None = None,
    piece: int | None = None,
) -> Float[Tensor, ""]:
    """The summed (not mean) cross-entropy in nats, in fp32 or wider; targets of `IGNORED` count nothing.

    A sum, because only the caller knows what is counted over all micro-batches and ranks. `weights` multiply
    each token's loss; they get no gradient. The head is used in the dtype of `hidden`; its gradient comes in
    its own.
    """
    counted = (targets != IGNORED).to(_wide(hidden))
    weights = counted if weights is None else weights.to(counted.dtype) * counted
    if not torch.is_grad_enabled():  # a parameter asks for its gradient even then
        head = head.detach()
    # only a step is compiled: without a compiler each logit takes three times the memory
    compiled = hidden.is_cuda and torch.is_grad_enabled()
    piece = piece or tokens_per_piece(len(head), compiled=compiled)
    loss: Tensor = _InPieces.apply(hidden, head, targets, weights, piece)
    return loss


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the hardware's fp32 sums, not rounded to bf16: a logit of 20 would be off by 0.06."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(_wide(a))


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, weights, piece):
        wants = ctx.needs_input_grad
        words = head.to(hidden.dtype)  # (V, D)
        total = torch.zeros((), dtype=weights.dtype, device=hidden.device)
        pieces, to_head = [], None
        # nothing is changed in place: compiled by torch 2.11, backward would be given what was there before
        for start in range(0, hidden.shape[0], piece):
            part = slice(start, start + piece)
            logits = _product(hidden[part], words.T)  # (P, V)
            losses, norm = token_losses(logits, targets[part])
            total = total + (losses * weights[part]).sum()
            if not any(wants[:2]):
                continue
            gradient = loss_gradient(logits, norm, targets[part], weights[part]).to(hidden.dtype)
            if wants[0]:
                pieces.append(gradient @ words)
            if wants[1]:
                more = _product(gradient.T, hidden[part])
                to_head = more if to_head is None else to_head + more
        to_hidden = torch.cat(pieces) if pieces else None
        ctx.save_for_backward(to_hidden, to_head)
        ctx.dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx, scale):
        to_hidden, to_head = ctx.saved_tensors
        return (
            None if to_hidden is None else to_hidden * scale.to(to_hidden.dtype),
            None if to_head is None else (to_head * scale).to(ctx.dtype),
            None,
            None,
            None,
        )


def token_losses(
    logits: Float[Tensor, "P V"], targets: Int[Tensor, "P"]
) -> tuple[Float[Tensor, "P"], Float[Tensor, "P 1"]]:
    """Each token's loss, and the logsumexp of its logits.

    Only sums and elementwise steps, as below: a compiler makes one kernel of both, and one of our own was
    slower.
    """
    norm = logits.logsumexp(dim=-1, keepdim=True)
    return (norm - logits.gather(1, _index(targets))).squeeze(1), norm


def loss_gradient(
    logits: Float[Tensor, "P V"],
    norm: Float[Tensor, "P 1"],
    targets: Int[Tensor, "P"],
    weights: Float[Tensor, "P"],
) -> Float[Tensor, "P V"]:
    """The gradient of the weighted loss to the logits."""
    hit = torch.arange(logits.shape[1], device=logits.device) == _index(targets)  # (P, V)
    return ((logits - norm).exp() - hit.to(logits.dtype)) * weights[:, None]


def _index(targets: Int[Tensor, "P"]) -> Int[Tensor, "P 1"]:
    return targets.clamp(min=0).long()[:, None]  # an ignored target's weight is 0, so any word does
