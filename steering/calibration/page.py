"""The page of a calibration: which cap, why, and what it gains and costs on material that it was not chosen
on.

write_calibration_page(run / "calibration.html", CalibrationResult.load(run))
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from personatlas.analysis.html.canvas import axis_style, empty_figure, line_style
from personatlas.analysis.html.page import write_page
from personatlas.persona.interventions import BASELINE
from personatlas.steering.arms import RANDOM, is_control_name
from personatlas.steering.calibration.result import CHOSEN, CalibrationResult

TRIED, FITTED = "tried", "tried, floors by gradient"
LOOKS = {  # of a kind of point: colour, symbol, size
    TRIED: ("--middle", "circle", 7),
    FITTED: ("--middle", "circle-open", 9),
    BASELINE: ("--ink", "diamond", 11),
    CHOSEN: ("--positive", "star", 17),
    RANDOM: ("--others", "x", 10),
    "add": ("--accent", "triangle-up", 10),
    "also": ("--muted", "square", 9),
}


@dataclass(frozen=True)
class Point:
    """A cap in the figure: its gain and cost as shares, and the gain's interval where it is known."""

    name: str
    kind: str
    cost: float
    gain: float
    interval: tuple[float, float] | None = None


def pareto_figure(points: Sequence[Point], budget: float) -> go.Figure:
    """Gains against costs; the budget is a dotted line.

    The frontier of what was tried (no other costs less and gains as much) is a line.
    """
    figure = empty_figure(margin={"l": 64, "r": 24, "t": 16, "b": 54}, showlegend=True)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    tried = [point for point in points if point.kind in (TRIED, FITTED)]
    frontier: list[Point] = []
    for point in sorted(tried, key=lambda point: (point.cost, -point.gain)):
        if not frontier or point.gain > frontier[-1].gain:
            frontier.append(point)
    if len(frontier) > 1:
        line = {"x": [point.cost for point in frontier], "y": [point.gain for point in frontier]}
        look = {
            "mode": "lines",
            "line": line_style("--middle", 1.5),
            "hoverinfo": "skip",
            "showlegend": False,
        }
        figure.add_scatter(**line, **look)
    for kind in LOOKS:
        own = [point for point in points if point.kind == kind]
        if own:
            figure.add_scatter(**_scatter(own, kind))
    high = max(0.05, *(point.gain for point in points)) * 1.12
    dotted = line_style("--ink", 1.5, "dot")
    figure.add_shape(type="line", x0=budget, x1=budget, y0=0, y1=high, line=dotted, layer="below")
    x_title, y_title = "more loss per token on benign answers", "answers that call themselves an assistant"
    figure.update_xaxes(title_text=x_title, tickformat=".0%", **axis_style(zero=True))
    figure.update_yaxes(title_text=y_title, tickformat=".0%", range=[0, min(high, 1.02)], **axis_style())
    return figure


def _scatter(points: Sequence[Point], kind: str) -> dict[str, Any]:
    colour, symbol, size = LOOKS[kind]
    intervals = [point.interval or (point.gain, point.gain) for point in points]
    gains = [point.gain for point in points]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [high - gain for gain, (_, high) in zip(gains, intervals, strict=True)],
        "arrayminus": [gain - low for gain, (low, _) in zip(gains, intervals, strict=True)],
        "thickness": 1,
        "width": 0,
        "color": f"var({colour})",
        "visible": kind not in (TRIED, FITTED),
    }
    return {
        "x": [point.cost for point in points],
        "y": gains,
        "text": [point.name for point in points],
        "name": kind,
        "mode": "markers",
        "marker": {"color": f"var({colour})", "symbol": symbol, "size": size},
        "error_y": bars,
        "hovertemplate": "%{text}: %{y:.1%} for %{x:+.1%} loss<extra></extra>",
    }


def write_calibration_page(path: Path, result: CalibrationResult) -> None:
    """Writes the page."""
    points = [
        Point(
            f"{row.name} (choosing half)",
            TRIED if row.shift is None else FITTED,
            row.more_loss,
            row.assistant,
        )
        for row in result.tried
        if row.assistant is not None
    ]
    for name, arm in result.report.items():
        kind = name if name in (BASELINE, CHOSEN) else "also"
        if is_control_name(name):
            kind = RANDOM
        elif re.fullmatch(r"add \S+", name):
            kind = "add"
        points.append(Point(name, kind, arm.more_loss, arm.assistant, arm.interval))
    content = result.to_json()
    shown = {
        "c": content,
        "tiles": _tiles(result),
        "rows": [{"arm": name, "chosen": name == CHOSEN, **vars(arm)} for name, arm in result.report.items()],
        # those that were tried under role prompts, best first, then the others by cost
        "tried": sorted(content["tried"], key=lambda row: (-row.get("assistant", -1.0), row["more_loss"])),
    }
    figure = pareto_figure(points, result.budget)
    filters = {"percent": _percent, "signed": _signed}
    write_page(path, Path(__file__).parent / "page.html.jinja", shown, {"pareto": figure}, filters)


def _tiles(result: CalibrationResult) -> list[dict[str, str]]:
    baseline, chosen = result.report[BASELINE], result.report[CHOSEN]
    randoms = [arm for name, arm in result.report.items() if is_control_name(name)]
    low, high = chosen.interval
    loss_low, loss_high = map(_signed, chosen.more_loss_interval or (0.0, 0.0))
    return [
        {
            "name": "call themselves an assistant",
            "value": _percent(chosen.assistant),
            "interval": f"95% {_percent(low)} to {_percent(high)}",
            "note": f"under the lowest roles, capped; baseline {_percent(baseline.assistant)}",
        },
        {
            "name": "more loss on benign answers",
            "value": _signed(chosen.more_loss),
            "interval": f"95% {loss_low} to {loss_high}",
            "note": f"per token; KL {chosen.kl:.3f} nats; the budget was {_percent(result.budget)}",
        },
        {
            "name": "fired",
            "value": _percent(chosen.fired),
            "interval": f"{_percent(chosen.benign_fired or 0.0)} on benign answers",
            "note": "of tokens times layers under the roles",
        },
        *(
            [
                {
                    "name": "random directions",
                    "value": _percent(fmean(arm.assistant for arm in randoms)),
                    "interval": f"{_signed(fmean(arm.more_loss for arm in randoms))} loss",
                    "note": f"mean of {len(randoms)} that fire as often: what disturbing alone does",
                }
            ]
            if randoms
            else []
        ),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}%".replace("-", "−")
