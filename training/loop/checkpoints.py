"""Checkpoints of a run: ordinary model folders, with the state that resuming needs beside the weights.

    RUN/checkpoints/step-000512/    config.json, model.safetensors (fp32), the tokenizer, state.json
                                    optimizer.safetensors, in the newest two only

They are made at step 0, at powers of two and at the end: what a model becomes changes with the logarithm of
its steps, so an axis can be watched as it emerges. Between them one is made every few minutes, which the next
one replaces. A checkpoint is a folder that is renamed when it is whole: a process killed at any moment leaves
the ones before it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from personatlas.persona.artifacts import atomic_folder, digest, read_record, remove_folder, write_json
from personatlas.persona.errors import UserError
from personatlas.persona.records import Count, JsonObject, JsonRecord, NonNegative, Positive
from personatlas.persona.runs import CHECKPOINTS, STEP, checkpoint_folders
from personatlas.training.export.huggingface import export_model, load_exported
from personatlas.training.model.gpt import GPT

RESUMABLE = 2  # checkpoints that keep the optimizer's state


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    step: int
    path: Path

    @property
    def is_resumable(self) -> bool:
        """Whether a run can resume from here."""
        return (self.path / "optimizer.safetensors").is_file()


def is_permanent(step: int, steps: int) -> bool:
    """Whether a step's checkpoint is kept: 0, powers of two, and the last."""
    return step == steps or step & (step - 1) == 0


def checkpoints_in(run: Path) -> list[Checkpoint]:
    """All whole checkpoints of a run, the earliest first."""
    whole = (
        Checkpoint(step, path)
        for step, path in checkpoint_folders(run).items()
        if (path / "state.json").is_file()
    )
    return list(whole)


def newest_resumable(run: Path) -> Checkpoint | None:
    """The checkpoint to resume from."""
    return next((item for item in reversed(checkpoints_in(run)) if item.is_resumable), None)


def save_checkpoint(
    run: Path, step: int, model: GPT, optimizer: dict[str, Tensor], tokenizer: Path, facts: JsonObject
) -> Checkpoint:
    """Writes a checkpoint whole or not at all; one that is there is left as it is."""
    path = run / CHECKPOINTS / f"{STEP}{step:06}"
    if (path / "state.json").is_file() and (path / "optimizer.safetensors").is_file():
        return Checkpoint(step, path)
    path.parent.mkdir(exist_ok=True)
    # an earlier one of this step, which is not resumable any more, is replaced
    with atomic_folder(path, replace=True) as temporary:
        export_model(model, tokenizer, temporary)
        files = {name: temporary / f"{name}.safetensors" for name in ("optimizer", "model")}
        save_file({name: value.contiguous() for name, value in optimizer.items()}, files["optimizer"])
        for file in files.values():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        digests = {name: digest(file) for name, file in files.items()}
        content = {**facts, "kind": "training-state", "step": step, **digests}
        write_json(temporary / "state.json", content)
    return Checkpoint(step, path)


@dataclass(frozen=True)
class CheckpointState(JsonRecord):
    """The content of state.json: the step, seconds of training, processes, hashes of both files, and whose run it is."""

    step: Count
    seconds: NonNegative
    world: Positive
    tokenizer: str | None = None
    asked: JsonObject | None = None
    optimizer: str | None = None
    model: str | None = None
    kind: Literal["training-state"] = "training-state"

    omit_none: ClassVar[tuple[str, ...]] = ("tokenizer", "asked", "optimizer", "model")


def load_state(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], CheckpointState]:
    """An optimizer's state and the content of state.json.

    Raises `UserError` where the optimizer's or the model's file is not as it was saved.
    """
    remedy = f"remove {checkpoint.path} and the run goes on"
    state = read_record(checkpoint.path / "state.json", CheckpointState, remedy)
    for name, sha in (("optimizer", state.optimizer), ("model", state.model)):
        path = checkpoint.path / f"{name}.safetensors"
        if sha is not None and not (path.is_file() and digest(path) == sha):
            raise UserError(f"{path} is damaged or was changed; {remedy}")
    if state.step != checkpoint.step:
        raise UserError(f"{checkpoint.path} holds step {state.step}: another checkpoint's files; {remedy}")
    try:
        return load_file(checkpoint.path / "optimizer.safetensors"), state
    except SafetensorError as error:
        raise UserError(f"{checkpoint.path / 'optimizer.safetensors'}: {error}; {remedy}") from None


def load_weights(checkpoint: Checkpoint, model: GPT) -> None:
    """Fills a model's parameters in place: they may be views of buffers."""
    stored = load_exported(checkpoint.path).state_dict()
    for name, parameter in model.named_parameters():
        if name not in stored or stored[name].shape != parameter.shape:
            raise UserError(
                f"{checkpoint.path} holds a model of another shape than the run's plan ({name}): it is of another "
                "run; remove it"
            )
        parameter.data.copy_(stored[name])


def prune_checkpoints(run: Path, steps: int, keep_permanent: bool = True) -> None:
    """Removes all checkpoints but permanent ones (if kept), the newest, and the newest two resumable.

    Others than those two lose their optimizer's state.
    """
    found = checkpoints_in(run)
    resumable = [item.step for item in found if item.is_resumable][-RESUMABLE:]
    for item in found:
        if item.step in resumable:
            continue
        if (keep_permanent and is_permanent(item.step, steps)) or item is found[-1]:
            (item.path / "optimizer.safetensors").unlink(missing_ok=True)
        else:
            remove_folder(item.path)
