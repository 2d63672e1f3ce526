"""Tables of the training report: the plan with its rules, and what chat tuning changed.

Rules are told with the constants that this very plan was made with, found from its values: constants change
with what is measured (`training/optim/schedule.py`), and a report stays right about its own run. What a plan
does not have is left out.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from personatlas.persona.records import JsonObject
from personatlas.training.optim.schedule import REFERENCE_BATCH, REFERENCE_WIDTH

PlanRow = tuple[str, str, str]  # what, how much, and by which rule


class LossTable(NamedTuple):
    """Losses by source, as cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


SHAPE = (
    "from the depth: 64 of width a layer, heads of 128 (of 64 below depth 8), two heads of queries to one of "
    "keys and values, an MLP of 8/3 the width"
)
BATCH = (
    "the critical batch, which grows with tokens^0.383, at most a 400th of the tokens; "
    "in whole multiples of 8 sequences"
)
RATES = {"matrices": "matrix_rate", "embedding": "embedding_rate", "head": "head_rate", "gains": "gain_rate"}
DECAY = "weights average over 15% of the run; at most 0.2"
FLOPS = (
    "6 a parameter that multiplies, and 12 · depth · heads · head width · context for attention; "
    "forward and backward"
)


def plan_table(plan: JsonObject, settings: JsonObject, *, is_base: bool) -> list[PlanRow]:
    """Sizes, length, rates and work, as far as the plan has them; only a base model's with their rules."""
    rows = [*_sizes_and_length(plan, settings), *_rates(plan, settings), *_work(plan)]
    return rows if is_base else [(name, value, "") for name, value, _ in rows]


def _sizes_and_length(plan: JsonObject, settings: JsonObject) -> list[PlanRow]:
    rows, steps = [], plan.get("steps")
    if shape := plan.get("shape"):
        text = (
            "depth {depth}, width {width}, {heads} heads of {head_width}, {kv_heads} of keys and values, "
            "inner {inner}, context {context:,}, vocabulary {vocabulary:,}"
        )
        rows.append(("shape", text.format(**shape), SHAPE))
    if counts := plan.get("parameters"):
        named = {"matrices": "matrix", "embedding": "embedding", "head": "head"}
        parts = (f"{name} {format_count(counts[key])}" for name, key in named.items() if key in counts)
        rows.append(("parameters", f"{format_count(counts['all'])}: {', '.join(parts)}", ""))
    if plan.get("tokens"):
        rows.append(("tokens", f"{plan['tokens']:,}", str(plan.get("horizon") or "")))
    if plan.get("batch"):
        rule = "as asked" if settings.get("batch") else BATCH
        rows.append(("batch", f"{plan['batch']:,} tokens, {steps:,} steps", rule))
    if warmup := plan.get("warmup"):
        decay = plan["decay"]
        rule = f"up over {warmup / steps:.0%} of the steps; straight down over the last {decay / steps:.0%}"
        rows.append(("schedule", f"{warmup:,} steps up, the last {decay:,} down to zero", rule))
    return rows


def _rates(plan: JsonObject, settings: JsonObject) -> list[PlanRow]:
    """The highest rates, with the constants of their rules."""
    rows, scale = [], settings.get("rate_scale") or 1.0
    factor = f", times {scale:g} as asked" if scale != 1.0 else ""
    for name, key in RATES.items():
        if plan.get(key) is not None:
            shrunk = REFERENCE_WIDTH / plan["shape"]["width"] if name == "head" else 1.0
            constant = plan[key] / scale / shrunk / (plan["batch"] / REFERENCE_BATCH) ** 0.5
            width = f" · {REFERENCE_WIDTH} / width" if name == "head" else ""
            rule = f"{constant:.3g} · √(batch / {REFERENCE_BATCH:,}){width}{factor}"
            optimizer = "Muon" if name == "matrices" else "AdamW"
            rows.append((f"rate of {name}", f"{plan[key]:.3g} ({optimizer})", rule))
    if plan.get("weight_decay") is not None:
        rows.append(("decay of matrices", f"{plan['weight_decay']:.3g}", DECAY))
    return rows


def _work(plan: JsonObject) -> list[PlanRow]:
    """FLOPs, memory, time."""
    rows, memory, chip = [], plan.get("memory"), plan.get("chip")
    if plan.get("flops_a_token") and plan.get("tokens"):
        each = plan["flops_a_token"]
        rows.append(("FLOPs", f"{each / 1e6:,.0f} M a token, {each * plan['tokens']:.2e} in all", FLOPS))
    if plan.get("micro_batch"):
        again = "; blocks are computed again in the backward pass" if plan.get("checkpointing") else ""
        text = f"{plan['micro_batch']} sequences, {plan.get('accumulation', 1)} a step and processor{again}"
        rows.append(("micro-batch", text, "as many sequences at once as fit into 80% of the memory"))
    if memory and chip:
        text = f"{memory['total'] / 1e9:,.1f} GB of {chip['memory'] / 1e9:,.0f} GB"
        rows.append(("memory", text, "an estimate, on the high side"))
    if plan.get("seconds"):
        cost = f"; about ${plan['cost']:,.2f}" if plan.get("cost") else ""
        text = f"{format_seconds(plan['seconds'])} at {plan['tokens_a_second']:,.0f} tokens a second{cost}"
        rows.append(("time", text, "at the speed that the plan was made for"))
    return rows


def format_count(number: int | float) -> str:
    """1,234; 56.7 k; 103 M; 1.24 B."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if number >= size:
            scaled = number / (1e3 if unit == " k" else size)
            return f"{scaled:.3g}{unit}" if scaled < 1000 else f"{scaled:,.0f}{unit}"
    return f"{number:,.0f}"


def format_seconds(seconds: int | float) -> str:
    """8.1 s, 299 s, 12 min, 3.4 h."""
    if seconds < 300:
        return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def losses_by_source(held_out: Sequence[JsonObject]) -> LossTable | None:
    """Loss of the first and the last evaluation that tell sources apart; None where none does."""
    evaluations = [row["sources"] for row in held_out if row.get("sources")]
    if not evaluations:
        return None
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for name, loss in last.items():
        if name == "all" or len(last) > 2:  # a lone source is all of them
            known = f"{loss['met'] / loss['conversations']:.0%}" if "met" in loss else "·"
            counts = [f"{loss['conversations']:,}", known, f"{loss['tokens']:,}"]
            rows.append([name, _format_loss(first.get(name)), _format_loss(loss), *counts])
    return LossTable(["conversations", "before", "now", "n", "known", "tokens"], rows)


def _format_loss(row: Mapping[str, float] | None) -> str:
    if row is None:
        return "·"
    digits = 1 if row["loss"] >= 10 else 3
    interval = "" if row.get("low") is None else f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
    return f"{row['loss']:.{digits}f}{interval}"
