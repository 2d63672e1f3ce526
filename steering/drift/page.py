"""The figures of drift: mean projection by turn with bands, what a cap changes by turn, and how many alarms are on.

The page of a drift study: where conversations go, what a cap changes, when an alarm comes, and what predicts the next turn.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from personatlas.analysis.html.canvas import CLEAR, axis_look, empty_figure, line_look
from personatlas.analysis.html.page import write_page
from personatlas.persona.interventions import BASELINE
from personatlas.steering.drift.result import ADAPTIVE, ALL, CAPPED

# how an arm looks: colour, its soft kind, symbol, dash
LOOKS = {
    "baseline": ("--ink", "--chance-soft", "diamond", "solid"),
    "capped": ("--positive", "--positive-soft", "circle", "solid"),
    "adaptive": ("--accent", "--accent-soft", "square", "dash"),
}
OTHER = ("--muted", "--chance-soft", "circle", "solid")
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
MARGIN = {"l": 64, "r": 24, "t": 16, "b": 54}


def trajectories(
    arms: Mapping[str, Sequence[Mapping[str, Any]]], baseline: Mapping[str, Any], span: tuple[float, float]
) -> go.Figure:
    """Mean projection of answers by turn and arm (rows with turn, mean, low, high), against the calm mean and its spread."""
    figure = _lines(arms, "%{y:.1f}")
    last = max((row["turn"] for rows in arms.values() for row in rows), default=1)
    mean, low = baseline["mean"], baseline["mean"] - baseline["spread"]
    for value, dash, name in ((mean, "dot", "calm mean"), (low, "dash", "a spread below it")):
        look = line_look("--middle", 1.2, dash)
        figure.add_scatter(
            x=[1, last], y=[value, value], name=name, mode="lines", line=look, hoverinfo="skip"
        )
    figure.update_yaxes(title_text="mean projection of the answer", range=list(span), **axis_look())
    return figure


def differences(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> go.Figure:
    """How much higher an arm's answers lie than the model's own, by turn."""
    figure = _lines(arms, "%{y:+.1f}")
    figure.update_yaxes(title_text="projection less that as it is", **axis_look(zero=True))
    return figure


def alarms_on(arms: Mapping[str, Sequence[float]]) -> go.Figure:
    """By turn, the share of conversations in which the alarm is on."""
    rows = {
        arm: [{"turn": n, "mean": share, "low": None, "high": None} for n, share in enumerate(own, 1)]
        for arm, own in arms.items()
    }
    figure = _lines(rows, "%{y:.0%}")
    figure.update_yaxes(
        title_text="conversations with the alarm on", tickformat=".0%", range=[0, 1.02], **axis_look()
    )
    return figure


def conversation(arms: Mapping[str, Sequence[Mapping[str, Any]]], baseline: Mapping[str, Any]) -> go.Figure:
    """One conversation's answers by turn and arm (rows with turn, projection, raised), its alarms marked."""
    rows = {
        arm: [
            {"turn": row["turn"], "mean": row["projection"], "low": None, "high": None}
            for row in own
            if row["projection"] is not None
        ]
        for arm, own in arms.items()
    }
    values = [row["mean"] for own in rows.values() for row in own]
    values += [baseline["mean"] + baseline["spread"], baseline["mean"] - 2 * baseline["spread"]]
    room = 0.06 * (max(values) - min(values))
    figure = trajectories(rows, baseline, (min(values) - room, max(values) + room))
    raised = [
        row for own in arms.values() for row in own if row.get("raised") and row["projection"] is not None
    ]
    if raised:
        ring = {
            "color": CLEAR,
            "size": 17,
            "symbol": "circle",
            "line": {"color": "var(--others)", "width": 2.5},
        }
        across, up = [row["turn"] for row in raised], [row["projection"] for row in raised]
        told = "an alarm is raised<extra></extra>"
        figure.add_scatter(
            x=across, y=up, name="drift begins", mode="markers", marker=ring, hovertemplate=told
        )
    return figure


def _lines(arms: Mapping[str, Sequence[Mapping[str, Any]]], form: str) -> go.Figure:
    """A line with its band for each arm."""
    figure = empty_figure(margin=MARGIN, showlegend=True)
    figure.update_layout(legend=LEGEND)
    for arm, rows in arms.items():
        colour, soft, symbol, dash = LOOKS.get(arm, OTHER)
        turns = [row["turn"] for row in rows]
        banded = [row for row in rows if row["low"] is not None]
        if banded:
            edge = [row["high"] for row in banded] + [row["low"] for row in banded[::-1]]
            across = [row["turn"] for row in banded] + [row["turn"] for row in banded[::-1]]
            area = {"fill": "toself", "fillcolor": f"var({soft})", "line": {"width": 0}, "mode": "lines"}
            figure.add_scatter(x=across, y=edge, hoverinfo="skip", showlegend=False, **area)
        figure.add_scatter(
            x=turns,
            y=[row["mean"] for row in rows],
            name=arm,
            mode="lines+markers",
            line=line_look(colour, 2.2, dash),
            marker={"color": f"var({colour})", "symbol": symbol, "size": 7},
            hovertemplate=f"{arm}, turn %{{x}}: {form}<extra></extra>",
        )
    figure.update_xaxes(title_text="turn", dtick=1, **axis_look())
    return figure


HERE = Path(__file__).parent
FARTHEST, DEEPEST = 4.0, 55  # the z at which a turn's colour is full, and how full that is (percent)


def write_drift_page(path: Path, content: Mapping[str, Any]) -> None:
    """Write the page of drift.json's content."""
    baseline, span = content["watch"]["baseline"], _span(content)

    def in_order(rows: Mapping[str, Any]) -> dict[str, Any]:  # a file's names are sorted
        return {arm: rows[arm] for arm in content["arms"] if arm in rows}

    figures: dict[str, Any] = {
        f"turns-{number}": trajectories(in_order(content["trajectories"][domain]), baseline, span)
        for number, domain in enumerate(content["domains"])
    }
    if len(content["arms"]) > 1:
        figures["differences"] = differences(in_order(content["differences"][ALL]))
    if content["alarms"]:
        figures["alarms"] = alarms_on(
            {arm: row["on"] for arm, row in in_order(content["alarms"][ALL]).items()}
        )
    for number, one in enumerate(content["examples"]):
        numbered = {
            arm: [{**row, "turn": n} for n, row in enumerate(own, 1)]
            for arm, own in in_order(one["arms"]).items()
        }
        figures[f"example-{number}"] = conversation(numbered, baseline)
    shown = {
        "c": content,
        "tiles": _tiles(content),
        "rows": [*content["domains"], *([ALL] if len(content["domains"]) > 1 else [])],
        "examples": [_example(one) for one in content["examples"]],
        "targets": {
            name: row for name, row in (content["next_turn"] or {}).items() if isinstance(row, Mapping)
        },
    }
    filters: dict[str, Callable[..., Any]] = {
        "percent": _percent,
        "span": span_of,
        "share": _share,
        "alarm": lambda row: _share({**row, "share": row["false_alarms"]}),
    }
    write_page(path, HERE / "page.html.jinja", shown, figures, filters)


def _span(content: Mapping[str, Any]) -> tuple[float, float]:
    """One range for all domains, so that they can be compared."""
    values = [
        row[name]
        for by_arm in content["trajectories"].values()
        for rows in by_arm.values()
        for row in rows
        for name in ("mean", "low", "high")
        if row[name] is not None
    ]
    values.append(content["watch"]["baseline"]["mean"])
    room = 0.06 * (max(values) - min(values) or 1.0)
    return min(values) - room, max(values) + room


def _tiles(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """The steepest domain, and what each arm does to its answers and to all."""
    slopes = {d: own[BASELINE] for d, own in content["slopes"].items() if d != ALL and own[BASELINE]}
    tiles = []
    if slopes:
        domain = min(slopes, key=lambda d: slopes[d]["value"])
        row = slopes[domain]
        note = f"slope a turn in {domain or 'all'}, as it is; {row['n']} conversations, shuffled turns within ±{row['chance']:.1f}"
        tiles.append(
            {
                "name": "steepest drift",
                "value": f"{row['value']:+.1f}",
                "interval": _interval(row),
                "note": note,
            }
        )
    plain = content["means"][ALL][BASELINE]
    tiles.append({"name": "mean, as it is", "value": f"{plain['value']:.1f}", "interval": _interval(plain), "note": f"projection of {plain['n']} answers"})  # fmt: skip
    for arm in content["arms"][1:]:
        row, wrote = content["means"][ALL][arm], content["wrote"][arm]
        note = f"on average over its answers; the cap acted on {_percent(wrote['acted'])} of them, fired on {_percent(wrote['fired'])}"
        change = row["change"]
        tiles.append({"name": f"mean, {arm}", "value": f"{row['value']:.1f}", "interval": f"{change['value']:+.1f} {_interval(change)}", "note": note})  # fmt: skip
    return [
        {name: text.replace("-", "−") if name != "note" else text for name, text in tile.items()}
        for tile in tiles
    ]


def _interval(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f"[{row['low']:+.1f}, {row['high']:+.1f}]"


def _example(one: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation as columns: as it is beside the arm that reacts, or else the capped one."""
    other = next((arm for arm in (ADAPTIVE, CAPPED) if arm in one["arms"]), None)
    arms = [BASELINE, *([other] if other else [])]
    length = max(len(one["arms"][arm]) for arm in arms)
    turns = []
    for turn in range(length):
        cells = [shaded(own[turn]) if turn < len(own := one["arms"][arm]) else None for arm in arms]
        turns.append({"asked": list(dict.fromkeys(cell["user"] for cell in cells if cell)), "cells": cells})
    return {"name": one["name"], "domain": one["domain"], "arms": arms, "turns": turns}


def shaded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with its colour: the farther from the calm mean, the deeper, on the side where it lies."""
    z = row["z"] or 0.0
    depth = round(min(abs(z), FARTHEST) / FARTHEST * DEEPEST)
    return {**row, "side": "positive" if z >= 0 else "others", "depth": depth}


def span_of(row: Mapping[str, Any] | None, form: str = "+.1f", name: str = "value") -> str:
    """A value with its interval, where it has one."""
    if row is None or row[name] is None:
        return "·"
    text = f"{row[name]:{form}}" + (
        "" if row["low"] is None else f" [{row['low']:{form}}, {row['high']:{form}}]"
    )
    return text.replace("-", "−")


def _share(row: Mapping[str, Any] | None) -> str:
    if row is None or row["share"] is None:
        return "·"
    low, high = row["interval"]
    return f"{row['share']:.0%} [{low:.0%}, {high:.0%}]"


def _percent(share: float | None) -> str:
    return "·" if share is None else f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"
