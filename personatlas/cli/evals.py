"""The command `eval`: suites of this project, tasks of lm-eval, or a task of Inspect, with and without caps.

personatlas eval smollm2-135m --arm cap:assistant --requests requests.csv
personatlas eval smollm2-135m --arm cap:assistant --lm-eval ifeval --data ifeval=ifeval.jsonl --limit 100
personatlas eval smollm2-135m --arm cap:assistant --inspect task.py@name --limit 100
personatlas eval --compare baseline.eval capped.eval
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Group, Parameter

from personatlas.cli.options import MODEL, OPTIONS, SAMPLING, STEERING, Json, ModelName, Out, SteeringOptions
from personatlas.cli.output import print_json
from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions
from personatlas.persona.runs import default_folder, find_axis
from personatlas.steering.evals.options import EvalOptions, InspectOptions, LmEvalOptions

if TYPE_CHECKING:
    from personatlas.steering.evals.harnesses.inspect_compare import InspectComparison
    from personatlas.steering.evals.result import EvalResult

T = TypeVar("T")
HIDDEN = Parameter(parse=False)
LM_EVAL, INSPECT = (
    ("data", "tasks_folder", "fewshot", "raw"),
    ("epochs", "grader", "log_dir"),
)  # of `TaskOptions`
TASKS = Parameter(name="*", group=Group("Tasks of lm-eval and Inspect", sort_key=0))


@dataclass(frozen=True)
class SuiteOptions(EvalOptions):
    """Files, sizes and judge of the suites; what tasks take too is in `TaskOptions`."""

    pairs: Annotated[int, HIDDEN] = 300
    tasks: Annotated[str | None, HIDDEN] = None
    data: Annotated[list[str] | None, HIDDEN] = None
    task_limit: Annotated[int | None, HIDDEN] = None
    task_tokens: Annotated[int | None, HIDDEN] = None
    random: Annotated[int, HIDDEN] = 1
    max_new_tokens: Annotated[int, HIDDEN] = 128
    temperature: Annotated[float, HIDDEN] = 0.7
    seed: Annotated[int, HIDDEN] = 0
    margin: Annotated[float, HIDDEN] = 0.05


@dataclass(frozen=True)
class SampleOptions:
    """Sizes and sampling of suites and of tasks."""

    limit: int | None = None
    "most cases a suite (300 unless given), or samples a task (all unless given)"
    max_new_tokens: int | None = None
    "longest answer; 128 unless given, 48 in susceptibility, in tasks the task's own"
    temperature: float | None = None
    "sampling temperature; 0.7 unless given; 0 takes the likeliest token"
    seed: int | None = None
    "seed of all arms; 0 unless given"
    margin: float | None = None
    "a change within this much of zero counts as none; 0.05 unless given, in lm-eval 0.02"


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of other harnesses."""

    lm_eval: str | None = None
    "tasks of the lm-eval harness with commas between, such as ifeval,gsm8k; with --suite beside the suites"
    data: tuple[str, ...] = ()
    "TASK=FILE.jsonl: rows of an lm-eval task from a file, without a download; may be repeated"
    tasks_folder: Path | None = None
    "a folder with task YAMLs for lm-eval"
    fewshot: int | None = None
    "examples in each prompt of lm-eval, instead of the task's own number"
    raw: bool = False
    "lm-eval's prompts without the chat template (its own default)"
    inspect: str | None = None
    "a task of Inspect: task.py, task.py@name, or the name of an installed task such as inspect_evals/gsm8k"
    epochs: int | None = None
    "how often every sample of Inspect is answered; the task's own number unless given"
    grader: str | None = None
    "a model in Inspect's words (openai/gpt-4o) for scorers that ask one; the baseline unless given"
    log_dir: Path | None = None
    "where Inspect writes its logs; ./logs unless given"
    compare: tuple[Path, Path] | None = None
    "two logs of Inspect, before and after, instead of MODEL"


def eval_(
    model: ModelName | None = None,
    /,
    *,
    suite: str | None = None,
    bank: Path | None = None,
    show_answers: bool = False,
    options: Annotated[SuiteOptions, OPTIONS] = SuiteOptions(),
    tasks: Annotated[TaskOptions, TASKS] = TaskOptions(),
    samples: Annotated[SampleOptions, SAMPLING] = SampleOptions(),
    steering: Annotated[SteeringOptions, STEERING] = SteeringOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    out: Out = None,
    json: Json = False,
) -> None:
    """Evaluate a model with and without caps, on the same prompts with the same seeds. Resumes.

    Without --lm-eval and --inspect, the suites of this project: what a cap buys and what it costs.

    Parameters
    ----------
    suite
        suites with commas between: persona-jailbreak, harm, over-refusal, susceptibility, drift, benign;
        unless given those that need no file and those whose file is given
    bank
        a bank with the axis's roles, if not the packaged one
    show_answers
        show answers to harmful requests in eval.html, which leaves them out otherwise
    out
        the folder of the evaluation; runs/NAME-eval unless given
    """
    if tasks.compare is not None:
        if model or tasks.inspect or tasks.lm_eval or suite:
            raise UserError("--compare takes two logs of Inspect, and no MODEL or task beside them")
        from personatlas.steering.evals.harnesses.inspect_compare import (
            compare_inspect_arms,
            read_inspect_arm,
            read_inspect_log,
            require_inspect,
        )

        require_inspect()
        before, after = (read_inspect_arm(read_inspect_log(path)) for path in tasks.compare)
        _print_inspect(compare_inspect_arms(before, after), json)
        return
    _require_together(suite, options, tasks)
    if model is None:
        raise UserError("give MODEL, or two logs of Inspect with --compare BEFORE AFTER")
    elif tasks.inspect is not None:
        if suite or tasks.lm_eval:
            raise UserError(
                "--inspect runs one task of Inspect: give --suite and --lm-eval in another command"
            )
        _inspect(model, tasks, samples, steering, load, json)
    elif tasks.lm_eval is not None and suite is None:
        _lm_eval(model, tasks, samples, steering, load, out or default_folder(model) / "evals", json)
    else:
        folder = out or default_folder(model, "eval")
        result = _run_suites(model, suite, folder, options, tasks, samples, steering, load, bank)
        if result is not None:
            from personatlas.cli.eval_tables import print_evaluation
            from personatlas.steering.evals.page import write_eval_page

            write_eval_page(folder / "eval.html", result, show_answers=show_answers)
            if json:
                print_json({name: value for name, value in result.to_json().items() if name != "pairs"})
            else:
                print_evaluation(result, folder)


def _require_together(suite: str | None, options: SuiteOptions, tasks: TaskOptions) -> None:
    """Raises `UserError` for options of suites, lm-eval or Inspect where that is not what runs."""
    runs_suites = suite is not None or (tasks.lm_eval is None and tasks.inspect is None)
    groups = [
        (runs_suites, "suites: give --suite", options, [own.name for own in fields(EvalOptions)]),
        (tasks.lm_eval is not None, "tasks of lm-eval: give --lm-eval", tasks, LM_EVAL),
        (tasks.inspect is not None, "a task of Inspect: give --inspect", tasks, INSPECT),
    ]
    for runs, what, given, names in groups:
        changed = [name for name in names if getattr(given, name) != getattr(type(given)(), name)]
        if changed and not runs:
            raise UserError(f"--{changed[0].replace('_', '-')} is about {what} with it")


def _run_suites(
    model: str,
    suite: str | None,
    folder: Path,
    options: SuiteOptions,
    tasks: TaskOptions,
    samples: SampleOptions,
    steering: SteeringOptions,
    load: ModelOptions,
    bank: Path | None,
) -> "EvalResult | None":
    from personatlas.steering.evals.study import evaluate

    options = replace(
        options,
        tasks=tasks.lm_eval,
        data=list(tasks.data) or None,
        task_limit=samples.limit if tasks.lm_eval else None,
        task_tokens=samples.max_new_tokens if tasks.lm_eval else None,
        pairs=_or(samples.limit, options.pairs),
        max_new_tokens=_or(samples.max_new_tokens, options.max_new_tokens),
        temperature=_or(samples.temperature, options.temperature),
        seed=_or(samples.seed, options.seed),
        margin=_or(samples.margin, options.margin),
    )
    axis = find_axis(model, steering.axis)
    return evaluate(
        model,
        axis,
        steering.arms(axis),
        None if suite is None else [name.strip() for name in suite.split(",") if name.strip()],
        folder,
        options=options,
        load=load,
        bank=bank,
        force=steering.force,
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _lm_eval(
    model: str,
    tasks: TaskOptions,
    samples: SampleOptions,
    steering: SteeringOptions,
    load: ModelOptions,
    folder: Path,
    json: bool,
) -> None:
    """Runs tasks of lm-eval; on the baseline alone where neither --axis nor --arm is given."""
    from personatlas.cli.eval_tables import print_lm_eval
    from personatlas.steering.evals.harnesses.lm_eval_result import parse_task_names, require_lm_eval
    from personatlas.steering.evals.harnesses.lm_eval_run import run_lm_eval

    require_lm_eval()
    options = LmEvalOptions(
        tasks.tasks_folder,
        list(tasks.data),
        samples.limit,
        tasks.fewshot,
        samples.max_new_tokens,
        tasks.raw,
        _or(samples.margin, LmEvalOptions.margin),
    )
    names = parse_task_names(tasks.lm_eval or "")
    axis = find_axis(model, steering.axis) if steering.axis or steering.arm else None
    arms = [] if axis is None else steering.arms(axis)
    result = run_lm_eval(model, names, axis, arms, folder, options=options, load=load, force=steering.force)
    print_json(result.to_json()) if json else print_lm_eval(result, folder)


def _inspect(
    model: str,
    tasks: TaskOptions,
    samples: SampleOptions,
    steering: SteeringOptions,
    load: ModelOptions,
    json: bool,
) -> None:
    from personatlas.steering.evals.harnesses.inspect_compare import require_inspect
    from personatlas.steering.evals.harnesses.inspect_run import run_inspect

    require_inspect()
    options = InspectOptions(
        samples.limit,
        tasks.epochs,
        samples.max_new_tokens,
        samples.temperature,
        samples.seed,
        tasks.grader,
        tasks.log_dir,
    )
    axis, task = find_axis(model, steering.axis), tasks.inspect or ""
    arms = steering.arms(axis)
    _print_inspect(run_inspect(model, task, axis, arms, options, load=load, force=steering.force), json)


def _print_inspect(comparison: "InspectComparison", json: bool) -> None:
    from personatlas.cli.eval_tables import print_inspect_comparison

    print_json(comparison.to_json()) if json else print_inspect_comparison(comparison)
