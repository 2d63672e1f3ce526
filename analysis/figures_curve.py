"""The figure of how many answers an axis needs."""

from typing import Any

import plotly.graph_objects as go

from personaxis.analysis.canvas import axis_look, empty_figure, line_look


def curve(found: dict[str, Any]) -> go.Figure:
    """Cosine between the axes of two disjoint sets of n answers a role, its extension, and the goal."""
    figure = empty_figure(margin={"l": 60, "r": 16, "t": 16, "b": 48})
    n, cosines = found["answers"], found["cosines"]
    edge = [row["high"] for row in cosines] + [row["low"] for row in reversed(cosines)]
    area = {"fill": "toself", "fillcolor": "var(--accent-soft)", "line": {"width": 0}, "mode": "lines"}
    figure.add_scatter(x=[*n, *reversed(n)], y=edge, hoverinfo="skip", **area)
    look = {
        "mode": "lines+markers",
        "line": line_look("--accent", 2.0),
        "marker": {"size": 6, "color": "var(--accent)"},
    }
    hover = "%{x:.3g} answers a role: cosine %{y:.2f}<extra></extra>"
    figure.add_scatter(x=n, y=[row["value"] for row in cosines], hovertemplate=hover, **look)
    end = max(n)
    if found["needed"] is not None and found["needed"] > end:
        end = found["needed"]
        signal = cosines[-1]["value"] / (1 - cosines[-1]["value"]) / n[-1]
        more = [n[-1] * (end / n[-1]) ** (i / 20) for i in range(21)]
        dotted = {"mode": "lines", "line": line_look("--accent", 1.5, "dot"), "hovertemplate": hover}
        figure.add_scatter(x=more, y=[m * signal / (1 + m * signal) for m in more], **dotted)
    goal = {"x0": min(n), "x1": end, "y0": found["goal"], "y1": found["goal"]}
    figure.add_shape(type="line", **goal, line=line_look("--muted", 1.0, "dot"), layer="below")
    figure.update_xaxes(title_text="answers a role in either half", type="log", **axis_look())
    ticks = [m for m in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if m <= end * 1.1]
    figure.update_xaxes(tickvals=ticks, ticktext=[str(m) for m in ticks])
    low = min(0.0, *(row["low"] for row in cosines))
    figure.update_yaxes(title_text="cosine between two axes", range=[low * 1.05, 1.02], **axis_look())
    return figure
