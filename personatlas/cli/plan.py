"""The command `train plan`: size, memory, hours and cost of a training run, before anything runs."""

from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Annotated

from personatlas.cli.options import OPTIONS, Json
from personatlas.cli.output import print_json, print_line, print_table
from personatlas.persona.errors import UserError, not_one_of
from personatlas.training.plan import (
    BYTES_A_TOKEN,
    CHIPS,
    Plan,
    describe_epochs,
    flops_a_token,
    make_plan,
    memory_for,
)


@dataclass(frozen=True)
class Machine:
    """What to train on."""

    gpu: str = "h100"
    "h100, h100-pcie, h100-nvl, h200, h200-nvl, a100, 4090 or cpu (two cores)"
    gpus: int = 1
    "how many of them"
    price: float | None = None
    "dollars an hour for one, instead of a rough figure"
    mfu: float = 0.45
    "the share of the peak that is reached"


def plan(
    *,
    depth: int,
    corpus: Path | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    machine: Annotated[Machine, OPTIONS] = Machine(),
    vocabulary: int = 32_768,
    context: int | None = None,
    json: Json = False,
) -> None:
    """Print size, tokens, batch, rates, memory, hours and cost of training a GPT; nothing is run.

    Parameters
    ----------
    depth
        number of blocks, from which all other sizes are derived
    corpus
        texts to train on, to see whether they are enough; read once, at 4.3 bytes a token
    tokens
        tokens to train on; the compute-optimal number unless given
    minutes
        minutes to train for, instead
    vocabulary
        tokens of the tokenizer
    context
        tokens that the model sees at once; from the depth unless given
    """
    if machine.gpu.lower() not in CHIPS:
        raise UserError(f"--gpu {not_one_of(machine.gpu, CHIPS)}")
    chip = CHIPS[machine.gpu.lower()]
    if machine.price is not None:
        if not (isfinite(machine.price) and machine.price >= 0):
            raise UserError(f"--price {machine.price} is no price")
        chip = replace(chip, price=machine.price)
    made = make_plan(
        depth,
        vocabulary=vocabulary,
        context=context,
        tokens=tokens,
        minutes=minutes,
        chip=chip,
        gpus=machine.gpus,
        share_of_peak=machine.mfu,
    )
    size = None
    if corpus is not None:
        from personatlas.training.data.corpus import Corpus

        texts = Corpus.open(corpus)  # not scan(): a plan can be made before anything is held out
        size = sum(len(piece.text.encode()) for piece in texts.pieces() if not texts.holds_out(piece))
        if size == 0:
            raise UserError(f"--corpus {corpus} has no text to train on")
    if json:
        known = {} if size is None else {"corpus": {"bytes": size, "tokens": round(size / BYTES_A_TOKEN)}}
        print_json(made.to_json() | known)
    else:
        _print(made, machine.mfu, size)


def _print(made: Plan, mfu: float, size: int | None) -> None:
    print_table(["", f"depth {made.shape.depth}"], _rows(made), left=(0, 1))
    rows = []
    for chip in [made.chip, *(chip for name, chip in CHIPS.items() if name != made.chip.name)]:
        speed = mfu * chip.peak * made.gpus / flops_a_token(made.shape)
        there = replace(made, chip=chip, tokens_a_second=speed)  # these very tokens on another processor
        rows.append(
            [f"{made.gpus} x {chip.name}", f"{speed:,.0f}", _time(there.seconds), f"${there.cost:,.2f}"]
        )
    print_table([f"at {mfu:.0%} of the peak", "tokens/s", "time", "cost"], rows)
    if size is not None:
        tokens = max(1, round(size / BYTES_A_TOKEN))
        print_line(f"{size:,} bytes, about {tokens:,} tokens: {describe_epochs(made.tokens, tokens)}")
    if not made.fits:
        need, there_is = _gigabytes(made.memory.total), _gigabytes(made.chip.memory)
        print_line(f"does not fit: one sequence needs {need} of {there_is}; lower --depth or --context")


def _rows(made: Plan) -> list[tuple[str, str]]:
    shape, memory = made.shape, made.memory
    total, matrices, embedding = (
        f"{n / 1e6:,.1f}" for n in (shape.parameters, shape.matrix_parameters, shape.embedding_parameters)
    )
    heads = f"{shape.heads} heads of {shape.head_width}, {shape.kv_heads} of keys and values"
    names = ("weights", "gradients", "optimizer", "activations", "logits")
    parts = ", ".join(f"{name} {getattr(memory, name) / 1e9:,.1f}" for name in names)
    micro_batch, n_bytes = made.micro_batch, made.chip.bytes
    recomputed = memory_for(shape, micro_batch, checkpointing=True, bytes=n_bytes, gpus=made.gpus).total
    activations = f"kept; computed again {_gigabytes(recomputed)}"
    if made.checkpointing:
        activations = "computed again in the backward pass"
    steps = f"{made.steps:,} steps: {made.warmup:,} up, the last {made.decay:,} down to zero"
    flops = flops_a_token(shape)
    return [
        ("shape", f"width {shape.width}, {heads}, inner {shape.inner}, context {shape.context}"),
        ("parameters", f"{total} M: matrices {matrices}, embedding {embedding}, head {embedding}"),
        ("tokens", f"{made.tokens:,} ({made.horizon})"),
        ("batch", f"{made.batch:,} tokens, {steps}"),
        (
            "rates",
            f"matrices {made.matrix_rate:.4f} (Muon), embedding {made.embedding_rate:.4f}, head "
            f"{made.head_rate:.5f}, gains {made.norm_rate:.5f} (AdamW); "
            f"decay of matrices {made.weight_decay:.3f}",
        ),
        ("FLOPs", f"{flops / 1e6:,.0f} M a token, {flops * made.tokens:.2e} in all"),
        ("memory", f"{_gigabytes(memory.total)} a GPU of {_gigabytes(made.chip.memory)}, estimated: {parts}"),
        (
            "micro-batch",
            f"{micro_batch} sequences, {made.accumulation} a step and GPU, blocks' insides {activations}",
        ),
    ]


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _gigabytes(size: int | float) -> str:
    return f"{size / 1e9:,.1f} GB"
