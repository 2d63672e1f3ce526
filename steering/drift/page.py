"""The page of a drift study: trajectories by domain, what a cap changes, alarms, costs, and conversations to
read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from personatlas.analysis.html.canvas import CLEAR, axis_style, empty_figure, line_style, plain
from personatlas.analysis.html.page import write_page
from personatlas.analysis.trajectories import TurnMean
from personatlas.persona.interventions import BASELINE
from personatlas.persona.records import JsonObject
from personatlas.steering.drift.result import ADAPTIVE, ALL, STORED, DriftResult, Example, StoredConversation
from personatlas.steering.drift.verdict import write_drift_verdict

# how arms look, in their order: colour, its band's colour, symbol
LOOKS = (
    ("--positive", "--positive-soft", "circle"),
    ("--accent", "--accent-soft", "square"),
    ("--others", "--others-soft", "triangle-up"),
    ("--muted", "--chance-soft", "x"),
)
BASELINE_LOOK = ("--ink", "--chance-soft", "diamond")
STORED_LOOK = ("--muted", "--chance-soft", "circle")
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
MARGIN = {"l": 64, "r": 24, "t": 16, "b": 54}
HERE = Path(__file__).parent
FULL_Z, FULL_DEPTH = 4.0, 55  # the z at which a turn's colour is full, and how full that is (percent)
MAX_CONVERSATIONS = 20  # on one page

TurnMeans = Mapping[str, Sequence[TurnMean]]  # by arm


def conversation_figure(
    arms: Mapping[str, Sequence[tuple[int, float | None, bool]]], baseline: JsonObject
) -> go.Figure:
    """One conversation's answers by arm as (turn, projection, raised), with its alarms, against the reference
    mean.
    """
    present = {
        arm: [(n, p, raised) for n, p, raised in turns if p is not None] for arm, turns in arms.items()
    }
    points = [turn for turns in present.values() for turn in turns]
    means = {arm: [TurnMean(n, p, None, None, 1) for n, p, _ in turns] for arm, turns in present.items()}
    values = [p for _, p, _ in points]
    values += [baseline["mean"] + baseline["spread"], baseline["mean"] - 2 * baseline["spread"]]
    figure = _trajectories(means, baseline, _padded(values))
    raised = [(n, p) for n, p, is_raised in points if is_raised]
    if raised:
        line = {"color": "var(--others)", "width": 2.5}
        figure.add_scatter(
            x=[n for n, _ in raised],
            y=[p for _, p in raised],
            name="drift begins",
            mode="markers",
            marker={"color": CLEAR, "size": 17, "symbol": "circle", "line": line},
            hovertemplate="an alarm is raised<extra></extra>",
        )
    return figure


def shade(z: float | None) -> JsonObject:
    """A turn's colour: the farther from the reference mean, the deeper, on the side where it lies."""
    depth = round(min(abs(z or 0.0), FULL_Z) / FULL_Z * FULL_DEPTH)
    return {"side": "positive" if (z or 0.0) >= 0 else "others", "depth": depth}


def write_drift_page(path: Path, result: DriftResult) -> None:
    """Writes the page of a drift study."""
    baseline, domains = result.watch["baseline"], result.domains
    arms = list(result.arms)  # in their order: a file's names are sorted
    every = [mean for by_arm in result.trajectories.values() for means in by_arm.values() for mean in means]
    bounds = [v for mean in every for v in (mean.mean, mean.low, mean.high) if v is not None]
    span = _padded([*bounds, baseline["mean"]])  # one range for all domains, so that they can be compared
    figures = {
        f"turns-{n}": _trajectories({arm: result.trajectories[d][arm] for arm in arms}, baseline, span)
        for n, d in enumerate(domains)
    }
    if len(arms) > 1:
        changes = {arm: result.differences[ALL][arm] for arm in arms[1:]}
        figures["differences"] = _lines(changes, "%{y:+.1f}")
        figures["differences"].update_yaxes(
            title_text="projection less the baseline's", **axis_style(zero=True)
        )
    if result.alarms:
        on = {
            arm: [TurnMean(n, share, None, None, 1) for n, share in enumerate(result.alarms[ALL][arm].on, 1)]
            for arm in arms
        }
        figures["alarms"] = _lines(on, "%{y:.0%}")
        title = "conversations with the alarm on"
        figures["alarms"].update_yaxes(title_text=title, tickformat=".0%", range=[0, 1.02], **axis_style())
    stored = result.stored.conversations if result.stored is not None else ()
    for kind, conversations in (("example", result.examples), ("stored", stored[:MAX_CONVERSATIONS])):
        for index, conversation in enumerate(conversations):
            points = {
                arm: [
                    (n, turn.projection, turn.raised) for n, turn in enumerate(turns, 1) if turn is not None
                ]
                for arm, turns in conversation.arms.items()
            }
            figures[f"{kind}-{index}"] = conversation_figure(points, baseline)
    for figure in figures.values():
        figure.update_layout(showlegend=False)  # the page has one for all
    shown = arms[1:2]  # beside the baseline
    record = [(f"model: {name}", value) for name, value in result.model.items()]
    record += [("axis", result.axis["of"]), ("reference conversations", result.watch["source"])]
    asked = {name: value for name, value in result.asked.to_json().items() if value is not None}
    record += [(name.replace("_", " "), value) for name, value in (asked | result.versions).items()]
    content = {
        "c": result,
        "verdict": write_drift_verdict(result),
        "looks": {
            arm: (colour, arm.endswith(ADAPTIVE)) for arm, (colour, *_) in _looks([STORED, *arms]).items()
        },
        "arms": arms,
        "drawn_arms": {one.name: list(one.arms) for one in (*result.examples, *stored)},
        "domain_rows": {d: _domain_rows(result, d) for d in [*([ALL] if len(domains) > 1 else []), *domains]},
        "arm_rows": _arm_rows(result),
        "examples": [_columns(one, [BASELINE, *shown]) for one in result.examples],
        "stored": [
            _columns(one, [arm for arm in (STORED, *arms) if arm in one.arms and not arm.endswith(ADAPTIVE)])
            for one in stored[:MAX_CONVERSATIONS]
        ],
        "more": max(0, len(stored) - MAX_CONVERSATIONS),
        "targets": {
            name: getattr(result.next_turn, name)
            for name in ("projection", "change")
            if getattr(result.next_turn, name, None) is not None
        },
        "record": record,
    }
    filters: dict[str, Callable[..., str]] = {
        "span": lambda row, form="+.1f", name="value": " ".join(_cell(row, name, form)),
        "share": lambda share, interval: " ".join(_share(share, interval)),
    }
    write_page(path, HERE / "page.html.jinja", content, figures, filters)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    margin = 0.06 * (max(values) - min(values) or 1.0)
    return min(values) - margin, max(values) + margin


def _trajectories(arms: TurnMeans, baseline: JsonObject, span: tuple[float, float]) -> go.Figure:
    """Mean projection by turn and arm, against the reference mean and standard deviation."""
    figure = _lines(arms, "%{y:.1f}")
    last = max((mean.turn for means in arms.values() for mean in means), default=1)
    mean, low = baseline["mean"], baseline["mean"] - baseline["spread"]
    for value, dash, name in ((mean, "dot", "reference mean"), (low, "dash", "one standard deviation below")):
        look = line_style("--middle", 1.2, dash)
        figure.add_scatter(
            x=[1, last], y=[value, value], name=name, mode="lines", line=look, hoverinfo="skip"
        )
    figure.update_yaxes(title_text="mean projection of the answer", range=list(span), **axis_style())
    return figure


def _looks(arms: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """An arm's look, which its adaptive arm shares."""
    looks: dict[str, tuple[str, str, str]] = {BASELINE: BASELINE_LOOK, STORED: STORED_LOOK}
    for arm in arms:
        looks.setdefault(arm.removesuffix(ADAPTIVE), LOOKS[(len(looks) - 2) % len(LOOKS)])
    return {arm: looks[arm.removesuffix(ADAPTIVE)] for arm in arms}


def _lines(arms: TurnMeans, form: str) -> go.Figure:
    """A line with its band for each arm."""
    figure = empty_figure(margin=MARGIN, showlegend=True)
    figure.update_layout(legend=LEGEND)
    looks = _looks(arms)
    for arm, means in arms.items():
        colour, band, symbol = looks[arm]
        dash = "dash" if arm.endswith(ADAPTIVE) else "solid"
        banded = [mean for mean in means if mean.low is not None]
        if banded:
            edge = [mean.high for mean in banded] + [mean.low for mean in banded[::-1]]
            turns = [mean.turn for mean in banded] + [mean.turn for mean in banded[::-1]]
            area = {"fill": "toself", "fillcolor": f"var({band})", "line": {"width": 0}, "mode": "lines"}
            figure.add_scatter(x=turns, y=edge, hoverinfo="skip", showlegend=False, **area)
        figure.add_scatter(
            x=[mean.turn for mean in means],
            y=[mean.mean for mean in means],
            name=plain(arm),
            mode="lines+markers",
            line=line_style(colour, 2.2, dash),
            marker={"color": f"var({colour})", "symbol": symbol, "size": 7},
            hovertemplate=f"{plain(arm)}, turn %{{x}}: {form}<extra></extra>",
        )
    last = max((mean.turn for means in arms.values() for mean in means), default=1)
    figure.update_xaxes(title_text="turn", dtick=-(-last // 8), **axis_style())
    return figure


def _domain_rows(result: DriftResult, domain: str) -> list[tuple[str, list[Sequence[str]]]]:
    """A domain's figures, a row each: for every arm the value, then what belongs to it."""
    rows: dict[str, list[Sequence[str]]] = {}
    for arm in result.arms:
        line, slope = result.trajectories[domain][arm], result.slopes[domain][arm]
        mean = result.means[domain][arm]
        uncapped = ((result.uncapped or {}).get(domain) or {}).get(arm, ())
        alarm = result.alarms.get(domain, {}).get(arm)
        cells = {
            "slope per turn": _cell(slope) + ([f"shuffled ±{slope.chance:.1f}"] if slope else []),
            "first turn": _cell(line[0] if line else None, "mean"),
            "last turn": _cell(line[-1] if line else None, "mean"),
            "last turn, read without it": _cell(uncapped[-1] if uncapped else None, "mean"),
            "mean": [*_cell(mean), f"n = {mean.n}"],
            "change": _cell(mean.change),
            "with an alarm": ["·"] if alarm is None else list(_share(alarm.share, alarm.interval)),
            "first alarm": ["·"] if alarm is None or alarm.first is None else [f"turn {alarm.first:.1f}"],
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    return [(name, cells) for name, cells in rows.items() if any(cell[0] != "·" for cell in cells)]


def _arm_rows(result: DriftResult) -> list[tuple[str, list[Sequence[str]]]]:
    """What the arms wrote and cost, a row each."""
    costs = result.cost.arms if result.cost is not None else {}
    rows: dict[str, list[Sequence[str]]] = {}
    for arm in result.arms:
        own = result.wrote[arm]
        cells = {
            "more loss": _cell(costs.get(arm), form="+.1%"),
            "on": [_percent(own.acted)],
            "fired": [_percent(own.fired)],
            "degenerate": _share(own.degenerate.share, own.degenerate.interval),
            "loops": _share(own.loops.share, own.loops.interval),
            "distinct": ["·" if own.distinct is None else f"{own.distinct:.2f}"],
            "tokens": [f"{own.tokens:.0f}"],
            "answers": [f"{own.answers:,}", *([f"{own.empty} empty"] if own.empty else [])],
            "cut short by the context": [str(own.ended_by_context)],
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    return list(rows.items())


def _columns(conversation: Example, arms: Sequence[str]) -> JsonObject:
    """A conversation's turns with the answers of some arms beside each other."""
    turns = []
    for n in range(max(len(conversation.arms[arm]) for arm in arms)):
        cells = [own[n] if n < len(own := conversation.arms[arm]) else None for arm in arms]
        if any(cells):
            users = list(dict.fromkeys(cell.user for cell in cells if cell))
            turns.append(
                {"users": users, "cells": [cell and cell.to_json() | shade(cell.z) for cell in cells]}
            )
    cut_short = conversation.cut_short if isinstance(conversation, StoredConversation) else ()
    return {
        "name": conversation.name,
        "domain": conversation.domain,
        "arms": arms,
        "turns": turns,
        "cut_short": cut_short,
    }


def _cell(row: Any, name: str = "value", form: str = "+.1f") -> list[str]:
    """The field `name` of a record, then the record's interval, where it has one."""
    value = None if row is None else getattr(row, name)
    if value is None or value != value:
        return ["·"]
    low, high = row.low, row.high
    bounds = [] if low is None else [f"[{low:{form}}, {high:{form}}]"]
    return [text.replace("-", "−") for text in (f"{value:{form}}", *bounds)]


def _share(share: float | None, interval: Sequence[float] | None) -> list[str]:
    return (
        ["·"]
        if share is None or interval is None
        else [f"{share:.0%}", f"[{interval[0]:.0%}, {interval[1]:.0%}]"]
    )


def _percent(share: float | None) -> str:
    return "·" if share is None else f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"
