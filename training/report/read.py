"""The record of a training run, read at any moment: what was asked, its metrics, its samples, and where it stands.

    record = read_record(Path("runs/mine"))
    record.steps[-1]["loss"], record.held_out[-1]["bits_per_byte"], record.state

A run that is still going on has no model yet, one that has just begun no rows either: everything may be missing but run.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personatlas.persona.artifacts import read_json
from personatlas.persona.errors import UserError
from personatlas.persona.logs import read_lines
from personatlas.persona.runs import MODEL, is_training_run

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """Rows of metrics.jsonl by their kind, rows of samples.jsonl, and run.json."""

    name: str
    run: Mapping[str, Any]
    steps: Sequence[Row]
    held_out: Sequence[Row]
    events: Sequence[Row]
    samples: Sequence[Row]
    finished: bool

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan, {} where run.json has none."""
        return self.run.get("plan") or {}

    @property
    def total(self) -> int | None:
        """Steps of the whole run."""
        return self.plan.get("steps") or self.run.get("steps")

    @property
    def step(self) -> int:
        """The last step that was written of."""
        return max((rows[-1]["step"] for rows in (self.steps, self.held_out) if rows), default=0)

    @property
    def last(self) -> Row:
        """The last step's row, {} before the first."""
        return self.steps[-1] if self.steps else {}

    @property
    def in_bits(self) -> bool:
        """Whether evaluations are in bits per byte; else they are losses, as of chat tuning."""
        return any(row.get("bits_per_byte") is not None for row in self.held_out)

    def middle(self, name: str) -> float | None:
        """The median of a number over all steps but the first tenth: the pace of the run, not of its start."""
        values = [row[name] for row in self.steps if row.get(name) is not None]
        values = sorted(values[len(values) // 10 :])
        return float(values[len(values) // 2]) if values else None


def read_record(folder: Path) -> Record:
    """Read a run's files. Raises `UserError` for a folder of another kind and for damaged files."""
    if not is_training_run(folder):
        raise UserError(f"{folder} is not the folder of a training run")
    rows = read_lines(folder / "metrics.jsonl")
    by_kind = {
        kind: [row for row in rows if row.get("kind") == kind] for kind in ("step", "held-out", "event")
    }
    return Record(
        name=folder.resolve().name,
        run=read_json(folder / "run.json"),
        steps=by_kind["step"],
        held_out=by_kind["held-out"],
        events=by_kind["event"],
        samples=read_lines(folder / "samples.jsonl"),
        finished=(folder / MODEL / "config.json").is_file(),
    )
