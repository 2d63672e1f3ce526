"""The record of a training run, read at any moment: settings, metrics, samples, and how far it has come.

    record = read_training_record(Path("runs/mine"))
    record.steps[-1]["loss"], record.held_out[-1]["bits_per_byte"], record.is_finished

A run that is going on has no model yet, one that has just begun no rows: everything may be missing but
run.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personatlas.persona.artifacts import REMAKE
from personatlas.persona.errors import UserError
from personatlas.persona.logs import read_lines
from personatlas.persona.records import (
    Count,
    FieldError,
    Fraction,
    JsonObject,
    JsonRecord,
    NonNegative,
    Positive,
    check_ascending,
    check_fields,
)
from personatlas.persona.runs import MODEL, is_training_run, read_manifest
from personatlas.training.loop.run_log import check_row
from personatlas.training.model.config import Shape
from personatlas.training.plan import Chip


@dataclass(frozen=True)
class StoredPlan(JsonRecord):
    """What the report shows of a plan in run.json: its fields, and numbers that were derived from them."""

    shape: Shape
    chip: Chip
    horizon: str
    tokens: Positive
    batch: Positive
    steps: Positive
    warmup: Count
    decay: Count
    micro_batch: Positive
    gpus: Positive
    accumulation: Count
    checkpointing: bool
    fits: bool
    parameters: dict[str, Count]
    memory: dict[str, Count]
    flops_a_token: Count
    tokens_a_second: NonNegative
    seconds: NonNegative
    cost: NonNegative
    weight_decay: NonNegative
    matrix_rate: NonNegative
    embedding_rate: NonNegative
    head_rate: NonNegative
    gain_rate: NonNegative
    second: Fraction

    def __post_init__(self) -> None:
        if (
            not {"matrix", "embedding", "head", "gains", "all"} <= set(self.parameters)
            or "total" not in self.memory
        ):
            raise ValueError("its parameters or its memory are not complete")


@dataclass(frozen=True)
class TrainingRecord:
    """Rows of metrics.jsonl by their kind, rows of samples.jsonl, and run.json."""

    name: str
    run: JsonObject
    steps: Sequence[JsonObject]
    held_out: Sequence[JsonObject]
    events: Sequence[JsonObject]
    samples: Sequence[JsonObject]
    is_finished: bool

    @property
    def plan(self) -> JsonObject:
        """The plan, {} where run.json has none."""
        return self.run.get("plan") or {}

    @property
    def total(self) -> int | None:
        """Steps of the whole run."""
        return self.plan.get("steps") or self.run.get("steps")

    @property
    def step(self) -> int:
        """The last step in the log."""
        return max((rows[-1]["step"] for rows in (self.steps, self.held_out) if rows), default=0)

    @property
    def last(self) -> JsonObject:
        """The last step's row, {} before the first."""
        return self.steps[-1] if self.steps else {}

    @property
    def in_bits(self) -> bool:
        """Whether evaluations are in bits per byte; else they are losses, as of chat tuning."""
        return any(row.get("bits_per_byte") is not None for row in self.held_out)

    def median(self, name: str) -> float | None:
        """The median of a number over all steps but the first tenth: the pace without the start."""
        values = [row[name] for row in self.steps if row.get(name) is not None]
        values = sorted(values[len(values) // 10 :])
        return float(values[len(values) // 2]) if values else None


def _read_run(folder: Path) -> JsonObject:
    """run.json with a plan that the report can show, of whatever version."""
    run = read_manifest(folder)
    try:
        check_fields(run, {"plan": StoredPlan, "command": str})
    except FieldError as error:
        raise UserError(f"{folder / 'run.json'} is damaged: {error}; {REMAKE}") from None
    return run


def read_training_record(folder: Path) -> TrainingRecord:
    """Reads a run's files. Raises `UserError` for a folder of another kind and for damaged files."""
    if not is_training_run(folder):
        raise UserError(f"{folder} is not the folder of a training run")
    rows = read_lines(folder / "metrics.jsonl", check_row)
    by_kind = {
        kind: [row for row in rows if row.get("kind") == kind] for kind in ("step", "held-out", "event")
    }
    try:
        check_ascending([row["step"] for row in by_kind["step"]])
    except ValueError:
        path = folder / "metrics.jsonl"
        raise UserError(
            f"{path} is damaged: its steps do not ascend; delete the lines out of order"
        ) from None
    return TrainingRecord(
        name=folder.resolve().name,
        run=_read_run(folder),
        steps=by_kind["step"],
        held_out=by_kind["held-out"],
        events=by_kind["event"],
        samples=read_lines(folder / "samples.jsonl", check_row),
        is_finished=(folder / MODEL / "config.json").is_file(),
    )
