"""The report of a training run: one HTML file that works offline, at any moment of the run and after it.

    write_training_report(Path("runs/mine"))         # runs/mine/report.html

Texts, names and samples come from others or from a model: the template escapes all of them (`analysis/page.py`).
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from personaxis.analysis.figures_training import smoothed, training_figures
from personaxis.analysis.page import write_page
from personaxis.analysis.training_record import Record, Row, read_record
from personaxis.persona.trained import checkpoint_folders

HERE = Path(__file__).parent
SHOWN = 5  # checkpoints whose samples are shown at once
# where the values of a base model's plan come from, in short; training/dial.py and rates.py say it with their sources
RULES = {
    "shape": "from the depth: 64 of width a layer, heads of 128 (of 64 below depth 8), two heads of queries to one of keys "
    "and values, an MLP of 8/3 the width",
    "batch": "262,144 · (tokens / 1e9)^0.383, at most a 400th of the tokens",
    "schedule": "up over 2% of the steps, 10 at least; straight down to zero over the last 60%",
    "matrices": "0.02 · √(batch / 524,288)",
    "embedding": "0.2 · √(batch / 524,288)",
    "head": "0.004 · √(batch / 524,288) · 768 / width",
    "gains": "0.004 · √(batch / 524,288)",
    "decay": "weights average over 15% of the run; at most 0.2",
    "flops": "6 a parameter that multiplies, and 12 · depth · heads · head width · context for attention; forward and backward",
    "micro-batch": "as many sequences at once as fit into 80% of the memory",
}


def write_training_report(folder: Path) -> Path:
    """Write report.html into a run's folder and return its path. Raises `KnownError` for another kind of folder."""
    record, path = read_record(folder), folder / "report.html"
    content = {
        "name": record.name,
        "created": record.run.get("created"),
        "facts": _facts(record),
        "verdict": _verdict(record),
        "warnings": _warnings(record),
        "tiles": _tiles(record),
        "held_out_name": "bits per byte" if record.in_bits else "loss",
        "evaluations": _evaluations(record),
        "in_parts": len({row.get("bytes") for row in record.held_out}) > 1,
        "plan": _plan(record),
        "samples": _samples(record),
        "events": record.events,
        "checkpoints": list(checkpoint_folders(folder)),
        "command": record.run.get("command"),
        "asked": _flat(record.run.get("asked") or {}),
        "versions": record.run.get("versions") or {},
        "whole": json.dumps(record.run, indent=1, sort_keys=True, ensure_ascii=False),
    }
    filters: dict[str, Callable[..., Any]] = {"count": lambda number: f"{number:,}"}
    write_page(path, HERE / "training_report.html.jinja", content, training_figures(record), filters)
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
        facts.append(f"{_large(counts['all'])} parameters")
    if plan.get("tokens"):
        facts.append(f"{_large(plan['tokens'])} tokens planned")
    if chip:
        facts.append(f"{plan.get('gpus', 1)} × {chip['name']}")
    return facts


def _parent(parent: Any) -> str:
    return str(parent.get("folder") or parent.get("id") or parent) if isinstance(parent, Mapping) else str(parent)


def _verdict(record: Record) -> str:
    """Where the run stands and what it has come to, in one or two sentences."""
    if not record.steps and not record.held_out:
        return "Nothing has been trained yet: this page has its plan, and shows the rest once it is written again."
    found, last = _found(record), record.last
    parts = [f"{found}, after {record.step:,} steps"]
    if not record.finished and record.total:
        parts = [f"Step {record.step:,} of {record.total:,} ({record.step / record.total:.0%}): {found}"]
    if last.get("seconds"):
        parts[0] += f", {_large(last['tokens'])} tokens and {_time(last['seconds'])} of training"
    speed, share = record.middle("tokens_a_second"), record.middle("utilisation")
    if speed is not None:
        parts.append(f"{speed:,.0f} tokens a second" + (f", {share:.0%} of the peak" if share is not None else ""))
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
        tiles.append(_tile("read", _large(last["tokens"]), "tokens", note))
    speed, share = record.middle("tokens_a_second"), record.middle("utilisation")
    if speed is not None:
        note = "median over the run" if share is None else f"median; {share:.1%} of the peak in model FLOPs"
        tiles.append(_tile("speed", _large(speed), "tokens a second", note))
    if last.get("seconds"):
        left = None if record.finished or not record.total else _seconds_left(record)
        note = "without compiling and pauses" if left is None else f"about {_time(left)} left"
        tiles.append(_tile("training time", _time(last["seconds"]), "of training", note))
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


def _plan(record: Record) -> list[tuple[str, str, str]]:
    """Rows of the plan: what, how much, and by which rule. What a plan does not have is left out."""
    asked = record.run.get("asked") or {}
    rows = _plan_rows(record.plan)
    if record.run.get("parent") or asked.get("stage", "base") != "base":
        return [(name, value, "") for name, value, _ in rows]  # tuning has rules of its own
    scale = asked.get("rate_scale") or 1.0
    return [
        (name, value, f"{rule}, times {scale:g} as asked" if scale != 1.0 and name.startswith("rate") else rule)
        for name, value, rule in rows
    ]


def _plan_rows(plan: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    shape, counts, memory, chip = (plan.get(name) or {} for name in ("shape", "parameters", "memory", "chip"))
    rows: list[tuple[str, str, str]] = []
    if shape:
        rows.append(("shape", "depth {depth}, width {width}, {heads} heads of {head_width}, {kv_heads} of keys and values, inner {inner}, context {context:,}, vocabulary {vocabulary:,}".format(**shape), RULES["shape"]))  # fmt: skip
    if counts:
        parts = ", ".join(
            f"{name} {_large(counts[name])}" for name in ("matrix", "embedding", "head") if name in counts
        )
        rows.append(("parameters", f"{_large(counts['all'])}: {parts.replace('matrix', 'matrices')}", ""))
    if plan.get("tokens"):
        rows.append(("tokens", f"{plan['tokens']:,}", str(plan.get("horizon") or "")))
    if plan.get("batch"):
        rows.append(("batch", f"{plan['batch']:,} tokens, {plan['steps']:,} steps", RULES["batch"]))
    if plan.get("warmup"):
        rows.append(
            ("schedule", f"{plan['warmup']:,} steps up, the last {plan['decay']:,} down to zero", RULES["schedule"])
        )
    for name, field, by in (
        ("matrices", "matrix_rate", "Muon"),
        ("embedding", "embedding_rate", "AdamW"),
        ("head", "head_rate", "AdamW"),
        ("gains", "gain_rate", "AdamW"),
    ):
        if plan.get(field) is not None:
            rows.append((f"rate of {name}", f"{plan[field]:.3g} ({by})", RULES[name]))
    if plan.get("weight_decay") is not None:
        rows.append(("decay of matrices", f"{plan['weight_decay']:.3g}", RULES["decay"]))
    if plan.get("flops_a_token") and plan.get("tokens"):
        each = plan["flops_a_token"]
        rows.append(("FLOPs", f"{each / 1e6:,.0f} M a token, {each * plan['tokens']:.2e} in all", RULES["flops"]))
    if plan.get("micro_batch"):
        again = "; blocks are computed again in the backward pass" if plan.get("checkpointing") else ""
        text = f"{plan['micro_batch']} sequences, {plan.get('accumulation', 1)} a step and processor{again}"
        rows.append(("micro-batch", text, RULES["micro-batch"]))
    if memory and chip:
        rows.append(("memory", f"{memory['total'] / 1e9:,.1f} GB of {chip['memory'] / 1e9:,.0f} GB", "an estimate, on the high side"))  # fmt: skip
    if plan.get("seconds"):
        text = f"{_time(plan['seconds'])} at {plan['tokens_a_second']:,.0f} tokens a second"
        cost = f"; about ${plan['cost']:,.2f}" if plan.get("cost") else ""
        rows.append(("time", text + cost, "at the share of the peak that the plan was made for"))
    return rows


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
    return sorted({steps[0], *(min(steps, key=lambda step: abs(math.log1p(step) - place)) for place in wanted)})


def _flat(asked: Mapping[str, Any]) -> dict[str, str]:
    def said(value: Any) -> str:
        return "as derived" if value is None else value if isinstance(value, str) else json.dumps(value)

    return {name: said(value) for name, value in asked.items()}


def _large(number: int | float) -> str:
    """1,234; 56.7 k; 103 M; 1.24 B."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if number >= size:
            scaled = number / (1e3 if unit == " k" else size)
            return f"{scaled:.3g}{unit}" if scaled < 1000 else f"{scaled:,.0f}{unit}"
    return f"{number:,.0f}"


def _time(seconds: int | float) -> str:
    if seconds < 300:
        return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
