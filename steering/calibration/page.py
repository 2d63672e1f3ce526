"""The figure of what interventions buy against what they cost.

The page of a calibration: which cap, why, what it buys and costs on material that it was not chosen on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from personatlas.analysis.html.canvas import axis_style, empty_figure, line_style
from personatlas.analysis.html.page import write_page

# how a kind of point looks: colour, symbol, size
LOOKS = {
    "tried": ("--middle", "circle", 7),
    "tried, floors by gradient": ("--middle", "circle-open", 9),
    "baseline": ("--ink", "diamond", 11),
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
        look = {
            "mode": "lines",
            "line": line_style("--middle", 1.5),
            "hoverinfo": "skip",
            "showlegend": False,
        }
        figure.add_scatter(**place, **look)
    for kind, (colour, symbol, size) in LOOKS.items():
        own = [point for point in points if point["kind"] == kind]
        if own:
            figure.add_scatter(**_scatter(own, kind, colour, symbol, size))
    high = max(0.05, *(point["gain"] for point in points)) * 1.12
    figure.add_shape(
        type="line", x0=budget, x1=budget, y0=0, y1=high, line=line_style("--ink", 1.5, "dot"), layer="below"
    )
    figure.update_xaxes(
        title_text="more loss per token on benign answers", tickformat=".0%", **axis_style(zero=True)
    )
    title = "answers that call themselves an assistant"
    figure.update_yaxes(title_text=title, tickformat=".0%", range=[0, min(high, 1.02)], **axis_style())
    return figure


def _scatter(
    points: Sequence[dict[str, Any]], kind: str, colour: str, symbol: str, size: int
) -> dict[str, Any]:
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


HERE = Path(__file__).parent


def write_calibration_page(path: Path, content: Mapping[str, Any]) -> None:
    """Write the page of calibration.json's content."""
    shown = {"c": content, "tiles": _tiles(content), "rows": _rows(content), "tried": _tried(content)}
    filters = {"percent": _percent, "signed": _signed}
    figure = pareto(_points(content), content["budget"])
    write_page(path, HERE / "page.html.jinja", shown, {"pareto": figure}, filters)


def _points(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    tried = [
        {
            "name": f"{one['name']} (choosing half)",
            "kind": "tried, floors by gradient" if "shift" in one else "tried",
            "cost": one["more_loss"],
            "gain": one["assistant"],
        }
        for one in content["tried"]
        if "assistant" in one
    ]
    reported = [
        {
            "name": name,
            "kind": _kind(name),
            "cost": row["more_loss"],
            "gain": row["assistant"],
            "interval": row["interval"],
        }
        for name, row in content["report"].items()
    ]
    return [*tried, *reported]


def _kind(name: str) -> str:
    first = name.split(" ", 1)[0]
    return name if name in ("baseline", "chosen") else first if first in ("random", "add") else "also"


def _tiles(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    plain, chosen = content["report"]["baseline"], content["report"]["chosen"]
    randoms = [row for name, row in content["report"].items() if name.startswith("random")]
    mean = sum(row["assistant"] for row in randoms) / len(randoms)
    low, high = chosen["interval"]
    dear = sum(row["more_loss"] for row in randoms) / len(randoms)
    return [
        {
            "name": "call themselves an assistant",
            "value": _percent(chosen["assistant"]),
            "interval": f"95% {_percent(low)} to {_percent(high)}",
            "note": f"under the lowest roles, capped; as the model is {_percent(plain['assistant'])}",
        },
        {
            "name": "more loss on benign answers",
            "value": _signed(chosen["more_loss"]),
            "interval": "95% {} to {}".format(*map(_signed, chosen["more_loss_interval"])),
            "note": f"per token; KL {chosen['kl']:.3f} nats; the budget was {_percent(content['budget'])}",
        },
        {
            "name": "fired",
            "value": _percent(chosen["fired"]),
            "interval": f"{_percent(chosen['benign_fired'])} on benign answers",
            "note": "of tokens times layers under the roles",
        },
        {
            "name": "random directions",
            "value": _percent(mean),
            "interval": f"{_signed(dear)} loss",
            "note": f"mean of {len(randoms)} that fire as often: what disturbing alone does",
        },
    ]


def _rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"arm": name, "chosen": name == "chosen", **row} for name, row in content["report"].items()]


def _tried(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that were tried under role prompts, best first, then the others by cost."""
    return sorted(content["tried"], key=lambda one: (-one.get("assistant", -1.0), one["more_loss"]))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}%".replace("-", "−")
