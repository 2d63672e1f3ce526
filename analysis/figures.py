"""Figures of a fit, as plotly figures from the numbers in fit.json.

    for name, figure in figures(fit).items(): ...

Colours are written as `var(--name)`: the page resolves them to its palette, so a figure follows light and dark. What a
fit does not hold (intervals at layers without rollout means, a third component) leaves its mark or figure out.
"""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
import plotly.graph_objects as go

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
ENDS = 5  # how many roles at each end of the axis are named
# Where labels may lie is worked out for the plot areas of a desktop and of a phone, in pixels; the page shows one of them.
SCREENS = {"wide": (840, 500), "narrow": (310, 330)}
LETTER, LINE, DOT = 6.8, 15, 9  # pixels: width of a letter, height of a line, from a dot's centre to its label

Role = dict[str, Any]
Box = tuple[float, float, float, float]


def figures(fit: dict[str, Any]) -> dict[str, go.Figure]:
    """Every figure that this fit has the numbers for, by the name that the page knows it by."""
    made = {"layers": by_layer(fit), "variance": variance(fit)}
    n_components = min((len(role["coordinates"]) for role in fit["roles"]), default=0)
    if n_components >= 2:
        made["plane"] = plane(fit)
    if n_components >= 3:
        made["cloud"] = cloud(fit)
    if all(fit["projections"].get(side) for side in ("positive", "others")):
        made["answers"] = answers(fit)
    return made


def middle(fit: dict[str, Any]) -> float:
    """Halfway between the pole's projection and the mean of the other roles': where colours are neutral."""
    others = [role["projection"] for role in fit["roles"] if not role["positive"]]
    return (float(_pole(fit)["projection"]) + float(np.mean(others))) / 2


def plane(fit: dict[str, Any]) -> go.Figure:
    """Roles in the plane of PC1 and PC2, coloured by projection; the line from the roles' mean to the star is the axis."""
    roles = fit["roles"]
    figure = _figure(coloraxis=_coloraxis(fit), margin={"l": 56, "r": 16, "t": 16, "b": 48})
    star = _pole(fit)["coordinates"]
    figure.add_scatter(x=[0, star[0]], y=[0, star[1]], mode="lines", hoverinfo="skip", line=_line("--ink", 1, "dot"))
    for kind, members in _kinds(fit).items():
        x, y = ([role["coordinates"][i] for role in members] for i in (0, 1))
        hover = {"text": [_hover(role) for role in members], "hovertemplate": "%{text}<extra></extra>"}
        figure.add_scatter(x=x, y=y, mode="markers", marker=_marker(kind, members, 2), **hover)
    for screen, size in SCREENS.items():
        placed = _place_labels(_worth_naming(fit), roles, size)
        figure.add_scatter(
            x=[role["coordinates"][0] for role, _ in placed],
            y=[role["coordinates"][1] for role, _ in placed],
            text=[_name(role) for role, _ in placed],
            textposition=[position for _, position in placed],
            textfont={"color": "var(--ink)", "size": 12},
            mode="text",
            hoverinfo="skip",
            cliponaxis=False,
            meta=screen,
        )
    figure.update_xaxes(title_text=f"PC1 ({_share(fit, 0)} of the variance)", **_axis(zero=True))
    equal = {"scaleanchor": "x", "constrain": "domain"}  # distances mean the same in both directions
    figure.update_yaxes(title_text=f"PC2 ({_share(fit, 1)})", **_axis(zero=True), **equal)
    return figure


def cloud(fit: dict[str, Any]) -> go.Figure:
    """The same roles in PC1 to PC3, to be turned by hand."""
    side = {"gridcolor": "var(--grid)", "zerolinecolor": "var(--grid)", "showbackground": False, "nticks": 5}
    scene = {f"{name}axis": {**side, "title": {"text": f"PC{i + 1}"}} for i, name in enumerate("xyz")}
    # from the side of high PC1, so that the default's end faces the reader
    camera = {"eye": {"x": 0.95, "y": -1.35, "z": 0.6}, "center": {"x": 0, "y": 0, "z": -0.12}}
    scene |= {"aspectmode": "data", "camera": camera, "dragmode": "turntable"}
    figure = _figure(coloraxis=_coloraxis(fit), margin={"l": 0, "r": 0, "t": 0, "b": 0}, scene=scene)
    star = _pole(fit)["coordinates"]
    ends = dict(zip("xyz", ([0, star[i]] for i in range(3)), strict=True))
    figure.add_scatter3d(**ends, mode="lines", hoverinfo="skip", line={"color": "var(--ink)", "width": 3})
    for kind, members in _kinds(fit).items():
        hover = {"text": [_hover(role) for role in members], "hovertemplate": "%{text}<extra></extra>"}
        figure.add_scatter3d(**_places(members), mode="markers", marker=_marker(kind, members, 3), **hover)
    named = [role for role in _worth_naming(fit) if role["positive"] or role in _ends(fit, 3)]
    font = {"color": "var(--ink)", "size": 12}
    words = {"text": [_name(role) for role in named], "textposition": "top center", "textfont": font}
    figure.add_scatter3d(**_places(named), mode="text", hoverinfo="skip", **words)
    return figure


def by_layer(fit: dict[str, Any]) -> go.Figure:
    """Three panels over layers: cos(PC1, axis), split-half, and the axis's length, each against chance where it is known."""
    lines = fit["layers"]
    panels: list[tuple[str, Any]] = [("cos(PC1, axis)", _cosines)]
    if any("split_half" in line for line in lines):
        panels.append(("split-half cosine", _halves))
    has_null = any("null" in line for line in lines)
    panels.append(("|axis| ÷ |axis| with shuffled labels" if has_null else "|axis|", _lengths))
    figure = _figure(margin={"l": 44, "r": 14, "t": 34, "b": 44}, hovermode="x")
    gap, height = 0.1, (1 - 0.1 * (len(panels) - 1)) / len(panels)
    for i, (title, draw) in enumerate(panels):
        top = 1 - i * (height + gap)
        suffix = str(i + 1) if i else ""
        last = i == len(panels) - 1
        figure.update_layout(
            {
                f"xaxis{suffix}": {**_axis(), "anchor": f"y{suffix}", "matches": "x" if i else None, "showgrid": False},
                f"yaxis{suffix}": {
                    **_axis(),
                    "domain": [max(top - height, 0), top],
                    "anchor": f"x{suffix}",
                    "nticks": 5,
                },
            }
        )
        figure.update_layout({f"xaxis{suffix}": {"showticklabels": last, "title": {"text": "layer"} if last else None}})
        draw(figure, lines, f"x{suffix}", f"y{suffix}")
        figure.add_annotation(**_corner(title, top))
    line = _line("--ink", 1, "dot")
    figure.add_shape(type="line", x0=fit["layer"], x1=fit["layer"], y0=0, y1=1, yref="paper", line=line, layer="below")
    label = {"x": fit["layer"], "y": 1, "yref": "paper", "yanchor": "bottom", "yshift": 14, "showarrow": False}
    figure.add_annotation(text=f"layer {fit['layer']}", font={"color": "var(--ink)", "size": 12}, **label)
    return figure


def variance(fit: dict[str, Any]) -> go.Figure:
    """Cumulative share of the variance between roles, with the numbers of components for 50, 70 and 90%."""
    total = np.cumsum(fit["variance_ratio"]) * 100
    numbers = list(range(1, len(total) + 1))
    figure = _figure(margin={"l": 52, "r": 16, "t": 16, "b": 48})
    hover = "%{x} components: %{y:.0f}%<extra></extra>"
    mode, marker = "lines+markers", {"size": 5, "color": "var(--accent)"}
    figure.add_scatter(
        x=numbers, y=total.tolist(), mode=mode, line=_line("--accent", 2), marker=marker, hovertemplate=hover
    )
    for share, count in fit["components_for"].items():
        percent = float(share) * 100
        if count > len(total):
            continue  # only the first components are in the report
        for corner in (
            {"x0": 0, "x1": count, "y0": percent, "y1": percent},
            {"x0": count, "x1": count, "y0": 0, "y1": percent},
        ):
            figure.add_shape(type="line", **corner, line=_line("--muted", 1, "dot"), layer="below")
        place = {"x": count, "y": percent, "xanchor": "left", "yanchor": "top", "xshift": 6, "yshift": -2}
        text = f"<b>{count}</b> for {percent:.0f}%"
        figure.add_annotation(**place, text=text, showarrow=False, font={"color": "var(--ink)", "size": 12})
    figure.update_xaxes(title_text="number of components", range=[0, len(total) + 0.8], **_axis())
    figure.update_yaxes(title_text="variance between roles", range=[0, 104], ticksuffix="%", **_axis())
    return figure


def answers(fit: dict[str, Any]) -> go.Figure:
    """Densities of single answers' projections, the pole's against the others', with quantiles below."""
    sides = {side: np.asarray(fit["projections"][side]) for side in ("positive", "others")}
    both = np.concatenate(list(sides.values()))
    # Freedman-Diaconis by the smaller group would be ragged on 80 answers; 15 to 60 bins shared by both are calm
    edges = np.histogram_bin_edges(both, bins=int(np.clip(np.sqrt(len(both)), 15, 60)))
    labels = {"positive": escape(_cut(fit["positive"]), quote=False), "others": "other roles"}
    figure = _figure(margin={"l": 84, "r": 16, "t": 12, "b": 48}, showlegend=True, barmode="overlay")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, margin_t=36)
    for side in ("others", "positive"):
        own, colour, soft = sides[side], f"var(--{side})", f"var(--{side}-soft)"
        density, _ = np.histogram(own, bins=edges, density=True)
        # a closed staircase, with its ends on the ground
        x, y = np.repeat(edges, 2).tolist(), [0.0, *np.repeat(density, 2).tolist(), 0.0]
        name = f"{labels[side]} (n = {len(own):,})"
        area = {"fill": "tozeroy", "fillcolor": soft, "line": {"color": colour, "width": 1.5}, "mode": "lines"}
        figure.add_scatter(x=x, y=y, name=name, hoverinfo="skip", **area)
        low, first, median, third, high = (float(q) for q in np.quantile(own, LEVELS))
        text = f"{labels[side]}<br>median {median:.4g}<br>half in {first:.4g} to {third:.4g}<br>90% in {low:.4g} to {high:.4g}"
        strip: dict[str, Any] = {"yaxis": "y2", "showlegend": False, "hovertemplate": f"{text}<extra></extra>"}
        for ends, width in (((low, high), 1.5), ((first, third), 7)):
            line = {"color": colour, "width": width}
            figure.add_scatter(x=ends, y=[labels[side]] * 2, mode="lines", line=line, **strip)
        dot = {"color": "var(--paper)", "size": 9, "line": {"color": colour, "width": 2}}
        figure.add_scatter(x=[median], y=[labels[side]], mode="markers", marker=dot, **strip)
    figure.update_xaxes(
        title_text=f"projection at layer {fit['layer']} (+ toward {_toward(fit)})", anchor="y2", **_axis()
    )
    density_axis = {"domain": [0.28, 1], "showticklabels": False, "title": {"text": "density"}, "rangemode": "tozero"}
    names = {"domain": [0, 0.2], "showgrid": False, "fixedrange": True, "zeroline": False, "type": "category"}
    figure.update_layout(yaxis={**_axis(), **density_axis}, yaxis2=names)
    return figure


def _cosines(figure: go.Figure, lines: list[dict[str, Any]], x: str, y: str) -> None:
    null = [line for line in lines if "null" in line]
    for run in _runs(null):
        layers = [line["layer"] for line in run]
        _band(figure, layers, [0.0] * len(run), [line["null"]["cos_pc1_95"] for line in run], "--chance-soft", x, y)
        _curve(
            figure,
            layers,
            [line["null"]["cos_pc1"] for line in run],
            "--muted",
            x,
            y,
            "shuffled labels %{y:.2f}",
            "dot",
        )
    for run in _runs([line for line in lines if "cos_pc1_by_roles" in line]):
        _interval_band(figure, run, "cos_pc1_by_roles", x, y)
    _curve(
        figure,
        [li["layer"] for li in lines],
        [li["cos_pc1"] for li in lines],
        "--accent",
        x,
        y,
        "cos(PC1, axis) %{y:.2f}",
    )
    figure.update_layout({f"yaxis{y[1:]}": {"range": [0, 1.02]}})


def _halves(figure: go.Figure, lines: list[dict[str, Any]], x: str, y: str) -> None:
    for run in _runs([line for line in lines if "split_half" in line]):
        _interval_band(figure, run, "split_half", x, y)
        values = [line["split_half"]["value"] for line in run]
        _curve(figure, [line["layer"] for line in run], values, "--accent", x, y, "split-half %{y:.2f}")
    low = min(line["split_half"]["low"] for line in lines if "split_half" in line)
    figure.update_layout({f"yaxis{y[1:]}": {"range": [min(0.0, low * 1.05), 1.02]}})


def _lengths(figure: go.Figure, lines: list[dict[str, Any]], x: str, y: str) -> None:
    runs = _runs([line for line in lines if "null" in line])
    if not runs:
        layers, norms = [line["layer"] for line in lines], [line["norm"] for line in lines]
        _curve(figure, layers, norms, "--accent", x, y, "|axis| %{y:.3g}")
    for run in runs:
        layers, means = [line["layer"] for line in run], [line["null"]["norm"] for line in run]
        chance = [line["null"]["norm_95"] / mean for line, mean in zip(run, means, strict=True)]
        _band(figure, layers, [0.0] * len(run), chance, "--chance-soft", x, y)
        ratio = [line["norm"] / mean for line, mean in zip(run, means, strict=True)]
        _curve(figure, layers, ratio, "--accent", x, y, "%{y:.2f} times the shuffled length")
    figure.update_layout({f"yaxis{y[1:]}": {"rangemode": "tozero"}})


def _interval_band(figure: go.Figure, run: list[dict[str, Any]], name: str, x: str, y: str) -> None:
    low, high = ([line[name][end] for line in run] for end in ("low", "high"))
    _band(figure, [line["layer"] for line in run], low, high, "--accent-soft", x, y)


def _band(
    figure: go.Figure, layers: list[int], low: list[float], high: list[float], colour: str, x: str, y: str
) -> None:
    outline = {"x": [*layers, *layers[::-1]], "y": [*high, *low[::-1]]}
    if len(layers) == 1:  # an area of no width would not be seen
        outline = {"x": [layers[0] + step for step in (-0.2, 0.2, 0.2, -0.2)], "y": [high[0], high[0], low[0], low[0]]}
    fill = {"fill": "toself", "fillcolor": f"var({colour})", "mode": "lines", "line": {"width": 0}}
    figure.add_scatter(**outline, **fill, hoverinfo="skip", xaxis=x, yaxis=y)


def _curve(
    figure: go.Figure,
    layers: list[int],
    values: list[float],
    colour: str,
    x: str,
    y: str,
    hover: str,
    dash: str = "solid",
) -> None:
    look: dict[str, Any] = {"mode": "lines", "line": _line(colour, 2 if dash == "solid" else 1.2, dash)}
    if dash == "solid":
        look |= {"mode": "lines+markers", "marker": {"size": 4, "color": f"var({colour})"}}
    figure.add_scatter(
        x=layers, y=values, **look, hovertemplate=f"layer %{{x}}: {hover}<extra></extra>", xaxis=x, yaxis=y
    )


def _runs(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Stretches of neighbouring layers, so that no band bridges a layer that has none."""
    pairs = groupby(enumerate(lines), key=lambda pair: pair[1]["layer"] - pair[0])
    return [[line for _, line in run] for _, run in pairs]


def _kinds(fit: dict[str, Any]) -> dict[str, list[Role]]:
    """Roles by how they are drawn: the pole as a star, a default that is not the pole as a diamond, the rest as dots."""
    kinds: dict[str, list[Role]] = {"dot": [], "default": [], "pole": []}
    for role in fit["roles"]:
        kinds["pole" if role["positive"] else "default" if role["role"] == fit["default"] else "dot"].append(role)
    return {kind: members for kind, members in kinds.items() if members}


def _marker(kind: str, members: list[Role], dimensions: int) -> dict[str, Any]:
    flat = dimensions == 2
    symbol = {"dot": "circle", "default": "diamond", "pole": "star" if flat else "diamond"}[kind]
    size = {"dot": 10, "default": 14, "pole": 20}[kind] if flat else {"dot": 5, "default": 8, "pole": 9}[kind]
    line = {"color": "var(--ink)" if kind != "dot" else "var(--outline)", "width": 1.2 if kind != "dot" else 0.8}
    return {
        "symbol": symbol,
        "size": size,
        "color": [m["projection"] for m in members],
        "coloraxis": "coloraxis",
        "line": line,
    }


def _coloraxis(fit: dict[str, Any]) -> dict[str, Any]:
    """Diverging, neutral halfway between the pole and the other roles' mean; each side reaches its own extreme."""
    values = [role["projection"] for role in fit["roles"]]
    low, high = min(values), max(values)
    share = (middle(fit) - low) / (high - low) if high > low else 0.5
    stops = [[0, "var(--others)"], [min(max(share, 0.01), 0.99), "var(--middle)"], [1, "var(--positive)"]]
    bar = {"orientation": "h", "x": 0.5, "y": -0.2, "yanchor": "top", "len": 0.7, "thickness": 9, "outlinewidth": 0}
    title = {"text": f"projection on the axis (+ toward {_toward(fit)})", "side": "top"}
    return {"colorscale": stops, "cmin": low, "cmax": high, "colorbar": {**bar, "title": title, "nticks": 6}}


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


def _place_labels(wanted: list[Role], roles: list[Role], size: tuple[int, int]) -> list[tuple[Role, str]]:
    """Labels that cover neither a dot nor another label, greedily, on a plot area of `size` pixels."""
    points = np.array([role["coordinates"][:2] for role in roles])
    span = np.ptp(points, axis=0)
    scale = min(size[0] / (span[0] or 1), size[1] / (span[1] or 1)) * 0.9  # one scale: both axes are drawn alike
    dots = points * scale
    placed: list[tuple[Role, str]] = []
    boxes: list[Box] = []
    for role in wanted:
        x, y = (coordinate * scale for coordinate in role["coordinates"][:2])
        half = len(_cut(role["role"])) * LETTER / 2
        away = DOT + 5 if role["positive"] else DOT
        choices: dict[str, tuple[float, float]] = {
            "top center": (x, y + away),
            "bottom center": (x, y - away),
            "middle right": (x + half + away, y),
            "middle left": (x - half - away, y),
        }
        for position, (cx, cy) in choices.items():
            box = (cx - half, cy - LINE / 2, cx + half, cy + LINE / 2)
            if not any(_overlap(box, other) for other in boxes) and not _covers(box, dots):
                placed.append((role, position))
                boxes.append(box)
                break
    return placed


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _covers(box: Box, dots: Any) -> bool:
    inside = (dots[:, 0] > box[0]) & (dots[:, 0] < box[2]) & (dots[:, 1] > box[1]) & (dots[:, 1] < box[3])
    return bool(inside.any())


def _figure(**layout: Any) -> go.Figure:
    """An empty figure without plotly's own template: transparent, quiet, in the page's colours."""
    hover = {"bgcolor": "var(--card)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)", "size": 13}}
    clear = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "template": None, "dragmode": False}
    font = {"family": FONT, "size": 13, "color": "var(--muted)"}
    # a fixed uirevision keeps zoom and camera when the page redraws in other colours
    return go.Figure(
        layout={**clear, "font": font, "hoverlabel": hover, "showlegend": False, "uirevision": "keep", **layout}
    )


def _axis(*, zero: bool = False) -> dict[str, Any]:
    return {
        "gridcolor": "var(--grid)",
        "zeroline": zero,
        "zerolinecolor": "var(--line)",
        "linecolor": "var(--line)",
        "automargin": True,
        "title_standoff": 10,
    }


def _line(colour: str, width: float, dash: str = "solid") -> dict[str, Any]:
    return {"color": f"var({colour})", "width": width, "dash": dash}


def _corner(text: str, top: float) -> dict[str, Any]:
    place = {"x": 0, "xref": "paper", "xanchor": "left", "y": top, "yref": "paper", "yanchor": "bottom", "yshift": 1}
    return {**place, "text": f"<b>{text}</b>", "showarrow": False, "font": {"color": "var(--ink)", "size": 13}}


def _places(roles: Sequence[Role]) -> dict[str, list[float]]:
    return {name: [role["coordinates"][i] for role in roles] for i, name in enumerate("xyz")}


def _pole(fit: dict[str, Any]) -> Role:
    pole: Role = next(role for role in fit["roles"] if role["positive"])
    return pole


def _share(fit: dict[str, Any], i: int) -> str:
    return f"{fit['variance_ratio'][i]:.0%}"


def _toward(fit: dict[str, Any]) -> str:
    return escape(_cut(fit["poles"][0]), quote=False)


def _name(role: Role) -> str:
    return escape(_cut(role["role"]), quote=False)  # plotly reads its texts as markup


def _hover(role: Role) -> str:
    interval = f" [{role['low']:.4g}, {role['high']:.4g}]" if "low" in role else ""
    return f"<b>{_name(role)}</b><br>projection {role['projection']:.4g}{interval}<br>{role['n']} answers"


def _cut(text: str, length: int = 28) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
