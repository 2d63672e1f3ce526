"""The page of an emerging axis: whether it is there, whether it is that of the end, and where the roles stand meanwhile.

The figures of an emerging axis, over checkpoints at even distances: steps are powers of two.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from personatlas.analysis.emergence import ends, settled
from personatlas.analysis.fit.tables import interval, number
from personatlas.analysis.html.canvas import axis_look, empty_figure, line_look, shortened
from personatlas.analysis.html.page import write_page

MARGIN = {"l": 60, "r": 18, "t": 14, "b": 46}
LABELS = 38  # that fit under one another in the figure of the roles
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def emergence_figures(found: Mapping[str, Any]) -> dict[str, go.Figure]:
    """Whether there is an axis, whether it is that of the end, and where the roles stand."""
    rows = found["checkpoints"]
    there = [
        ("cos(PC1, axis)", [row["cos_pc1"] for row in rows], "--accent"),
        ("split-half", [row["split_half"] for row in rows], "--positive"),
    ]
    same = [
        ("rank correlation of roles", [row["ranked_alike"] for row in rows], "--accent"),
        ("cosine of axes", [{"value": row["cosine"]} for row in rows], "--others"),
    ]
    figures = {"there": _curves(rows, there), "same": _curves(rows, same)}
    null = [row["cos_pc1_shuffled"] for row in rows]
    if None not in null:
        dotted = {
            "mode": "lines",
            "line": line_look("--muted", 1.2, "dot"),
            "name": "cos(PC1, axis), shuffled",
        }
        figures["there"].add_scatter(x=_steps(rows), y=null, hovertemplate="%{y:.2f}", **dotted)
    return figures | {"roles": _courses(found)}


def _steps(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{row['step']:,}" for row in rows]


def _curves(rows: Sequence[Mapping[str, Any]], lines: Sequence[tuple[str, list[Any], str]]) -> go.Figure:
    figure = empty_figure(margin=MARGIN, showlegend=True, hovermode="x unified", legend=LEGEND)
    steps, low = _steps(rows), 0.0
    for name, values, colour in lines:
        known = [(step, one) for step, one in zip(steps, values, strict=True) if one is not None]
        x, y = [step for step, _ in known], [one["value"] for _, one in known]
        arms = [(one.get("low"), one.get("high")) for _, one in known]
        if all(one is not None for one, _ in arms):
            above = [high - value for value, (_, high) in zip(y, arms, strict=True)]
            below = [value - under for value, (under, _) in zip(y, arms, strict=True)]
            sizes = {"type": "data", "array": above, "arrayminus": below, "symmetric": False}
            bars = {**sizes, "thickness": 1.2, "width": 3, "color": f"var({colour})"}
        else:
            bars = None
        look = {
            "mode": "lines+markers",
            "line": line_look(colour, 2.0),
            "marker": {"size": 7, "color": f"var({colour})"},
        }
        figure.add_scatter(x=x, y=y, name=name, error_y=bars, hovertemplate="%{y:.2f}", **look)
        low = min([low, *y, *(one for one, _ in arms if one is not None)])
    figure.update_xaxes(title_text="step", type="category", categoryarray=steps, **axis_look())
    figure.update_yaxes(title_text="", range=[min(low * 1.1, -0.02), 1.04], **axis_look(zero=True))
    return figure


def _courses(found: Mapping[str, Any]) -> go.Figure:
    """z of the default and of the outermost roles; all others in grey."""
    figure = empty_figure(margin={**MARGIN, "r": 170}, hovermode="closest")
    steps, courses, positive = _steps(found["checkpoints"]), found["roles"], found["positive"]
    lowest, highest = ends(courses, positive)
    colours = (
        dict.fromkeys(lowest, "--others") | dict.fromkeys(highest, "--positive") | {positive: "--accent"}
    )
    shown = sorted(
        courses, key=lambda name: (name in colours, name == positive)
    )  # what is told apart lies on top
    for name in shown:
        colour = colours.get(name)
        width = 3.0 if name == positive else 1.6 if colour else 0.7
        look = {
            "mode": "lines",
            "line": line_look(colour or "--middle", width),
            "opacity": 1.0 if colour else 0.45,
        }
        hover = f"{name}, step %{{x}}: %{{y:.2f}}<extra></extra>"
        figure.add_scatter(x=steps, y=courses[name], name=name, hovertemplate=hover, **look)
    everywhere = [z for course in courses.values() for z in course]
    room = (max(everywhere) - min(everywhere)) / LABELS
    for name, place in _apart([(name, courses[name][-1]) for name in courses if name in colours], room):
        text = f"<b>{name}</b>" if name == positive else shortened(name, 20)
        end = {
            "x": len(steps) - 1,
            "y": place,
            "text": text,
            "showarrow": False,
            "xanchor": "left",
            "xshift": 8,
        }
        figure.add_annotation(**end, font={"color": f"var({colours[name]})", "size": 12})
    figure.update_xaxes(title_text="step", type="category", categoryarray=steps, **axis_look())
    figure.update_yaxes(title_text="place among the roles, standard deviations", **axis_look(zero=True))
    return figure


def _apart(places: Sequence[tuple[str, float]], room: float) -> list[tuple[str, float]]:
    """Places of labels that do not cover one another: those closer than `room` push each other away, each as far."""
    ordered = sorted(places, key=lambda one: one[1])
    at = [place for _, place in ordered]
    for _ in range(100):
        for index in range(1, len(at)):
            short = room - (at[index] - at[index - 1])
            if short > 0:
                at[index - 1] -= short / 2
                at[index] += short / 2
    return [(name, place) for (name, _), place in zip(ordered, at, strict=True)]


HERE = Path(__file__).parent


def write_emergence_page(path: Path, name: str, found: Mapping[str, Any]) -> None:
    """Write the page of emergence.json's content."""
    filters: dict[str, Callable[..., Any]] = {
        "count": lambda value: f"{value:,}",
        "interval": interval,
        "number": number,
        "size": lambda value: "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}",
    }
    content = {"name": name, "e": found, "tiles": _tiles(found), "lead": _lead(found)}
    write_page(path, HERE / "emergence.html.jinja", content, emergence_figures(found), filters)


def _lead(found: Mapping[str, Any]) -> str:
    """What came of it, in a few sentences."""
    rows = found["checkpoints"]
    first, last = rows[0], rows[-1]
    lowest, highest = (" and ".join(names) for names in ends(found["roles"], found["positive"], 2))
    since = settled(rows)
    order = (
        f"From step {since:,} on the roles stand in nearly the order of the end"
        if since is not None
        else "No earlier checkpoint has the roles in the order of the end"
    )
    chance, low = last["cos_pc1_shuffled"], last["cos_pc1"]["low"]
    doubt = (
        " That is not beyond what shuffled labels give."
        if chance is not None and (low or 0.0) <= chance
        else ""
    )
    return (
        f"At step {first['step']:,} the main direction of the roles and the axis have a cosine of {interval(first['cos_pc1'])}, at step "
        f"{last['step']:,} {interval(last['cos_pc1'])}.{doubt} {order}. Farthest from {found['positive']} at the "
        f"end: {lowest}; nearest: {highest}."
    )


def _tiles(found: Mapping[str, Any]) -> list[dict[str, str]]:
    last, first = found["checkpoints"][-1], found["checkpoints"][0]
    place, half = last["pole"], last["split_half"]
    tiles = [
        _tile(
            "cos(PC1, axis)",
            last["cos_pc1"],
            f"shuffled {number(last['cos_pc1_shuffled'])}; {number(first['cos_pc1']['value'])} at first",
        ),
        _tile(
            found["positive"],
            {"value": place["z"]},
            f"standard deviations above the roles; {place['place']} of {place['of']} from the top",
        ),
    ]
    if half is not None:
        tiles.insert(1, _tile("split-half", half, "cosine of two halves' axes"))
    if last["p"] is not None:
        tiles.append(
            _tile(
                "length",
                {"value": last["length"]},
                f"shuffled {number(last['length_shuffled'])}, p {last['p']:.2g}",
            )
        )
    return tiles


def _tile(name: str, found: Mapping[str, Any], note: str) -> dict[str, str]:
    known = "" if found.get("low") is None else f"95% {found['low']:.2f} to {found['high']:.2f}"
    return {"name": name, "value": f"{found['value']:.2f}", "interval": known, "note": note}
