"""The ends of a run, first and last: may this folder go on, and what is left in it when the last step is done."""

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from personatlas.persona.errors import UserError
from personatlas.persona.runs import RunFolder
from personatlas.training.loop.checkpoints import checkpoints_in
from personatlas.training.loop.run_log import METRICS, read_metrics
from personatlas.training.loop.trainer import Loop
from personatlas.training.report.page import write_training_report

NOT_OF_THE_MODEL = ("optimizer.safetensors", "state.json")


def require_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """`UserError` where a run would go on with something else than it began with."""
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        name = changed[0]
        what = f"{name.replace('_', '-')} {_short(before[name])}, not {_short(now[name])}"
        raise UserError(f"--out {folder} holds a run with {what}; give that, or another folder for a new run")


def finish(run: RunFolder, loop: Loop, folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    """Make RUN/model of the last checkpoint, note the result in run.json, write the report; returns the result."""
    make_model(folder)
    rows = read_metrics(folder)
    held = next((row for row in reversed(rows) if row["kind"] == "held-out"), None)
    steps = [row for row in rows if row["kind"] == "step"]
    if held is None or not steps:
        raise UserError(
            f"{folder / METRICS} does not tell of the last steps: the model is in {folder / 'model'}, but its figures are "
            f"lost; remove {checkpoints_in(folder)[-1].path} to make the last steps again"
        )
    plan, seconds = loop.plan, steps[-1]["seconds"]
    speed = plan.tokens / seconds
    result = {
        "held_out": {name: value for name, value in held.items() if name not in ("kind", "step")},
        "steps": plan.steps,
        "tokens": plan.tokens,
        "seconds": seconds,
        "tokens_a_second": speed,
        "utilisation": loop.utilisation(speed),
        **more,
    }
    run.note(result=result)
    write_training_report(folder)
    return result


def make_model(folder: Path) -> Path:
    """RUN/model: the last checkpoint without what only training needs. The weights are a link where it can be; files that
    people edit are not, since a checkpoint stays as it was made."""
    last, path = checkpoints_in(folder)[-1], folder / "model"
    temporary = folder / f".model.{secrets.token_hex(6)}"
    temporary.mkdir()
    try:
        for file in last.path.iterdir():
            if file.name not in NOT_OF_THE_MODEL:
                _put(file, temporary / file.name)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _put(file: Path, place: Path) -> None:
    if file.name == "model.safetensors":
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(file, place)
            return
    shutil.copyfile(file, place)


def _short(value: Any) -> str:
    return "as derived" if value is None else str(value)[:16]
