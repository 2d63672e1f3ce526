"""Figures of a fit, as plotly figures from the numbers in fit.json.

    for name, figure in figures(fit).items(): ...

Colours are written as `var(--name)`: the page resolves them to its palette, so a figure follows light and dark. What a
fit does not hold (intervals at layers without rollout means, a third component) leaves its mark or figure out.

The figure of how many answers an axis needs.

The figure of trait space.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
import plotly.graph_objects as go

from personatlas.analysis.html.canvas import (
    DOT,
    SCREENS,
    WORDS,
    Label,
    axis_look,
    empty_figure,
    line_look,
    place_labels,
    shortened,
)


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


NAMED = 5  # traits named at each end of the axis


def trait_plane(traits: dict[str, Any]) -> go.Figure:
    """Traits over the first two components of trait space, coloured by their cosine with the axis."""
    rows = traits["traits"]
    limit = max(abs(row["cosine"]) for row in rows) or 1.0
    stops = [[0, "var(--others)"], [0.5, "var(--middle)"], [1, "var(--positive)"]]
    bar = {
        "orientation": "h",
        "yref": "container",
        "y": 0,
        "yanchor": "bottom",
        "thickness": 9,
        "outlinewidth": 0,
    }
    bar |= {
        "title": {"text": "cosine with the axis", "side": "top", "font": {"size": 13}},
        "len": 0.8,
        "ypad": 4,
    }
    colours = {"colorscale": stops, "cmin": -limit, "cmax": limit, "colorbar": bar}
    figure = empty_figure(coloraxis=colours, margin={"l": 60, "r": 16, "t": 16, "b": 124})
    x, y = ([row["coordinates"][i] for row in rows] for i in (0, 1))
    edge = {"color": "var(--outline)", "width": 0.8}
    look = {"size": 8, "color": [row["cosine"] for row in rows], "coloraxis": "coloraxis", "line": edge}
    text = [f"<b>{_figures_traits_name(row)}</b><br>cosine {row['cosine']:.2f}" for row in rows]
    figure.add_scatter(
        x=x, y=y, mode="markers", marker=look, text=text, hovertemplate="%{text}<extra></extra>"
    )
    wanted = _figures_traits_worth_naming(rows)
    for screen, size in SCREENS.items():
        labels = [Label(shortened(row["trait"]), *row["coordinates"][:2]) for row in wanted]
        placed = place_labels(list(zip(x, y, strict=True)), labels, size)
        named = [wanted[i] for i in placed]
        places = {name: [row["coordinates"][i] for row in named] for i, name in enumerate("xy")}
        words = {
            "text": [_figures_traits_name(row) for row in named],
            "textposition": list(placed.values()),
            "textfont": WORDS,
        }
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


def _figures_traits_worth_naming(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ends of the axis, then those of both components: the most wanted first."""
    wanted = [row for pair in zip(rows[:NAMED], rows[::-1][:NAMED], strict=True) for row in pair]
    for i in (0, 1):
        ordered = sorted(rows, key=lambda row: float(row["coordinates"][i]))
        wanted += [*ordered[:3], *ordered[-3:]]
    return list({row["trait"]: row for row in wanted}.values())


def _figures_traits_name(row: dict[str, Any]) -> str:
    return escape(shortened(row["trait"]), quote=False)


LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
ENDS = 5  # how many roles at each end of the axis are named
CROWD = 120  # more roles than this are drawn as smaller dots

Role = dict[str, Any]
Line = dict[str, Any]
Place = dict[str, str]


def figures(fit: dict[str, Any]) -> dict[str, go.Figure]:
    """Every figure that this fit has the numbers for, by the name that the page knows it by."""
    made = {"layers": by_layer(fit), "variance": variance(fit)}
    n_components = min((len(role["coordinates"]) for role in fit["roles"]), default=0)
    if n_components >= 2:
        made["plane"] = plane(fit)
    if n_components >= 3:
        made["cloud"] = cloud(fit)
    if fit.get("curve") and len(fit["curve"]["answers"]) > 1:
        made["curve"] = curve(fit["curve"])
    if fit.get("traits"):
        made["traits"] = trait_plane(fit["traits"])
    if all(fit["projections"].get(side) for side in ("positive", "others")):
        made["answers"] = answers(fit)
    return made


def middle(fit: dict[str, Any]) -> float:
    """Halfway between the pole's projection and the mean of the other roles': where colours are neutral."""
    others = [role["projection"] for role in fit["roles"] if not role["positive"]]
    return (float(_pole(fit)["projection"]) + float(np.mean(others))) / 2


def plane(fit: dict[str, Any]) -> go.Figure:
    """Roles over PC1 and PC2, coloured by projection; the line from the roles' mean to the star is the axis."""
    figure = empty_figure(coloraxis=_coloraxis(fit), margin={"l": 60, "r": 16, "t": 16, "b": 124})
    star = _pole(fit)["coordinates"]
    figure.add_scatter(
        x=[0, star[0]], y=[0, star[1]], mode="lines", hoverinfo="skip", line=line_look("--ink", 1.0, "dot")
    )
    for kind, members in _kinds(fit).items():
        figure.add_scatter(
            **_places(members, 2), mode="markers", marker=_marker(kind, members, 2), **_hover(members)
        )
    for screen, size in SCREENS.items():
        worth = _worth_naming(fit)
        wanted = [_label(role, fit) for role in worth]
        placed = place_labels([role["coordinates"][:2] for role in fit["roles"]], wanted, size)
        roles, positions = [worth[i] for i in placed], list(placed.values())
        words = {
            "text": [_name(role) for role in roles],
            "textposition": positions,
            "textfont": WORDS,
            "meta": screen,
        }
        # unseen markers: plotly keeps a label clear of the marker in its own trace only
        unseen = {"size": [20 if role["positive"] else 12 for role in roles], "opacity": 0}
        look = {"mode": "markers+text", "marker": unseen, "hoverinfo": "skip", "cliponaxis": False}
        figure.add_scatter(**_places(roles, 2), **words, **look)
    figure.update_xaxes(
        title_text=f"PC1 ({fit['variance_ratio'][0]:.0%} of the variance)", **axis_look(zero=True)
    )
    # distances mean the same in both directions
    equal = {"scaleanchor": "x", "constrain": "domain", "constraintoward": "top"}
    figure.update_yaxes(title_text=f"PC2 ({fit['variance_ratio'][1]:.0%})", **axis_look(zero=True), **equal)
    return figure


def cloud(fit: dict[str, Any]) -> go.Figure:
    """The same roles in PC1 to PC3, to be turned by hand."""
    side = {"gridcolor": "var(--grid)", "zerolinecolor": "var(--line)", "nticks": 6}
    side |= {"showbackground": False, "showticklabels": False, "showspikes": False}
    camera = {"eye": {"x": 0.8, "y": -1.35, "z": 0.6}, "center": {"x": 0, "y": 0, "z": -0.05}}
    scene: dict[str, Any] = {"aspectmode": "data", "camera": camera, "dragmode": "turntable"}
    for i, name in enumerate("xyz"):
        scene[f"{name}axis"] = {**side, "title": {"text": f"PC{i + 1}", "font": WORDS}}
    coloraxis = {**_coloraxis(fit), "showscale": False}  # the plane above has it
    figure = empty_figure(coloraxis=coloraxis, margin={"l": 0, "r": 0, "t": 0, "b": 0}, scene=scene)
    star = _pole(fit)["coordinates"]
    ends = {name: [0, star[i]] for i, name in enumerate("xyz")}
    figure.add_scatter3d(**ends, mode="lines", hoverinfo="skip", line={"color": "var(--ink)", "width": 3})
    for kind, members in _kinds(fit).items():
        figure.add_scatter3d(
            **_places(members, 3), mode="markers", marker=_marker(kind, members, 3), **_hover(members)
        )
    named = _far_apart(_worth_naming(fit))
    words = {"text": [_name(role) for role in named], "textposition": "top center"}
    figure.add_scatter3d(**_places(named, 3), mode="text", hoverinfo="skip", textfont=WORDS, **words)
    return figure


def by_layer(fit: dict[str, Any]) -> go.Figure:
    """Panels over layers: cos(PC1, axis), split-half and the axis's length, each against chance where it is known."""
    lines = fit["layers"]
    panels: list[tuple[str, Any]] = [("cos(PC1, axis)", _cosines)]
    if any("split_half" in line for line in lines):
        panels.append(("split-half cosine", _halves))
    has_null = any("null" in line for line in lines)
    panels.append(("|axis| ÷ |axis| with shuffled labels" if has_null else "|axis|", _lengths))
    figure = empty_figure(margin={"l": 48, "r": 14, "t": 44, "b": 44}, hovermode="x")
    gap = 0.1
    height = (1 - gap * (len(panels) - 1)) / len(panels)
    for i, (title, draw) in enumerate(panels):
        top, number, last = 1 - i * (height + gap), str(i + 1) if i else "", i == len(panels) - 1
        x = {
            **axis_look(),
            "anchor": f"y{number}",
            "showgrid": False,
            "range": [lines[0]["layer"] - 0.6, len(lines) - 0.4],
        }
        x |= {
            "showticklabels": last,
            "title": {"text": "layer"} if last else None,
            "matches": "x" if i else None,
        }
        y = {**axis_look(), "anchor": f"x{number}", "domain": [max(top - height, 0), top], "nticks": 5}
        figure.update_layout({f"xaxis{number}": x, f"yaxis{number}": y})
        figure.update_layout(
            {f"yaxis{number}": draw(figure, lines, {"xaxis": f"x{number}", "yaxis": f"y{number}"})}
        )
        place = {
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": top,
            "yref": "paper",
            "yanchor": "bottom",
            "yshift": 2,
        }
        figure.add_annotation(**place, text=f"<b>{title}</b>", showarrow=False, font={**WORDS, "size": 13})
    ends = {"x0": fit["layer"], "x1": fit["layer"], "y0": 0, "y1": 1, "yref": "paper"}
    figure.add_shape(type="line", **ends, line=line_look("--ink", 1.0, "dot"), layer="below")
    above = {
        "x": fit["layer"],
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "yshift": 16,
        "showarrow": False,
    }
    figure.add_annotation(text=f"layer {fit['layer']}", font=WORDS, **above)
    return figure


def variance(fit: dict[str, Any]) -> go.Figure:
    """Cumulative share of the variance between roles, with the numbers of components for 50, 70 and 90%."""
    total = np.cumsum(fit["variance_ratio"]) * 100
    figure = empty_figure(margin={"l": 60, "r": 16, "t": 16, "b": 48})
    look = {
        "mode": "lines+markers",
        "line": line_look("--accent", 2.0),
        "marker": {"size": 5, "color": "var(--accent)"},
    }
    hover = "%{x} components: %{y:.0f}%<extra></extra>"
    figure.add_scatter(x=list(range(1, len(total) + 1)), y=total.tolist(), hovertemplate=hover, **look)
    for share, count in fit["components_for"].items():
        percent = float(share) * 100
        if count > len(total):
            continue  # only the first components are in the report
        for x0, y1 in ((0, percent), (count, 0)):
            line = line_look("--muted", 1.0, "dot")
            figure.add_shape(type="line", x0=x0, x1=count, y0=percent, y1=y1, line=line, layer="below")
        place = {"x": count, "y": percent, "xanchor": "left", "yanchor": "top", "xshift": 6, "yshift": -2}
        figure.add_annotation(**place, text=f"<b>{count}</b> for {percent:.0f}%", showarrow=False, font=WORDS)
    figure.update_xaxes(title_text="number of components", range=[0, len(total) + 0.8], **axis_look())
    figure.update_yaxes(title_text="variance between roles", range=[0, 104], ticksuffix="%", **axis_look())
    return figure


def answers(fit: dict[str, Any]) -> go.Figure:
    """Densities of single answers' projections, the pole's against the others', with quantiles below."""
    sides = {side: np.asarray(fit["projections"][side]) for side in ("others", "positive")}
    both = np.concatenate(list(sides.values()))
    # Freedman-Diaconis by the smaller group would be ragged on 80 answers; 15 to 60 bins shared by both are calm
    edges = np.histogram_bin_edges(both, bins=int(np.clip(np.sqrt(len(both)), 15, 60)))
    labels = {"positive": escape(shortened(fit["positive"], 14), quote=False), "others": "other roles"}
    figure = empty_figure(margin={"l": 92, "r": 16, "t": 36, "b": 48}, showlegend=True)
    for side, own in sides.items():
        colour, name = f"var(--{side})", labels[side]
        density, _ = np.histogram(own, bins=edges, density=True)
        # a closed staircase, with its ends on the ground
        x, y = np.repeat(edges, 2).tolist(), [0.0, *np.repeat(density, 2).tolist(), 0.0]
        area = {
            "fill": "tozeroy",
            "fillcolor": f"var(--{side}-soft)",
            "line": {"color": colour, "width": 1.5},
        }
        figure.add_scatter(
            x=x, y=y, name=f"{name} (n = {len(own):,})", mode="lines", hoverinfo="skip", **area
        )
        low, first, median, third, high = (float(quantile) for quantile in np.quantile(own, LEVELS))
        text = f"median {median:.4g}<br>half in {first:.4g} to {third:.4g}<br>90% in {low:.4g} to {high:.4g}"
        strip = {
            "yaxis": "y2",
            "showlegend": False,
            "hovertemplate": f"<b>{name}</b><br>{text}<extra></extra>",
        }
        for ends, width in (((low, high), 1.5), ((first, third), 7)):
            figure.add_scatter(
                x=ends, y=[name, name], mode="lines", line={"color": colour, "width": width}, **strip
            )
        dot = {"color": "var(--paper)", "size": 9, "line": {"color": colour, "width": 2}}
        figure.add_scatter(x=[median], y=[name], mode="markers", marker=dot, **strip)
    room = 0.02 * float(edges[-1] - edges[0])
    x_axis = {**axis_look(), "anchor": "y2", "range": [float(edges[0]) - room, float(edges[-1]) + room]}
    figure.update_xaxes(title_text=f"projection at layer {fit['layer']} (+ toward {_toward(fit)})", **x_axis)
    density_axis = {
        "domain": [0.28, 1],
        "showticklabels": False,
        "showgrid": False,
        "title": {"text": "density"},
    }
    names = {"domain": [0, 0.2], "showgrid": False, "fixedrange": True, "zeroline": False, "type": "category"}
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(
        yaxis={**axis_look(), **density_axis, "rangemode": "tozero"}, yaxis2=names, legend=legend
    )
    return figure


def _cosines(figure: go.Figure, lines: list[Line], at: Place) -> dict[str, Any]:
    for run in _runs(lines, "null"):
        nulls = [line["null"] for line in run]
        _band(figure, run, [0.0] * len(run), [null["cos_pc1_95"] for null in nulls], "--chance-soft", at)
        _curve(
            figure, run, [null["cos_pc1"] for null in nulls], "shuffled labels %{y:.2f}", at, "--muted", "dot"
        )
    for run in _runs(lines, "cos_pc1_by_roles"):
        _interval_band(figure, run, "cos_pc1_by_roles", at)
    _curve(figure, lines, [line["cos_pc1"] for line in lines], "cos(PC1, axis) %{y:.2f}", at)
    return {"range": [0, 1.02]}


def _halves(figure: go.Figure, lines: list[Line], at: Place) -> dict[str, Any]:
    lows = [0.0]
    for run in _runs(lines, "split_half"):
        _interval_band(figure, run, "split_half", at)
        _curve(figure, run, [line["split_half"]["value"] for line in run], "split-half %{y:.2f}", at)
        lows += [line["split_half"]["low"] for line in run]
    return {"range": [min(lows) * 1.05, 1.02]}


def _lengths(figure: go.Figure, lines: list[Line], at: Place) -> dict[str, Any]:
    runs = _runs(lines, "null")
    for run in runs:
        means = [line["null"]["norm"] for line in run]
        chance = [line["null"]["norm_95"] / mean for line, mean in zip(run, means, strict=True)]
        _band(figure, run, [0.0] * len(run), chance, "--chance-soft", at)
        ratio = [line["norm"] / mean for line, mean in zip(run, means, strict=True)]
        _curve(figure, run, ratio, "%{y:.2f} times the shuffled length", at)
    if not runs:
        _curve(figure, lines, [line["norm"] for line in lines], "|axis| %{y:.3g}", at)
    return {"rangemode": "tozero"}


def _interval_band(figure: go.Figure, run: list[Line], name: str, at: Place) -> None:
    low, high = ([line[name][end] for line in run] for end in ("low", "high"))
    _band(figure, run, low, high, "--accent-soft", at)


def _band(
    figure: go.Figure, run: list[Line], low: list[float], high: list[float], colour: str, at: Place
) -> None:
    layers = [line["layer"] for line in run]
    if len(run) == 1:  # an area of no width would not be seen
        layers, low, high = [layers[0] - 0.2, layers[0] + 0.2], low * 2, high * 2
    outline = {"x": [*layers, *layers[::-1]], "y": [*high, *low[::-1]], "mode": "lines", "line": {"width": 0}}
    figure.add_scatter(**outline, fill="toself", fillcolor=f"var({colour})", hoverinfo="skip", **at)


def _curve(
    figure: go.Figure,
    run: list[Line],
    values: list[float],
    hover: str,
    at: Place,
    colour: str = "--accent",
    dash: str = "solid",
) -> None:
    look: dict[str, Any] = {"mode": "lines", "line": line_look(colour, 2.0 if dash == "solid" else 1.2, dash)}
    if dash == "solid":
        look |= {"mode": "lines+markers", "marker": {"size": 4, "color": f"var({colour})"}}
    layers, hover = [line["layer"] for line in run], f"layer %{{x}}: {hover}<extra></extra>"
    figure.add_scatter(x=layers, y=values, hovertemplate=hover, **look, **at)


def _runs(lines: list[Line], name: str) -> list[list[Line]]:
    """Stretches of neighbouring layers that have `name`, so that no band bridges a layer that lacks it."""
    pairs = groupby(
        enumerate(line for line in lines if name in line), key=lambda pair: pair[1]["layer"] - pair[0]
    )
    return [[line for _, line in run] for _, run in pairs]


def _kinds(fit: dict[str, Any]) -> dict[str, list[Role]]:
    """Roles by how they are drawn: the pole a star, a default that is not the pole a diamond, the rest dots."""
    kinds: dict[str, list[Role]] = {"dot": [], "default": [], "pole": []}
    for role in fit["roles"]:
        kinds["pole" if role["positive"] else "default" if role["role"] == fit["default"] else "dot"].append(
            role
        )
    return {kind: members for kind, members in kinds.items() if members}


def _marker(kind: str, members: list[Role], dimensions: int) -> dict[str, Any]:
    flat, small = dimensions == 2, len(members) > CROWD
    symbol = {
        "dot": "circle",
        "default": "diamond" if flat else "square",
        "pole": "star" if flat else "diamond",
    }[kind]
    size = {"dot": 7 if small else 10, "default": 13, "pole": 19}[kind]
    edge = {
        "color": "var(--outline)" if kind == "dot" else "var(--ink)",
        "width": 0.8 if kind == "dot" else 1.2,
    }
    colour = {"color": [role["projection"] for role in members], "coloraxis": "coloraxis"}
    return {"symbol": symbol, "size": size if flat else size / 2.2, "line": edge, "opacity": 1, **colour}


def _coloraxis(fit: dict[str, Any]) -> dict[str, Any]:
    """Diverging, neutral halfway between the pole and the other roles' mean; each side reaches its own extreme."""
    values = [role["projection"] for role in fit["roles"]]
    low, high = min(values), max(values)
    share = (middle(fit) - low) / (high - low) if high > low else 0.5
    stops = [[0, "var(--others)"], [min(max(share, 0.01), 0.99), "var(--middle)"], [1, "var(--positive)"]]
    bar = {
        "orientation": "h",
        "yref": "container",
        "y": 0,
        "yanchor": "bottom",
        "thickness": 9,
        "outlinewidth": 0,
    }
    space = "<br><span style='font-size:5px'> </span>"  # plotly leaves none between title and bar
    title = {"text": f"projection (+ toward {_toward(fit)}){space}", "side": "top", "font": {"size": 13}}
    bar |= {"title": title, "nticks": 6, "lenmode": "fraction", "len": 0.8, "ypad": 4}
    return {"colorscale": stops, "cmin": low, "cmax": high, "colorbar": bar}


def _label(role: Role, fit: dict[str, Any]) -> Label:
    x, y = role["coordinates"][:2]
    must = role["positive"] or role["role"] == fit["default"]  # these two are named come what may
    return Label(shortened(role["role"]), x, y, must, DOT + 5 if role["positive"] else DOT)


def _worth_naming(fit: dict[str, Any]) -> list[Role]:
    """Roles to label, the most wanted first: pole, default, then the ends of the axis, of PC1 and of PC2."""
    wanted = [role for role in fit["roles"] if role["positive"]]
    wanted += [role for role in fit["roles"] if role["role"] == fit["default"]]
    wanted += _ends(fit, ENDS)
    for i in (0, 1):
        ordered = sorted(fit["roles"], key=lambda role: float(role["coordinates"][i]))
        wanted += [*ordered[:2], *ordered[-2:]]
    return list({role["role"]: role for role in wanted}.values())


def _ends(fit: dict[str, Any], count: int) -> list[Role]:
    others = [role for role in fit["roles"] if not role["positive"]]
    pairs = zip(others[:count], others[::-1][:count], strict=True)
    return [role for pair in pairs for role in pair]


def _far_apart(wanted: list[Role]) -> list[Role]:
    """Those of the wanted roles that lie a quarter of the cloud's size from all before them: their labels turn."""
    size = float(np.ptp([role["coordinates"] for role in wanted], axis=0).max())
    found: list[Role] = []
    for role in wanted:
        if all(math.dist(role["coordinates"], other["coordinates"]) > size / 4 for other in found):
            found.append(role)
    return found


def _places(roles: Sequence[Role], dimensions: int) -> dict[str, list[float]]:
    return {name: [role["coordinates"][i] for role in roles] for i, name in enumerate("xyz"[:dimensions])}


def _pole(fit: dict[str, Any]) -> Role:
    pole: Role = next(role for role in fit["roles"] if role["positive"])
    return pole


def _toward(fit: dict[str, Any]) -> str:
    return escape(shortened(fit["poles"][0], 20), quote=False)


def _name(role: Role) -> str:
    return escape(shortened(role["role"]), quote=False)  # plotly reads its texts as markup


def _hover(roles: list[Role]) -> dict[str, Any]:
    texts = []
    for role in roles:
        interval = f" [{role['low']:.4g}, {role['high']:.4g}]" if "low" in role else ""
        texts.append(
            f"<b>{_name(role)}</b><br>projection {role['projection']:.4g}{interval}<br>{role['n']} answers"
        )
    return {"text": texts, "hovertemplate": "%{text}<extra></extra>"}
