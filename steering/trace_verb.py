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
    force: bool = False,
    how: ModelOptions = ModelOptions(),
    json: bool = False,
) -> None:
    """Trace stored conversations along an axis, turn by turn, and say where the persona drifts.

    Parameters
    ----------
    transcript
        conversations in OpenAI's or ShareGPT's form, JSON or JSONL
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it
    calm
        conversations of this model that do not drift, at least 20, on which the alarm is calibrated; without them there are z but no alarms
    rule
        what raises an alarm: cusum (a small drift that lasts) or several (two of three turns far below)
    false_alarms
        the share of calm conversations that may raise one
    force
        use an axis of the same model in another weight format
    json
        print every token's projection as JSON
    """
    if not 0 < false_alarms < 1:
        raise KnownError(f"--false-alarms {false_alarms} is outside 0..1: it is a share of conversations")
    content = _content(*_read(model, how, axis, transcript, calm, force), rule, false_alarms)
    print_json(content) if json else _print(content)


def _read(
    model: str, how: ModelOptions, axis: str, transcript: Path, calm: Path | None, force: bool
) -> tuple[Any, list[Any], list[Any]]:
    """The axis, and what was traced: the transcript and the calm conversations."""
    from personaxis.steering.conversations import read_conversations
    from personaxis.steering.traced import traced
    from personaxis.steering.verbs import loaded

    told = read_conversations(transcript)
    quiet = read_conversations(calm) if calm is not None else []
    held = loaded(model, how, axis, [], force=force)
    with progress("reading", len(told) + len(quiet)) as advance:
        found = traced(held.subject, held.chat, held.axis, told, advance)
        still = traced(held.subject, held.chat, held.axis, quiet, advance) if quiet else []
    return held.axis, found, still


def _content(axis: Any, found: list[Any], still: list[Any], name: str, rate: float) -> dict[str, Any]:
    from personaxis.analysis.drift import Cusum, Several, baseline_of, calibrated
    from personaxis.analysis.drift import false_alarms as counted

    conversations = [[turn.projection for turn in one.turns] for one in still]
    if still:
        baseline = baseline_of([value for one in conversations for value in one])
        rule = calibrated(Cusum() if name == "cusum" else Several(), conversations, baseline, rate)
        seen = counted(rule, baseline, conversations)
        alarm = {
            "rule": name,
            "limit": rule.limit,
            "false_alarms": seen.share,
            "interval": list(seen.interval),
            "n": seen.n,
        }
    else:
        baseline, rule, alarm = _of_axis(axis), None, None
    rows = [_row(one, rule, baseline) for one in found]
    told = {
        "mean": baseline.mean,
        "spread": baseline.spread,
        "of": "calm conversations" if still else "the axis's default answers",
    }
    return {"layer": axis.layer, "model": axis.model, "baseline": told, "alarm": alarm, "conversations": rows}


def _row(one: Any, rule: Any, baseline: Any) -> dict[str, Any]:
    """A conversation's turns with their z and, where there is a rule, the alarm's state."""
    from personaxis.analysis.drift import watch

    places = [turn.projection for turn in one.turns]
    states = list(watch(rule, baseline, places)) if rule is not None else [None] * len(places)
    turns = []
    for turn, state in zip(one.turns, states, strict=True):
        told = {"message": turn.message, "tokens": [turn.start, turn.stop], "projection": turn.projection}
        alarm = {} if state is None else {"alarm": state.alarm, "raised": state.raised}
        turns.append({**told, "z": baseline.z(turn.projection), **alarm})
    tokens = {"ids": list(one.spans.ids), "projection": one.projection.tolist()}
    return {"name": one.name, "turns": turns, "left_out": one.left_out, **tokens}


def _of_axis(axis: Any) -> Any:
    """The default's answers as the axis keeps them: median, and interquartile range as a standard deviation."""
    from personaxis.analysis.drift import Baseline

    row = axis.default_quantiles[axis.layers.index(axis.layer)]
    if not {0.25, 0.5, 0.75} <= set(axis.levels):
        raise KnownError(
            "the axis keeps no quartiles of the default's answers; give --calm conversations in their place"
        )
    low, middle, high = (float(row[axis.levels.index(level)]) for level in (0.25, 0.5, 0.75))
    return Baseline(middle, (high - low) / 1.349, 0)


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
            table.add_row(*cells, Text(_gauge(turn["z"]), style="cyan"), Text(state, style="yellow"))
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
        out.print(Text(f"{alarm['rule']} above {alarm['limit']:.2f}: raised in {alarm['false_alarms']:.0%} [{low:.0%}, {high:.0%}] of {alarm['n']} calm conversations", style="dim"))  # fmt: skip


def _gauge(z: float) -> str:
    """A mark on a line from -WIDE to +WIDE, with the default's mean in the middle."""
    place = round((min(max(z, -WIDE), WIDE) + WIDE) / (2 * WIDE) * BARS)
    line = ["─"] * (BARS + 1)
    line[BARS // 2] = "┼"
    line[place] = "●"
    return "".join(line)
