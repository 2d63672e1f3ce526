"""The verb `eval`: capped against uncapped.

The verb `inspect`: a task of Inspect in two arms, the model as it is and capped, and what the cap changed.

personatlas inspect smollm2-135m task.py@name --axis smollm2-135m --limit 100
personatlas inspect --compare plain.eval capped.eval

The verb of EleutherAI's lm-eval harness: its tasks capped and uncapped, through one loaded model.

personatlas lm-eval smollm2-135m ifeval --axis smollm2-135m --data ifeval=ifeval.jsonl --limit 100
"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from personatlas.cli.options import MODEL, OPTIONS, Json, ModelName
from personatlas.cli.output import print_json, print_line, print_path, print_table, print_warning
from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions, given
from personatlas.persona.progress import say
from personatlas.persona.runs import default_folder
from personatlas.steering.evals.options import EvalOptions

SIGNIFICANT = 0.05


def eval_(
    model: ModelName,
    /,
    *,
    axis: str,
    cap: Annotated[list[str] | None, Parameter(negative=())] = None,
    suite: str | None = None,
    out: Path | None = None,
    bank: Path | None = None,
    force: bool = False,
    show_answers: bool = False,
    options: Annotated[EvalOptions, OPTIONS] = EvalOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Evaluate a model as it is and capped, on the same prompts with the same seeds: what a cap buys and costs (resumes).

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it
    cap
        a cap by name, file or LEVEL@LAYERS, "assistant" unless given, with +0.2 or -0.2 behind it for a neighbour; may be given several times
    suite
        suites with commas between: persona-jailbreak, harm, over-refusal, susceptibility, drift, benign; unless given those that need no file and those whose file is given
    out
        the folder of the evaluation; runs/NAME-eval unless given
    bank
        a bank with the axis's roles, if not the packaged one
    force
        use an axis of the same model in another weight format
    show_answers
        show answers to harmful requests in eval.html, which leaves them out otherwise
    """
    from personatlas.steering.evals.page import write_eval_page
    from personatlas.steering.evals.study import evaluate

    folder = out or default_folder(model, "eval")
    suites = None if suite is None else [name.strip() for name in suite.split(",") if name.strip()]
    result = evaluate(
        model, axis, _caps(cap), suites, folder, options=options, load=load, bank=bank, force=force
    )
    if result is not None:
        write_eval_page(folder / "eval.html", result, show_answers=show_answers)
        content = {name: value for name, value in result.to_json().items() if name != "pairs"}
        print_json(content) if json else _print(content, folder)


def _caps(given: list[str] | None) -> list[str]:
    caps = given or ["assistant"]
    if len(set(caps)) != len(caps):
        raise UserError(f"--cap {next(name for name in caps if caps.count(name) > 1)!r} is given twice")
    return caps


def _print(content: dict[str, Any], folder: Path) -> None:
    for name, suite in content["suites"].items():
        roles = f"{suite['roles']} roles, " if suite["roles"] > 1 else ""
        title = f"{name}: {suite['n']} cases, {roles}{suite['requests']} requests"
        print_table(["", *content["arms"]], _suite_rows(suite, content["arms"]), title=title)
    print_table(["", *content["arms"]], _cost_rows(content), title="cost")
    for name, task in content["capability"].get("tasks", {"tasks": {}})["tasks"].items():
        rows = []
        for metric, result in task["metrics"].items():
            rows += _task_rows(metric, [result["arms"].get(arm, {}) for arm in content["arms"]])
        print_table(["", *content["arms"]], rows, title=f"{name} of lm-eval: {task['n']} samples")
    print_line(
        "↑ more is better, ↓ less is better; could show: the smallest change that so many cases would have shown"
    )
    for warning in content["warnings"]:
        print_warning(warning)
    print_path("every answer", folder / "eval.json")
    print_path("page", folder / "eval.html")


def _suite_rows(suite: dict[str, Any], arms: list[str]) -> list[list[str]]:
    """Per outcome its share, its change against the baseline, p, and where p is large the change that could be shown."""
    rows = []
    for outcome, result in suite["outcomes"].items():
        shares: list[str] = []
        changes: list[str] = []
        ps: list[str] = []
        least: list[str] = []
        for arm in arms:
            row = result["arms"][arm]
            low, high = row["interval"] or (0, 0)
            shares.append(
                "not judged" if row["share"] is None else f"{row['share']:.1%} [{low:.0%}, {high:.0%}]"
            )
            change = row.get("change") if row["share"] is not None else None
            if not change:
                for cells in (changes, ps, least):
                    cells.append("")
                continue
            p = change.get("p_holm", change["p"])
            changes.append(f"{change['value']:+.1%} [{change['low']:+.0%}, {change['high']:+.0%}]")
            ps.append(f"{p:.2g}")
            least.append("" if p < SIGNIFICANT else f"{change['smallest']:.1%}")
        rows.append([f"{outcome} {'↑' if result['better'] == 'more' else '↓'}", *shares])
        for title, cells in (("  change", changes), ("  p", ps), ("  could show", least)):
            if any(cells):
                rows.append([title, *cells])
    projections = [suite["arms"][arm]["projection"] for arm in arms]
    rows.append(["projection", *("" if value is None else f"{value:.1f}" for value in projections)])
    rows.append(["fired", *(f"{suite['arms'][arm]['fired']:.0%}" for arm in arms)])
    return rows


def _cost_rows(content: dict[str, Any]) -> list[list[str]]:
    capability, arms = content["capability"], content["arms"]
    rows: list[list[str]] = [
        ["more loss on benign answers"], ["KL"], ["baseline's loss on own answers"], ["bits per byte"],
    ]  # fmt: skip
    for arm in arms:
        cost, own = capability.get("benign", {}).get(arm), capability.get("own_loss", {}).get(arm)
        text = capability.get("text", {}).get("arms", {}).get(arm)
        low, high = cost["more_loss_interval"] if cost else (0.0, 0.0)
        rows[0].append(f"{cost['more_loss']:+.1%} [{low:+.1%}, {high:+.1%}]" if cost else "")
        rows[1].append(f"{cost['kl']:.3f}" if cost else "")
        rows[2].append(f"{own['loss']:.3f} ± {own['error']:.3f}" if own and own["loss"] is not None else "")
        rows[3].append(f"{text['bits_per_byte']:.4f}" if text else "")
    return [row for row in rows if any(row[1:])]


def _task_rows(metric: str, arms: list[dict[str, Any]]) -> list[list[str]]:
    """A metric of lm-eval over the arms: value, change, adjusted p, least change that could be shown, p of no loss."""
    rows: list[list[str]] = [[metric], ["  change"], ["  p"], ["  could show"], ["  no loss, p"]]
    for row in arms:
        value = row.get("value", "")
        rows[0].append(f"{value:.3f}" if isinstance(value, int | float) else str(value))
        if "change" not in row:
            for line in rows[1:]:
                line.append("")
            continue
        low, high = row["interval"]
        rows[1].append(f"{row['change']:+.3f} [{low:+.3f}, {high:+.3f}]")
        rows[2].append(f"{row['p_holm']:.2g}")
        rows[3].append("" if row["p_holm"] < SIGNIFICANT else f"{row['smallest']:.3f}")
        rows[4].append(f"{row['tost_p']:.2g}")
    return [line for number, line in enumerate(rows) if not number or any(line[1:])]


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
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
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
    """
    from personatlas.steering.evals.harnesses.inspect_compare import (
        arm_of,
        compared,
        read_log,
        require_inspect,
    )

    require_inspect()
    if compare is not None:
        if model or task or axis:
            raise UserError(
                "--compare takes two logs that are there, and no MODEL, TASK or --axis beside them"
            )
        logs = [read_log(path) for path in compare]
    elif model and task and axis:
        logs = run_arms(model, task, axis, cap, asked, load, force=force)
    else:
        raise UserError("give MODEL, TASK and --axis RUN, or two logs with --compare BEFORE AFTER")
    found = compared(*(arm_of(log) for log in logs))
    print_json(found) if json else _inspect_verb_print(found)


def run_arms(
    model: str, task: str, axis: str, cap: str, asked: TaskOptions, load: ModelOptions, *, force: bool = False
) -> list[Any]:
    """The logs of both arms, answered by one loaded model. Raises `UserError` for a task or a cap that cannot be."""
    from inspect_ai.model import GenerateConfig, Model

    from personatlas.steering.evals.harnesses.inspect_provider import Answerer, PersonatlasAPI
    from personatlas.steering.session import load_steered_model

    _require_one(task)
    for option in ("limit", "epochs", "max_tokens"):
        value = getattr(asked, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value} is below 1")
    if cap in ("", "none"):
        raise UserError("--cap none leaves nothing to compare: name the cap of the second arm")
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
        raise UserError(" ".join(str(error.message).split())) from None
    if len(logs) != 1:
        raise UserError(f"{task} is {len(logs)} tasks; name one of them: FILE.py@NAME")
    return logs[0]


def _require_one(task: str) -> None:
    """A file with several tasks must be told which; Inspect itself would run them all."""
    from inspect_ai import list_tasks

    path = Path(task.partition("@")[0])
    if path.suffix != ".py":
        return
    if not path.is_file():
        raise UserError(
            f"there is no task file {path}; give FILE.py, FILE.py@NAME or the name of an installed task"
        )
    names = [found.name for found in list_tasks(path.name, root_dir=path.absolute().parent)]
    chosen = task.partition("@")[2]
    if chosen and chosen not in names:
        raise UserError(f"{path} has no task {chosen!r}, only {', '.join(names) or 'none'}")
    if not chosen and len(names) != 1:
        raise UserError(
            f"{path} has {len(names)} tasks ({', '.join(names) or 'none'}); name one: {path}@NAME"
        )


def _inspect_verb_print(found: dict[str, Any]) -> None:
    before, after = found["arms"]
    is_capped = [bool(arm["cap"]) for arm in (before, after)]
    names = ["baseline", "capped"] if is_capped == [False, True] else [before["name"], after["name"]]
    rows = []
    for name, row in {**found["scorers"], "projection": found["projection"]}.items():
        if not row["n"]:
            rows.append([name, "", "", "", "", "", "0"])
            continue
        change = row["change"]
        rows.append(
            [
                name,
                *(f"{row[arm]:.3f}" for arm in ("before", "after")),
                f"{change['value']:+.3f}",
                f"[{change['low']:+.2f}, {change['high']:+.2f}]",
                f"{change['p']:.2g} ({row['p_holm']:.2g})" if "p_holm" in row else "",
                str(row["n"]),
            ]
        )
    print_table(["scorer", *names, "change", "95%", "p (Holm)", "pairs"], rows)
    print_line(f"projection: of an answer's tokens at layer {found['layer']}, before the cap's step")
    for name, row in found["scorers"].items():
        if row["n"] and not row["is_shown"]:
            least = row["change"]["smallest"]
            text = f"no change shown; {row['n']} pairs as scattered as these show one of {least:.3f}"
            print_line(f"{name}: {text if least else 'every pair scored the same'}")
        if row["left_out"]:
            print_warning(f"{name}: {row['left_out']} pairs without a number in both arms are left out")
    if not found["same_seeds"]:
        print_warning("the two arms were sampled with different seeds")
    for arm in found["arms"]:
        if arm["fired"] == 0:
            print_warning(f"{arm['name']}: the cap never fired, and its answers are the model's own")
        elif arm["fired"] is not None:
            print_line(f"{arm['name']}: the cap changed {arm['fired']:.0%} of tokens times layers")
        print_path("log", arm["log"])


BASELINE = "baseline"  # `arms.BASELINE`, whose module needs torch, which `--help` does not load


@Parameter(name="*")
@dataclass(frozen=True)
class TaskOptions_of_lm_eval_verb:
    """How to run the tasks."""

    tasks_folder: Path | None = None
    "a folder with task YAMLs of your own"
    data: list[str] = field(default_factory=list)
    "TASK=FILE.jsonl: rows in place of the ones that a built-in task would download; may be given several times"
    limit: int | None = None
    "samples a task; all unless given"
    fewshot: int | None = None
    "examples in each prompt, in place of the task's own number"
    max_new_tokens: int | None = None
    "bounds every answer; the task's own length unless given"
    raw: bool = False
    "prompts as they are, without the chat template (lm-eval's own default)"
    margin: float = 0.02
    "the largest change that counts as none, in the metric's own unit"
    out: Path | None = None
    "where answers and results go, runs/MODEL/evals unless given; the same command goes on from what is there"


def lm_eval(
    model: ModelName,
    tasks: str,
    /,
    *,
    axis: str | None = None,
    cap: list[str] | None = None,
    force: bool = False,
    asked: TaskOptions_of_lm_eval_verb = TaskOptions_of_lm_eval_verb(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Run tasks of the lm-eval harness as the model is and with every cap, and compare them sample by sample.

    Without an axis there is nothing to cap by: the tasks are run on the model as it is.

    Parameters
    ----------
    tasks
        lm-eval's task names with commas between: ifeval,gsm8k
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it; none to run the model as it is
    cap
        a cap by name, file or LEVEL@LAYERS, "assistant" unless given; may be given several times
    force
        use an axis of the same model in another weight format
    """
    from personatlas.persona.models.load import load_model
    from personatlas.steering.evals.harnesses.lm_eval_result import (
        parse_task_data,
        parse_task_names,
        require_lm_eval,
    )
    from personatlas.steering.evals.harnesses.lm_eval_run import LmEvalOptions, check_tasks, run_lm_eval
    from personatlas.steering.session import load_chat, load_steered_model

    require_lm_eval()
    names, files = parse_task_names(tasks), parse_task_data(asked.data)
    caps = _lm_eval_verb_caps(cap or [], axis)
    check_tasks(names, files, asked.tasks_folder)
    folder = asked.out or default_folder(model) / "evals"
    options = LmEvalOptions(asked.limit, not asked.raw, asked.fewshot, asked.max_new_tokens, asked.margin)
    options.check()
    arms: dict[str, Any] = {BASELINE: []}
    if axis is None:
        decoder = load_model(model, device=load.device, dtype=load.dtype, chat_template=load.chat_template)
    else:
        steered = load_steered_model(model, load, axis, caps, force=force)
        decoder = steered.model
        arms |= {name: [own] for name, own in zip(caps, steered.caps, strict=True)}
    content = run_lm_eval(
        decoder,
        load_chat(decoder),
        arms,
        names,
        data=files,
        out=folder,
        tasks_folder=asked.tasks_folder,
        options=options,
    ).to_json()
    print_json(content) if json else _lm_eval_verb_print(content, folder)


def _lm_eval_verb_caps(given: list[str], axis: str | None) -> list[str]:
    if axis is None and given:
        raise UserError(f"--cap {given[0]} needs --axis: along which axis?")
    wrong = [name for name in given if given.count(name) > 1 or name == BASELINE]
    if wrong:
        raise UserError(f"--cap {wrong[0]!r} is given twice, or is the name of the uncapped arm")
    return given or ([] if axis is None else ["assistant"])


def _lm_eval_verb_print(content: dict[str, Any], folder: Path) -> None:
    arms = content["arms"]
    for name, task in content["tasks"].items():
        rows = []
        for metric, result in task["metrics"].items():
            rows += _task_rows(metric, [result["arms"].get(arm, {}) for arm in arms])
        shares = [task["account"].get(arm, {}).get("share") for arm in arms]
        if any(share is not None for share in shares):
            rows.append(["fired", *("" if share is None else f"{share:.1%}" for share in shares)])
        print_table(["", *arms], rows, title=f"{name}: {task['n']} samples")
    print_line(
        "intervals are bootstraps over samples; p is adjusted over all rows (Holm); could show: the smallest change that so "
        "many samples would have shown; no loss: p of two one-sided tests against "
        f"±{content['asked']['margin']:g}"
    )
    for note in [*content["notes"], *_never_fired(content)]:
        print_warning(note)
    print_path("every answer", folder / "lm_eval.json")


def _never_fired(content: dict[str, Any]) -> list[str]:
    arms = [arm for arm in content["arms"] if arm != BASELINE]
    accounts = {arm: [task["account"][arm]["fired"] for task in content["tasks"].values()] for arm in arms}
    return [
        f"the cap {arm} never fired: every token stayed above its floor"
        for arm in arms
        if not sum(accounts[arm])
    ]
