"""A task of Inspect in two arms of one loaded model, the baseline and a cap, and what the cap changed.

comparison = run_inspect("smollm2-135m", "task.py@name", "smollm2-135m", ["assistant"],
InspectOptions(limit=100)); comparison.scorers["includes"].change.value
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE
from personatlas.persona.models.load import Model
from personatlas.persona.options import ModelOptions, option_values
from personatlas.persona.progress import say, say_if_fewer
from personatlas.steering.evals.harnesses.inspect_compare import (
    InspectComparison,
    compare_inspect_arms,
    read_inspect_arm,
    require_inspect,
)
from personatlas.steering.evals.options import InspectOptions
from personatlas.steering.session import Arms, load_steered_model

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog
    from inspect_ai.model import Model as InspectModel


def run_inspect(
    model: str | Model,
    task: str,
    axis: str | Axis,
    arms: Arms,
    options: InspectOptions = InspectOptions(),
    *,
    load: ModelOptions = ModelOptions(),
    force: bool = False,
) -> InspectComparison:
    """Runs a task on the baseline and in one arm. `task` is FILE.py, FILE.py@NAME or the name of an installed
    task.

    Raises `UserError` for a task or an arm that cannot be.
    """
    require_inspect()
    from inspect_ai.model import GenerateConfig
    from inspect_ai.model import Model as InspectModel

    from personatlas.steering.evals.harnesses.batch_answerer import BatchAnswerer
    from personatlas.steering.evals.harnesses.inspect_provider import PersonatlasAPI

    _require_one(task)
    options.check()
    steered = load_steered_model(model, axis, arms, load, force=force)
    answerer, name = BatchAnswerer(steered), steered.only_arm[0]
    if name == BASELINE:
        raise UserError("Inspect compares the baseline with an arm: give one --arm")
    model_name = model if isinstance(model, str) else model.id
    axis_name = axis if isinstance(axis, str) else axis.source
    settings = {name: value for name, value in option_values(load).items() if value is not None}
    logs, grader = [], None
    for cap in (None, name):
        api = PersonatlasAPI(model_name=model_name, axis=axis_name, cap=cap, answerer=answerer)
        arm = InspectModel(api, GenerateConfig(), {"axis": axis_name, "cap": cap or "none", **settings})
        say(f"{task}: {cap or BASELINE}")
        # a model that grades itself would be capped in one arm only: the arms would be graded by two measures
        grader = grader or options.grader or arm
        logs.append(_run(task, arm, options, grader))
        if cap is None and (n_samples := logs[0].eval.dataset.samples) is not None:
            say_if_fewer("--limit", options.limit, n_samples, f"of {task} ")
    return compare_inspect_arms(*map(read_inspect_arm, logs))


def _run(task: str, arm: "InspectModel", options: InspectOptions, grader: "str | InspectModel") -> "EvalLog":
    from inspect_ai import eval
    from inspect_ai._util.error import PrerequisiteError

    names = ("limit", "epochs", "max_tokens", "temperature", "seed")
    settings = {name: value for name in names if (value := getattr(options, name)) is not None}
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


def _require_one(task: str) -> None:
    """A file with several tasks must be told which; Inspect itself would run them all."""
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
