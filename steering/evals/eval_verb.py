"""The verb `eval`: capped against uncapped."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from personaxis.persona.errors import KnownError
from personaxis.persona.options import ModelOptions
from personaxis.persona.verbs import Model, console, print_json, run_folder, say_result
from personaxis.steering.evals.asked import EvalOptions

SIGNIFICANT = 0.05


def eval_(
    model: Model,
    /,
    *,
    axis: str,
    cap: Annotated[list[str] | None, Parameter(negative=())] = None,
    out: Path | None = None,
    bank: Path | None = None,
    force: bool = False,
    show_answers: bool = False,
    asked: EvalOptions = EvalOptions(),
    how: ModelOptions = ModelOptions(),
    json: bool = False,
) -> None:
    """Evaluate a model as it is and capped, on the same prompts with the same seeds: what a cap buys and costs (resumes).

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it
    cap
        a cap by name, file or LEVEL@LAYERS, "assistant" unless given, with +0.2 or -0.2 behind it for a neighbour; may be given several times
    out
        the folder of the evaluation; runs/NAME-eval unless given
    bank
        a bank with the axis's roles, if not the packaged one
    force
        use an axis of the same model in another weight format
    show_answers
        show answers to harmful requests in eval.html, which leaves them out otherwise
    json
        print eval.json without its answers
    """
    from personaxis.steering.evals.evaluate import evaluate
    from personaxis.steering.evals.page import write_eval_page

    folder = out or run_folder(model, None).with_name(run_folder(model, None).name + "-eval")
    content = evaluate(model, how, axis, _caps(cap), asked, folder, bank, force=force)
    if content is not None:
        write_eval_page(folder / "eval.html", content, show_answers=show_answers)
        print_json({name: value for name, value in content.items() if name != "pairs"}) if json else _print(
            content, folder
        )


def _caps(given: list[str] | None) -> list[str]:
    caps = given or ["assistant"]
    if len(set(caps)) != len(caps):
        raise KnownError(f"--cap {next(name for name in caps if caps.count(name) > 1)!r} is given twice")
    return caps


def _print(content: dict[str, Any], folder: Path) -> None:
    out = console()
    for name, suite in content["suites"].items():
        out.print(_table(name, suite, content["arms"]))
    out.print(_costs(content))
    if "tasks" in content["capability"]:
        out.print(_tasks(content))
    for warning in content["warnings"]:
        out.print(Text(f"note: {warning}", style="yellow"))
    say_result(f"every answer: {folder / 'eval.json'}")
    say_result(f"page: {folder / 'eval.html'}")


def _table(name: str, suite: dict[str, Any], arms: list[str]) -> Table:
    roles = f"{suite['roles']} roles, " if suite["roles"] > 1 else ""
    asked = f"{suite['n']} cases, {roles}{suite['requests']} requests"
    table = Table(title=f"{name}: {asked}", title_justify="left")
    table.add_column("arm")
    for outcome, row in suite["outcomes"].items():
        table.add_column(f"{outcome} ({'more' if row['better'] == 'more' else 'less'} is better)")
    table.add_column("projection", justify="right")
    table.add_column("fired", justify="right")
    for arm in arms:
        own = suite["arms"][arm]
        cells = [_cell(row["arms"][arm]) for row in suite["outcomes"].values()]
        place = "" if own["projection"] is None else f"{own['projection']:.1f}"
        table.add_row(Text(arm), *cells, place, f"{own['fired']:.0%}")
    return table


def _cell(row: dict[str, Any]) -> str:
    """A share with its interval, and below it the change with what it is worth."""
    if row["share"] is None:
        return "not judged"
    low, high = row["interval"]
    text = f"{row['share']:.1%} [{low:.0%}, {high:.0%}]"
    change = row.get("change")
    if not change:
        return text
    p = change.get("p_holm", change["p"])
    said = f"{change['value']:+.1%} [{change['low']:+.0%}, {change['high']:+.0%}] p {p:.2g}"
    return f"{text}\n{said}" + ("" if p < SIGNIFICANT else f"\n(could show {change['smallest']:.1%})")


def _costs(content: dict[str, Any]) -> Table:
    table = Table(title="cost", title_justify="left")
    for title in ("arm", "more loss on benign answers", "KL", "own answers' loss as it is", "bits per byte"):
        table.add_column(title)
    capability = content["capability"]
    for arm in content["arms"]:
        cost, own = capability.get("benign", {}).get(arm), capability.get("own_loss", {}).get(arm)
        text = capability.get("text", {}).get("arms", {}).get(arm)
        low, high = cost["more_loss_interval"] if cost else (0.0, 0.0)
        table.add_row(
            Text(arm),
            f"{cost['more_loss']:+.1%} [{low:+.1%}, {high:+.1%}]" if cost else "",
            f"{cost['kl']:.3f}" if cost else "",
            f"{own['loss']:.3f} ± {own['error']:.3f}" if own and own["loss"] is not None else "",
            f"{text['bits_per_byte']:.4f}" if text else "",
        )
    return table


def _tasks(content: dict[str, Any]) -> Table:
    table = Table(title="tasks of lm-eval", title_justify="left")
    for title in ("task", "metric", *content["arms"]):
        table.add_column(Text(title))
    for name, task in content["capability"]["tasks"]["tasks"].items():
        for metric, told in task["metrics"].items():
            cells = [_task_cell(told["arms"].get(arm, {})) for arm in content["arms"]]
            table.add_row(Text(f"{name} ({task['n']})"), Text(metric), *cells)
    return table


def _task_cell(row: dict[str, Any]) -> str:
    if not isinstance(row.get("value"), int | float):
        return ""
    text = f"{row['value']:.3f}"
    if "change" not in row:
        return text
    shown = "" if row["p_holm"] < SIGNIFICANT else f"\n(could show {row['smallest']:.3f})"
    return f"{text}\n{row['change']:+.3f} [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]{shown}"
