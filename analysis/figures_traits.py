"""The figure of trait space."""

from html import escape
from typing import Any

import plotly.graph_objects as go

from personaxis.analysis.canvas import WORDS, axis_look, empty_figure, shortened
from personaxis.analysis.labels import SCREENS, Label, place_labels

NAMED = 5  # traits named at each end of the axis


def trait_plane(traits: dict[str, Any]) -> go.Figure:
    """Traits over the first two components of trait space, coloured by their cosine with the axis."""
    rows = traits["traits"]
    limit = max(abs(row["cosine"]) for row in rows) or 1.0
    stops = [[0, "var(--others)"], [0.5, "var(--middle)"], [1, "var(--positive)"]]
    bar = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "thickness": 9, "outlinewidth": 0}
    bar |= {"title": {"text": "cosine with the axis", "side": "top", "font": {"size": 13}}, "len": 0.8, "ypad": 4}
    colours = {"colorscale": stops, "cmin": -limit, "cmax": limit, "colorbar": bar}
    figure = empty_figure(coloraxis=colours, margin={"l": 60, "r": 16, "t": 16, "b": 124})
    x, y = ([row["coordinates"][i] for row in rows] for i in (0, 1))
    edge = {"color": "var(--outline)", "width": 0.8}
    look = {"size": 8, "color": [row["cosine"] for row in rows], "coloraxis": "coloraxis", "line": edge}
    text = [f"<b>{_name(row)}</b><br>cosine {row['cosine']:.2f}" for row in rows]
    figure.add_scatter(x=x, y=y, mode="markers", marker=look, text=text, hovertemplate="%{text}<extra></extra>")
    wanted = _worth_naming(rows)
    for screen, size in SCREENS.items():
        labels = [Label(shortened(row["trait"]), *row["coordinates"][:2]) for row in wanted]
        placed = place_labels(list(zip(x, y, strict=True)), labels, size)
        named = [wanted[i] for i in placed]
        places = {name: [row["coordinates"][i] for row in named] for i, name in enumerate("xy")}
        words = {"text": [_name(row) for row in named], "textposition": list(placed.values()), "textfont": WORDS}
        # unseen markers: plotly keeps a label clear of the marker in its own trace only
        unseen = {
            "mode": "markers+text",
            "marker": {"size": 12, "opacity": 0},
            "hoverinfo": "skip",
            "cliponaxis": False,
        }
        figure.add_scatter(**places, **words, **unseen, meta=screen)
    ratio = traits["variance_ratio"]
    figure.update_xaxes(title_text=f"trait PC1 ({ratio[0]:.0%} of the variance)", **axis_look(zero=True))
    # distances mean the same in both directions
    equal = {"scaleanchor": "x", "constrain": "domain", "constraintoward": "top"}
    figure.update_yaxes(title_text=f"trait PC2 ({ratio[1]:.0%})", **axis_look(zero=True), **equal)
    return figure


def _worth_naming(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ends of the axis, then those of both components: the most wanted first."""
    wanted = [row for pair in zip(rows[:NAMED], rows[::-1][:NAMED], strict=True) for row in pair]
    for i in (0, 1):
        ordered = sorted(rows, key=lambda row: float(row["coordinates"][i]))
        wanted += [*ordered[:3], *ordered[-3:]]
    return list({row["trait"]: row for row in wanted}.values())


def _name(row: dict[str, Any]) -> str:
    return escape(shortened(row["trait"]), quote=False)
