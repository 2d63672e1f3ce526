"""A task of Inspect in two arms, the baseline and one with a cap, answered by one loaded model.

logs = run_inspect("smollm2-135m", "task.py@name", "smollm2-135m", "assistant", InspectOptions(limit=100))
compared(*(arm_of(log) for log in logs))
"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions, given
from personatlas.persona.progress import say

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog
    from inspect_ai.model import Model


@dataclass(frozen=True)
class InspectOptions:
    """How a task is run; what is None is the task's own."""

    limit: int | None = None
    "the first samples only; all unless given"
    epochs: int | None = None
    "how often every sample is answered"
    max_tokens: int | None = None
    "longest answer, else 512"
    temperature: float | None = None
    "sampling temperature, else 0.7"
    seed: int | None = None
    "seed of both arms, else 0"
    grader: str | None = None
    "a model in Inspect's words (openai/gpt-4o) for scorers that ask one; the baseline unless given"
    log_dir: Path | None = None
    "where Inspect writes its logs; ./logs unless given"

    def check(self) -> None:
        """Raises `UserError` for a number that is out of range."""
        names = {"limit": "limit", "epochs": "epochs", "max_tokens": "max-new-tokens"}
        for name, option in names.items():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{option} {value} is below 1")


def run_inspect(
    model: str,
    task: str,
    axis: str,
    cap: str,
    options: InspectOptions = InspectOptions(),
    load: ModelOptions = ModelOptions(),
    *,
    force: bool = False,
) -> "list[EvalLog]":
    """Returns the logs of both arms. Raises `UserError` for a task or a cap that cannot be.

    `task` is FILE.py, FILE.py@NAME or the name of an installed task.
    """
    from inspect_ai.model import GenerateConfig, Model

    from personatlas.steering.evals.harnesses.inspect_provider import Answerer, PersonatlasAPI
    from personatlas.steering.session import load_steered_model

    _require_one_task(task)
    options.check()
    answerer = Answerer(load_steered_model(model, load, axis, [cap], force=force))
    load_options = {name: value for name, value in given(load).items() if value is not None}
    arms = {}
    for name in (None, cap):
        api = PersonatlasAPI(model_name=model, axis=axis, cap=name, answerer=answerer)
        arms[name] = Model(api, GenerateConfig(), {"axis": axis, "cap": name or "none", **load_options})
    logs = []
    for name, arm in arms.items():
        say(f"{task}: {'capped' if name else 'baseline'}")
        # a model that grades itself would be capped in one arm only: the arms would be graded by two measures
        logs.append(_run_arm(task, arm, options, options.grader or arms[None]))
    return logs


def _run_arm(task: str, arm: "Model", options: InspectOptions, grader: "str | Model") -> "EvalLog":
    from inspect_ai import eval
    from inspect_ai._util.error import PrerequisiteError

    names = ("limit", "epochs", "max_tokens", "temperature", "seed")
    settings: dict[str, Any] = {
        name: value for name in names if (value := getattr(options, name)) is not None
    }
    try:
        with redirect_stdout(sys.stderr):  # stdout is for the result
            logs = eval(
                task,
                model=arm,
                model_roles={"grader": grader},
                display="plain",
                log_dir=None if options.log_dir is None else str(options.log_dir.absolute()),
                max_connections=arm.api.max_connections(),
                ctl_server=False,
                score_display=False,
                **settings,
            )
    except PrerequisiteError as error:
        raise UserError(" ".join(str(error.message).split())) from None
    if len(logs) != 1:
        raise UserError(f"{task} is {len(logs)} tasks; name one of them: FILE.py@NAME")
    return logs[0]


def _require_one_task(task: str) -> None:
    """`UserError` for a file with several tasks and no @NAME, all of which Inspect itself would run."""
    from inspect_ai import list_tasks

    file, _, name = task.partition("@")
    path = Path(file)
    if path.suffix != ".py":
        return
    if not path.is_file():
        raise UserError(
            f"there is no task file {path}; give FILE.py, FILE.py@NAME or the name of an installed task"
        )
    names = [found.name for found in list_tasks(path.name, root_dir=path.absolute().parent)]
    if name and name not in names:
        raise UserError(f"{path} has no task {name!r}, only {', '.join(names) or 'none'}")
    if not name and len(names) != 1:
        raise UserError(
            f"{path} has {len(names)} tasks ({', '.join(names) or 'none'}); name one: {path}@NAME"
        )
