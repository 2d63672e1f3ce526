"""The report of a training run: one HTML file that works offline, at any moment of the run and after it.

    write_training_report(Path("runs/mine"))         # runs/mine/report.html

Texts, names and samples come from others or from a model: the template escapes all of them.
"""

import json
from pathlib import Path

import numpy as np

from personatlas.analysis.html.page import short_path, write_page
from personatlas.persona.records import JsonObject
from personatlas.persona.runs import checkpoint_folders, spread_steps
from personatlas.training.report.figures import smoothed, training_figures
from personatlas.training.report.read import TrainingRecord, read_training_record
from personatlas.training.report.tables import format_count, format_seconds, losses_by_source, plan_table

HERE = Path(__file__).parent
SHOWN_STEPS = 5  # whose samples are shown at once


def write_training_report(folder: Path) -> Path:
    """Writes report.html into a run's folder; its path. Raises `UserError` for another kind of folder."""
    record, path = read_training_record(folder), folder / "report.html"
    settings, parent = record.run.get("asked") or {}, record.run.get("parent")
    is_base = not parent and settings.get("stage", "base") == "base"
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
        "plan": plan_table(record.plan, settings, is_base=is_base),
        "tuned": losses_by_source(record.held_out),
        "samples": _samples(record),
        "events": record.events,
        "checkpoints": list(checkpoint_folders(folder)),
        "command": record.run.get("command"),
        "asked": {
            name: "as derived" if value is None else value if isinstance(value, str) else json.dumps(value)
            for name, value in settings.items()
        },
        "versions": record.run.get("versions") or {},
        "whole": json.dumps(record.run, indent=1, sort_keys=True, ensure_ascii=False),
    }
    filters = {"count": lambda number: f"{number:,}"}
    write_page(path, HERE / "page.html.jinja", content, training_figures(record), filters)
    return path


def _facts(record: TrainingRecord) -> list[str]:
    plan = record.plan
    shape, chip, counts = plan.get("shape") or {}, plan.get("chip") or {}, plan.get("parameters") or {}
    facts = []
    if parent := record.run.get("parent"):
        facts.append(
            f"tuned from {short_path(parent.get('path', parent) if isinstance(parent, dict) else parent)}"
        )
    if shape:
        facts.append(f"depth {shape['depth']}, width {shape['width']}")
    if counts:
        facts.append(f"{format_count(counts['all'])} parameters")
    if plan.get("tokens"):
        facts.append(f"{format_count(plan['tokens'])} tokens planned")
    if chip:
        facts.append(f"{plan.get('gpus', 1)} × {chip['name']}")
    return facts


def _verdict(record: TrainingRecord) -> str:
    """Where the run stands and what it has come to, in one or two sentences."""
    if not record.steps and not record.held_out:
        return "Nothing has been trained yet: this page has its plan; written again, it shows the rest."
    loss, last = _describe_loss(record), record.last
    parts = [f"{loss}, after {record.step:,} steps"]
    if not record.is_finished and record.total:
        parts = [f"Step {record.step:,} of {record.total:,} ({record.step / record.total:.0%}): {loss}"]
    if last.get("seconds"):
        parts[0] += (
            f", {format_count(last['tokens'])} tokens and {format_seconds(last['seconds'])} of training"
        )
    speed, share = record.median("tokens_a_second"), record.median("utilisation")
    if speed is not None:
        of_peak = "" if share is None else f", {share:.0%} of the peak"
        parts.append(f"{speed:,.0f} tokens a second{of_peak}")
    return ". ".join(parts) + "."


def _of_peak(share: float, plan: JsonObject) -> str:
    """Model-FLOPs utilisation with the chip and its peak, and without the attention that a causal mask leaves
    out."""
    chip, usual, causal = (plan.get(name) for name in ("chip", "flops_a_token", "flops_a_token_causal"))
    peak = f"{chip['name']}'s {chip['peak'] / 1e12:,.0f} TFLOP/s" if chip else "peak"
    masked = f", {share * causal / usual:.1%} without masked attention" if causal and usual else ""
    return f"{share:.1%} of the {peak} in model FLOPs{masked}"


def _describe_loss(record: TrainingRecord) -> str:
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


def _warnings(record: TrainingRecord) -> list[str]:
    """What a reader must know before the curves."""
    warnings = [
        f"step {row['step']:,}: {row.get('text') or row['what']}"
        for row in record.events
        if row.get("what") in ("failed", "nan", "stopped") and row is record.events[-1]
    ]
    odd = next((row["step"] for row in record.steps if row.get("loss") is None), None)
    if odd is not None:
        warnings.append(f"the loss of step {odd:,} was not a finite number")
    if record.plan.get("fits") is False:
        warnings.append("the plan does not fit into this processor's memory by its own estimate")
    return warnings


def _tile(name: str, value: str, interval: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "interval": interval, "note": note}


def _tiles(record: TrainingRecord) -> list[dict[str, str]]:
    tiles = [_held_out_tile(record)] if record.held_out else []
    loss, last = _final_loss(record), record.last
    if loss is not None:
        first = next(row["loss"] for row in record.steps if row.get("loss") is not None)
        tiles.append(_tile("training loss", f"{loss:.3f}", "nats a token", f"smoothed; {first:.2f} at first"))
    if last.get("tokens"):
        planned = record.plan.get("tokens")
        note = f"{last['tokens'] / planned:.0%} of the plan" if planned else f"{record.step:,} steps"
        tiles.append(_tile("read", format_count(last["tokens"]), "tokens", note))
    speed, share = record.median("tokens_a_second"), record.median("utilisation")
    if speed is not None:
        note = "median over the run" if share is None else f"median; {_of_peak(share, record.plan)}"
        tiles.append(_tile("speed", format_count(speed), "tokens a second", note))
    if last.get("seconds"):
        left = None
        if not record.is_finished and len(record.steps) > 1 and record.step < (record.total or 0):
            middle = record.steps[len(record.steps) // 2]
            if last["step"] > middle["step"] and middle.get("seconds") is not None:
                pace = (last["seconds"] - middle["seconds"]) / (last["step"] - middle["step"])
                left = float(pace * ((record.total or 0) - last["step"]))
        note = "without compiling and pauses" if left is None else f"about {format_seconds(left)} left"
        tiles.append(_tile("training time", format_seconds(last["seconds"]), "of training", note))
    return tiles


def _held_out_tile(record: TrainingRecord) -> dict[str, str]:
    name = "bits_per_byte" if record.in_bits else "loss"
    rows = [row for row in record.held_out if row.get(name) is not None]
    if not rows:
        return _tile("held-out text", "·", "", "its loss was not a finite number")
    row = rows[-1]
    best = min((other for other in rows if other.get("bytes") == row.get("bytes")), key=lambda row: row[name])
    interval = row.get("interval")
    unit = "bits per byte" if record.in_bits else "loss, nats a token"
    known = f"{unit}, 95% {interval[0]:.3f} to {interval[1]:.3f}" if interval else unit
    size = f"{row['bytes'] / 1e6:,.2f} MB" if row.get("bytes") else f"{row.get('tokens', 0):,} tokens"
    note = f"over {size}" + ("" if best is row else f"; lowest {best[name]:.4f} at step {best['step']:,}")
    return _tile("held-out text", f"{row[name]:.3f}", known, note)


def _final_loss(record: TrainingRecord) -> float | None:
    pairs = [(row["step"], row["loss"]) for row in record.steps if row.get("loss") is not None]
    if not pairs:
        return None
    table = np.array(pairs, dtype=np.float64)
    return float(smoothed(table[:, 0], table[:, 1])[-1])


def _evaluations(record: TrainingRecord) -> list[dict[str, str]]:
    forms = {"step": ",", "bits_per_byte": ".4f", "loss": ".4f", "tokens": ",", "bytes": ","}
    return [
        {name: "·" if row.get(name) is None else f"{row[name]:{form}}" for name, form in forms.items()}
        for row in record.held_out
    ]


def _samples(record: TrainingRecord) -> list[JsonObject]:
    """By prompt: what was written at the first, the last and some steps between; the rest apart."""
    shown = set(spread_steps(sorted({row["step"] for row in record.samples}), SHOWN_STEPS))
    by_prompt: dict[str, list[JsonObject]] = {}
    for row in record.samples:
        by_prompt.setdefault(row["prompt"], []).append(row)
    return [
        {
            "prompt": prompt,
            "shown": [row for row in rows if row["step"] in shown],
            "rest": [row for row in rows if row["step"] not in shown],
        }
        for prompt, rows in by_prompt.items()
    ]
