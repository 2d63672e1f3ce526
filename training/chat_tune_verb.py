"""The verb `train chat`: a base model and conversations in, a model that chats out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from personaxis.persona.verbs import console, print_json
from personaxis.training.asked import Around
from personaxis.training.chat_asked import ChatAsked, ChatLength, Chats, ChatTuning

SHOWN = 12  # sources in the table; all of them are in run.json


def chat(
    base: Path,
    /,
    *,
    out: Path,
    chats: Chats = Chats(),
    length: ChatLength = ChatLength(),
    tuning: ChatTuning = ChatTuning(),
    around: Around = Around(),
    json: bool = False,
) -> None:
    """Tune a base model on conversations; the same command goes on where it was stopped.

    What is odd about the data is counted, named and left out. Only what the assistant says is learned.

    Parameters
    ----------
    base
        the folder of `personaxis train base`, one of its checkpoints, or an exported folder
    out
        the run's folder; its `model` is an ordinary Hugging Face checkpoint
    json
        print the result as JSON
    """
    from personaxis.training.chat import train_chat

    result = train_chat(ChatAsked(base, out, chats, length, tuning, **asdict(around)))
    if json:
        print_json(result)
    elif result is not None:
        _say_result(result, out)


def _say_result(result: dict[str, Any], out: Path) -> None:
    before, after = result["sources"]["before"], result["sources"]["after"]
    table = Table("held out", "nats a token", "untuned", "perplexity", "n", "known", box=None, pad_edge=False)
    for name in list(after)[: 1 + SHOWN]:
        one = after[name]
        table.add_row(
            name,
            _with(one, "loss"),
            f"{before[name]['loss']:.3f}",
            f"{one['perplexity']:.2f}",
            f"{one['conversations']:,}",
            f"{one['met'] / one['conversations']:.0%}",
        )
    console().print(table)
    if any(one["met"] for one in after.values()):
        console().print(
            "known: answers that training gives too, to other questions or in other roles: their loss is memory"
        )
    if "style" in result:
        _say_style(result["style"])
    plain = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    plain.add_row("training", f"{result['seconds']:,.1f} s, {result['steps']:,} steps, {result['epochs']:.2f} epochs")
    plain.add_row("model", str(out / "model"))
    console().print(plain)


def _say_style(style: dict[str, Any]) -> None:
    """Teacher, untuned and tuned side by side: over all roles that were tuned on, and what became of the others."""
    if not style["measures"]:
        return
    measures = {who: dict(found["all"]) for who, found in style["measures"].items()}
    for who, found in style["measures"].items():
        for group in found:
            if group.endswith("held-out roles"):
                names = [name for name in ("recognised", "chance") if name in found[group]]
                measures[who] |= {f"{name}: {group}": found[group][name] for name in names}
    table = Table(f"style, {style['questions']} questions", *measures, box=None, pad_edge=False)
    for name in measures["after"]:
        cells = [
            _with(found[name], "value") if isinstance(found[name], dict) else f"{found[name]:.2f}"
            for found in measures.values()
        ]
        table.add_row(name, *cells)
    console().print(table)


def _with(found: dict[str, Any], name: str) -> str:
    digits = 1 if found[name] >= 10 else 3 if name == "loss" else 2
    known = "" if found["low"] is None else f" [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
    return f"{found[name]:.{digits}f}{known}"
