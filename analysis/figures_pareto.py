"""The figure of what interventions buy against what they cost."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from personaxis.analysis.canvas import axis_look, empty_figure, line_look

# how a kind of point looks: colour, symbol, size
LOOKS = {
    "tried": ("--middle", "circle", 7),
    "tried, floors by gradient": ("--middle", "circle-open", 9),
    "as it is": ("--ink", "diamond", 11),
    "chosen": ("--positive", "star", 17),
    "random": ("--others", "x", 10),
    "add": ("--accent", "triangle-up", 10),
    "also": ("--muted", "square", 9),
}


def pareto(points: Sequence[dict[str, Any]], budget: float) -> go.Figure:
    """Points with name, kind, cost, gain and maybe the gain's interval; the budget is a dotted line.

    Costs and gains are shares. The frontier of what was tried (no other costs less and gains as much) is a line.
    """
    figure = empty_figure(margin={"l": 64, "r": 24, "t": 16, "b": 54}, showlegend=True)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    frontier = _frontier([point for point in points if point["kind"].startswith("tried")])
    if len(frontier) > 1:
        place = {"x": [point["cost"] for point in frontier], "y": [point["gain"] for point in frontier]}
        look = {"mode": "lines", "line": line_look("--middle", 1.5), "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(**place, **look)
    for kind, (colour, symbol, size) in LOOKS.items():
        own = [point for point in points if point["kind"] == kind]
        if own:
            figure.add_scatter(**_scatter(own, kind, colour, symbol, size))
    high = max(0.05, *(point["gain"] for point in points)) * 1.12
    figure.add_shape(
        type="line", x0=budget, x1=budget, y0=0, y1=high, line=line_look("--ink", 1.5, "dot"), layer="below"
    )
    figure.update_xaxes(title_text="more loss per token on benign answers", tickformat=".0%", **axis_look(zero=True))
    title = "answers that call themselves an assistant"
    figure.update_yaxes(title_text=title, tickformat=".0%", range=[0, min(high, 1.02)], **axis_look())
    return figure


def _scatter(points: Sequence[dict[str, Any]], kind: str, colour: str, symbol: str, size: int) -> dict[str, Any]:
    errors = [point.get("interval") or (point["gain"], point["gain"]) for point in points]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [high - point["gain"] for point, (_, high) in zip(points, errors, strict=True)],
        "arrayminus": [point["gain"] - low for point, (low, _) in zip(points, errors, strict=True)],
        "thickness": 1,
        "width": 0,
        "color": f"var({colour})",
        "visible": not kind.startswith("tried"),
    }
    return {
        "x": [point["cost"] for point in points],
        "y": [point["gain"] for point in points],
        "text": [point["name"] for point in points],
        "name": kind,
        "mode": "markers",
        "marker": {"color": f"var({colour})", "symbol": symbol, "size": size},
        "error_y": bars,
        "hovertemplate": "%{text}: %{y:.1%} for %{x:+.1%} loss<extra></extra>",
    }


def _frontier(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda point: (point["cost"], -point["gain"])):
        if not found or point["gain"] > found[-1]["gain"]:
            found.append(point)
    return found
