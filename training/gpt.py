"""A GPT in the shape of transformers' Qwen3, initialised and trained by our own code.

    h_0 = embed(ids)
    a_l = h_l + attention(norm(h_l))        attention: rotary, norm of each head's queries and keys, grouped queries
    h_{l+1} = a_l + mlp(norm(a_l))          mlp: down(silu(gate(x)) * up(x))
    logits = head(norm(h_L))

The residual stream is plainly additive: no scaling, no mixing with h_0, no skips to later blocks, so "the residual after
block l" means the same here as in every other checkpoint. Why Qwen3 and not Llama: the norm of queries and keys bounds the
attention logits whatever the learning rate, which Muon's large steps need, and transformers, TransformerLens, vLLM and
llama.cpp all know it. Modules have the names of such a checkpoint, so that an export copies weights and converts nothing.

    shape = Shape(vocabulary=32768, depth=12, width=768, heads=6, kv_heads=3, head_width=128, inner=2048, context=2048)
    model = GPT(shape).initialise(seed=0)
    model(ids, targets).backward()                   # summed cross-entropy
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from personaxis.training.fp8 import fp8_product
from personaxis.training.gate import gated
from personaxis.training.heads import heads_of, normed, rotation, turn_of
from personaxis.training.loss import linear_cross_entropy
from personaxis.training.shape import Shape


class Linear(nn.Linear):
    """A matrix without bias, kept in its own dtype and multiplied in that of its input: fp32 masters, bf16 products."""

    fp8 = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Left empty: `GPT.initialise` or a checkpoint fills it."""

    def forward(self, x: Tensor) -> Tensor:
        return together(x, self)


def together(x: Tensor, *linears: Linear) -> Tensor:
    """Several matrices' outputs side by side, by one product: larger tiles, and one gradient to x instead of a sum of some."""
    weights = [linear.weight for linear in linears]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return fp8_product(x, weight) if linears[0].fp8 else F.linear(x, weight.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm with a gain, in fp32 whatever comes in."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention; each head of keys and values serves heads / kv_heads heads of queries."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj = Linear(shape.width, shape.heads * shape.head_width)
        self.k_proj = Linear(shape.width, shape.kv_heads * shape.head_width)
        self.v_proj = Linear(shape.width, shape.kv_heads * shape.head_width)
        self.o_proj = Linear(shape.heads * shape.head_width, shape.width)
        self.q_norm = Norm(shape.head_width, shape.eps)
        self.k_norm = Norm(shape.head_width, shape.eps)

    def forward(self, x: Tensor, turn: Tensor, mask: Any) -> Tensor:
        qkv = together(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = heads_of(qkv, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, turn, self.heads)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))  # (B, H, T, W) -> (B, T, D)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.width, shape.inner)
        self.up_proj = Linear(shape.width, shape.inner)
        self.down_proj = Linear(shape.inner, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(together(x, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    """h + attention + mlp, each of a normed copy."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.width, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.width, shape.eps)
        self.mlp = MLP(shape)

    def forward(self, h: Tensor, turn: Tensor, mask: Any) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), turn, mask)
        return h + self.mlp(self.post_attention_layernorm(h))


class GPT(nn.Module):
    """The model. Its parameters are empty until `initialise` or a checkpoint fills them.

    `compute` is the dtype of residual stream and products, whatever dtype the parameters have; `checkpointing` keeps
    only the blocks' inputs for the backward pass and computes the rest again; `fp8` makes the products of the blocks'
    matrices, not of the head, in 8 bits (training/fp8.py).
    """

    def __init__(
        self,
        shape: Shape,
        *,
        compute: torch.dtype = torch.float32,
        checkpointing: bool = False,
        fp8: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.compute, self.checkpointing = shape, compute, checkpointing
        # from empty: nn.Embedding would fill it from the global generator
        self.embed_tokens = nn.Embedding(
            shape.vocabulary, shape.width, _weight=torch.empty(shape.vocabulary, shape.width)
        )
        self.turn: Tensor
        self.register_buffer("turn", rotation(shape), persistent=False)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = Norm(shape.width, shape.eps)
        # Not tied to the embedding: they want scales a thousand times apart at the start (1 and 0.001) and learning
        # rates fifty times apart, and an embedding of its own costs memory but no FLOPs.
        self.lm_head = Linear(shape.width, shape.vocabulary)
        for module in self.layers.modules():
            if isinstance(module, Linear):
                module.fp8 = fp8

    @torch.no_grad()
    def initialise(self, seed: int) -> "GPT":
        """Fill all parameters, on the CPU and then copied, so that a seed gives one model on every device.

        - `o_proj` and `down_proj`, which write to the residual stream, are zero: every block starts as the identity, the
          stream has the embedding's scale at any depth, and no 1/√depth is needed to keep it so.
        - Matrices that read the stream are uniform with variance 1/inputs: a normed input of RMS 1 gives an output of RMS
          1. Uniform rather than normal: as good, and without outliers for bf16.
        - The embedding is normal with RMS 1, the scale of what a block writes once it is trained; at 0.02 the first block
          would drown the token's identity.
        - The head is normal with RMS 0.001/√(width/768): the first loss is ln(vocabulary) within a thousandth. Not zero,
          which would let no gradient through to the blocks at the first step.
        - All gains are one.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape)
            if "norm" in name:
                value.fill_(1.0)
            elif name.startswith("embed_tokens"):
                value.normal_(generator=generator)
            elif name.startswith("lm_head"):
                value.normal_(std=0.001 * (self.shape.width / 768) ** -0.5, generator=generator)
            elif "o_proj" in name or "down_proj" in name:
                value.zero_()
            else:
                bound = (3 / parameter.shape[1]) ** 0.5
                value.uniform_(-bound, bound, generator=generator)
            parameter.copy_(value)
        return self

    def residuals(self, ids: Int[Tensor, "B T"], documents: Int[Tensor, "B T"] | None = None) -> Float[Tensor, "B T D"]:
        """The normed output of the last block, which the head reads."""
        if ids.shape[1] > self.shape.context:
            raise ValueError(f"{ids.shape[1]} tokens do not fit into a context of {self.shape.context}")
        h = self.embed_tokens(ids).to(self.compute)  # (B, T, D)
        turn = turn_of(self.turn, ids.shape[1])
        mask = None if documents is None else document_mask(documents)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, turn, mask, use_reentrant=False)
            else:
                h = layer(h, turn, mask)
        return self.norm(h)

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        weights: Float[Tensor, "B T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"] | Float[Tensor, ""]:
        """Logits in fp32, or with `targets` their summed cross-entropy in nats, in pieces (`training/loss.py`).

        `targets` are the ids one place later; -100 is not counted. `documents` numbers the text that each token belongs
        to: no token sees another text. Positions run on across texts, which rotary, being relative, does not notice.
        """
        h = self.residuals(ids, documents)
        if targets is None:
            return self.lm_head(h).to(torch.promote_types(h.dtype, torch.float32))
        flat = None if weights is None else weights.flatten()
        return linear_cross_entropy(h.flatten(0, 1), self.lm_head.weight, targets.flatten(), flat)

    @torch.no_grad()
    def continued(
        self, ids: Int[Tensor, "B T"], count: int, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Int[Tensor, "B N"]:
        """`ids` and `count` more tokens, the likeliest ones at temperature 0. Without a cache: for samples, not serving."""
        for _ in range(count):
            logits = self(ids[:, -self.shape.context :])[:, -1]  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, new], dim=1)
        return ids


def document_mask(documents: Int[Tensor, "B T"]) -> Any:
    """Which keys a query may see: earlier ones of its own document. Blocks for flex_attention on a GPU, else (B, 1, T, T)."""
    if documents.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = documents.shape
        return create_block_mask(
            lambda b, _h, q, k: (q >= k) & (documents[b, q] == documents[b, k]),
            rows,
            None,
            length,
            length,
            device=str(documents.device),
        )
    same = documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, T, T)
    return same.tril()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """softmax(q kᵀ / √W) v, causal; `mask` from `document_mask`. (B, H, T, W) and (B, K, T, W) -> (B, H, T, W)."""
    grouped = q.shape[1] != k.shape[1]
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
