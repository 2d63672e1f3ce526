"""The figures of an evaluation: gain against cost by cap, shares by category, what firing buys, and trajectories by turn."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from personaxis.analysis.canvas import axis_look, empty_figure, line_look, shortened

# how an arm looks, by its kind: colour, symbol, size
LOOKS = {
    "as it is": ("--ink", "diamond", 12),
    "cap": ("--positive", "star", 16),
    "other cap": ("--accent", "circle", 11),
    "random": ("--others", "x", 11),
}
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
MARGIN = {"l": 64, "r": 24, "t": 16, "b": 54}


def gain_against_cost(points: Sequence[Mapping[str, Any]], outcome: str, cost: str) -> go.Figure:
    """Arms with name, kind, cost, share and interval: down and to the left is better where less of the outcome is."""
    figure = empty_figure(margin=MARGIN, showlegend=True)
    figure.update_layout(legend=LEGEND)
    for kind in LOOKS:
        own = [point for point in points if point["kind"] == kind]
        if own:
            figure.add_scatter(
                **_marks(own, kind, "cost", f"%{{text}}: %{{y:.1%}} for %{{x:+.1%}} {cost}<extra></extra>")
            )
    high = max(0.05, *(point["interval"][1] for point in points)) * 1.08
    figure.update_xaxes(title_text=cost, tickformat=".1%", **axis_look(zero=True))
    figure.update_yaxes(title_text=outcome, tickformat=".0%", range=[0, min(high, 1.06)], **axis_look())
    return figure


def fired_against_change(points: Sequence[Mapping[str, Any]], outcome: str) -> go.Figure:
    """Arms by the share of tokens that they change, and what that changed in the outcome (with its interval)."""
    figure = empty_figure(margin=MARGIN, showlegend=True)
    figure.update_layout(legend=LEGEND)
    for kind in LOOKS:
        own = [point for point in points if point["kind"] == kind]
        if own:
            figure.add_scatter(**_marks(own, kind, "fired", "%{text}: %{y:+.1%} with %{x:.0%} fired<extra></extra>"))
    figure.update_xaxes(
        title_text="tokens times layers that fired", tickformat=".0%", rangemode="tozero", **axis_look()
    )
    figure.update_yaxes(title_text=f"change of {outcome}", tickformat="+.0%", **axis_look(zero=True))
    return figure


def category_bars(
    categories: Mapping[str, Mapping[str, Mapping[str, Any]]], arms: Mapping[str, str], outcome: str
) -> go.Figure:
    """Shares by category and arm (name -> kind) with 95% intervals, the widest category on top."""
    names = sorted(categories, key=lambda name: -max(row["n"] for row in categories[name].values()))
    figure = empty_figure(margin={"l": 190, "r": 24, "t": 30, "b": 54}, showlegend=True, barmode="group")
    figure.update_layout(legend=LEGEND, height=130 + len(names) * (14 + 15 * len(arms)), bargap=0.25)
    shades = {"as it is": "--ink", "cap": "--positive", "other cap": "--accent", "random": "--others"}
    for arm, kind in list(arms.items())[::-1]:
        rows = [categories[name][arm] for name in names]
        shares = [row["share"] or 0.0 for row in rows]
        spans = [row["interval"] or (0.0, 0.0) for row in rows]
        errors = {
            "type": "data",
            "symmetric": False,
            "array": [high - share for share, (_, high) in zip(shares, spans, strict=True)],
            "arrayminus": [share - low for share, (low, _) in zip(shares, spans, strict=True)],
            "thickness": 1,
            "width": 0,
            "color": "var(--muted)",
        }
        figure.add_bar(
            x=shares,
            y=[shortened(name.replace("_", " "), 24) for name in names],
            orientation="h",
            name=arm,
            marker={"color": f"var({shades[kind]})"},
            error_x=errors,
            customdata=[row["n"] for row in rows],
            hovertemplate=f"%{{y}}, {arm}: %{{x:.0%}} of %{{customdata}}<extra></extra>",
        )
    figure.update_xaxes(title_text=outcome, tickformat=".0%", rangemode="tozero", **axis_look())
    figure.update_yaxes(autorange="reversed", **axis_look())
    return figure


def turns(arms: Mapping[str, Sequence[Mapping[str, Any]]], kinds: Mapping[str, str]) -> go.Figure:
    """Mean projection of answers by turn and arm, with standard errors."""
    figure = empty_figure(margin=MARGIN, showlegend=True)
    figure.update_layout(legend=LEGEND)
    for arm, rows in arms.items():
        shown = [row for row in rows if row["projection"] is not None]
        colour, symbol, _ = LOOKS[kinds[arm]]
        bars = {
            "type": "data",
            "array": [row["error"] or 0 for row in shown],
            "thickness": 1,
            "width": 0,
            "color": f"var({colour})",
        }
        figure.add_scatter(
            x=[row["turn"] + 1 for row in shown],
            y=[row["projection"] for row in shown],
            name=arm,
            mode="lines+markers",
            line=line_look(colour, 2.0),
            marker={"color": f"var({colour})", "symbol": symbol, "size": 8},
            error_y=bars,
            hovertemplate=f"{arm}, turn %{{x}}: %{{y:.1f}}<extra></extra>",
        )
    figure.update_xaxes(title_text="turn", dtick=1, **axis_look())
    figure.update_yaxes(title_text="mean projection of the answer", **axis_look())
    return figure


def _marks(points: Sequence[Mapping[str, Any]], kind: str, across: str, hover: str) -> dict[str, Any]:
    colour, symbol, size = LOOKS[kind]
    low = [point["share"] - point["interval"][0] for point in points]
    high = [point["interval"][1] - point["share"] for point in points]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": high,
        "arrayminus": low,
        "thickness": 1,
        "width": 0,
        "color": f"var({colour})",
    }
    return {
        "x": [point[across] for point in points],
        "y": [point["share"] for point in points],
        "text": [point["name"] for point in points],
        "name": kind if kind != "cap" else points[0]["name"],
        "mode": "markers",
        "marker": {"color": f"var({colour})", "symbol": symbol, "size": size},
        "error_y": bars,
        "hovertemplate": hover,
    }
