"""Checkpoints of a run: ordinary model folders with what is needed to go on beside them.

    RUN/checkpoints/step-000512/    config.json, model.safetensors (fp32), the tokenizer, state.json
                                    optimizer.safetensors, in the newest two only

They are made at step 0, at powers of two and at the end: what a model becomes changes with the logarithm of its steps, so
an axis can be watched as it emerges. Between them one is made every few minutes, which the next one replaces. A
checkpoint is a folder that is renamed when it is whole: a process killed at any moment leaves the ones before it.
"""

import errno
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from personatlas.persona.artifacts import digest, read_json, write_json
from personatlas.persona.errors import UserError
from personatlas.training.export.huggingface import export, load_exported
from personatlas.training.model.gpt import GPT

KEPT = 2  # checkpoints from which a run can go on
PREFIX = "step-"
# what a killed process was in the middle of; two dots where a checkpoint's weights were being written
LEFTOVERS = (
    *(f"checkpoints/.{PREFIX}*", f"checkpoints/..{PREFIX}*"),
    *(".model.*", ".tokenizer.*", ".*.json.*", ".*.jsonl.*", "tokens/.*.json.*", "tokens/.*.npy.*"),
)


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk."""

    step: int
    path: Path

    @property
    def resumes(self) -> bool:
        """Whether a run can go on from here."""
        return (self.path / "optimizer.safetensors").is_file()


def lasting(step: int, steps: int) -> bool:
    """Whether a step's checkpoint is for keeps: 0, powers of two, and the last."""
    return step == steps or step & (step - 1) == 0


def checkpoints_in(run: Path) -> list[Checkpoint]:
    """All whole ones of a run, the earliest first."""
    folder = run / "checkpoints"
    found = folder.glob(f"{PREFIX}*") if folder.is_dir() else []
    whole = (
        path for path in found if (path / "state.json").is_file() and path.name.removeprefix(PREFIX).isdigit()
    )
    return sorted(
        (Checkpoint(int(path.name.removeprefix(PREFIX)), path) for path in whole), key=lambda one: one.step
    )


def newest(run: Path) -> Checkpoint | None:
    """The one to go on from."""
    return next((one for one in reversed(checkpoints_in(run)) if one.resumes), None)


def save_checkpoint(
    run: Path, step: int, model: GPT, optimizer: dict[str, Tensor], tokenizer: Path, facts: dict[str, Any]
) -> Checkpoint:
    """Write one, whole or not at all, whatever goes wrong; one that is there is left as it is."""
    path = run / "checkpoints" / f"{PREFIX}{step:06}"
    if (path / "state.json").is_file() and (path / "optimizer.safetensors").is_file():
        return Checkpoint(step, path)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        export(model, tokenizer, temporary)
        state = temporary / "optimizer.safetensors"
        save_file({name: value.contiguous() for name, value in optimizer.items()}, state)
        _sync(state)
        _sync(temporary / "model.safetensors")
        digests = {"optimizer": digest(state), "model": digest(temporary / "model.safetensors")}
        write_json(temporary / "state.json", {**facts, "kind": "training-state", "step": step, **digests})
        if path.exists():  # an earlier one of this step, from which nothing can go on any more
            _remove(path)
        temporary.replace(path)
    except SafetensorError as error:
        raise _as_full(error, path) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(step, path)


def load_state(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state and what state.json says. `UserError` where that, or the model's file, is not as it was saved."""
    facts = read_json(checkpoint.path / "state.json")
    for name in ("optimizer", "model"):
        path = checkpoint.path / f"{name}.safetensors"
        if name in facts and not (path.is_file() and digest(path) == facts[name]):
            raise UserError(
                f"{path} is damaged or was changed; remove {checkpoint.path} and the run goes on from the one before"
            )
    return load_file(checkpoint.path / "optimizer.safetensors"), facts


def load_weights(checkpoint: Checkpoint, model: GPT) -> None:
    """Fill a model that is there, in place: its parameters may be views of buffers."""
    stored = load_exported(checkpoint.path).state_dict()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(stored[name])


def prune(run: Path, steps: int, every: bool = True) -> None:
    """Remove what the rule does not keep, and leftovers of what was never finished.

    For keeps are lasting steps (with `every`), the newest, and the newest two from which a run can go on; state to go on
    with stays in those two.
    """
    found = checkpoints_in(run)
    kept = [one.step for one in found if one.resumes][-KEPT:]
    for one in found:
        if one.step in kept:
            continue
        if (every and lasting(one.step, steps)) or one is found[-1]:
            (one.path / "optimizer.safetensors").unlink(missing_ok=True)
        else:
            _remove(one.path)
    for pattern in LEFTOVERS:
        for leftover in run.glob(pattern):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _remove(path: Path) -> None:
    """Under another name first: a kill in the middle must not leave half a checkpoint that looks whole."""
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _as_full(error: SafetensorError, path: Path) -> Exception:
    """The Rust side tells of a full disk in words only."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if f"os error {code}" in str(error) or f"code: {code}," in str(error):
            return OSError(code, os.strerror(code), str(path))
    return UserError(f"{path} cannot be written: {error}")
