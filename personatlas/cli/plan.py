"""The verb plan: what a training run will be and take, before anything runs."""

from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Annotated

from rich.table import Table

from personatlas.cli.options import OPTIONS, Json
from personatlas.cli.output import console, print_json, print_line
from personatlas.persona.errors import UserError
from personatlas.training.plan import (
    BYTES_A_TOKEN,
    CHIPS,
    Chip,
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
    "h100, h200, a100, 4090 or cpu (two cores)"
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
    """Print parameters, tokens, batch, rates, memory, hours and cost of training a GPT of some depth; nothing is run.

    Parameters
    ----------
    depth
        the one dial: blocks; all other sizes follow
    corpus
        texts to train on: are they enough? They are read once, and 4.3 bytes are taken for a token
    tokens
        so many tokens; as many as are compute-optimal unless given
    minutes
        what these GPUs do in so many minutes, instead
    vocabulary
        tokens of the tokenizer
    context
        tokens that the model sees at once; from the depth unless given
    """
    made = make_plan(
        depth,
        vocabulary=vocabulary,
        context=context,
        tokens=tokens,
        minutes=minutes,
        chip=_chip(machine.gpu, machine.price),
        gpus=machine.gpus,
        share_of_peak=machine.mfu,
    )
    size = _bytes_of(corpus) if corpus is not None else None
    if json:
        known = {} if size is None else {"corpus": {"bytes": size, "tokens": round(size / BYTES_A_TOKEN)}}
        print_json(made.to_json() | known)
    else:
        _print(made, machine.mfu, size)


def _chip(name: str, price: float | None) -> Chip:
    if name.lower() not in CHIPS:
        raise UserError(f"--gpu {name!r} is not one of {', '.join(CHIPS)}")
    if price is None:
        return CHIPS[name.lower()]
    if not (isfinite(price) and price >= 0):
        raise UserError(f"--price {price} is no price")
    return replace(CHIPS[name.lower()], price=price)


def _bytes_of(corpus: Path) -> int:
    """UTF-8 bytes of the training side of a corpus, all of it read once."""
    from personatlas.training.data.corpus import open_corpus

    texts = open_corpus(corpus)  # not scan(): a plan can be made before anything is chosen to be held out
    size = sum(len(piece.text.encode()) for piece in texts.pieces() if not texts.holds_out(piece))
    if size == 0:
        raise UserError(f"--corpus {corpus} has no text to train on")
    return size


def _print(made: Plan, mfu: float, size: int | None) -> None:
    table = Table("", f"depth {made.shape.depth}", box=None, pad_edge=False)
    for name, value in _rows(made):
        table.add_row(name, value)
    console().print(table)
    _print_chips(made, mfu)
    if size is not None:
        tokens = max(1, round(size / BYTES_A_TOKEN))
        print_line(f"{size:,} bytes, about {tokens:,} tokens: {describe_epochs(made.tokens, tokens)}")
    if not made.fits:
        need, there = _gigabytes(made.memory.total), _gigabytes(made.chip.memory)
        print_line(f"does not fit: one sequence needs {need} of {there}; lower --depth or --context")


def _rows(made: Plan) -> list[tuple[str, str]]:
    shape, memory = made.shape, made.memory
    millions = [
        f"{n / 1e6:,.1f}" for n in (shape.parameters, shape.matrix_parameters, shape.embedding_parameters)
    ]
    heads = f"{shape.heads} heads of {shape.head_width}, {shape.kv_heads} of keys and values"
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    held = ", ".join(f"{name} {getattr(memory, name) / 1e9:,.1f}" for name in parts)
    again = memory_for(
        shape, made.micro_batch, checkpointing=True, bytes=made.chip.bytes, gpus=made.gpus
    ).total
    how = (
        "computed again in the backward pass"
        if made.checkpointing
        else f"kept; computed again {_gigabytes(again)}"
    )
    return [
        ("shape", f"width {shape.width}, {heads}, inner {shape.inner}, context {shape.context}"),
        (
            "parameters",
            f"{millions[0]} M: matrices {millions[1]}, embedding {millions[2]}, head {millions[2]}",
        ),
        ("tokens", f"{made.tokens:,} ({made.horizon})"),
        (
            "batch",
            f"{made.batch:,} tokens, {made.steps:,} steps: {made.warmup:,} up, the last {made.decay:,} down to zero",
        ),
        (
            "rates",
            f"matrices {made.matrix_rate:.4f} (Muon), embedding {made.embedding_rate:.4f}, head {made.head_rate:.5f}, "
            f"gains {made.norm_rate:.5f} (AdamW); decay of matrices {made.weight_decay:.3f}",
        ),
        (
            "FLOPs",
            f"{flops_a_token(shape) / 1e6:,.0f} M a token, {flops_a_token(shape) * made.tokens:.2e} in all",
        ),
        ("memory", f"{_gigabytes(memory.total)} a GPU of {_gigabytes(made.chip.memory)}, estimated: {held}"),
        (
            "micro-batch",
            f"{made.micro_batch} sequences, {made.accumulation} a step and GPU, blocks' insides {how}",
        ),
    ]


def _print_chips(made: Plan, mfu: float) -> None:
    """Hours and cost of these very tokens on every processor that is known, the asked one first."""
    table = Table(f"at {mfu:.0%} of the peak", "tokens/s", "time", "cost", box=None, pad_edge=False)
    chips = [made.chip, *(chip for name, chip in CHIPS.items() if name != made.chip.name)]
    for chip in chips:
        speed = mfu * chip.peak * made.gpus / flops_a_token(made.shape)
        there = replace(made, chip=chip, tokens_a_second=speed)
        table.add_row(
            f"{made.gpus} x {chip.name}", f"{speed:,.0f}", _time(there.seconds), f"${there.cost:,.2f}"
        )
    console().print(table)


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _gigabytes(size: int | float) -> str:
    return f"{size / 1e9:,.1f} GB"
