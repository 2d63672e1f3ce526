"""What chat tuning begins with: the finished model of a training run, one of its checkpoints, or an exported folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personaxis.persona.errors import KnownError
from personaxis.persona.store import digest, read_json
from personaxis.persona.trained import is_training_run
from personaxis.training.checkpoints import checkpoints_in
from personaxis.training.export import shape_of
from personaxis.training.shape import Shape

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Parent:
    """A model folder with its tokenizer."""

    folder: Path
    shape: Shape
    weights: str
    "SHA-256"
    plan: dict[str, Any] | None = None
    "of the run that made the base model, where its run.json is at hand"


def parent_of(base: Path) -> Parent:
    """Raises `KnownError` for anything that is not a GPT of ours, and for a run that has not finished."""
    if not base.exists():
        raise KnownError(f"{base} does not exist; give the folder of a training run, of a checkpoint or of an export")
    folder = base
    if (base / "run.json").is_file():
        if not is_training_run(base):
            raise KnownError(f"{base} is a run of another kind; give the folder of `personaxis train base`")
        folder = base / "model"
        if not (folder / "config.json").is_file():
            found = checkpoints_in(base)
            hint = f"or name a checkpoint, the newest is {found[-1].path}" if found else "it has no checkpoint yet"
            raise KnownError(f"{base} is a run that has not finished: go on with it first; {hint}")
    if not (folder / "config.json").is_file():
        raise KnownError(f"{base} is no training run, checkpoint or exported folder: it has no run.json or config.json")
    shape = shape_of(read_json(folder / "config.json"), folder)
    if not (folder / WEIGHTS).is_file():
        raise KnownError(f"{folder / WEIGHTS} does not exist; a checkpoint in several files must be saved as one first")
    return Parent(folder, shape, digest(folder / WEIGHTS), _plan(base))


def _plan(base: Path) -> dict[str, Any] | None:
    """From the run's folder, or from that of a checkpoint or model in it."""
    for folder in (base, base.resolve().parent, base.resolve().parent.parent):
        if (folder / "run.json").is_file():
            record = read_json(folder / "run.json")
            found = record.get("plan") if record.get("asked", {}).get("stage") == "base" else None
            return found if isinstance(found, dict) else None
    return None
