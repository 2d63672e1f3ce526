"""A run folder: what was asked, what was made, and a lock so that two processes never write into one folder.

run.json  rollouts.jsonl  scores.jsonl  activations.*  axis.*  space.*  fit.json  report.html
and, with traits, trait_activations.*  traits.*

with open_run(folder) as run:
    run.require_subject(model)

The folder of a training run, where a model is asked for: which model it stands for, and what that one is called.

resolve_model("runs/mine")                         # "runs/mine/model", or its newest checkpoint while it is being made
checkpoint_name("runs/mine")                         # "mine-step-000512": where what is found about it goes
model_name("runs/mine/checkpoints/step-512")  # "mine", whatever the step, so that checkpoints get the same prompts

The fitted axis and persona space that come with the packaged model, so that chat and monitoring can begin at once.

    axis = load_axis(packaged_axis_folder("smollm2-135m") / "axis")

`axes/NAME/README.md` has the command that made them. The axis's quantiles over the default's and the roles' answers, at
every layer, are the floors that a cap can be made of.
"""

import errno
import fcntl
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from personatlas.persona.artifacts import read_json, write_json
from personatlas.persona.errors import UserError

KIND = "training"  # in run.json
MODEL, CHECKPOINTS, STEP = "model", "checkpoints", "step-"


def is_training_run(folder: Path) -> bool:
    """Whether a folder is what `personatlas train` writes."""
    record = folder / "run.json"
    if not record.is_file():
        return False
    content = read_json(record)
    return isinstance(content, dict) and content.get("kind") == KIND


def checkpoint_folders(run: Path) -> dict[int, Path]:
    """A training run's checkpoints by their steps, in order; one that is being written or removed is not among them."""
    found = {}
    for folder in (run / CHECKPOINTS).glob(f"{STEP}*"):
        number = folder.name.removeprefix(STEP)
        if number.isdigit() and (folder / "config.json").is_file():
            found[int(number)] = folder
    return dict(sorted(found.items()))


def spread_steps(steps: Sequence[int], count: int) -> list[int]:
    """Up to `count` (2 or more) of some sorted steps: the first two, the last, and between them the nearest to
    even logarithms; of two the first and the last.
    """
    if len(steps) <= count:
        return list(steps)
    if count == 2:
        return [steps[0], steps[-1]]
    low, high = math.log1p(steps[1]), math.log1p(steps[-1])
    targets = [low + (high - low) * i / (count - 2) for i in range(count - 1)]
    nearest = (min(steps, key=lambda step: abs(math.log1p(step) - target)) for target in targets)
    return sorted({steps[0], *nearest})


def resolve_model(name: str) -> str:
    """The model that a name stands for: a training run's finished model, else its newest checkpoint; other names as they are.

    Raises `UserError` for a run without a checkpoint, and for a folder that is a run of another kind.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return name
    if is_training_run(folder):
        if (folder / MODEL / "config.json").is_file():
            return str(folder / MODEL)
        checkpoints = checkpoint_folders(folder)
        if not checkpoints:
            raise UserError(
                f"{name} is a training run without a checkpoint yet; `personatlas run report {name}` shows where it stands"
            )
        return str(checkpoints[max(checkpoints)])
    if folder.name == CHECKPOINTS and (steps := checkpoint_folders(folder.parent)):
        raise UserError(
            f"{name} holds {len(steps)} checkpoints; give one of them, such as {steps[max(steps)]}"
        )
    if (folder / "run.json").is_file():
        asked = read_json(folder / "run.json").get("asked", {})
        of = f" of {asked['model_name']}: give that" if asked.get("model_name") else ": give its model"
        raise UserError(f"{name} is a run folder{of} as the model, and the run with --axis {name}")
    return name


def checkpoint_name(name: str) -> str:
    """A short name for what is found about a model, which tells a run's checkpoints apart."""
    path = Path(resolve_model(name))
    run = _run_of(path)
    return path.name if run is None else f"{run.name}-{path.name}"


def default_folder(model: str, study: str = "") -> Path:
    """The folder for what is computed about a model: runs/NAME, or runs/NAME-STUDY."""
    name = Path(model).stem if model.endswith(".gguf") else checkpoint_name(model)
    return Path("runs") / (f"{name}-{study}" if study else name)


def model_name(path: Path) -> str:
    """What people, and the prompt "You are {model}.", call the model in a folder: by its training run, if it is in one."""
    return (_run_of(path) or path).name


def _run_of(path: Path) -> Path | None:
    """The training run that a model's folder is in."""
    path = path.expanduser().resolve()
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path.parent
    named = path.name == MODEL or path.name.startswith(STEP)
    return run if named and is_training_run(run) else None


# What must not change under a run: rollouts made with other values would be another population.
FIXED = (
    "model",
    "bank",
    "traits_bank",
    "seed",
    "max_new_tokens",
    "temperature",
    "top_p",
    "dtype",
    "engine",
    "chat_template",
    "chunk",
)


@dataclass(frozen=True)
class RunFolder:
    """An open run folder. `rank` 0 writes the shared files; other ranks write only their own shards."""

    folder: Path
    rank: int = 0

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of run.json, {} before the first step."""
        path = self.folder / "run.json"
        content = read_json(path) if path.exists() else {}
        if not isinstance(content, dict):
            raise UserError(
                f"{path} is not the record of a run, but a {type(content).__name__}; choose another folder"
            )
        return content

    def claim(self, asked: dict[str, Any]) -> None:
        """Record what this call asks for. What makes a run one run (`FIXED`) must agree with what is there."""
        if self.manifest.get("kind") == KIND:
            raise UserError(
                f"{self.folder} is a training run, whose own this folder stays; choose another with --out"
            )
        before = self.manifest.get("asked", {})
        for name in FIXED:
            if name in before and name in asked and before[name] != asked[name]:
                raise UserError(
                    f"{self.folder} is a run with {name} {_short(before[name])}, not {_short(asked[name])}; "
                    f"choose another folder with --out"
                )
        if self.rank == 0:
            content = {**self.manifest, "asked": {**before, **asked}, "versions": versions()}
            content.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
            if content != self.manifest:
                write_json(self.folder / "run.json", content)

    def note(self, **facts: Any) -> None:
        """Add facts about what was done to run.json (rank 0 only)."""
        content = {**self.manifest, **facts}
        if self.rank == 0 and content != self.manifest:
            write_json(self.folder / "run.json", content)


@contextmanager
def open_run(folder: Path, *, create: bool = False, rank: int = 0) -> Iterator[RunFolder]:
    """Lock and open a run folder. `UserError` when it is missing (without `create`) or another process holds it."""
    if not folder.exists() and not create:
        raise UserError(f"run folder {folder} does not exist")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} is a file, not a run folder") from None
    except (PermissionError, FileNotFoundError) as error:
        raise UserError(
            f"run folder {folder} cannot be made ({error.strerror}); choose another with --out"
        ) from None
    if rank:
        yield RunFolder(folder, rank)
        return
    try:
        lock = (folder / ".lock").open("w")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); choose another with --out"
        ) from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use by another process; wait for it, or choose another folder with --out"
            ) from None
        yield RunFolder(folder, rank)


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("personatlas", "torch", "transformers", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = (
            f"{value.get('id')} ({value.get('weights')}, {value.get('fingerprint', '')[:8]})"
            if "id" in value
            else value
        )
    return str(value)[:80]


FITTED = Path(__file__).parent / "axes"
ENDINGS = (".json", ".safetensors")


def packaged_axes() -> tuple[str, ...]:
    """Models that an axis comes with."""
    return tuple(sorted(path.name for path in FITTED.iterdir() if (path / "axis.json").is_file()))


def packaged_axis_folder(name: str) -> Path:
    """The folder with `axis.*` and `space.*` of a packaged model. `UserError` when none comes with it."""
    if name not in packaged_axes():
        raise UserError(
            f"no axis comes with {name!r}, only with {', '.join(packaged_axes())}; fit one: personatlas axis"
        )
    return FITTED / name


def find_axis(model: str, axis: str | None = None) -> str:
    """The name of an axis: `axis` itself, else the one packaged with the model or the one in its default run folder.

    Raises `UserError` when there is none.
    """
    if axis is not None:
        return axis
    if model in packaged_axes():
        return model
    folder = default_folder(model)
    if not (folder / "axis.json").is_file():
        raise UserError(
            f"{model} has no axis in {folder} yet: make it (personatlas axis {model}), or name another with --axis"
        )
    return str(folder)


def resolve_axis(name: str) -> Path:
    """Where an axis lies that is named by a run folder, an artefact (with or without its ending) or a packaged model."""
    path = Path(name)
    if name in packaged_axes() and not path.exists():
        return packaged_axis_folder(name) / "axis"
    stem = path / "axis" if path.is_dir() else path.with_suffix("") if path.suffix in ENDINGS else path
    if not stem.with_name(stem.name + ".json").is_file():
        raise UserError(
            f"no axis at {name}: give a run folder with a fit, an axis.safetensors or {packaged_axes()[0]}"
        )
    return stem
