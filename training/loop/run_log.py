"""What a run writes while it trains: metrics.jsonl with its mirrors, samples.jsonl, and progress on stderr.

    with open_run_log(run, steps, samples, tensorboard=True) as log:        # on rank 0 only
        log.cut_after(256)                              # resuming: forget what was written of later steps
        log.write({"kind": "step", "step": 257, "loss": 3.1, "rate": 0.5})
        log.sample(model, step=257)
    read_metrics(run)

metrics.jsonl holds whole lines only, also after kill -9; TensorBoard and Weights & Biases mirror its numbers.
JSON has no NaN: a number that is not finite is null. Progress is one line that moves on a terminal, else one
every ten seconds:

    step 1,200/5,000, loss 3.412, held out 1.312 bits per byte, 544,000 tokens/s, 24 min left
"""

import json
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from personatlas.persona.artifacts import atomic
from personatlas.persona.errors import UserError
from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.progress import EVERY, format_duration, say
from personatlas.persona.records import (
    Bounds,
    Count,
    Ends,
    FieldError,
    JsonObject,
    JsonRecord,
    NonNegative,
    Positive,
    check_fields,
    read_field,
)
from personatlas.training.model.gpt import GPT

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
MIRRORED = {"step": "train", "held-out": "held-out"}  # what mirrors call the kinds of rows


@dataclass(frozen=True)
class SourceLoss(JsonRecord):
    """What a row of metrics.jsonl says of the answers of one source."""

    loss: NonNegative
    low: NonNegative | None
    high: NonNegative | None
    tokens: Count
    conversations: Positive
    met: Count | None = None

    omit_none = ("met",)

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None) and self.low is not None:
            raise ValueError("an interval has two ends")
        if (self.met or 0) > self.conversations:
            raise ValueError(f"{self.met} of {self.conversations} conversations")


ROW = {
    **dict.fromkeys(
        ("loss", "bits_per_byte", "gradient_norm", "rate", "seconds", "tokens_a_second"), NonNegative
    ),
    **dict.fromkeys(("tokens", "bytes"), Count),
    **dict.fromkeys(("what", "text"), str),
    "utilisation": NonNegative,
    "interval": Ends,
    "sources": dict[str, SourceLoss],
}
SMOOTHING = 0.9  # of the loss that is shown: one step's is noise


def read_metrics(folder: Path) -> list[JsonObject]:
    """All rows of a run's metrics.jsonl, in the order in which they were written; [] before the first."""
    return read_lines(folder / METRICS, check_row)


def check_row(row: JsonObject) -> None:
    """Raises `ValueError` for what is no row of metrics.jsonl or samples.jsonl."""
    read_field(row, "step", Count)
    kind = row.get("kind")
    if kind is None:
        read_field(row, "prompt", str), read_field(row, "text", str)
    elif kind not in ("step", "held-out", "event"):
        raise FieldError(f" is {str(kind)[:40]!r}, not step, held-out or event", "kind")
    check_fields(row, ROW)
    if kind == "event":
        read_field(row, "what", str)
    if row.get("utilisation") is not None:
        read_field(row, "tokens_a_second", Annotated[float, Bounds(1e-9)])


def cut_log(path: Path, step: int) -> None:
    """Takes the rows of later steps out of a log, atomically."""
    rows = read_lines(path, check_row)
    kept = [row for row in rows if row["step"] <= step]
    if len(kept) < len(rows):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


class MetricsMirror:
    """Where numbers go beside metrics.jsonl."""

    def cut_after(self, step: int) -> None:
        """The next numbers replace those of later steps."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of one step."""

    def close(self) -> None:
        """Writes what is buffered."""


class TensorBoardMirror(MetricsMirror):
    """Event files, written by tensorboardX with nothing but numpy and protobuf."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._purge: int | None = None
        self._writer: SummaryWriter | None = None

    def cut_after(self, step: int) -> None:
        self._purge = step + 1

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # its thread ends at a full disk, and nobody would make room in a queue with an end
            options = {"purge_step": self._purge, "flush_secs": 10, "max_queue": 1 << 30}
            self._writer = SummaryWriter(str(self._folder), **options)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbMirror(MetricsMirror):
    """One run of Weights & Biases for one folder: its id is stored, so a resumed run resumes there too."""

    def __init__(self, folder: Path, project: str) -> None:
        import wandb

        id_path = folder / "wandb" / "id"
        id_path.parent.mkdir(parents=True, exist_ok=True)
        if not id_path.is_file():
            id_path.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=id_path.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(folder),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.Error, ValueError) as error:
            text = " ".join(str(error).split())
            raise UserError(
                f"--wandb {project}: {text}; "
                "log in (`wandb login`) or set WANDB_MODE=offline and `wandb sync` later"
            ) from None
        # their own step never goes back; ours does when a run resumes from a checkpoint
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


class MetricsLog:
    """metrics.jsonl and its mirrors. `wandb` is the name of a project there.

    Raises `UserError` where a mirror's package is not installed or it cannot be reached, before anything is
    written.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, wandb: str | None = None) -> None:
        wanted = {"tensorboardX": ("--tensorboard", tensorboard), "wandb": ("--wandb", wandb is not None)}
        for package, (option, is_wanted) in wanted.items():
            if is_wanted and find_spec(package) is None:
                raise UserError(f"{option} needs a package that is not installed: pip install {package}")
        self.folder = folder
        self._mirrors: list[MetricsMirror] = []
        if tensorboard:
            self._mirrors.append(TensorBoardMirror(folder / "tensorboard"))
        if wandb is not None:
            self._mirrors.append(WandbMirror(folder, wandb))

    def cut_after(self, step: int) -> None:
        """Forgets what came after a step. Call it before `write`."""
        for mirror in self._mirrors:
            mirror.cut_after(step)
        cut_log(self.folder / METRICS, step)

    def write(self, row: JsonObject) -> None:
        """Appends a row, which has `kind` and `step`."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        append_lines(self.folder / METRICS, [finite], sync=False)
        if family := MIRRORED.get(row["kind"]):
            numbers = {
                f"{family}/{name}": float(value)
                for name, value in finite.items()
                if name != "step" and isinstance(value, int | float)
            }
            for mirror in self._mirrors:
                mirror.write(row["step"], numbers)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mirror in self._mirrors:
            mirror.close()


class ProgressLine:
    """Shows rows of metrics.jsonl on stderr. `steps` is the step at which the run ends."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._loss = self._weight = 0.0  # an exponential mean that is unbiased from the first value on
        self._first: JsonObject | None = None
        self._row: JsonObject = {}
        self._held_out = ""
        self._said_at, self._said_step = -EVERY, 0
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            bar = [BarColumn(24)] if console.width >= 110 else []
            self._bar = Progress(*bar, TextColumn("{task.description}"), console=console)
            self._task = self._bar.add_task("", total=steps)

    def show(self, row: JsonObject) -> None:
        """Takes a row. Events are said at once; numbers when it is time."""
        if row["kind"] == "event":
            say(f"step {row['step']:,}: {row.get('text') or row['what']}")
        elif row["kind"] == "held-out":
            bits = row.get("bits_per_byte")
            text = f"loss {row['loss']:.4f}" if bits is None else f"{bits:.4f} bits per byte"
            self._held_out = f"held out {text}"
            if self._bar is None:
                say(f"step {row['step']:,}: {self._held_out}")
        else:
            self._first, self._row = self._first or row, row
            if (loss := row.get("loss")) is not None:
                self._loss = SMOOTHING * self._loss + (1 - SMOOTHING) * loss
                self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
            if self._bar is not None:
                self._bar.update(self._task, completed=row["step"], description=self.describe(short=True))
            elif time.monotonic() - self._said_at >= EVERY or row["step"] == self.steps:
                self._said_at = time.monotonic()
                self._say_step()

    def describe(self, *, short: bool = False) -> str:
        """The last step's numbers; `short` fits a terminal of 80 columns."""
        row, held_out, left = self._row, self._held_out, self.seconds_left()
        if short:
            held_out = held_out.removeprefix("held out ").replace("bits per byte", "bits/byte")
        speed, share = row.get("tokens_a_second"), row.get("utilisation")
        parts = [
            f"step {row.get('step', 0):,}/{self.steps:,}",
            f"loss {self._loss / self._weight:.3f}" if self._weight else "",
            held_out,
            "" if speed is None else f"{speed / 1000:,.1f}k tok/s" if short else f"{speed:,.0f} tokens/s",
            "" if share is None else f"{share:.0%}" if short else f"{share:.1%} of the peak",
            "" if left is None else f"{format_duration(left)} left",
        ]
        return (" · " if short else ", ").join(part for part in parts if part)

    def seconds_left(self) -> float | None:
        """Training time left at this process's pace; None before the second step and at the end."""
        first, row = self._first, self._row
        if first is None or row["step"] <= first["step"] or row["step"] >= self.steps:
            return None
        pace = (row["seconds"] - first["seconds"]) / (row["step"] - first["step"])
        return float(pace * (self.steps - row["step"]))

    def _say_step(self) -> None:
        self._said_step = self._row["step"]
        say(self.describe())

    def __enter__(self) -> "ProgressLine":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._row and self._row["step"] != self._said_step:
            self._say_step()


class SampleWriter(ABC):
    """Writes samples.jsonl in a run folder, once for every step that asks for it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SAMPLES
        self._steps = {row["step"] for row in read_lines(self.path, check_row)}

    @abstractmethod
    def sample(self, model: GPT) -> list[tuple[str, str]]:
        """Prompts and what the model writes after them, with the same draws every time."""

    def write(self, model: GPT, step: int) -> None:
        """Samples and appends, unless this step's samples are there. `model` must not be compiled."""
        if step in self._steps:
            return
        rows = [{"step": step, "prompt": prompt, "text": text} for prompt, text in self.sample(model)]
        if rows:
            append_lines(self.path, rows, sync=False)
        self._steps.add(step)

    def cut_after(self, step: int) -> None:
        """Forgets later steps: the run resumes from this one."""
        cut_log(self.path, step)
        self._steps = {row["step"] for row in read_lines(self.path, check_row)}


@dataclass(frozen=True)
class RunLog:
    """The open logs of a run. One without parts writes nothing, as on all ranks but the first."""

    metrics: MetricsLog | None = None
    line: ProgressLine | None = None
    samples: SampleWriter | None = None

    def write(self, row: JsonObject) -> None:
        """Appends a row to metrics.jsonl and shows it."""
        if self.metrics is not None:
            self.metrics.write(row)
        if self.line is not None:
            self.line.show(row)

    def sample(self, model: GPT, step: int) -> None:
        """Appends what the model writes."""
        if self.samples is not None:
            self.samples.write(model, step)

    def cut_after(self, step: int) -> None:
        """Forgets what was written of later steps."""
        for log in (self.metrics, self.samples):
            if log is not None:
                log.cut_after(step)


@contextmanager
def open_run_log(
    folder: Path, steps: int, samples: SampleWriter, *, tensorboard: bool = False, wandb: str | None = None
) -> Iterator[RunLog]:
    """The logs of a run of so many steps, closed at the end."""
    with MetricsLog(folder, tensorboard=tensorboard, wandb=wandb) as metrics, ProgressLine(steps) as line:
        yield RunLog(metrics, line, samples)
