"""The verb `drift`: do conversations leave the Assistant, where, and does a cap hold them?"""

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from personaxis.persona.options import ModelOptions
from personaxis.persona.verbs import Model, console, print_json, run_folder, say_result
from personaxis.steering.drift_asked import DriftOptions


def drift(
    model: Model,
    /,
    *,
    axis: str,
    cap: str | None = None,
    calm: Path | None = None,
    out: Path | None = None,
    force: bool = False,
    asked: DriftOptions = DriftOptions(),
    how: ModelOptions = ModelOptions(),
    json: bool = False,
) -> None:
    """Have conversations in several domains as the model is, capped, and capped only while an alarm is on (resumes).

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it
    cap
        a cap by name, file or LEVEL@LAYERS; "assistant" unless given, where it is saved beside the axis
    calm
        a calm.json of an earlier study, on which the alarm is calibrated; unless given the one beside the axis, else this study's own conversations in the domains that hold
    out
        the folder of the study; runs/NAME-drift unless given
    force
        use an axis of the same model in another weight format
    json
        print drift.json without its examples
    """
    from personaxis.steering.drift_page import write_drift_page
    from personaxis.steering.drift_study import study

    folder = out or run_folder(model, None).with_name(run_folder(model, None).name + "-drift")
    content = study(model, how, axis, cap, asked, folder, calm, force=force)
    write_drift_page(folder / "drift.html", content)
    if json:
        print_json({name: value for name, value in content.items() if name != "examples"})
    else:
        _print(content, folder)


def _print(content: dict[str, Any], folder: Path) -> None:
    out = console()
    for domain in [*content["domains"], "all"]:
        out.print(_table(content, domain))
    out.print(_wrote(content))
    for target, row in (content["next_turn"] or {}).items():
        if isinstance(row, dict):
            said = f"R² {_span(row['r2'], row['low'], row['high'], '.2f')}; the domain alone {row['domain']['r2']:.2f}, shuffled {row['shuffled']['mean']:.2f}"
            out.print(Text(f"next answer's {target} from the user's message: {said}"))
    for warning in content["warnings"]:
        out.print(Text(f"note: {warning}", style="yellow"))
    say_result(f"every turn: {folder / 'turns.jsonl'}; conversations, for `trace`: {folder / 'conversations.jsonl'}")
    say_result(f"calm conversations, to be put beside the axis: {folder / 'calm.json'}")
    say_result(f"page: {folder / 'drift.html'}")


def _table(content: dict[str, Any], domain: str) -> Table:
    table = Table(title=f"{domain}: {content['conversations'][domain]} conversations", title_justify="left")
    for title in (
        "arm",
        "first turn",
        "last turn",
        "slope a turn [95%]",
        "change [95%]",
        "alarms [95%]",
        "first alarm",
    ):
        table.add_column(title)
    for arm in content["arms"]:
        rows, slope = content["trajectories"][domain][arm], content["slopes"][domain][arm]
        change = content["means"][domain][arm].get("change")
        alarm = content["alarms"].get(domain, {}).get(arm)
        table.add_row(
            Text(arm),
            f"{rows[0]['mean']:.1f}" if rows else "",
            f"{rows[-1]['mean']:.1f} (turn {rows[-1]['turn']})" if rows else "",
            _span(slope["value"], slope["low"], slope["high"], "+.1f") if slope else "",
            _span(change["value"], change["low"], change["high"], "+.1f") if change and change["n"] else "",
            _span(alarm["share"], alarm["interval"][0], alarm["interval"][1], ".0%") if alarm and alarm["n"] else "",
            f"{alarm['first']:.0f}" if alarm and alarm["first"] is not None else "",
        )
    return table


def _wrote(content: dict[str, Any]) -> Table:
    table = Table(title="what the arms wrote", title_justify="left")
    for title in ("arm", "answers", "cap on", "fired", "degenerate", "loops", "tokens", "more loss where it holds"):
        table.add_column(title)
    cost = content["cost"] or {}
    for arm, row in content["wrote"].items():
        shares = (f"{row[name]:.0%}" for name in ("acted", "fired"))
        told = [(row[name]["share"], row[name]["interval"]) for name in ("degenerate", "loops")]
        broken = [_span(share, low, high, ".0%") for share, (low, high) in told]
        more = _span(cost[arm]["value"], cost[arm]["low"], cost[arm]["high"], "+.1%") if arm in cost else ""
        table.add_row(Text(arm), str(row["answers"]), *shares, *broken, f"{row['tokens']:.0f}", more)
    return table


def _span(value: float, low: float | None, high: float | None, form: str) -> str:
    """A value with its interval, where it has one."""
    return f"{value:{form}}" + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")
