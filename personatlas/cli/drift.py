"""The verb `drift`: do conversations leave the Assistant, where, and does a cap hold them?

The verb `trace`: a stored conversation's persona, turn by turn.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table
from rich.text import Text

from personatlas.analysis.drift_alarm import GAUGE_LIMIT, z_gauge
from personatlas.cli.options import MODEL, Json, ModelName
from personatlas.cli.output import console, print_json, print_line, print_path
from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import progress, say
from personatlas.persona.runs import default_folder
from personatlas.steering.drift.options import DriftOptions


def drift(
    model: ModelName,
    /,
    *,
    axis: str,
    cap: str | None = None,
    reference: Path | None = None,
    out: Path | None = None,
    force: bool = False,
    asked: DriftOptions = DriftOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Have conversations in several domains as the model is, capped, and capped only while an alarm is on (resumes).

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it
    cap
        a cap by name, file or LEVEL@LAYERS; "assistant" unless given, where it is saved beside the axis
    reference
        a reference.json of an earlier study, on which the alarm is calibrated; unless given the one beside the axis, else this study's own conversations in the domains that hold
    out
        the folder of the study; runs/NAME-drift unless given
    force
        use an axis of the same model in another weight format
    """
    from personatlas.steering.drift.page import write_drift_page
    from personatlas.steering.drift.study import study

    folder = out or default_folder(model, "drift")
    content = study(model, load, axis, cap, asked, folder, reference, force=force)
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
    print_line(
        f"every turn: {folder / 'turns.jsonl'}; conversations, for `trace`: {folder / 'conversations.jsonl'}"
    )
    print_line(f"reference conversations, to be put beside the axis: {folder / 'reference.json'}")
    print_path("page", folder / "drift.html")


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
            _span(alarm["share"], alarm["interval"][0], alarm["interval"][1], ".0%")
            if alarm and alarm["n"]
            else "",
            f"{alarm['first']:.0f}" if alarm and alarm["first"] is not None else "",
        )
    return table


def _wrote(content: dict[str, Any]) -> Table:
    table = Table(title="what the arms wrote", title_justify="left")
    for title in (
        "arm",
        "answers",
        "cap on",
        "fired",
        "degenerate",
        "loops",
        "tokens",
        "more loss where it holds",
    ):
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


def trace(
    model: ModelName,
    transcript: Path,
    /,
    *,
    axis: str,
    reference: Path | None = None,
    rule: Literal["cusum", "two_of_three"] = "cusum",
    false_alarms: float = 0.05,
    html: Path | None = None,
    force: bool = False,
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Trace stored conversations along an axis, turn by turn, and say where the persona drifts.

    Parameters
    ----------
    transcript
        conversations in OpenAI's or ShareGPT's form, JSON or JSONL, or one as plain text (.txt: "User: ...", "Assistant: ...")
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it
    reference
        a reference.json of `personatlas drift`, or at least 40 conversations of this model that do not drift: the alarm is calibrated on one half and its false alarms are counted in the other. Unless given, the reference.json beside the axis; without one there are z but no alarms
    rule
        what raises an alarm: cusum (a small drift that lasts) or two_of_three (two of three turns far below)
    false_alarms
        the share of reference conversations that may raise one
    html
        write a page here with the conversations, their turns and tokens coloured, and their trajectories (20 at most)
    force
        use an axis of the same model in another weight format
    """
    if not 0 < false_alarms < 1:
        raise UserError(f"--false-alarms {false_alarms} is outside 0..1: it is a share of conversations")
    told = _told(transcript, html)
    along, found, watcher = _read(model, load, axis, told, reference, rule, false_alarms, force)
    content = _content(along, found, watcher)
    print_json(content) if json else _trace_verb_print(content)
    if html is not None:
        _write_page(html, content, found, told, along)


def _write_page(html: Path, content: dict[str, Any], found: list[Any], told: list[Any], axis: Any) -> None:
    from personatlas.steering.drift.trace import write_trace_page

    write_trace_page(html, content, found, told, axis.poles)
    say(f"page: {html}")


def _told(transcript: Path, html: Path | None) -> list[Any]:
    """The conversations, once it is sure that a page can be written."""
    from personatlas.persona.artifacts import require_writable
    from personatlas.persona.formats import read_conversations

    if html is not None:
        require_writable(html, "--html")
    return read_conversations(transcript)


def _read(
    model: str,
    load: ModelOptions,
    axis: str,
    told: list[Any],
    reference: Path | None,
    rule: str,
    rate: float,
    force: bool,
) -> tuple[Any, list[Any], Any]:
    """The axis, what was traced, and how it is watched. What can be wrong without a model is found before one is loaded."""
    from personatlas.persona.axis import load_axis
    from personatlas.persona.formats import read_conversations
    from personatlas.persona.runs import resolve_axis
    from personatlas.steering.drift.trace import calm_of, require_calm, traced
    from personatlas.steering.drift_monitor import is_reference_file, load_monitor
    from personatlas.steering.session import load_steered_model

    quiet = (
        read_conversations(reference) if reference is not None and not is_reference_file(reference) else []
    )
    stem = resolve_axis(axis)
    if quiet:
        require_calm(quiet)
    else:
        watcher = load_monitor(load_axis(stem), reference, rule, rate)
    held = load_steered_model(model, load, axis, [], force=force)
    with progress("reading", len(told) + len(quiet)) as advance:
        found = traced(held.model, held.chat, held.axis, told, advance)
        if quiet:
            watcher = calm_of(held.model, held.chat, held.axis, quiet, advance).monitor(rule, rate)
    return held.axis, found, watcher


def _content(axis: Any, found: list[Any], watcher: Any) -> dict[str, Any]:
    rows = [_row(one, watcher) for one in found]
    return {"layer": axis.layer, "model": axis.model, **watcher.describe(), "conversations": rows}


def _row(one: Any, watcher: Any) -> dict[str, Any]:
    """A conversation's turns with their z and, where there is a rule, the alarm's state."""
    monitor, turns = watcher.start(), []
    for turn in one.turns:
        state = None if monitor is None else monitor.update(turn.projection)
        told = {"message": turn.message, "tokens": [turn.start, turn.stop], "projection": turn.projection}
        alarm = {} if state is None else {"alarm": state.alarm, "raised": state.raised}
        turns.append({**told, "z": watcher.reference.z(turn.projection), **alarm})
    tokens = {"ids": list(one.spans.ids), "projection": one.projection.tolist()}
    return {"name": one.name, "turns": turns, "left_out": one.left_out, **tokens}


def _trace_verb_print(content: dict[str, Any]) -> None:
    out, baseline, alarm = console(), content["baseline"], content["alarm"]
    for one in content["conversations"]:
        table = Table(title=one["name"], title_justify="left")
        for title in ("turn", "tokens", "projection", "z", f"-{GAUGE_LIMIT:g} to +{GAUGE_LIMIT:g}", ""):
            table.add_column(
                title, justify="right" if title in ("turn", "tokens", "projection", "z") else "left"
            )
        for number, turn in enumerate(one["turns"], 1):
            start, stop = turn["tokens"]
            state = "drift begins" if turn.get("raised") else "drifting" if turn.get("alarm") else ""
            cells = (str(number), str(stop - start), f"{turn['projection']:.1f}", f"{turn['z']:+.1f}")
            table.add_row(*cells, Text(z_gauge(turn["z"]), style="cyan"), Text(state, style="yellow"))
        out.print(table)
        if one["left_out"]:
            say(f"{one['name']}: {one['left_out']} turns are beyond the model's context and were not read")
    out.print(
        Text(
            f"layer {content['layer']}; z against {baseline['of']}: {baseline['mean']:.1f} ± {baseline['spread']:.1f}",
            style="dim",
        )
    )
    if alarm is not None:
        low, high = alarm["interval"]
        out.print(Text(f"{alarm['rule']} above {alarm['limit']:.2f}: raised in {alarm['false_alarms']:.0%} [{low:.0%}, {high:.0%}] of {alarm['n']} reference conversations that it was not calibrated on", style="dim"))  # fmt: skip
