"""The verb `trace`: a stored conversation's persona, turn by turn."""

from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from personaxis.persona.errors import KnownError
from personaxis.persona.options import ModelOptions
from personaxis.persona.progress import progress, say
from personaxis.persona.verbs import Model, console, print_json

BARS = 24  # characters of a gauge
WIDE = 3.0  # z at either end of it


def trace(
    model: Model,
    transcript: Path,
    /,
    *,
    axis: str,
    calm: Path | None = None,
    rule: Literal["cusum", "several"] = "cusum",
    false_alarms: float = 0.05,
    html: Path | None = None,
    force: bool = False,
    how: ModelOptions = ModelOptions(),
    json: bool = False,
) -> None:
    """Trace stored conversations along an axis, turn by turn, and say where the persona drifts.

    Parameters
    ----------
    transcript
        conversations in OpenAI's or ShareGPT's form, JSON or JSONL, or one as plain text (.txt: "User: ...", "Assistant: ...")
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it
    calm
        a calm.json of `personaxis drift`, or at least 40 conversations of this model that do not drift: the alarm is calibrated on one half and its false alarms are counted in the other. Unless given, the calm.json beside the axis; without one there are z but no alarms
    rule
        what raises an alarm: cusum (a small drift that lasts) or several (two of three turns far below)
    false_alarms
        the share of calm conversations that may raise one
    html
        write a page here with the conversations, their turns and tokens coloured, and their trajectories (20 at most)
    force
        use an axis of the same model in another weight format
    json
        print every token's projection as JSON
    """
    if not 0 < false_alarms < 1:
        raise KnownError(f"--false-alarms {false_alarms} is outside 0..1: it is a share of conversations")
    told = _told(transcript, html)
    along, found, watcher = _read(model, how, axis, told, calm, rule, false_alarms, force)
    content = _content(along, found, watcher)
    print_json(content) if json else _print(content)
    if html is not None:
        _write_page(html, content, found, told, along)


def _write_page(html: Path, content: dict[str, Any], found: list[Any], told: list[Any], axis: Any) -> None:
    from personaxis.steering.trace_page import write_trace_page

    write_trace_page(html, content, found, told, axis.poles)
    say(f"page: {html}")


def _told(transcript: Path, html: Path | None) -> list[Any]:
    """The conversations, once it is sure that a page can be written."""
    from personaxis.persona.store import require_writable
    from personaxis.steering.conversations import read_conversations

    if html is not None:
        require_writable(html, "--html")
    return read_conversations(transcript)


def _read(
    model: str, how: ModelOptions, axis: str, told: list[Any], calm: Path | None, rule: str, rate: float, force: bool
) -> tuple[Any, list[Any], Any]:
    """The axis, what was traced, and how it is watched. What can be wrong without a model is found before one is loaded."""
    from personaxis.persona.axis import load_axis
    from personaxis.persona.fitted import axis_stem
    from personaxis.steering.calm import is_calm, watcher_of
    from personaxis.steering.conversations import read_conversations
    from personaxis.steering.traced import calm_of, require_calm, traced
    from personaxis.steering.verbs import loaded

    quiet = read_conversations(calm) if calm is not None and not is_calm(calm) else []
    stem = axis_stem(axis)
    if quiet:
        require_calm(quiet)
    else:
        watcher = watcher_of(load_axis(stem), stem, calm, rule, rate)
    held = loaded(model, how, axis, [], force=force)
    with progress("reading", len(told) + len(quiet)) as advance:
        found = traced(held.subject, held.chat, held.axis, told, advance)
        if quiet:
            watcher = calm_of(held.subject, held.chat, held.axis, quiet, advance).watcher(rule, rate)
    return held.axis, found, watcher


def _content(axis: Any, found: list[Any], watcher: Any) -> dict[str, Any]:
    rows = [_row(one, watcher) for one in found]
    return {"layer": axis.layer, "model": axis.model, **watcher.describe(), "conversations": rows}


def _row(one: Any, watcher: Any) -> dict[str, Any]:
    """A conversation's turns with their z and, where there is a rule, the alarm's state."""
    monitor, turns = watcher.monitor(), []
    for turn in one.turns:
        state = None if monitor is None else monitor.turn(turn.projection)
        told = {"message": turn.message, "tokens": [turn.start, turn.stop], "projection": turn.projection}
        alarm = {} if state is None else {"alarm": state.alarm, "raised": state.raised}
        turns.append({**told, "z": watcher.baseline.z(turn.projection), **alarm})
    tokens = {"ids": list(one.spans.ids), "projection": one.projection.tolist()}
    return {"name": one.name, "turns": turns, "left_out": one.left_out, **tokens}


def _print(content: dict[str, Any]) -> None:
    out, baseline, alarm = console(), content["baseline"], content["alarm"]
    for one in content["conversations"]:
        table = Table(title=one["name"], title_justify="left")
        for title in ("turn", "tokens", "projection", "z", f"-{WIDE:g} to +{WIDE:g}", ""):
            table.add_column(title, justify="right" if title in ("turn", "tokens", "projection", "z") else "left")
        for number, turn in enumerate(one["turns"], 1):
            start, stop = turn["tokens"]
            state = "drift begins" if turn.get("raised") else "drifting" if turn.get("alarm") else ""
            cells = (str(number), str(stop - start), f"{turn['projection']:.1f}", f"{turn['z']:+.1f}")
            table.add_row(*cells, Text(gauge(turn["z"]), style="cyan"), Text(state, style="yellow"))
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
        out.print(Text(f"{alarm['rule']} above {alarm['limit']:.2f}: raised in {alarm['false_alarms']:.0%} [{low:.0%}, {high:.0%}] of {alarm['n']} calm conversations that it was not calibrated on", style="dim"))  # fmt: skip


def gauge(z: float, bars: int = BARS) -> str:
    """A mark on a line from -WIDE to +WIDE, with the default's mean in the middle."""
    place = round((min(max(z, -WIDE), WIDE) + WIDE) / (2 * WIDE) * bars)
    line = ["─"] * (bars + 1)
    line[bars // 2] = "┼"
    line[place] = "●"
    return "".join(line)
