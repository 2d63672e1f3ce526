"""The report of a training run: one HTML file that works offline, at any moment of the run and after it.

    write_training_report(Path("runs/mine"))         # runs/mine/report.html

Texts, names and samples come from others or from a model: the template escapes all of them (`analysis/page.py`).
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from personatlas.analysis.html.page import write_page
from personatlas.persona.runs import checkpoint_folders
from personatlas.training.report.figures import smoothed, training_figures
from personatlas.training.report.read import Record, Row, read_record
from personatlas.training.report.tables import duration, large, losses_by_source, plan_table

HERE = Path(__file__).parent
SHOWN = 5  # checkpoints whose samples are shown at once


def write_training_report(folder: Path) -> Path:
    """Write report.html into a run's folder and return its path. Raises `UserError` for another kind of folder."""
    record, path = read_record(folder), folder / "report.html"
    asked, parent = record.run.get("asked") or {}, record.run.get("parent")
    content = {
        "name": record.name,
        "parent": parent,
        "created": record.run.get("created"),
        "facts": _facts(record),
        "verdict": _verdict(record),
        "warnings": _warnings(record),
        "tiles": _tiles(record),
        "held_out_name": "bits per byte" if record.in_bits else "loss",
        "evaluations": _evaluations(record),
        "in_parts": len({row.get("bytes") for row in record.held_out}) > 1,
        "plan": plan_table(record.plan, asked, is_base=not parent and asked.get("stage", "base") == "base"),
        "tuned": losses_by_source(record.held_out),
        "samples": _samples(record),
        "events": record.events,
        "checkpoints": list(checkpoint_folders(folder)),
        "command": record.run.get("command"),
        "asked": _flat(asked),
        "versions": record.run.get("versions") or {},
        "whole": json.dumps(record.run, indent=1, sort_keys=True, ensure_ascii=False),
    }
    filters: dict[str, Callable[..., Any]] = {"count": lambda number: f"{number:,}"}
    write_page(path, HERE / "page.html.jinja", content, training_figures(record), filters)
    return path


def _facts(record: Record) -> list[str]:
    plan = record.plan
    shape, chip, counts = plan.get("shape") or {}, plan.get("chip") or {}, plan.get("parameters") or {}
    facts = []
    if record.run.get("parent"):
        facts.append(f"tuned from {_parent(record.run['parent'])}")
    if shape:
        facts.append(f"depth {shape['depth']}, width {shape['width']}")
    if counts:
        facts.append(f"{large(counts['all'])} parameters")
    if plan.get("tokens"):
        facts.append(f"{large(plan['tokens'])} tokens planned")
    if chip:
        facts.append(f"{plan.get('gpus', 1)} × {chip['name']}")
    return facts


def _parent(parent: Any) -> str:
    return str(parent.get("path", parent)) if isinstance(parent, Mapping) else str(parent)


def _verdict(record: Record) -> str:
    """Where the run stands and what it has come to, in one or two sentences."""
    if not record.steps and not record.held_out:
        return "Nothing has been trained yet: this page has its plan, and shows the rest once it is written again."
    found, last = _found(record), record.last
    parts = [f"{found}, after {record.step:,} steps"]
    if not record.finished and record.total:
        parts = [f"Step {record.step:,} of {record.total:,} ({record.step / record.total:.0%}): {found}"]
    if last.get("seconds"):
        parts[0] += f", {large(last['tokens'])} tokens and {duration(last['seconds'])} of training"
    speed, share = record.middle("tokens_a_second"), record.middle("utilisation")
    if speed is not None:
        parts.append(
            f"{speed:,.0f} tokens a second" + (f", {share:.0%} of the peak" if share is not None else "")
        )
    return ". ".join(parts) + "."


def _found(record: Record) -> str:
    """What the last evaluation, or else the training loss, says."""
    row = record.held_out[-1] if record.held_out else None
    if row is None:
        loss = _final_loss(record)
        return "no loss yet" if loss is None else f"a training loss of {loss:.3f} nats a token"
    where = "" if row["step"] == record.step else f" (at step {row['step']:,})"
    if row.get("bits_per_byte") is not None:
        return f"{row['bits_per_byte']:.4f} bits per byte on held-out text{where}"
    if row.get("loss") is not None:
        return f"{row['loss']:.4f} nats a token on held-out text{where}"
    return f"a held-out loss that is no number{where}"


def _warnings(record: Record) -> list[str]:
    """What a reader must know before the curves."""
    found = [
        f"step {row['step']:,}: {row.get('text') or row['what']}"
        for row in record.events
        if row.get("what") in ("failed", "nan", "stopped") and row is record.events[-1]
    ]
    odd = next((row["step"] for row in record.steps if row.get("loss") is None), None)
    if odd is not None:
        found.append(f"the loss of step {odd:,} was not a finite number")
    if record.plan.get("fits") is False:
        found.append("the plan does not fit into this processor's memory by its own estimate")
    return found


def _tile(name: str, value: str, interval: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "interval": interval, "note": note}


def _tiles(record: Record) -> list[dict[str, str]]:
    tiles = [_held_out_tile(record)] if record.held_out else []
    loss, last = _final_loss(record), record.last
    if loss is not None:
        first = next(row["loss"] for row in record.steps if row.get("loss") is not None)
        tiles.append(_tile("training loss", f"{loss:.3f}", "nats a token", f"smoothed; {first:.2f} at first"))
    if last.get("tokens"):
        planned = record.plan.get("tokens")
        note = f"{last['tokens'] / planned:.0%} of the plan" if planned else f"{record.step:,} steps"
        tiles.append(_tile("read", large(last["tokens"]), "tokens", note))
    speed, share = record.middle("tokens_a_second"), record.middle("utilisation")
    if speed is not None:
        note = "median over the run" if share is None else f"median; {share:.1%} of the peak in model FLOPs"
        tiles.append(_tile("speed", large(speed), "tokens a second", note))
    if last.get("seconds"):
        left = None if record.finished or not record.total else _seconds_left(record)
        note = "without compiling and pauses" if left is None else f"about {duration(left)} left"
        tiles.append(_tile("training time", duration(last["seconds"]), "of training", note))
    return tiles


def _held_out_tile(record: Record) -> dict[str, str]:
    name = "bits_per_byte" if record.in_bits else "loss"
    rows = [row for row in record.held_out if row.get(name) is not None]
    if not rows:
        return _tile("held-out text", "·", "", "its loss was not a finite number")
    row = rows[-1]
    best = min((one for one in rows if one.get("bytes") == row.get("bytes")), key=lambda one: one[name])
    interval = row.get("interval")
    unit = "bits per byte" if record.in_bits else "loss, nats a token"
    known = f"{unit}, 95% {interval[0]:.3f} to {interval[1]:.3f}" if interval else unit
    size = f"{row['bytes'] / 1e6:,.2f} MB" if row.get("bytes") else f"{row.get('tokens', 0):,} tokens"
    note = f"over {size}" + ("" if best is row else f"; lowest {best[name]:.4f} at step {best['step']:,}")
    return _tile("held-out text", f"{row[name]:.3f}", known, note)


def _final_loss(record: Record) -> float | None:
    import numpy as np

    pairs = [(row["step"], row["loss"]) for row in record.steps if row.get("loss") is not None]
    if not pairs:
        return None
    table = np.array(pairs, dtype=np.float64)
    return float(smoothed(table[:, 0], table[:, 1])[-1])


def _seconds_left(record: Record) -> float | None:
    if len(record.steps) < 2 or record.step >= (record.total or 0):
        return None
    first, last = record.steps[len(record.steps) // 2], record.last
    if last["step"] == first["step"]:
        return None
    pace = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    return float(pace * ((record.total or 0) - last["step"]))


def _evaluations(record: Record) -> list[dict[str, str]]:
    return [
        {
            "step": f"{row['step']:,}",
            "bits": "·" if row.get("bits_per_byte") is None else f"{row['bits_per_byte']:.4f}",
            "loss": "·" if row.get("loss") is None else f"{row['loss']:.4f}",
            "tokens": f"{row['tokens']:,}" if row.get("tokens") else "·",
            "bytes": f"{row['bytes']:,}" if row.get("bytes") else "·",
        }
        for row in record.held_out
    ]


def _samples(record: Record) -> list[dict[str, Any]]:
    """By prompt: what was written at the first, the last and some steps between, evenly in their logarithm; the rest apart."""
    steps = sorted({row["step"] for row in record.samples})
    shown = set(spread(steps, SHOWN))
    found: dict[str, list[Row]] = {}
    for row in record.samples:
        found.setdefault(row["prompt"], []).append(row)
    return [
        {
            "prompt": prompt,
            "shown": [row for row in rows if row["step"] in shown],
            "rest": [row for row in rows if row["step"] not in shown],
        }
        for prompt, rows in found.items()
    ]


def spread(steps: list[int], count: int) -> list[int]:
    """Up to `count` of some sorted steps: the first two, the last, and between them the nearest to even logarithms."""
    if len(steps) <= count:
        return steps
    low, high = math.log1p(steps[1]), math.log1p(steps[-1])
    wanted = [low + (high - low) * i / (count - 2) for i in range(count - 1)]
    return sorted(
        {steps[0], *(min(steps, key=lambda step: abs(math.log1p(step) - place)) for place in wanted)}
    )


def _flat(asked: Mapping[str, Any]) -> dict[str, str]:
    def said(value: Any) -> str:
        return "as derived" if value is None else value if isinstance(value, str) else json.dumps(value)

    return {name: said(value) for name, value in asked.items()}
