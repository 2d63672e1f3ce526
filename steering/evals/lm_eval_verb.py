"""The verb of EleutherAI's lm-eval harness: its tasks capped and uncapped, through one loaded model.

personaxis lm-eval smollm2-135m ifeval --axis smollm2-135m --data ifeval=ifeval.jsonl --limit 100
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text

from personaxis.persona.errors import KnownError
from personaxis.persona.options import ModelOptions
from personaxis.persona.verbs import Model, console, print_json, run_folder, say_result

AS_IT_IS = "as it is"  # `arms.AS_IT_IS`, whose module needs torch, which `--help` does not load
LEVEL = 0.05  # of an adjusted p


@Parameter(name="*")
@dataclass(frozen=True)
class TaskOptions:
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
    model: Model,
    tasks: str,
    /,
    *,
    axis: str | None = None,
    cap: list[str] | None = None,
    force: bool = False,
    asked: TaskOptions = TaskOptions(),
    how: ModelOptions = ModelOptions(),
    json: bool = False,
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
    json
        print everything as JSON, every sample with its answers and scores
    """
    from personaxis.steering.evals.lm_eval_tasks import require_asked, require_lm_eval
    from personaxis.steering.verbs import as_it_is, loaded

    require_lm_eval()
    if axis is None and cap:
        raise KnownError(f"--cap {cap[0]} needs --axis: along which axis?")
    names, files, caps = task_names(tasks), data_files(asked.data), cap or ([] if axis is None else ["assistant"])
    require_asked(names, files, asked.tasks_folder)
    wrong = [name for name in caps if caps.count(name) > 1 or name == AS_IT_IS]
    if wrong:
        raise KnownError(f"--cap {wrong[0]!r} is given twice, or is the name of the uncapped arm")
    folder = asked.out or run_folder(model, None) / "evals"

    def load() -> Any:
        return as_it_is(model, how) if axis is None else loaded(model, how, axis, caps, force=force)

    content = _run(load, caps, names, files, folder, asked)
    print_json(content) if json else _print(content, folder)


def _run(
    load: Any, caps: list[str], names: list[str], files: dict[str, Path], folder: Path, asked: TaskOptions
) -> dict[str, Any]:
    from personaxis.steering.evals.lm_eval_run import Asked, run_tasks

    settings = Asked(asked.limit, not asked.raw, asked.fewshot, asked.max_new_tokens, asked.margin)  # before the model
    held = load()
    arms = {AS_IT_IS: []} | {name: [own] for name, own in zip(caps, held.caps, strict=True)}
    return run_tasks(
        held.subject,
        held.chat,
        arms,
        names,
        data=files,
        folder=folder,
        tasks_folder=asked.tasks_folder,
        **asdict(settings),
    )


def task_names(text: str) -> list[str]:
    """Names with commas between, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def data_files(given: list[str]) -> dict[str, Path]:
    """Files by task, from TASK=FILE.jsonl. `KnownError` for anything else."""
    found: dict[str, Path] = {}
    for one in given:
        task, mark, file = one.partition("=")
        if not (task and mark and file):
            raise KnownError(f"--data {one!r} is not TASK=FILE.jsonl")
        found[task.strip()] = Path(file)
    return found


def _print(content: dict[str, Any], folder: Path) -> None:
    out = console()
    for name, task in content["tasks"].items():
        table = Table(
            Column("metric", overflow="fold"), Column("arm", overflow="fold", min_width=len(AS_IT_IS)), "value", "change [95%]", "p", "shows",
            "no loss", title=Text(f"{name}, {task['n']} samples"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for metric, told in task["metrics"].items():
            for arm, row in told["arms"].items():
                table.add_row(Text(metric), Text(arm), _value(row), *map(Text, _changed(row)))
        out.print(table)
        shares = {arm: one["share"] for arm, one in task["account"].items() if one["share"] is not None}
        if shares:
            say_result("fired: " + ", ".join(f"{arm} {share:.1%}" for arm, share in shares.items()))
    say_result(
        "intervals are bootstraps over samples; p is adjusted over all rows (Holm); shows: the least change that so many samples would have "
        f"shown; no loss: p of two one-sided tests against ±{content['asked']['margin']:g}"
    )
    for note in [*content["notes"], *_never_fired(content)]:
        out.print(Text(f"warning: {note}", style="yellow"))
    say_result(f"every answer: {folder / 'lm_eval.json'}")


def _value(row: dict[str, Any]) -> str:
    return f"{row['value']:.3f}" if isinstance(row["value"], int | float) else str(row["value"])


def _changed(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Change with its interval, p; where that is not significant, the least that would have been; p of no loss."""
    if "change" not in row:
        return "", "", "", ""
    low, high = row["interval"]
    least = "" if row["p_holm"] < LEVEL else f"±{row['smallest']:.3f}"
    return f"{row['change']:+.3f} [{low:.3f}, {high:.3f}]", f"{row['p_holm']:.2g}", least, f"{row['tost_p']:.2g}"


def _never_fired(content: dict[str, Any]) -> list[str]:
    arms = [arm for arm in content["arms"] if arm != AS_IT_IS]
    accounts = {arm: [task["account"][arm]["fired"] for task in content["tasks"].values()] for arm in arms}
    return [f"the cap {arm} never fired: every token stayed above its floor" for arm in arms if not sum(accounts[arm])]
