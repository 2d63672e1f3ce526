"""What a run leaves behind as it goes: its metrics, a line on stderr, and samples. One process of a run keeps it.

with recorded(run, steps, samples) as record:
    record.write({"kind": "step", "step": 1, ...})
    record.sample(model, step=64)
    record.cut(64)                      # going on from there: what was written of later steps is forgotten
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from personaxis.training.gpt import GPT
from personaxis.training.line import Line
from personaxis.training.meters import Meters


@runtime_checkable
class Writer(Protocol):
    """What a model says at some steps: `Samples` of a base model, `Replies` of a chat model."""

    def write(self, model: GPT, step: int) -> None:
        """Sample, unless this step's samples are there."""

    def cut_after(self, step: int) -> None:
        """Forget later steps."""


@dataclass(frozen=True)
class Record:
    """An open record; one without parts writes nothing, as all but one process of a run do."""

    meters: Meters | None = None
    line: Line | None = None
    samples: Writer | None = None

    def write(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        if self.meters is not None:
            self.meters.write(row)
        if self.line is not None:
            self.line.show(row)

    def sample(self, model: GPT, step: int) -> None:
        """Let the model write."""
        if self.samples is not None:
            self.samples.write(model, step)

    def cut(self, step: int) -> None:
        """Forget what was written of later steps."""
        if self.meters is not None:
            self.meters.cut_after(step)
        if self.samples is not None:
            self.samples.cut_after(step)


@contextmanager
def recorded(
    folder: Path, steps: int, samples: Writer, *, tensorboard: bool = False, wandb: str | None = None
) -> Iterator[Record]:
    """The record of a run of so many steps, closed at the end."""
    with Meters(folder, tensorboard=tensorboard, wandb=wandb) as meters, Line(steps) as line:
        yield Record(meters, line, samples)
