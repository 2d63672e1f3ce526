"""What a training run tells the world: metrics.jsonl, and TensorBoard or Weights & Biases where asked.

    with Meters(run, tensorboard=True, wandb="my-project") as meters:       # on rank 0 only
        meters.cut_after(256)                                               # going on from a checkpoint
        meters.write({"kind": "step", "step": 257, "loss": 3.1, "rate": 0.5})
    read_metrics(run)

The file is the record, whole lines only, also after kill -9; the others are mirrors of its numbers. JSON has no NaN: a number
that is not finite stands in it as null.
"""

import json
import math
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from personaxis.persona.errors import KnownError
from personaxis.persona.store import append_lines, atomic, read_lines

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

    Raises `KnownError` where a mirror's package is not installed or it cannot be reached, before anything is written.
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
            raise KnownError(
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
        raise KnownError(f"{option} needs a package that is not installed: pip install {package}")
