"""Run folders, and what the name of a MODEL, a RUN or an AXIS points to.

    with open_run(Path("runs/smollm2-135m"), create=True) as run:  # locked: no two processes write into one
    folder
        run.claim({"model": model.describe(), "seed": 0})

    resolve_model("runs/mine")                        # "runs/mine/model", or its newest checkpoint while it
    trains default_folder("runs/mine/checkpoints/step-512")  # runs/mine-step-512: what is computed about that
    model model_name(Path("runs/mine/checkpoints/step-512"))  # "mine" at every step, so that prompts stay the
    same resolve_axis("smollm2-135m")                      # the stem of the axis that comes with the packaged
    model

A run folder holds run.json, rollouts.jsonl, scores.jsonl, activations.*, axis.*, space.*, fit.json,
report.html, and with traits trait_activations.* and traits.*. A training run's run.json has the kind
"training". `axes/NAME/README.md` has the command that made a packaged axis.
"""

import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from personatlas.persona.artifacts import REMAKE, locked, read_object, remove_leftovers, write_json
from personatlas.persona.errors import UserError, did_you_mean, did_you_mean_path, explain_os_error
from personatlas.persona.records import (
    Count,
    FieldError,
    Fraction,
    JsonObject,
    ModelFacts,
    Names,
    NonNegative,
    Positive,
    check_fields,
    read_field,
)

if TYPE_CHECKING:
    from personatlas.persona.models.load import Model

TRAINING = "training"  # the kind in run.json of a training run
MODEL, CHECKPOINTS, STEP = "model", "checkpoints", "step-"  # folders of a training run
GGUF = ".gguf"
PACKAGED_AXES = Path(__file__).parent / "axes"
# What must not change under a run: rollouts made with other values would be another population.
FIXED: tuple[str, ...] = (
    "model",
    "bank",
    "traits_bank",
    "controls_bank",
    "seed",
    "max_new_tokens",
    "temperature",
    "top_p",
    "dtype",
    "engine",
)
FIXED += ("chat_template", "chunk")
ROLLOUT_SETTINGS = ("model", "bank", "seed", "max_new_tokens", "temperature", "top_p", "roles")
Moment = Annotated[str, datetime.fromisoformat]
JUDGED = {"id": str, "counts": dict[str, Count], "unscored": Count}
MANIFEST = {
    "kind": str,
    "created": Moment,
    "versions": dict[str, str],
    "steps": Count,
    "threads": Positive,
    "gate": {"share": Fraction, "low": Fraction, "high": Fraction, "n": Count, "judge": str},
    "judge": JUDGED,
    "trait_judge": JUDGED,
    "plan": JsonObject,
    "result": JsonObject,
    "asked": {
        "model_name": str,
        "name": str,
        "template_date": Moment,
        "model": ModelFacts,
        "chat_template": str,
        "traits_bank": str,
        "controls_bank": str,
        "seed": int,
        "max_new_tokens": Positive,
        "temperature": NonNegative,
        "top_p": Fraction,
        "roles": Names,
        "traits": Names,
        "stage": str,
        "plan": str,
        **dict.fromkeys(("chunk", "prompts", "questions", "samples", "depth", "context", "batch"), Positive),
        **dict.fromkeys(("minutes", "rate_scale", "epochs", "tokens"), NonNegative),
    },
}


@dataclass(frozen=True)
class RunFolder:
    """An open run folder. `rank` 0 writes the shared files; other ranks write only their own shards."""

    folder: Path
    rank: int = 0

    @property
    def manifest(self) -> JsonObject:
        """The content of run.json, {} before the first step."""
        return read_manifest(self.folder) if (self.folder / "run.json").exists() else {}

    def date(self, model: "Model") -> "Model":
        """The model with the date of this run's prompts, so that a resumed run holds one date.

        That is the recorded one; of runs without it, the day when the run was begun.
        """
        manifest = self.manifest
        recorded = manifest.get("asked", {}).get("template_date") or manifest.get("created")
        if recorded is None:
            return model
        now = datetime.fromisoformat(recorded)
        return replace(model, now=now.astimezone().replace(tzinfo=None) if now.tzinfo else now)

    def claim(self, asked: JsonObject) -> None:
        """Records what this call asks for. Raises `UserError` where a `FIXED` value differs from what is
        there.
        """
        manifest = self.manifest
        if manifest.get("kind") == TRAINING:
            raise UserError(f"{self.folder} belongs to a training run; choose another folder with --out")
        before = manifest.get("asked", {})
        for name in FIXED:
            if name in before and name in asked and not _is_same(before[name], asked[name]):
                raise UserError(
                    f"{self.folder} is a run with {name} {_short(before[name])}, not {_short(asked[name])}; "
                    f"choose another folder with --out"
                )
        if self.rank == 0:
            content = {**manifest, "asked": {**before, **asked}, "versions": versions()}
            content.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
            if content != manifest:
                write_json(self.folder / "run.json", content)

    def as_recorded(self, model: "Model") -> "Model":
        """The model with the name and the date that it had when the run began, which are in prompts, wherever
        it lies now.
        """
        model, before = self.date(model), self.manifest.get("asked", {})
        if "model" not in before or not _is_same(before["model"], model.describe()):
            return model
        id = str(before["model"]["id"])
        name = before.get("name") or (Path(id).name if id.endswith(GGUF) else model_name(Path(id)))
        return model if name == model.name else replace(model, name=name)

    def note(self, **facts: object) -> None:
        """Adds facts about what was done to run.json (rank 0 only)."""
        content = {**self.manifest, **facts}
        if self.rank == 0 and content != self.manifest:
            write_json(self.folder / "run.json", content)


def _is_same(before: object, now: object) -> bool:
    """Whether two recorded values are one; a model is its weights, and where they lie is a hint."""
    if isinstance(before, dict) and isinstance(now, dict) and before.get("fingerprint") is not None:
        return bool(before["fingerprint"] == now.get("fingerprint"))
    return before == now


def _short(value: object) -> str:
    if isinstance(value, dict) and "id" in value:
        value = f"{value['id']} ({value.get('weights')}, {value.get('fingerprint', '')[:8]})"
    return str(value)[:80]


@contextmanager
def open_run(folder: Path, *, create: bool = False, rank: int = 0) -> Iterator[RunFolder]:
    """Locks and opens a run folder. `UserError` when it is missing (without `create`) or in use by a
    process.
    """
    if not folder.exists() and not create:
        raise UserError(f"run folder {folder} does not exist{did_you_mean_path(folder)}")
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} is a file, not a run folder") from None
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be made: {explain_os_error(error)}") from None
    if rank:
        yield RunFolder(folder, rank)
        return
    try:
        with locked(folder, lock=folder / ".lock"):
            remove_leftovers(folder)
            yield RunFolder(folder, rank)
    except UserError:
        if is_new and folder.is_dir() and not any(folder.iterdir()):  # refused before anything was done
            folder.rmdir()
        raise


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("personatlas", "torch", "transformers", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def read_manifest(folder: Path) -> JsonObject:
    """The content of run.json. `UserError` for a missing one, and for one that no run has written."""
    path = folder / "run.json"
    content = read_object(path)
    try:
        check_fields(content, MANIFEST)
        asked = read_field(content, "asked", JsonObject) if "asked" in content else {}
        if content.get("kind") != TRAINING and asked.get("model") is not None:
            read_field(asked["model"], "id", str)
        if content.get("kind") != TRAINING and "model_name" in asked:
            for name in ROLLOUT_SETTINGS:
                read_field(asked, name, object)
    except FieldError as error:
        raise UserError(f"{path} is damaged: {error}; {REMAKE}") from None
    return content


def is_training_run(folder: Path) -> bool:
    """Whether a folder is what `personatlas train` writes."""
    return (folder / "run.json").is_file() and read_manifest(folder).get("kind") == TRAINING


def checkpoint_folders(run: Path) -> dict[int, Path]:
    """A training run's checkpoints by their steps, in order, without one that is being written or removed."""
    folders = {}
    for folder in (run / CHECKPOINTS).glob(f"{STEP}*"):
        step = folder.name.removeprefix(STEP)
        if step.isdigit() and (folder / "config.json").is_file():
            folders[int(step)] = folder
    return dict(sorted(folders.items()))


def spread_steps(steps: Sequence[int], count: int) -> list[int]:
    """Up to `count` (2 or more) of some sorted steps: the first two, the last, and between them the nearest
    to even logarithms; of two the first and the last.
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
    """A training run's finished model, else its newest checkpoint; any other name as it is.

    Raises `UserError` for a training run without a checkpoint, and for a folder that is a run of another
    kind.
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
                f"{name} is a training run without a checkpoint yet; `personatlas run report {name}` shows where it "
                "stands"
            )
        return str(checkpoints[max(checkpoints)])
    if folder.name == CHECKPOINTS and (steps := checkpoint_folders(folder.parent)):
        raise UserError(
            f"{name} holds {len(steps)} checkpoints; give one of them, such as {steps[max(steps)]}"
        )
    if (folder / "run.json").is_file():
        model = read_manifest(folder).get("asked", {}).get("model_name")
        hint = f" of {model}: give that" if model else ": give its model"
        raise UserError(f"{name} is a run folder{hint} as the model, and the run with --axis {name}")
    return name


def hub_snapshot(path: Path) -> tuple[str, str] | None:
    """The id and the commit of a folder in the hub's cache, models--OWNER--NAME/snapshots/COMMIT."""
    *_, repository, snapshots, commit = ("", "", "", *path.parts)
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return "/".join(repository.split("--")[1:]), commit


def locate(name: str | Path) -> Path:
    """The place that a model's name stands for: `.`, `..` and links are followed, but a `.gguf` file keeps
    its own name, since the hub's cache names what it links to by a hash. Names of nothing here stay as they
    are.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    return path.parent.resolve() / path.name if path.exists() else path


def _training_run_of(model: Path) -> Path | None:
    """The training run that a model's folder is in."""
    run = model.parent.parent if model.parent.name == CHECKPOINTS else model.parent
    is_named = model.name == MODEL or model.name.startswith(STEP)
    return run if is_named and is_training_run(run) else None


def model_name(path: Path) -> str:
    """What people, and the prompt "You are {model}.", call a model: its training run's name, if it is in one,
    else that of its folder, file or repository.
    """
    path = locate(path)
    snapshot = hub_snapshot(path)
    if snapshot is not None:
        return snapshot[0].rpartition("/")[2]
    return (_training_run_of(path) or path).name.removesuffix(GGUF)


def checkpoint_name(name: str) -> str:
    """A short name for what is computed about a model, which tells a training run's checkpoints apart."""
    path = locate(resolve_model(name))
    run = _training_run_of(path)
    return model_name(path) if run is None else f"{run.name}-{path.name}"


def default_folder(model: str, study: str = "") -> Path:
    """The folder for what is computed about a model: runs/NAME, or runs/NAME-STUDY."""
    name = checkpoint_name(model)
    return Path("runs") / (f"{name}-{study}" if study else name)


def packaged_axes() -> tuple[str, ...]:
    """Models that an axis comes with."""
    return tuple(sorted(path.parent.name for path in PACKAGED_AXES.glob("*/axis.json")))


def packaged_axis_folder(name: str) -> Path:
    """The folder with `axis.*` and `space.*` of a packaged model. `UserError` when none comes with it."""
    if name not in packaged_axes():
        names = ", ".join(packaged_axes())
        raise UserError(f"no axis comes with {name!r}, only with {names}; fit one: personatlas axis")
    return PACKAGED_AXES / name


def own_axis(model: str) -> str | None:
    """The name of a model's axis: the one packaged with it, or in its default run folder; None without one."""
    if model in packaged_axes():
        return model
    folder = default_folder(model)
    return str(folder) if (folder / "axis.json").is_file() else None


def find_axis(model: str, axis: str | None = None) -> str:
    """The name of an axis: `axis` itself, else the model's own. Raises `UserError` when there is none."""
    found = axis or own_axis(model)
    if found is None:
        raise UserError(
            f"{model} has no axis in {default_folder(model)} yet: make it (personatlas axis {model}), or name "
            "another with --axis"
        )
    return found


def resolve_axis(name: str) -> Path:
    """The stem of an axis by the name of a run folder, an artefact (with or without ending) or a packaged
    model.

    Raises `UserError` when there is none.
    """
    path = Path(name)
    if name in packaged_axes() and not path.exists():
        return packaged_axis_folder(name) / "axis"
    is_file = path.suffix in (".json", ".safetensors")
    stem = path / "axis" if path.is_dir() else path.with_suffix("") if is_file else path
    if not stem.with_name(stem.name + ".json").is_file():
        raise UserError(
            f"no axis at {name}: give a run folder with a fit, an axis.safetensors or {packaged_axes()[0]}"
            + (did_you_mean(name, packaged_axes()) or did_you_mean_path(path))
        )
    return stem
