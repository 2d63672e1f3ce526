"""The folder of a training run, where a model is asked for: which model it stands for, and what that one is called.

resolved("runs/mine")                         # "runs/mine/model", or its newest checkpoint while it is being made
run_name("runs/mine")                         # "mine-step-000512": where what is found about it goes
model_name("runs/mine/checkpoints/step-512")  # "mine", whatever the step, so that checkpoints get the same prompts
"""

from pathlib import Path

from personaxis.persona.errors import KnownError
from personaxis.persona.store import read_json

KIND = "training"  # in run.json
MODEL, CHECKPOINTS, STEP = "model", "checkpoints", "step-"


def is_training_run(folder: Path) -> bool:
    """Whether a folder is what `personaxis train` writes."""
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


def resolved(name: str) -> str:
    """The model that a name stands for: a training run's finished model, else its newest checkpoint; other names as they are.

    Raises `KnownError` for a run without a checkpoint, and for a folder that is a run of another kind.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return name
    if is_training_run(folder):
        if (folder / MODEL / "config.json").is_file():
            return str(folder / MODEL)
        checkpoints = checkpoint_folders(folder)
        if not checkpoints:
            raise KnownError(
                f"{name} is a training run without a checkpoint yet; `personaxis report {name}` shows where it stands"
            )
        return str(checkpoints[max(checkpoints)])
    if folder.name == CHECKPOINTS and (steps := checkpoint_folders(folder.parent)):
        raise KnownError(f"{name} holds {len(steps)} checkpoints; give one of them, such as {steps[max(steps)]}")
    if (folder / "run.json").is_file():
        asked = read_json(folder / "run.json").get("asked", {})
        of = f" of {asked['model_name']}: give that" if asked.get("model_name") else ": give its model"
        raise KnownError(f"{name} is a run folder{of} as the model, and the run with --axis {name}")
    return name


def run_name(name: str) -> str:
    """A short name for what is found about a model, which tells a run's checkpoints apart."""
    path = Path(resolved(name))
    run = _run_of(path)
    return path.name if run is None else f"{run.name}-{path.name}"


def model_name(path: Path) -> str:
    """What people, and the prompt "You are {model}.", call the model in a folder: by its training run, if it is in one."""
    return (_run_of(path) or path).name


def _run_of(path: Path) -> Path | None:
    """The training run that a model's folder is in."""
    path = path.expanduser().resolve()
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path.parent
    named = path.name == MODEL or path.name.startswith(STEP)
    return run if named and is_training_run(run) else None
