"""The verb `inspect`: a task of Inspect in two arms, the model as it is and capped, and what the cap changed.

personaxis inspect smollm2-135m task.py@name --axis smollm2-135m --limit 100
personaxis inspect --compare plain.eval capped.eval
"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Column, Table
from rich.text import Text

from personaxis.persona.errors import KnownError
from personaxis.persona.options import ModelOptions, given
from personaxis.persona.progress import say
from personaxis.persona.verbs import console, print_json, say_result


@Parameter(name="*")
@dataclass(frozen=True)
class TaskOptions:
    """How to run the task."""

    limit: int | None = None
    "the first samples only; all unless given"
    epochs: int | None = None
    "times that every sample is answered; the task's own number unless given"
    max_tokens: int | None = None
    "longest answer; the task's own unless given, else 512"
    temperature: float | None = None
    "sampling temperature; the task's own unless given, else 0.7"
    seed: int | None = None
    "both arms sample with it; 0 unless given"
    grader: str | None = None
    "a model in Inspect's words (openai/gpt-4o) for scorers that ask one; this model as it is unless given"
    log_dir: Path | None = None
    "where Inspect writes its logs; ./logs unless given"


def inspect(
    model: str | None = None,
    task: str | None = None,
    /,
    *,
    axis: str | None = None,
    cap: str = "assistant",
    compare: Annotated[tuple[Path, Path] | None, Parameter(negative=())] = None,
    force: bool = False,
    asked: TaskOptions = TaskOptions(),
    how: ModelOptions = ModelOptions(),
    json: bool = False,
) -> None:
    """Run a task of Inspect on a model as it is and capped, and test what changed; or compare two logs (--compare).

    Parameters
    ----------
    model
        a packaged name (smollm2-135m), a local folder, a .gguf file or a hub id
    task
        task.py, task.py@name, or the name of an installed task such as inspect_evals/gsm8k
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it
    cap
        a cap saved beside the axis, a cap file, or LEVEL@LAYERS: p50@18-23, roles:p75@20,22
    compare
        two logs, before and after, in place of MODEL and TASK
    force
        use an axis of the same model in another weight format
    json
        print everything as JSON
    """
    from personaxis.steering.evals.inspect_compare import arm_of, compared, read_log, require_inspect

    require_inspect()
    if compare is not None:
        if model or task or axis:
            raise KnownError("--compare takes two logs that are there, and no MODEL, TASK or --axis beside them")
        logs = [read_log(path) for path in compare]
    elif model and task and axis:
        logs = run_arms(model, task, axis, cap, asked, how, force=force)
    else:
        raise KnownError("give MODEL, TASK and --axis RUN, or two logs with --compare BEFORE AFTER")
    found = compared(*(arm_of(log) for log in logs))
    print_json(found) if json else _print(found)


def run_arms(
    model: str, task: str, axis: str, cap: str, asked: TaskOptions, how: ModelOptions, *, force: bool = False
) -> list[Any]:
    """The logs of both arms, answered by one loaded model. Raises `KnownError` for a task or a cap that cannot be."""
    from inspect_ai.model import GenerateConfig, Model

    from personaxis.steering.evals.answerer import Answerer
    from personaxis.steering.evals.inspect_model import PersonaxisAPI
    from personaxis.steering.verbs import loaded

    _require_one(task)
    for option in ("limit", "epochs", "max_tokens"):
        value = getattr(asked, option)
        if value is not None and value < 1:
            raise KnownError(f"--{option.replace('_', '-')} {value} is below 1")
    if cap in ("", "none"):
        raise KnownError("--cap none leaves nothing to compare: name the cap of the second arm")
    answerer = Answerer(loaded(model, how, axis, [cap], force=force))
    given_how = {name: value for name, value in given(how).items() if value is not None}
    arms = {}
    for name in (None, cap):
        api = PersonaxisAPI(model_name=model, axis=axis, cap=name, answerer=answerer)
        arms[name] = Model(api, GenerateConfig(), {"axis": axis, "cap": name or "none", **given_how})
    logs = []
    for name, arm in arms.items():
        say(f"{task}: {'capped' if name else 'as it is'}")
        # a model that grades itself would be capped in one arm only: the arms would be graded by two measures
        logs.append(_run(task, arm, asked, asked.grader or arms[None]))
    return logs


def _run(task: str, arm: Any, asked: TaskOptions, grader: Any) -> Any:
    from inspect_ai import eval
    from inspect_ai._util.error import PrerequisiteError

    names = ("limit", "epochs", "max_tokens", "temperature", "seed")
    settings = {name: value for name in names if (value := getattr(asked, name)) is not None}
    try:
        with redirect_stdout(sys.stderr):  # stdout is for the result
            logs = eval(
                task,
                model=arm,
                model_roles={"grader": grader},
                display="plain",
                log_dir=None if asked.log_dir is None else str(asked.log_dir.absolute()),
                max_connections=arm.api.max_connections(),
                ctl_server=False,
                score_display=False,
                **settings,
            )
    except PrerequisiteError as error:
        raise KnownError(" ".join(str(error.message).split())) from None
    if len(logs) != 1:
        raise KnownError(f"{task} is {len(logs)} tasks; name one of them: FILE.py@NAME")
    return logs[0]


def _require_one(task: str) -> None:
    """A file with several tasks must be told which; Inspect itself would run them all."""
    from inspect_ai import list_tasks

    path = Path(task.partition("@")[0])
    if path.suffix != ".py":
        return
    if not path.is_file():
        raise KnownError(f"there is no task file {path}; give FILE.py, FILE.py@NAME or the name of an installed task")
    names = [found.name for found in list_tasks(path.name, root_dir=path.absolute().parent)]
    chosen = task.partition("@")[2]
    if chosen and chosen not in names:
        raise KnownError(f"{path} has no task {chosen!r}, only {', '.join(names) or 'none'}")
    if not chosen and len(names) != 1:
        raise KnownError(f"{path} has {len(names)} tasks ({', '.join(names) or 'none'}); name one: {path}@NAME")


def _print(found: dict[str, Any]) -> None:
    before, after = found["arms"]
    said = f"projection: of an answer's tokens at layer {found['layer']}, before the cap's step"
    is_plain = [not arm["cap"] for arm in (before, after)]
    arms = ("as it is", "capped") if is_plain == [True, False] else (before["name"], after["name"])
    scorer, interval = Column("scorer", overflow="fold", min_width=10), Column("95%", no_wrap=True)
    table = Table(scorer, *arms, "change", interval, "p (Holm)", "pairs", caption=said)
    rows = {**found["scorers"], "projection": found["projection"]}
    for name, row in rows.items():
        if not row["n"]:
            table.add_row(Text(name), "", "", "", "", "", "0")
            continue
        change = row["change"]
        reach = Text(f"[{change['low']:+.2f}, {change['high']:+.2f}]")
        p = f"{change['p']:.2g} ({row['p_holm']:.2g})" if "p_holm" in row else ""
        means = (f"{row[arm]:.3f}" for arm in ("before", "after"))
        table.add_row(Text(name), *means, f"{change['value']:+.3f}", reach, p, str(row["n"]))
    out = console()
    out.print(table)
    for name, row in found["scorers"].items():
        if row["n"] and not row["is_shown"]:
            least = row["change"]["smallest"]
            said = f"no change shown; {row['n']} pairs as scattered as these show one of {least:.3f}"
            say_result(f"{name}: {said if least else 'every pair scored the same'}")
        if row["left_out"]:
            out.print(
                Text(f"{name}: {row['left_out']} pairs without a number in both arms are left out", style="yellow")
            )
    if not found["same_seeds"]:
        out.print(Text("the two arms were sampled with different seeds", style="yellow"))
    for arm in found["arms"]:
        if arm["fired"] == 0:
            out.print(Text(f"{arm['name']}: the cap never fired, and its answers are the model's own", style="yellow"))
        elif arm["fired"] is not None:
            say_result(f"{arm['name']}: the cap changed {arm['fired']:.0%} of tokens times layers")
        out.print(Text(f"log: {arm['log']}"), soft_wrap=True)
