"""The verb `train base`: a corpus in, a model folder out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from personaxis.persona.verbs import console, print_json
from personaxis.training.asked import Around, BaseAsked, Length, Texts, Tuning


def base(
    *,
    depth: int,
    out: Path,
    texts: Texts = Texts(),
    length: Length = Length(),
    tuning: Tuning = Tuning(),
    around: Around = Around(),
    json: bool = False,
) -> None:
    """Train a GPT of some depth on a corpus; the same command goes on where it was stopped.

    Everything but the depth is derived: `personaxis plan --depth N` says what. Under torchrun every process has a GPU.

    Parameters
    ----------
    depth
        the one dial: blocks; all other sizes follow
    out
        the run's folder; its `model` is an ordinary Hugging Face checkpoint
    json
        print the result as JSON
    """
    from personaxis.training.base import train_base

    result = train_base(BaseAsked(depth, out, texts, length, tuning, **asdict(around)))
    if json:
        print_json(result)
    elif result is not None:
        _say_result(result, out)


def _say_result(result: dict[str, Any], out: Path) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    held = result["held_out"]
    exact = f"{held['tokens']:,} tokens, {held['bytes'] / 1e6:,.2f} MB"
    table.add_row("held out", f"{held['bits_per_byte']:.4f} bits per byte, {held['loss']:.4f} nats a token  ({exact})")
    speed = f"{result['seconds']:,.1f} s of training, {result['tokens_a_second']:,.0f} tokens/s"
    share = result["utilisation"]
    table.add_row("training", speed if share is None else f"{speed}, {share:.1%} of the peak")
    table.add_row("tokens", f"{result['tokens']:,} in {result['steps']:,} steps, {result['epochs']:.2f} epochs")
    table.add_row("model", str(out / "model"))
    table.add_row("report", str(out / "report.html"))
    console().print(table)
