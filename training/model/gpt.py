"""A GPT in the shape of transformers' Qwen3, initialised and trained by our own code.

    h_0 = embed(ids)
    a_l = h_l + attention(norm(h_l))        grouped queries; queries and keys are normalised, then rotated
    h_{l+1} = a_l + mlp(norm(a_l))          mlp: down(silu(gate(x)) * up(x))
    logits = head(norm(h_L))

The residual stream is plainly additive, so "the residual after block l" means the same as in every other
checkpoint. Qwen3 rather than Llama, since the norm of queries and keys bounds the attention logits whatever
the learning rate, which Muon's large steps need, and transformers, TransformerLens, vLLM and llama.cpp know
it. Modules have the names of such a checkpoint, so that an export copies weights and converts nothing.

    model = GPT(shape_at(depth=12)).initialise(seed=0)
    model(ids, targets).backward()                   # summed cross-entropy

On a GPU, SwiGLU and the norm and rotation of queries and keys are kernels of their own
(`training/model/kernels.py`): a step of a small model waits for memory more than for products.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from personatlas.training.model.config import Shape
from personatlas.training.model.cross_entropy import linear_cross_entropy
from personatlas.training.model.fp8 import fp8_product

AttentionMask = BlockMask | Tensor | None


def swiglu(gate_up: Float[Tensor, "*B J"]) -> Float[Tensor, "*B I"]:
    """SwiGLU's gate: silu of the first half of the features times the second (Shazeer 2020)."""
    if uses_kernels(gate_up):
        y: Tensor = _SwiGLU.apply(gate_up)
        return y
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def uses_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels take it: on a GPU, and no wider than the fp32 that they compute in."""
    return x.is_cuda and x.dtype != torch.float64


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        from personatlas.training.model.kernels import swiglu_on_gpu

        ctx.save_for_backward(gate_up)
        return swiglu_on_gpu(gate_up)

    @staticmethod
    def backward(ctx, to_y):
        from personatlas.training.model.kernels import swiglu_backward_on_gpu

        (gate_up,) = ctx.saved_tensors
        return swiglu_backward_on_gpu(gate_up, to_y)


def rotary_table(shape: Shape) -> Int[Tensor, "2 C W"]:
    """Cosine and sine of position / base^(2i/W) for a whole context, as the int32 with the bits of fp32.

    Features i and i + W/2 rotate together; the sine's first half is negative. A table, since a compiler makes
    cosines anew in every block: 8 of 135 ms of a step of depth 12 on an H100. int32, since `model.bfloat16()`
    rounds float buffers, and bf16 cannot tell position 2,047 from 2,048. On the CPU also on the meta device:
    a checkpoint does not hold it.
    """
    steps = torch.arange(0, shape.head_width, 2, device="cpu", dtype=torch.float32) / shape.head_width
    angles = torch.arange(shape.context, device="cpu", dtype=torch.float32)[:, None] / shape.rope_base**steps
    cosine, sine = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)])
    return table.contiguous().view(torch.int32)


def rotary_values(table: Int[Tensor, "2 C W"], tokens: int) -> Float[Tensor, "2 T W"]:
    """The table's first tokens as fp32 numbers, once for all blocks."""
    return table.view(torch.float32)[:, :tokens].contiguous()


def rms_norm(x: Float[Tensor, "*B W"], weight: Float[Tensor, " W"], eps: float) -> Float[Tensor, "*B W"]:
    """weight · x / √(mean(x²) + eps), in fp32 whatever comes in."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def apply_rotary(x: Float[Tensor, "B T H W"], rotary: Float[Tensor, "2 T W"]) -> Float[Tensor, "B T H W"]:
    """Rotates each head in fp32: y_i = x_i cos(tθ_i) - x_{i+W/2} sin(tθ_i), the other half with +.

    Halves are swapped by a flip: a concatenation of two is worked out twice by a compiler, and half thrown
    away.
    """
    cosine, sine = rotary[:, :, None]  # (T, 1, W) each
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x * cosine + swapped * sine).to(x.dtype)


def qk_norm_rotary(
    qkv: Float[Tensor, "B T QKV"],
    q_weight: Float[Tensor, " W"],
    k_weight: Float[Tensor, " W"],
    eps: float,
    rotary: Float[Tensor, "2 T W"],
    heads: int,
) -> tuple[Float[Tensor, "B H T W"], Float[Tensor, "B K T W"], Float[Tensor, "B K T W"]]:
    """Queries and keys, normalised and rotated, and values as they are; `heads` are those of queries."""
    width = q_weight.shape[0]
    kv_heads = (qkv.shape[-1] // width - heads) // 2
    if uses_kernels(qkv) and width & (width - 1) == 0:
        weights = torch.stack([q_weight, k_weight]).float()
        q, k, v = _QKNormRotary.apply(qkv, weights, rotary, heads, kv_heads, eps)
    else:
        q, k, v = qkv.unflatten(-1, (-1, width)).split([heads, kv_heads, kv_heads], dim=2)
        q = apply_rotary(rms_norm(q, q_weight, eps), rotary)
        k = apply_rotary(rms_norm(k, k_weight, eps), rotary)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _QKNormRotary(torch.autograd.Function):
    """Values pass through as they are, so that one kernel fills the whole gradient of `qkv`."""

    @staticmethod
    def forward(ctx, qkv, norm_weights, rotary, heads, kv_heads, eps):
        from personatlas.training.model.kernels import qk_norm_rotary_on_gpu

        rotated = qk_norm_rotary_on_gpu(qkv, norm_weights, rotary, heads, kv_heads, eps)  # (B, T, H + K, W)
        values = qkv[..., (heads + kv_heads) * rotary.shape[-1] :].unflatten(-1, (kv_heads, -1))
        ctx.save_for_backward(qkv, norm_weights, rotary)
        ctx.eps = eps
        return rotated[:, :, :heads], rotated[:, :, heads:], values

    @staticmethod
    def backward(ctx, to_q, to_k, to_v):
        from personatlas.training.model.kernels import qk_norm_rotary_backward_on_gpu

        to_qkv, to_norm_weights = qk_norm_rotary_backward_on_gpu(
            *ctx.saved_tensors, *(x.transpose(1, 2) for x in (to_q, to_k, to_v)), ctx.eps
        )
        return to_qkv, to_norm_weights, None, None, None, None


class Linear(nn.Linear):
    """A matrix without bias, multiplied in the dtype of its input: fp32 masters, bf16 products."""

    fp8 = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Left empty: `GPT.initialise` or a checkpoint fills it."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs), in the dtype of x."""
        return fused_linear(x, self)


def fused_linear(x: Tensor, *linears: Linear) -> Tensor:
    """Several matrices' outputs side by side, by one product: larger tiles, and one gradient to x."""
    weights = [linear.weight for linear in linears]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return fp8_product(x, weight) if linears[0].fp8 else F.linear(x, weight.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), divided by its root mean square and scaled."""
        return rms_norm(x, self.weight, self.eps)


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

    def forward(self, x: Tensor, rotary: Tensor, mask: AttentionMask) -> Tensor:
        """x (B, T, D) to (B, T, D); a token sees itself and earlier ones of its document."""
        qkv = fused_linear(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = qk_norm_rotary(
            qkv, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, rotary, self.heads
        )
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))  # (B, H, T, W) -> (B, T, D)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.width, shape.inner)
        self.up_proj = Linear(shape.width, shape.inner)
        self.down_proj = Linear(shape.inner, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) to (B, T, D)."""
        return self.down_proj(swiglu(fused_linear(x, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    """h + attention + mlp, each of a normalised copy."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.width, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.width, shape.eps)
        self.mlp = MLP(shape)

    def forward(self, h: Tensor, rotary: Tensor, mask: AttentionMask) -> Tensor:
        """The residual stream (B, T, D) after the block."""
        h = h + self.self_attn(self.input_layernorm(h), rotary, mask)
        return h + self.mlp(self.post_attention_layernorm(h))


class GPT(nn.Module):
    """The model. Its parameters are empty until `initialise` or a checkpoint fills them.

    `compute` is the dtype of residual stream and products, whatever dtype the parameters have;
    `checkpointing` keeps only the blocks' inputs for the backward pass and computes the rest again; `fp8`
    makes the products of the blocks' matrices, not of the head, in 8 bits (`training/model/fp8.py`).
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
        table = torch.empty(shape.vocabulary, shape.width)
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width, _weight=table)
        self.rotary: Tensor
        self.register_buffer("rotary", rotary_table(shape), persistent=False)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = Norm(shape.width, shape.eps)
        # Not tied to the embedding: they want scales a thousand times apart at the start (1 and 0.001) and
        # learning rates fifty times apart, and an embedding of its own costs memory but no FLOPs.
        self.lm_head = Linear(shape.width, shape.vocabulary)
        for module in self.layers.modules():
            if isinstance(module, Linear):
                module.fp8 = fp8

    @torch.no_grad()
    def initialise(self, seed: int) -> "GPT":
        """Fills all parameters, on the CPU and then copied, so that a seed gives one model on every device.

        - `o_proj` and `down_proj` are zero: every block starts as the identity, the residual stream has the
          embedding's scale at any depth, and no factor 1/√depth is needed.
        - Matrices that read the stream are uniform with variance 1/inputs: an input of RMS 1 gives an output
          of RMS 1, without outliers for bf16.
        - The embedding is normal with RMS 1, the scale of what a block writes once it is trained.
        - The head is normal with RMS 0.001/√(width/768): the first loss is ln(vocabulary) within a
          thousandth. Not zero, which would let no gradient through to the blocks at the first step.
        - All norm weights are one.
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

    def hidden_states(
        self, ids: Int[Tensor, "B T"], documents: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """The normalised output of the last block, which the head reads."""
        if ids.shape[1] > self.shape.context:
            raise ValueError(f"{ids.shape[1]} tokens do not fit into a context of {self.shape.context}")
        h = self.embed_tokens(ids).to(self.compute)  # (B, T, D)
        rotary = rotary_values(self.rotary, ids.shape[1])
        mask = None if documents is None else document_mask(documents)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, rotary, mask, use_reentrant=False)
            else:
                h = layer(h, rotary, mask)
        return self.norm(h)

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        weights: Float[Tensor, "B T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"] | Float[Tensor, ""]:
        """Logits in fp32, or with `targets` their summed cross-entropy in nats
        (`training/model/cross_entropy.py`).

        `targets` are the ids one position later; -100 is not counted. `documents` numbers the text that each
        token belongs to: no token sees another text. Positions run on across texts; rotary, being relative,
        is unaffected.
        """
        h = self.hidden_states(ids, documents)
        if targets is None:
            return self.lm_head(h).to(torch.promote_types(h.dtype, torch.float32))
        flat = None if weights is None else weights.flatten()
        return linear_cross_entropy(h.flatten(0, 1), self.lm_head.weight, targets.flatten(), flat)

    @torch.no_grad()
    def generate(
        self,
        ids: Int[Tensor, "B T"],
        count: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B N"]:
        """`ids` and `count` more, the likeliest at temperature 0; without a cache, so not for serving."""
        for _ in range(count):
            logits = self(ids[:, -self.shape.context :])[:, -1]  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, new], dim=1)
        return ids


def document_mask(documents: Int[Tensor, "B T"]) -> BlockMask | Tensor:
    """Earlier tokens of the same document: blocks for flex_attention on a GPU, else (B, 1, T, T)."""
    if documents.is_cuda:
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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """softmax(q kᵀ / √W) v, causal or by mask: (B, H, T, W) and (B, K, T, W) -> (B, H, T, W)."""
    grouped = q.shape[1] != k.shape[1]
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
