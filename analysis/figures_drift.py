"""The figures of drift: mean projection by turn with bands, what a cap changes by turn, and how many alarms are on."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from personaxis.analysis.canvas import CLEAR, axis_look, empty_figure, line_look

# how an arm looks: colour, its soft kind, symbol, dash
LOOKS = {
    "as it is": ("--ink", "--chance-soft", "diamond", "solid"),
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
        figure.add_scatter(x=[1, last], y=[value, value], name=name, mode="lines", line=look, hoverinfo="skip")
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
    figure.update_yaxes(title_text="conversations with the alarm on", tickformat=".0%", range=[0, 1.02], **axis_look())
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
    raised = [row for own in arms.values() for row in own if row.get("raised") and row["projection"] is not None]
    if raised:
        ring = {"color": CLEAR, "size": 17, "symbol": "circle", "line": {"color": "var(--others)", "width": 2.5}}
        across, up = [row["turn"] for row in raised], [row["projection"] for row in raised]
        told = "an alarm is raised<extra></extra>"
        figure.add_scatter(x=across, y=up, name="drift begins", mode="markers", marker=ring, hovertemplate=told)
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
