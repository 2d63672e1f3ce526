"""What a run leaves behind as it goes: its metrics, a line on stderr, and samples. One process of a run keeps it.

with recorded(run, steps, samples) as record:
    record.write({"kind": "step", "step": 1, ...})
    record.sample(model, step=64)
    record.cut(64)                      # going on from there: what was written of later steps is forgotten

What a training run tells the world: metrics.jsonl, and TensorBoard or Weights & Biases where asked.

    with Meters(run, tensorboard=True, wandb="my-project") as meters:       # on rank 0 only
        meters.cut_after(256)                                               # going on from a checkpoint
        meters.write({"kind": "step", "step": 257, "loss": 3.1, "rate": 0.5})
    read_metrics(run)

The file is the record, whole lines only, also after kill -9; the others are mirrors of its numbers. JSON has no NaN: a number
that is not finite stands in it as null.

Where a training run stands, on stderr: one line that moves on a terminal, a plain line every ten seconds elsewhere.

with Line(plan.steps) as line:
    line.show(row)            # every row that goes into metrics.jsonl

step 1,200/5,000: loss 3.412, held out 1.312 bits per byte, 544,000 tokens/s, 49.1% of the peak, 24 min left
"""

import json
import math
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from personatlas.persona.artifacts import atomic
from personatlas.persona.errors import UserError
from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.progress import EVERY, say
from personatlas.training.model.gpt import GPT

METRICS = "metrics.jsonl"
# what the mirrors call the rows' kinds
FAMILIES = {"step": "train", "held-out": "held-out"}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run, in the order in which they were written; [] before the first."""
    return read_lines(folder / METRICS)


def cut_after(path: Path, step: int) -> int | None:
    """Take the rows of later steps out of a log, atomically. The last step that it told of, None for an empty one."""
    rows = read_lines(path)
    kept = [row for row in rows if row["step"] <= step]
    if len(kept) < len(rows):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return max((row["step"] for row in rows), default=None)


class Meters:
    """The record of a run and its mirrors. `wandb` is the name of a project there.

    Raises `UserError` where a mirror's package is not installed or it cannot be reached, before anything is written.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, wandb: str | None = None) -> None:
        if tensorboard:
            _require("tensorboardX", "--tensorboard")
        if wandb is not None:
            _require("wandb", "--wandb")
        self.folder = folder
        self._mirrors: list[Mirror] = []
        if tensorboard:
            self._mirrors.append(TensorBoard(folder / "tensorboard"))
        if wandb is not None:
            self._mirrors.append(WeightsAndBiases(folder, wandb))

    def cut_after(self, step: int) -> int | None:
        """Forget what came after a step. Returns the last step that the record told of. Call it before `write`."""
        for mirror in self._mirrors:
            mirror.cut_after(step)
        return cut_after(self.folder / METRICS, step)

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; `kind` and `step` are always in it."""
        finite = {name: None if _is_odd(value) else value for name, value in row.items()}
        append_lines(self.folder / METRICS, [finite], sync=False)
        if row["kind"] in FAMILIES:
            numbers = {
                f"{FAMILIES[row['kind']]}/{name}": float(value)
                for name, value in finite.items()
                if name != "step" and isinstance(value, int | float)
            }
            for mirror in self._mirrors:
                mirror.write(row["step"], numbers)

    def close(self) -> None:
        """Flush the mirrors."""
        for mirror in self._mirrors:
            mirror.close()
        self._mirrors = []

    def __enter__(self) -> "Meters":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Mirror:
    """Where numbers go beside the record."""

    def cut_after(self, step: int) -> None:
        """The next numbers replace those of later steps."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of one step."""

    def close(self) -> None:
        """Flush."""


class TensorBoard(Mirror):
    """Event files. tensorboardX writes them with nothing but numpy and protobuf; TensorBoard itself only looks at them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._purge: int | None = None
        self._writer: Any = None

    def cut_after(self, step: int) -> None:
        self._purge = step + 1

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge, flush_secs=10)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases(Mirror):
    """One run there for one folder here: its id is kept, so a run that goes on goes on there too."""

    def __init__(self, folder: Path, project: str) -> None:
        import wandb

        kept = folder / "wandb" / "id"
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.is_file():
            kept.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=kept.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(folder),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.Error, ValueError) as error:
            text = " ".join(str(error).split())
            raise UserError(
                f"--wandb {project}: {text}; log in (`wandb login`) or set WANDB_MODE=offline and `wandb sync` later"
            ) from None
        # their own step never goes back; ours does when a run goes on from a checkpoint
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _require(package: str, option: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"{option} needs a package that is not installed: pip install {package}")


SMOOTHING = 0.9  # of the loss that is shown: one step's is noise


class Line:
    """Shows rows of metrics.jsonl. `steps` is the step at which the run ends."""

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        self.steps, self.quiet = steps, quiet
        self._loss = _Smoothed()
        self._first: Mapping[str, Any] | None = None
        self._row: Mapping[str, Any] | None = None
        self._held_out = ""
        self._said = -EVERY
        self._told = 0
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal and not quiet:
            bar = [BarColumn(24)] if console.width >= 110 else []
            self._bar = Progress(*bar, TextColumn("{task.description}"), console=console)
            self._task = self._bar.add_task("", total=steps)

    def show(self, row: Mapping[str, Any]) -> None:
        """Take up a row. Events are said at once; numbers when it is time."""
        if row["kind"] == "event":
            self._say(f"step {row['step']:,}: {row.get('text') or row['what']}")
        elif row["kind"] == "held-out":
            self._held_out = _held_out(row)
            if self._bar is None:
                self._say(f"step {row['step']:,}: {self._held_out}")
        else:
            self._first = self._first or row
            self._row = row
            self._loss.add(row.get("loss"))
            self._move()

    def told(self, *, short: bool = False) -> str:
        """Everything about the last step; short enough for a terminal of 80 characters."""
        row = self._row or {}
        left, speed, share = self.seconds_left(), row.get("tokens_a_second"), row.get("utilisation")
        parts = [
            f"step {row.get('step', 0):,}/{self.steps:,}",
            "" if self._loss.value is None else f"loss {self._loss.value:.3f}",
            self._held_out.removeprefix("held out ").replace("bits per byte", "bits/byte")
            if short
            else self._held_out,
            "" if speed is None else f"{speed / 1000:,.1f}k tok/s" if short else f"{speed:,.0f} tokens/s",
            "" if share is None else f"{share:.0%}" if short else f"{share:.1%} of the peak",
            "" if left is None else f"{in_words(left)} left",
        ]
        return (" · " if short else ", ").join(part for part in parts if part)

    def seconds_left(self) -> float | None:
        """Training time to the last step at the pace since this process began; None before the second step and at the end."""
        first, row = self._first, self._row
        if first is None or row is None or row["step"] <= first["step"] or row["step"] >= self.steps:
            return None
        pace = (row["seconds"] - first["seconds"]) / (row["step"] - first["step"])
        return float(pace * (self.steps - row["step"]))

    def _move(self) -> None:
        assert self._row is not None
        step = self._row["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self.told(short=True))
        elif time.monotonic() - self._said >= EVERY or step == self.steps:
            self._said = time.monotonic()
            self._say_step()

    def _say_step(self) -> None:
        assert self._row is not None
        self._told = self._row["step"]
        self._say(self.told())

    def _say(self, text: str) -> None:
        if not self.quiet:
            say(text)

    def __enter__(self) -> "Line":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._row is not None and self._row["step"] != self._told:
            self._say_step()


class _Smoothed:
    """An exponential mean that is unbiased from the first value on."""

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0

    def add(self, value: float | None) -> None:
        if value is not None:
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * value
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)

    @property
    def value(self) -> float | None:
        return self._sum / self._weight if self._weight else None


def _held_out(row: Mapping[str, Any]) -> str:
    if row.get("bits_per_byte") is not None:
        return f"held out {row['bits_per_byte']:.4f} bits per byte"
    return f"held out loss {row['loss']:.4f}"


def in_words(seconds: int | float) -> str:
    """8 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
