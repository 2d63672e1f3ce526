"""The page of an emerging axis: whether there is one, whether it is that of the last checkpoint, and where
the roles lie.

Checkpoints are at even distances: their steps are powers of two.
"""

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from personatlas.analysis.emergence import CheckpointFit, EmergenceResult
from personatlas.analysis.fit.tables import interval_text, number_text
from personatlas.analysis.html.canvas import Style, axis_style, empty_figure, line_style, plain
from personatlas.analysis.html.page import write_page
from personatlas.analysis.stats import Interval

TEMPLATE = Path(__file__).parent / "emergence.html.jinja"
MARGIN = {"l": 60, "r": 18, "t": 14, "b": 46}
LABELS = 32  # that fit under one another in the figure of the roles
TICKS = 4  # steps named below an axis: as many as a phone has room for
ENDS = 6  # roles at either end that are drawn in colour
Lines = dict[str, tuple[str, list[Interval | None]]]  # by name: colour, and an interval a checkpoint
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def write_emergence_page(path: Path, name: str, result: EmergenceResult) -> None:
    """Writes the page of an emerging axis of the model of that name."""
    rows = result.checkpoints
    content = {"name": name, "e": result, "tiles": _tiles(result), "ends": result.ends(2)}
    axis_lines: Lines = {
        "cos(PC1, axis)": ("--accent", [row.cos_pc1 for row in rows]),
        "split-half": ("--positive", [row.split_half for row in rows]),
    }
    last_lines: Lines = {
        "rank correlation of roles": ("--accent", [row.rank_correlation for row in rows]),
        "cosine of axes": ("--others", [Interval(row.cosine, None, None) for row in rows]),
    }
    figures = {"there": _line_figure(rows, axis_lines), "same": _line_figure(rows, last_lines)}
    null = [row.cos_pc1_shuffled for row in rows]
    if None not in null:
        label, line = "cos(PC1, axis), shuffled", line_style("--muted", 1.2, "dot")
        figures["there"].add_scatter(
            x=_steps(rows), y=null, mode="lines", line=line, name=label, hovertemplate="%{y:.2f}"
        )
    figures["roles"] = _role_figure(result)
    filters = {
        "count": lambda value: f"{value:,}",
        "interval": interval_text,
        "number": number_text,
        "size": lambda value: "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}",
    }
    write_page(path, TEMPLATE, content, figures, filters)


def _steps(rows: Sequence[CheckpointFit]) -> list[str]:
    return [f"{row.step:,}" for row in rows]


def _line_figure(rows: Sequence[CheckpointFit], lines: Lines) -> go.Figure:
    figure = empty_figure(margin=MARGIN, showlegend=True, hovermode="x unified", legend=LEGEND)
    steps, lowest = _steps(rows), 0.0
    for name, (colour, intervals) in lines.items():
        points = [(step, found) for step, found in zip(steps, intervals, strict=True) if found is not None]
        y, bars = [found.value for _, found in points], None
        bounds = [(found.low, found.high) for _, found in points]
        known = [(low, high) for low, high in bounds if low is not None and high is not None]
        if len(known) == len(points):
            above = [high - value for value, (_, high) in zip(y, known, strict=True)]
            below = [value - low for value, (low, _) in zip(y, known, strict=True)]
            sizes = {"type": "data", "array": above, "arrayminus": below, "symmetric": False}
            bars = {**sizes, "thickness": 1.2, "width": 3, "color": f"var({colour})"}
        figure.add_scatter(
            x=[step for step, _ in points],
            y=y,
            name=name,
            error_y=bars,
            hovertemplate="%{y:.2f}",
            mode="lines+markers",
            line=line_style(colour, 2.0),
            marker={"size": 7, "color": f"var({colour})"},
        )
        lowest = min([lowest, *y, *(low for low, _ in known)])
    figure.update_xaxes(**_step_axis(steps))
    figure.update_yaxes(title_text="", range=[min(lowest * 1.1, -0.02), 1.04], **axis_style(zero=True))
    return figure


def _step_axis(steps: list[str]) -> Style:
    named = steps[:: -(-len(steps) // TICKS)]
    order = {"type": "category", "categoryarray": steps, "tickvals": named, "tickangle": 0}
    return {"title_text": "step", **order, **axis_style()}


def _role_figure(result: EmergenceResult) -> go.Figure:
    """z-scores of the positive pole and of the roles at the ends in colour; all others in grey."""
    figure = empty_figure(margin={**MARGIN, "r": 128}, hovermode="closest")
    steps, positive = _steps(result.checkpoints), result.positive
    lowest, highest = result.ends(ENDS)
    colours = dict.fromkeys(lowest, "--others") | dict.fromkeys(highest, "--positive")
    colours[positive] = "--accent"
    # coloured lines lie on top
    for name in sorted(result.roles, key=lambda name: (name in colours, name == positive)):
        colour = colours.get(name)
        width = 3.0 if name == positive else 1.6 if colour else 0.7
        figure.add_scatter(
            x=steps,
            y=result.roles[name],
            name=plain(name),
            hovertemplate=f"{plain(name)}, step %{{x}}: %{{y:.2f}}<extra></extra>",
            mode="lines",
            line=line_style(colour or "--middle", width),
            opacity=1.0 if colour else 0.45,
        )
    values = [z for course in result.roles.values() for z in course]
    room = (max(values) - min(values)) / LABELS
    ends = sorted((course[-1], name) for name, course in result.roles.items() if name in colours)
    heights = [z for z, _ in ends]
    for _ in range(100):  # labels closer than `room` push each other away, both as far
        for index in range(1, len(heights)):
            overlap = room - (heights[index] - heights[index - 1])
            if overlap > 0:
                heights[index - 1] -= overlap / 2
                heights[index] += overlap / 2
    for height, (_, name) in zip(heights, ends, strict=True):
        text = f"<b>{plain(name, 16)}</b>" if name == positive else plain(name, 16)
        at = {"x": len(steps) - 1, "y": height, "xanchor": "left", "xshift": 8}
        font = {"color": f"var({colours[name]})", "size": 12}
        figure.add_annotation(**at, text=text, showarrow=False, font=font)
    shown = [-0.2, len(steps) - 0.8]  # without it plotly makes room for the labels a second time
    figure.update_xaxes(**_step_axis(steps), range=shown)
    figure.update_yaxes(title_text="z-score among the roles", **axis_style(zero=True))
    return figure


def _tiles(result: EmergenceResult) -> list[dict[str, str]]:
    first, last = result.checkpoints[0], result.checkpoints[-1]
    null, pole = last.cos_pc1_shuffled, last.pole
    shuffled = "" if null is None else f"shuffled {number_text(null)}; "
    tiles = [
        _tile("cos(PC1, axis)", last.cos_pc1, f"{shuffled}{first.cos_pc1.value:.2f} at first"),
        _tile(
            result.positive,
            Interval(pole.z, None, None),
            f"z-score among the roles; rank {pole.rank} of {pole.n}",
        ),
    ]
    if last.split_half is not None:
        tiles.insert(1, _tile("split-half", last.split_half, "cosine of two halves' axes"))
    if last.p_norm is not None:
        note = f"shuffled {number_text(last.norm_shuffled)}, p = {last.p_norm:.2g}"
        tiles.append(_tile("|axis|", Interval(last.norm, None, None), note))
    return tiles


def _tile(name: str, found: Interval, note: str) -> dict[str, str]:
    bounds = "" if found.low is None else f"95% {found.low:.2f} to {found.high:.2f}"
    value = f"{found.value:z.2f}".replace("-", "−")
    return {"name": name, "value": value, "interval": bounds, "note": note}
