"""Tables of evaluations: a metric a row, an arm a column."""

from pathlib import Path
from typing import Any

from personatlas.cli.output import print_line, print_path, print_table, print_warning

BASELINE = "baseline"  # persona.interventions.BASELINE, whose module needs torch
SIGNIFICANT = 0.05  # of an adjusted p


def print_evaluation(content: dict[str, Any], folder: Path) -> None:
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


def print_lm_eval(content: dict[str, Any], folder: Path) -> None:
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


def print_inspect_comparison(found: dict[str, Any]) -> None:
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
