"""The plan of a training run, derived from its depth and, if given, from its tokens or minutes.

    plan = make_plan(12, minutes=3.05, chip=CHIPS["h200"])
    plan.shape.width, plan.tokens, plan.batch, plan.steps, plan.matrix_rate

Each rule is a function with its reason. What comes from elsewhere says from where; what is not measured here
says so. FLOPs a token, forward and backward, are counted as nanochat counts them: 6 for each parameter in the
blocks' matrices and the head (the embedding is a lookup), and 12 · depth · heads · head width · context for
attention, causal or not.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from personatlas.persona.errors import UserError
from personatlas.persona.records import Fraction, JsonObject, JsonRecord, NonNegative, Positive
from personatlas.training.model.config import Shape, tokens_per_piece
from personatlas.training.optim.schedule import (
    Rates,
    adam_beta2_for,
    decay_for,
    momentum_at,
    peak_rates,
    warmup_for,
    weight_decay_for,
)

if TYPE_CHECKING:  # a plan is arithmetic
    import torch

DEPTHS = range(1, 49)  # 5 B parameters at 48: more than fits where every GPU holds all weights
# Keys of run.json that differ from the plan's fields
STORED_RATES = ("matrix_rate", "embedding_rate", "head_rate", "gain_rate")  # in run.json
STORED = {"norm_rate": "gain_rate", "adam_beta2": "second"}
TOKENS_A_PARAMETER = 20  # Hoffmann et al. 2022 ("Chinchilla"), here on matrix parameters
MAX_EPOCHS = 16  # after which a text that is read again teaches nothing (Muennighoff et al. 2023)
SHARE_OF_PEAK = 0.45
BYTES_A_TOKEN = 4.3  # of English at a vocabulary of 32,768: 443 MB of 19th-century books are 103 M tokens


@dataclass(frozen=True)
class Chip(JsonRecord):
    """A processor: dense peak in FLOP/s of its training dtype, memory in bytes, rent in dollars an hour."""

    name: str
    peak: NonNegative
    memory: NonNegative
    price: NonNegative
    bytes: Positive = 2
    "of a number in products"


CHIPS = {
    # vendors' dense bf16 peaks, lower for PCIe and NVL parts; rents are rough on-demand figures of 2026, which --price replaces
    "h100": Chip("h100", 989e12, 80e9, 3.0),
    "h100-pcie": Chip("h100-pcie", 756e12, 80e9, 2.5),
    "h100-nvl": Chip("h100-nvl", 835e12, 94e9, 2.8),
    "h200": Chip("h200", 989e12, 141e9, 3.8),
    "h200-nvl": Chip("h200-nvl", 835e12, 141e9, 3.5),
    "a100": Chip("a100", 312e12, 80e9, 1.8),
    "4090": Chip("4090", 165e12, 24e9, 0.45),
    # two cores of an AVX-512 server, fp32: a product of 1024 x 768 x 2048 ran at 83 GFLOP/s a core
    "cpu": Chip("cpu", 166e9, 8e9, 0.0, 4),
}


def shape_at(depth: int, vocabulary: int = 32_768, context: int | None = None) -> Shape:
    """The model of a depth. Raises `UserError` for a depth, vocabulary or context that is not allowed."""
    if depth not in DEPTHS:
        raise UserError(f"--depth {depth} is not one of {DEPTHS[0]}..{DEPTHS[-1]}")
    if vocabulary < 257:
        raise UserError(f"--vocabulary {vocabulary}: a byte-level tokenizer has 256 bytes and an end (257)")
    if context is not None and context < 2:
        raise UserError(f"--context {context}: at least 2 tokens are needed to predict one from another")
    # 128 fills the tensor cores' tiles and halves the exponentials; below depth 8 heads would be too few
    head = 128 if depth >= 8 else 64
    width = -(-64 * depth // head) * head  # 64 a layer in whole heads: one aspect ratio, as in nanochat
    heads = width // head
    # two heads of queries share one of keys and values: half the cache when served; its cost is not measured
    kv_heads = heads // 2 if heads % 2 == 0 and heads >= 4 else heads
    # 8/3 of the width in whole 128s: three matrices cost what an MLP's two of 4 widths do (Shazeer 2020)
    inner = -(-8 * width // (3 * 128)) * 128
    # for shallow models a power of two of at least 128 a layer, at least 256
    usual_context = min(2048, max(256, 2 ** math.ceil(math.log2(128 * depth))))
    return Shape(vocabulary, depth, width, heads, kv_heads, head, inner, context or usual_context)


def optimal_tokens(shape: Shape) -> int:
    """The horizon at which a FLOP is best spent, 20 tokens a matrix parameter (Hoffmann et al. 2022)."""
    return TOKENS_A_PARAMETER * shape.matrix_parameters


def depth_for(corpus: int, vocabulary: int, chip: Chip, gpus: int = 1, minutes: float = math.inf) -> int:
    """The depth of a model for a corpus of so many tokens: the largest whose compute-optimal horizon is read
    in at most `MAX_EPOCHS` and in some minutes; at least 2.
    """
    depth, budget = 2, 60 * minutes * SHARE_OF_PEAK * chip.peak * gpus
    for larger in DEPTHS[2:]:
        shape = shape_at(larger, vocabulary)
        tokens = optimal_tokens(shape)
        if tokens > MAX_EPOCHS * corpus or tokens * flops_a_token(shape) > budget:
            break
        depth = larger
    return depth


def critical_batch(horizon: int) -> float:
    """Tokens in a batch: 158,000 · (horizon / 1e9)^0.383, and never more than a 400th of the horizon.

    The batch that can grow without costing tokens grows with the horizon and hardly with the model (Zhang et
    al. 2024); the exponent is that of Bergsma et al. 2025, who find 175,000 at 1e9 for AdamW. Measured with
    Muon at depth 12: at 9e7 tokens 32,768 and 65,536 do as well as each other, at 2e7 65,536 does better than
    131,072 by 0.07 bits per byte. Below that a GPU waits for the optimizer.
    """
    return min(158_000 * (horizon / 1e9) ** 0.383, horizon / 400)


def batch_for(tokens: int, context: int, gpus: int = 1) -> int:
    """The critical batch in whole multiples of 8 sequences and of the GPUs."""
    unit = context * math.lcm(8, gpus)
    return max(1, round(critical_batch(tokens) / unit)) * unit


def flops_a_token(shape: Shape, *, causal: bool = False) -> int:
    """FLOPs of the forward and backward pass; recomputation does not count.

    As is usual, attention counts as if every token saw the whole context; `causal` counts the half that it
    sees.
    """
    products = 6 * (shape.matrix_parameters + shape.embedding_parameters)
    return products + (6 if causal else 12) * shape.depth * shape.heads * shape.head_width * shape.context


def utilisation(tokens_a_second: float, shape: Shape, chip: Chip, gpus: int = 1) -> float:
    """Model-FLOPs utilisation: a speed as a share of the chips' dense peak."""
    return tokens_a_second * flops_a_token(shape) / (chip.peak * gpus)


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip; an estimate, on the high side for a compiled model."""

    weights: int
    "fp32 masters"
    gradients: int
    "fp32"
    optimizer: int
    "Muon's momentum, and two moments for all else; spread over the GPUs"
    activations: int
    "what the backward pass needs, and the matrices in the dtype of the products"
    logits: int
    "one piece of the loss, its gradient, and the gradient of the head, twice while pieces of it are added"

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def memory_for(shape: Shape, sequences: int, *, checkpointing: bool, bytes: int = 2, gpus: int = 1) -> Memory:
    """Memory of a micro-batch on each of some GPUs; `bytes` are those of a number in products."""
    tokens = sequences * shape.context
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    # residuals and norms, two each; queries raw, rotated, out; keys raw, rotated; values; gate, up, product
    inside = (
        tokens * bytes * (4 * shape.width + 3 * queries + 3 * keys + 3 * shape.inner)
        + 4 * tokens * shape.heads
    )
    kept = shape.depth * tokens * bytes * shape.width + inside if checkpointing else shape.depth * inside
    compiled = bytes < 4  # on a GPU, all of which train in bf16
    # fp32 logits and their gradient; what is not compiled holds some more of their size on the way
    piece, logit = tokens_per_piece(shape.vocabulary, compiled=compiled), 4 + bytes if compiled else 22
    copies = bytes * (shape.matrix_parameters + shape.embedding_parameters) if compiled else 0
    other = shape.parameters - shape.matrix_parameters
    return Memory(
        weights=4 * shape.parameters,
        gradients=4 * shape.parameters,
        optimizer=-(-4 * (shape.matrix_parameters + 2 * other) // gpus),
        activations=kept + 2 * tokens * bytes * shape.width + copies,
        logits=min(tokens, piece) * shape.vocabulary * logit + 8 * shape.embedding_parameters,
    )


def micro_batch_for(shape: Shape, share: int, chip: Chip, gpus: int) -> tuple[int, bool, bool]:
    """Sequences at once, whether to checkpoint, and whether it fits.

    The largest divisor of a GPU's share within 80% of its memory, without checkpointing if even one sequence
    fits so, since that costs a third more computation.
    """
    for checkpointing in (False, True):
        for sequences in (n for n in range(share, 0, -1) if share % n == 0):
            need = memory_for(shape, sequences, checkpointing=checkpointing, bytes=chip.bytes, gpus=gpus)
            if need.total <= 0.8 * chip.memory:
                return sequences, checkpointing, True
    return 1, True, False


@dataclass(frozen=True)
class Plan(JsonRecord):
    """A run, made by `make_plan` or `make_chat_plan`: whole batches, and the schedule's highest rates."""

    shape: Shape
    horizon: str
    tokens: Positive
    batch: Positive
    steps: Positive
    warmup: Positive
    decay: Positive
    matrix_rate: NonNegative
    embedding_rate: NonNegative
    head_rate: NonNegative
    norm_rate: NonNegative
    weight_decay: NonNegative
    adam_beta2: Fraction
    chip: Chip
    gpus: Positive
    tokens_a_second: NonNegative
    micro_batch: Positive
    checkpointing: bool
    fits: bool

    json_names: ClassVar[Mapping[str, str]] = STORED

    def __post_init__(self) -> None:
        if self.batch % self.shape.context or not self.tokens_a_second > 0:
            raise ValueError(f"{self.batch} tokens are no whole rows, or no speed is known")

    def scaled(self, factor: float) -> "Plan":
        """All rates times a factor."""
        names = ("matrix_rate", "embedding_rate", "head_rate", "norm_rate")
        return replace(self, **{name: factor * getattr(self, name) for name in names})

    def rate_at(self, step: int) -> float:
        """What multiplies every rate at a step, 0-based: up in a line, flat, down in a line; in (0, 1]."""
        up = (step + 1) / self.warmup
        down = (self.steps - step) / self.decay
        return max(0.0, min(1.0, up, down))

    def rates_at(self, step: int) -> Rates:
        """Rates and constants of a step, 0-based."""
        share = self.rate_at(step)
        return Rates(
            matrix=share * self.matrix_rate,
            embedding=share * self.embedding_rate,
            head=share * self.head_rate,
            norm=share * self.norm_rate,
            decay=self.weight_decay,
            momentum=momentum_at(step, self.steps),
            adam_beta2=self.adam_beta2,
        )

    @property
    def memory(self) -> Memory:
        """Bytes on one chip."""
        sizes = {"bytes": self.chip.bytes, "gpus": self.gpus}
        return memory_for(self.shape, self.micro_batch, checkpointing=self.checkpointing, **sizes)

    @property
    def accumulation(self) -> int:
        """Micro-batches of one GPU in one step."""
        return self.batch // (self.shape.context * self.micro_batch * self.gpus)

    @property
    def seconds(self) -> float:
        """Of training alone: start-up, compilation and evaluation come on top."""
        return self.tokens / self.tokens_a_second

    @property
    def cost(self) -> float:
        """Dollars."""
        return self.seconds / 3600 * self.gpus * self.chip.price

    def to_json(self) -> JsonObject:
        """Plain values, derived ones too."""
        values = super().to_json()
        counts = {
            "matrix": self.shape.matrix_parameters,
            "embedding": self.shape.embedding_parameters,
            "head": self.shape.embedding_parameters,
            "gains": self.shape.norm_parameters,
            "all": self.shape.parameters,
        }
        return {
            **values,
            "parameters": counts,
            "flops_a_token": flops_a_token(self.shape),
            "flops_a_token_causal": flops_a_token(self.shape, causal=True),
            "utilisation": utilisation(self.tokens_a_second, self.shape, self.chip, self.gpus),
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "accumulation": self.accumulation,
            "seconds": self.seconds,
            "cost": self.cost,
        }


def make_plan(
    depth: int,
    *,
    vocabulary: int = 32_768,
    context: int | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    chip: Chip = CHIPS["h100"],
    gpus: int = 1,
    share_of_peak: float = SHARE_OF_PEAK,
    speed: float | None = None,
    batch: int | None = None,
    corpus: int | None = None,
) -> Plan:
    """Derives a run: for the compute-optimal horizon, for `tokens`, or for `minutes` at a share of the peak.

    `speed` is in tokens a second of all chips, where it has been measured; `corpus` is how many tokens there
    are, where they are to be read `MAX_EPOCHS` times at most. Batch, steps, rates, decay and
    schedule follow the horizon; `batch` is in tokens, whole sequences for every GPU. Raises `UserError` for
    options that make no run.
    """
    shape = shape_at(depth, vocabulary, context)
    if tokens is not None and minutes is not None:
        raise UserError("--tokens and --minutes both say how long to train; give one of them")
    if not 0 < share_of_peak <= 1:
        raise UserError(f"--mfu {share_of_peak} is not a share of the peak (0.45 is 45%)")
    if gpus < 1:
        raise UserError(f"--gpus {gpus} is below 1")
    speed = speed or share_of_peak * chip.peak * gpus / flops_a_token(shape)
    wanted, horizon = optimal_tokens(shape), f"compute-optimal, {TOKENS_A_PARAMETER} a matrix parameter"
    if tokens is not None:
        wanted, horizon = tokens, "as asked"
    elif minutes is not None:
        if not 0 < minutes < math.inf:
            raise UserError(f"--minutes {minutes} is no time to train in")
        wanted, horizon = int(60 * minutes * speed), f"what {minutes:g} minutes hold"
    if corpus is not None and wanted > MAX_EPOCHS * corpus:
        wanted, horizon = MAX_EPOCHS * corpus, f"{MAX_EPOCHS} epochs"
    batch = batch_for(max(wanted, 1), shape.context, gpus) if batch is None else batch
    if batch < 1 or batch % (shape.context * gpus):
        unit = shape.context * gpus
        raise UserError(f"--batch {batch}: give a multiple of {unit:,} tokens, one sequence for every GPU")
    if wanted < batch:
        raise UserError(f"{wanted:,} tokens are less than a batch of {batch:,}; train longer")
    steps, rates = wanted // batch, peak_rates(batch, shape.width)
    micro_batch, checkpointing, fits = micro_batch_for(shape, batch // (shape.context * gpus), chip, gpus)
    return Plan(
        shape=shape,
        horizon=horizon,
        tokens=steps * batch,
        batch=batch,
        steps=steps,
        warmup=warmup_for(steps),
        decay=decay_for(steps),
        matrix_rate=rates.matrix,
        embedding_rate=rates.embedding,
        head_rate=rates.head,
        norm_rate=rates.norm,
        weight_decay=weight_decay_for(rates.matrix, steps),
        adam_beta2=adam_beta2_for(batch),
        chip=chip,
        gpus=gpus,
        tokens_a_second=speed,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        fits=fits,
    )


def describe_epochs(tokens: int, corpus: int) -> str:
    """How often a horizon reads a corpus of some tokens, and what that is worth (Muennighoff et al. 2023)."""
    times = tokens / corpus
    if times <= 1:
        return f"{times:.0%} of the corpus is read, once"
    worth = "nearly as good as new text" if times <= 4 else "worth less and less"
    worth = worth if times <= MAX_EPOCHS else "worth nothing any more"
    return f"the corpus is too small: it is read {times:.1f} times ({worth} by the last)"


def detect_chip(device: "torch.device") -> Chip:
    """The processor of a device; an unknown GPU counts as the slowest known one, with its own memory."""
    if device.type != "cuda":
        return CHIPS["cpu"]
    import torch

    name = torch.cuda.get_device_name(device)
    memory = float(torch.cuda.get_device_properties(device).total_memory)
    for key in sorted(CHIPS, key=len, reverse=True):  # "h100-pcie" before "h100"
        if all(part in name.lower() for part in key.split("-")):
            return replace(CHIPS[key], memory=memory)
    return replace(CHIPS["4090"], name=name, memory=memory)
