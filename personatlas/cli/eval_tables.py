"""Tables of evaluations: a metric a row, an arm a column."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.text import Text

from personatlas.cli.output import (
    console,
    count_of,
    print_line,
    print_path,
    print_table,
    print_warning,
    with_interval,
)
from personatlas.steering.evals.harnesses.inspect_compare import InspectComparison
from personatlas.steering.evals.harnesses.lm_eval_result import LmEvalResult, TaskMetric, TaskResult
from personatlas.steering.evals.result import EvalResult, Outcome
from personatlas.steering.evals.verdict import (
    SIGNIFICANT,
    p_value,
    shown_outcomes,
    suite_order,
    write_verdict,
)


def print_evaluation(result: EvalResult, folder: Path) -> None:
    """Prints the verdict, a table per suite, the costs, the tasks of lm-eval, and where everything is."""
    arms = list(result.arms)
    for verdict in write_verdict(result):
        print_line(Text.assemble((f"{verdict.arm}: ", "bold"), f"{verdict.text}."))
        for text in verdict.details if len(verdict.details) > 1 or len(arms) == 1 else ():
            print_line(f"- {text}")
    console().print()
    for name in suite_order(result):
        suite = result.suites[name]
        roles = f"{suite.roles} roles, " if suite.roles > 1 else ""
        title = f"{name}: {count_of(suite.n, 'case')}, {roles}{count_of(suite.requests, 'request')}"
        outcomes = shown_outcomes(result, name)
        rows = [row for own, outcome in outcomes.items() for row in _outcome_rows(own, outcome, arms)]
        projections = [suite.arms[arm].projection for arm in arms]
        rows.append(["projection", *("" if value is None else f"{value:.1f}" for value in projections)])
        rows.append(["fired", *(f"{suite.arms[arm].fired:.0%}" for arm in arms)])
        print_table(["", *arms], rows, title=title)
    print_table(["", *arms], _cost_rows(result, arms), title="cost")
    if result.capability.tasks is not None:
        _print_tasks(result.capability.tasks.tasks, arms)
    print_line(
        "↑ more is better, ↓ less is better; could show: the least change that so many cases would have shown"
    )
    for warning in result.warnings:
        print_warning(warning)
    print_path("every answer", folder / "eval.json")
    print_path("page", folder / "eval.html")


def _outcome_rows(name: str, outcome: Outcome, arms: Sequence[str]) -> list[list[str]]:
    """The share, its change against the baseline, p, and where p is large the change that could be shown."""
    columns = []
    for arm in arms:
        share = outcome.arms[arm]
        if share.share is None or share.interval is None:
            columns.append(["not judged", "", "", ""])
            continue
        low, high = share.interval
        column, change = [f"{share.share:.1%} [{low:.0%}, {high:.0%}]"], share.change
        if change is not None:
            column.append(f"{change.value:+.1%} [{change.low:+.0%}, {change.high:+.0%}]")
            column.append(p_value(change.adjusted_p))
            column.append("" if change.adjusted_p < SIGNIFICANT else f"{change.smallest:.1%}")
        columns.append([*column, "", "", ""][:4])
    title = f"{name} {'↑' if outcome.better == 'more' else '↓'}"
    return _rows([title, "  change", "  p", "  could show"], columns)


def _cost_rows(result: EvalResult, arms: Sequence[str]) -> list[list[str]]:
    capability, columns = result.capability, []
    texts = capability.text.arms if capability.text is not None else {}
    for arm in arms:
        cost, own, text = (
            (capability.benign or {}).get(arm),
            (capability.own_loss or {}).get(arm),
            texts.get(arm),
        )
        columns.append(
            [
                with_interval(cost.more_loss, *cost.more_loss_interval, "+.1%") if cost else "",
                f"{cost.kl:.3f}" if cost else "",
                f"{own.loss:.3f} ± {own.error:.3f}" if own and own.loss is not None else "",
                f"{text.bits_per_byte:.4f}" if text else "",
            ]
        )
    titles = ["more loss on benign answers", "KL", "baseline's loss on own answers", "bits per byte"]
    return [row for row in _rows(titles, columns) if any(row[1:])]


def _rows(titles: Sequence[str], columns: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows of a table from its columns; rows below the first that are empty are left out."""
    rows = [[title, *cells] for title, *cells in zip(titles, *columns, strict=True)]
    return [row for number, row in enumerate(rows) if not number or any(row[1:])]


def print_lm_eval(result: LmEvalResult, folder: Path) -> None:
    """Prints a table per task of lm-eval."""
    _print_tasks(result.tasks, list(result.arms))
    print_line(
        "intervals and p are of a t test over samples; p is adjusted over all rows (Holm); could show: the least "
        "change that so many samples would have shown; no loss: p of two one-sided tests against "
        f"±{result.asked['margin']:g}"
    )
    for note in result.notes:
        print_warning(note)
    for arm in result.arms:
        counts = [task.account[arm] for task in result.tasks.values()]
        if any(count.share is not None for count in counts) and not sum(count.fired for count in counts):
            print_warning(f"the cap {arm} never fired: every token stayed above its floor")
    print_path("every answer", folder / "lm_eval.json")


def _print_tasks(tasks: dict[str, TaskResult], arms: Sequence[str]) -> None:
    for name, task in tasks.items():
        rows = [row for metric, values in task.metrics.items() for row in _metric_rows(metric, values, arms)]
        shares = [task.account[arm].share if arm in task.account else None for arm in arms]
        if any(share is not None for share in shares):
            rows.append(["fired", *("" if share is None else f"{share:.1%}" for share in shares)])
        print_table(["", *arms], rows, title=f"{name}: {count_of(task.n, 'sample')}")


def _metric_rows(name: str, metric: TaskMetric, arms: Sequence[str]) -> Iterable[list[str]]:
    """The value, its change, the adjusted p, the least change that could be shown, and p of no loss."""
    columns = []
    for arm in arms:
        row = metric.arms.get(arm)
        value = row.value if row is not None else ""
        column = [f"{value:.3f}" if isinstance(value, int | float) else str(value)]
        if row is not None and row.change is not None and row.interval is not None and row.p_holm is not None:
            low, high = row.interval
            column.append(f"{row.change:+.3f} [{low:+.3f}, {high:+.3f}]")
            column.append(p_value(row.p_holm))
            column.append("" if row.p_holm < SIGNIFICANT or row.smallest is None else f"{row.smallest:.3f}")
            column.append("" if row.tost_p is None else f"{row.tost_p:.2g}")
        columns.append([*column, "", "", "", ""][:5])
    return _rows([name, "  change", "  p", "  could show", "  no loss, p"], columns)


def print_inspect_comparison(comparison: InspectComparison) -> None:
    """Prints the scores of both arms and what changed."""
    before, after = comparison.arms
    names = [before.name, after.name]
    if before.cap is None and after.cap is not None:
        names = ["baseline", "capped"]
    rows = []
    for name, row in {**comparison.scorers, "projection": comparison.projection}.items():
        cells, change = ["", "", "", "", ""], row.change
        if change is not None:
            cells = [f"{row.before:.3f}", f"{row.after:.3f}", f"{change.value:+.3f}"]
            cells.append(f"[{change.low:+.2f}, {change.high:+.2f}]")
            cells.append("" if row.p_holm is None else f"{change.p:.2g} ({row.p_holm:.2g})")
        rows.append([name, *cells, str(row.n)])
    print_table(["scorer", *names, "change", "95%", "p (Holm)", "pairs"], rows)
    print_line(f"projection: of an answer's tokens at layer {comparison.layer}, before the cap's step")
    for name, row in comparison.scorers.items():
        if row.change is not None and not row.is_shown:
            least = row.change.smallest
            text = f"no change shown; {row.n} pairs as scattered as these show one of {least:.3f}"
            print_line(f"{name}: {text if least else 'every pair scored the same'}")
        if row.left_out:
            print_warning(f"{name}: {row.left_out} pairs without a number in both arms are left out")
    if not comparison.same_seeds:
        print_warning("the two arms were sampled with different seeds")
    for arm in comparison.arms:
        if arm.fired == 0:
            print_warning(f"{arm.name}: the cap never fired, and its answers are the model's own")
        elif arm.fired is not None:
            print_line(f"{arm.name}: the cap changed {arm.fired:.0%} of tokens times layers")
        print_path("log", arm.log)
