"""Figures of a fit, from the numbers of fit.json.

    for name, figure in figures(FitResult.load(folder)).items(): ...

What a fit lacks (intervals at layers without rollout means, a third component) leaves its mark or its figure
out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
import plotly.graph_objects as go

from personatlas.analysis.fit.result import (
    AxisComparison,
    FitResult,
    LayerFit,
    LearningCurve,
    RoleProjection,
    TraitResult,
)
from personatlas.analysis.html.canvas import (
    POINT_GAP,
    TEXT_FONT,
    Label,
    Style,
    add_labels,
    axis_style,
    empty_figure,
    line_style,
    plain,
)
from personatlas.analysis.stats import Interval

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NAMED = 5  # roles or traits named at each end of the axis
CLOSE = 12  # fewer layers than this are all named below their axis
CROWD = 120  # more roles than this are drawn as smaller dots
MARGIN = {"l": 60, "r": 16, "t": 16, "b": 48}
# distances mean the same in both directions
EQUAL = {"scaleanchor": "x", "constrain": "domain", "constraintoward": "top"}
T = TypeVar("T")


@dataclass(frozen=True)
class _Panel:
    """A panel over layers: a line, its interval band, and where shuffled labels lie (mean or None, 95th
    percentile)."""

    title: str
    hover: str
    y_axis: Style
    value: Callable[[LayerFit], float | None]
    interval: Callable[[LayerFit], Interval | None] = lambda row: None
    chance: Callable[[LayerFit], tuple[float | None, float] | None] = lambda row: None


def figures(fit: FitResult) -> dict[str, go.Figure]:
    """Returns every figure that the fit has the numbers for, by its name on the page."""
    drawn = {"layers": layer_figure(fit), "variance": variance_figure(fit)}
    n_components = min((len(role.coordinates) for role in fit.roles), default=0)
    if n_components >= 2:
        drawn["plane"] = plane_figure(fit)
    if n_components >= 3:
        drawn["cloud"] = cloud_figure(fit)
    if fit.curve and len(fit.curve.answers) > 1:
        drawn["curve"] = curve_figure(fit.curve)
    if fit.traits:
        drawn["traits"] = trait_figure(fit.traits)
    if fit.projections.positive and fit.projections.others:
        drawn["answers"] = answer_figure(fit)
    if fit.comparison and fit.comparison.z_scores:
        drawn["moved"] = moved_figure(fit.comparison)
    if fit.comparison and fit.comparison.cosines and len(fit.comparison.cosines) > 1:
        drawn["cosines"] = cosine_figure(fit.comparison)
    return drawn


def neutral_projection(fit: FitResult) -> float:
    """Returns the projection halfway between the pole's and the mean of the other roles', where colours are
    neutral."""
    return (fit.positive_role.projection + float(np.mean([role.projection for role in fit.other_roles]))) / 2


def plane_figure(fit: FitResult) -> go.Figure:
    """Draws the roles over PC1 and PC2, coloured by projection; the line from the roles' mean to the star is
    the axis."""
    figure = empty_figure(coloraxis=_role_colours(fit), margin={**MARGIN, "b": 124})
    star = fit.positive_role.coordinates
    line = line_style("--ink", 1.0, "dot")
    figure.add_scatter(x=[0, star[0]], y=[0, star[1]], mode="lines", hoverinfo="skip", line=line)
    for kind, roles in _roles_by_kind(fit).items():
        figure.add_scatter(
            **_positions(roles, 2), mode="markers", marker=_marker(kind, roles, 2), **_hover(roles)
        )
    labels = [
        Label(
            role.role,
            x=role.coordinates[0],
            y=role.coordinates[1],
            required=role.positive or role.role == fit.default,
            gap=POINT_GAP + 5 if role.positive else POINT_GAP,
            size=20 if role.positive else 12,
        )
        for role in _roles_to_name(fit)
    ]
    add_labels(figure, [role.coordinates[:2] for role in fit.roles], labels)
    first, second = fit.variance_ratio[:2]
    figure.update_xaxes(title_text=f"PC1 ({first:.0%} of the variance)", **axis_style(zero=True))
    figure.update_yaxes(title_text=f"PC2 ({second:.0%})", **axis_style(zero=True), **EQUAL)
    return figure


def cloud_figure(fit: FitResult) -> go.Figure:
    """Draws the same roles over PC1 to PC3, to be turned by hand."""
    side = {
        "gridcolor": "var(--grid)",
        "zerolinecolor": "var(--line)",
        "nticks": 6,
        "showbackground": False,
        "showticklabels": False,
        "showspikes": False,
    }
    camera = {"eye": {"x": 0.8, "y": -1.35, "z": 0.6}, "center": {"x": 0, "y": 0, "z": -0.05}}
    scene: Style = {"aspectmode": "data", "camera": camera, "dragmode": "turntable"}
    for number, name in enumerate("xyz", 1):
        scene[f"{name}axis"] = {**side, "title": {"text": f"PC{number}", "font": TEXT_FONT}}
    colours = {**_role_colours(fit), "showscale": False}  # the plane above shows the scale
    figure = empty_figure(coloraxis=colours, margin={"l": 0, "r": 0, "t": 0, "b": 0}, scene=scene)
    ends = {name: [0, end] for name, end in zip("xyz", fit.positive_role.coordinates, strict=True)}
    figure.add_scatter3d(**ends, mode="lines", hoverinfo="skip", line={"color": "var(--ink)", "width": 3})
    for kind, roles in _roles_by_kind(fit).items():
        figure.add_scatter3d(
            **_positions(roles, 3), mode="markers", marker=_marker(kind, roles, 3), **_hover(roles)
        )
    # labels turn with the cloud: name roles a quarter of its size apart
    candidates, named = _roles_to_name(fit), list[RoleProjection]()
    size = float(np.ptp([role.coordinates for role in candidates], axis=0).max())
    for role in candidates:
        if all(math.dist(role.coordinates, other.coordinates) > size / 4 for other in named):
            named.append(role)
    words = {
        "text": [plain(role.role) for role in named],
        "textposition": "top center",
        "textfont": TEXT_FONT,
    }
    figure.add_scatter3d(**_positions(named, 3), mode="text", hoverinfo="skip", **words)
    return figure


def trait_figure(traits: TraitResult) -> go.Figure:
    """Draws the traits over PC1 and PC2 of trait space, coloured by their cosine with the axis."""
    rows = traits.traits
    limit = max(abs(row.cosine) for row in rows) or 1.0
    colours = _colour_scale(-limit, limit, 0.5, "cosine with the axis")
    figure = empty_figure(coloraxis=colours, margin={**MARGIN, "b": 124})
    points = [row.coordinates[:2] for row in rows]
    x, y = zip(*points, strict=True)
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers",
        marker={
            "size": 8,
            "color": [row.cosine for row in rows],
            "coloraxis": "coloraxis",
            "line": {"color": "var(--outline)", "width": 0.8},
        },
        text=[f"<b>{plain(row.trait)}</b><br>cosine {row.cosine:.2f}" for row in rows],
        hovertemplate="%{text}<extra></extra>",
    )
    named = [row for pair in zip(rows[:NAMED], rows[::-1][:NAMED], strict=True) for row in pair]
    for axis in (0, 1):
        ordered = sorted(rows, key=lambda row: row.coordinates[axis])
        named += [*ordered[:3], *ordered[-3:]]
    named = list({row.trait: row for row in named}.values())
    add_labels(figure, points, [Label(row.trait, row.coordinates[0], row.coordinates[1]) for row in named])
    first, second = traits.variance_ratio[:2]
    figure.update_xaxes(title_text=f"trait PC1 ({first:.0%} of the variance)", **axis_style(zero=True))
    figure.update_yaxes(title_text=f"trait PC2 ({second:.0%})", **axis_style(zero=True), **EQUAL)
    return figure


def layer_figure(fit: FitResult) -> go.Figure:
    """Draws cos(PC1, axis), split-half cosine and |axis| over layers, each with the level of chance where it
    is known."""
    rows, panels = fit.layers, _panels(fit)
    figure = empty_figure(margin={"l": 48, "r": 14, "t": 44, "b": 44}, hovermode="x")
    gap = 0.1
    height = (1 - gap * (len(panels) - 1)) / len(panels)
    for number, panel in enumerate(panels):
        top, suffix = 1 - number * (height + gap), str(number + 1) if number else ""
        is_last = number == len(panels) - 1
        x = {
            **axis_style(),
            "anchor": f"y{suffix}",
            "showgrid": False,
            "range": [rows[0].layer - 0.6, len(rows) - 0.4],
            "showticklabels": is_last,
            "title": {"text": "layer"} if is_last else None,
            "matches": "x" if number else None,
        }
        domain = [max(top - height, 0), top]
        y = {**axis_style(), "anchor": f"x{suffix}", "domain": domain, "nticks": 5, **panel.y_axis}
        figure.update_layout({f"xaxis{suffix}": x, f"yaxis{suffix}": y})
        _draw_panel(figure, rows, panel, {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"})
        corner = {"x": 0, "xref": "paper", "xanchor": "left", "y": top, "yref": "paper", "yanchor": "bottom"}
        font = {**TEXT_FONT, "size": 13}
        figure.add_annotation(**corner, yshift=2, text=f"<b>{panel.title}</b>", showarrow=False, font=font)
    ends = {"x0": fit.layer, "x1": fit.layer, "y0": 0, "y1": 1, "yref": "paper"}
    figure.add_shape(type="line", **ends, line=line_style("--ink", 1.0, "dot"), layer="below")
    above = {"x": fit.layer, "y": 1, "yref": "paper", "yanchor": "bottom", "yshift": 16}
    figure.add_annotation(text=f"layer {fit.layer}", font=TEXT_FONT, showarrow=False, **above)
    return figure


def curve_figure(curve: LearningCurve) -> go.Figure:
    """Draws the cosine between two axes of n answers per role, its extrapolation, and the goal."""
    figure = empty_figure(margin=MARGIN)
    n, values = list(curve.answers), [interval.value for interval in curve.cosines]
    lows, highs = ([getattr(interval, end) for interval in curve.cosines] for end in ("low", "high"))
    area = {"fill": "toself", "fillcolor": "var(--accent-soft)", "line": {"width": 0}, "mode": "lines"}
    figure.add_scatter(x=[*n, *reversed(n)], y=[*highs, *reversed(lows)], hoverinfo="skip", **area)
    hover = "%{x:.3g} answers per role: cosine %{y:.2f}<extra></extra>"
    figure.add_scatter(x=n, y=values, hovertemplate=hover, **_line_and_dots(6))
    end = max(n)
    if curve.needed is not None and curve.needed > end:
        end = curve.needed
        signal = values[-1] / (1 - values[-1]) / n[-1]
        more = [n[-1] * (end / n[-1]) ** (i / 20) for i in range(21)]
        dotted = {"mode": "lines", "line": line_style("--accent", 1.5, "dot"), "hovertemplate": hover}
        figure.add_scatter(x=more, y=[m * signal / (1 + m * signal) for m in more], **dotted)
    goal = {"x0": min(n), "x1": end, "y0": curve.goal, "y1": curve.goal}
    figure.add_shape(type="line", **goal, line=line_style("--muted", 1.0, "dot"), layer="below")
    ticks = [m for m in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if m <= end * 1.1]
    figure.update_xaxes(
        title_text="answers per role in either half",
        type="log",
        tickvals=ticks,
        ticktext=[str(m) for m in ticks],
        **axis_style(),
    )
    y_range = [min(0.0, *lows) * 1.05, 1.02]
    figure.update_yaxes(title_text="cosine between two axes", range=y_range, **axis_style())
    return figure


def variance_figure(fit: FitResult) -> go.Figure:
    """Draws the cumulative variance between roles, with the components that hold 50, 70 and 90%."""
    total = (np.cumsum(fit.variance_ratio) * 100).tolist()
    figure = empty_figure(margin=MARGIN)
    hover = "%{x} components: %{y:.0f}%<extra></extra>"
    figure.add_scatter(x=list(range(1, len(total) + 1)), y=total, hovertemplate=hover, **_line_and_dots(5))
    for share, count in fit.components_for.items():
        percent = float(share) * 100
        if count > len(total):
            continue  # fit.json holds the first components only
        for x0, y1 in ((0, percent), (count, 0)):
            line = line_style("--muted", 1.0, "dot")
            figure.add_shape(type="line", x0=x0, x1=count, y0=percent, y1=y1, line=line, layer="below")
        at = {"x": count, "y": percent, "xanchor": "left", "yanchor": "top", "xshift": 6, "yshift": -2}
        figure.add_annotation(
            **at, text=f"<b>{count}</b> for {percent:.0f}%", showarrow=False, font=TEXT_FONT
        )
    figure.update_xaxes(title_text="number of components", range=[0, len(total) + 0.8], **axis_style())
    figure.update_yaxes(title_text="variance between roles", range=[0, 104], ticksuffix="%", **axis_style())
    return figure


def moved_figure(comparison: AxisComparison) -> go.Figure:
    """Draws the roles' z-scores on this axis over those on the other one; those that moved farthest have
    names."""
    figure, z = empty_figure(margin=MARGIN), comparison.z_scores
    ends = [min(min(pair) for pair in z.values()), max(max(pair) for pair in z.values())]
    figure.add_scatter(x=ends, y=ends, mode="lines", hoverinfo="skip", line=line_style("--muted", 1.0, "dot"))
    sides: dict[str, list[str]] = {"--positive": [], "--others": []}
    for name, change in comparison.moved:
        sides["--positive" if change >= 0 else "--others"].append(name)
    for colour, names in sides.items():
        figure.add_scatter(
            x=[z[name][1] for name in names],
            y=[z[name][0] for name in names],
            text=[plain(name) for name in names],
            mode="markers",
            marker={"color": f"var({colour})", "size": 6 if len(z) > CROWD else 9, "opacity": 0.75},
            hovertemplate="%{text}: %{y:.2f} here, %{x:.2f} there<extra></extra>",
        )
    named = [name for name, _ in comparison.moved[: 2 * NAMED]]
    labels = [Label(name, x=z[name][1], y=z[name][0]) for name in named]
    add_labels(figure, [pair[::-1] for pair in z.values()], labels)
    figure.update_xaxes(title_text="z-score on the other axis", **axis_style(zero=True))
    figure.update_yaxes(title_text="z-score on this axis", **axis_style(zero=True), **EQUAL)
    return figure


def cosine_figure(comparison: AxisComparison) -> go.Figure:
    """Draws the cosine between the two axes over layers."""
    figure = empty_figure(margin=MARGIN)
    cosines = {int(layer): cosine for layer, cosine in (comparison.cosines or {}).items()}
    hover = "layer %{x}: cosine %{y:.2f}<extra></extra>"
    figure.add_scatter(x=list(cosines), y=list(cosines.values()), hovertemplate=hover, **_line_and_dots(5))
    figure.update_xaxes(title_text="layer", dtick=1 if len(cosines) < CLOSE else None, **axis_style())
    y_range = [min(0.0, *cosines.values()) * 1.05, 1.04]
    figure.update_yaxes(title_text="cosine between the axes", range=y_range, **axis_style(zero=True))
    return figure


def answer_figure(fit: FitResult) -> go.Figure:
    """Draws densities of single answers' projections, pole and other roles, with quantiles below."""
    sides = {"others": np.asarray(fit.projections.others), "positive": np.asarray(fit.projections.positive)}
    names = {"positive": plain(fit.positive, 14), "others": "other roles"}
    both = np.concatenate(list(sides.values()))
    # Freedman-Diaconis by the smaller group is ragged on 80 answers; both groups share 15 to 60 bins
    edges = np.histogram_bin_edges(both, bins=int(np.clip(np.sqrt(len(both)), 15, 60)))
    figure = empty_figure(margin={"l": 92, "r": 16, "t": 36, "b": 48}, showlegend=True)
    for side, values in sides.items():
        colour, name = f"var(--{side})", names[side]
        density, _ = np.histogram(values, bins=edges, density=True)
        figure.add_scatter(
            x=np.repeat(edges, 2).tolist(),
            y=[0.0, *np.repeat(density, 2).tolist(), 0.0],
            name=f"{name} (n = {len(values):,})",
            mode="lines",
            hoverinfo="skip",
            fill="tozeroy",
            fillcolor=f"var(--{side}-soft)",
            line={"color": colour, "width": 1.5},
        )
        low, first, median, third, high = np.quantile(values, QUANTILES).tolist()
        text = f"median {median:.4g}<br>half in {first:.4g} to {third:.4g}<br>90% in {low:.4g} to {high:.4g}"
        strip = {
            "yaxis": "y2",
            "showlegend": False,
            "hovertemplate": f"<b>{name}</b><br>{text}<extra></extra>",
        }
        for ends, width in (((low, high), 1.5), ((first, third), 7)):
            line = {"color": colour, "width": width}
            figure.add_scatter(x=ends, y=[name, name], mode="lines", line=line, **strip)
        dot = {"color": "var(--paper)", "size": 9, "line": {"color": colour, "width": 2}}
        figure.add_scatter(x=[median], y=[name], mode="markers", marker=dot, **strip)
    room = 0.02 * float(edges[-1] - edges[0])
    figure.update_xaxes(
        title_text=f"projection at layer {fit.layer} (+ toward {plain(fit.poles[0], 20)})",
        range=[float(edges[0]) - room, float(edges[-1]) + room],
        **axis_style(),
        anchor="y2",
    )
    density_axis = {"domain": [0.28, 1], "showticklabels": False, "showgrid": False, "rangemode": "tozero"}
    figure.update_layout(
        yaxis={**axis_style(), **density_axis, "title": {"text": "density"}},
        yaxis2={
            "domain": [0, 0.2],
            "showgrid": False,
            "fixedrange": True,
            "zeroline": False,
            "type": "category",
        },
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def _panels(fit: FitResult) -> list[_Panel]:
    """The panels over layers that the fit has numbers for."""
    rows = fit.layers
    lows = [row.split_half.low or 0.0 for row in rows if row.split_half]
    cosines = _Panel(
        "cos(PC1, axis)",
        "cos(PC1, axis) %{y:.2f}",
        {"range": [0, 1.02]},
        value=lambda row: row.cos_pc1,
        interval=lambda row: row.cos_pc1_by_roles,
        chance=lambda row: (row.null.cos_pc1, row.null.cos_pc1_95) if row.null else None,
    )
    halves = _Panel(
        "split-half cosine",
        "split-half %{y:.2f}",
        {"range": [min(0.0, *lows) * 1.05, 1.02]} if lows else {},
        value=lambda row: row.split_half.value if row.split_half else None,
        interval=lambda row: row.split_half,
    )
    norms = _Panel("|axis|", "|axis| %{y:.3g}", {"rangemode": "tozero"}, value=lambda row: row.norm)
    if any(row.null for row in rows):
        norms = _Panel(
            "|axis| ÷ |axis| with shuffled labels",
            "%{y:.2f} times the shuffled length",
            {"rangemode": "tozero"},
            value=lambda row: row.norm / row.null.norm if row.null else None,
            chance=lambda row: (None, row.null.norm_95 / row.null.norm) if row.null else None,
        )
    return [cosines, halves, norms] if lows else [cosines, norms]


def _draw_panel(figure: go.Figure, rows: Sequence[LayerFit], panel: _Panel, axes: dict[str, str]) -> None:
    for run, chance in _runs(rows, panel.chance):
        _add_band(figure, run, [0.0] * len(run), [top for _, top in chance], "--chance-soft", axes)
        if chance[0][0] is not None:
            means = [mean for mean, _ in chance if mean is not None]
            dotted: Style = {"mode": "lines", "line": line_style("--muted", 1.2, "dot")}
            _add_line(figure, run, means, "shuffled labels %{y:.2f}", dotted, axes)
    for run, intervals in _runs(rows, panel.interval):
        lows, highs = ([getattr(interval, end) for interval in intervals] for end in ("low", "high"))
        _add_band(figure, run, lows, highs, "--accent-soft", axes)
    for run, values in _runs(rows, panel.value):
        _add_line(figure, run, values, panel.hover, _line_and_dots(4), axes)


def _add_band(
    figure: go.Figure,
    run: Sequence[LayerFit],
    low: list[float],
    high: list[float],
    colour: str,
    axes: dict[str, str],
) -> None:
    layers = [float(row.layer) for row in run]
    if len(run) == 1:  # an area of no width would not be seen
        layers, low, high = [layers[0] - 0.2, layers[0] + 0.2], low * 2, high * 2
    outline = {"x": [*layers, *layers[::-1]], "y": [*high, *low[::-1]], "mode": "lines", "line": {"width": 0}}
    figure.add_scatter(**outline, fill="toself", fillcolor=f"var({colour})", hoverinfo="skip", **axes)


def _add_line(
    figure: go.Figure,
    run: Sequence[LayerFit],
    values: list[float],
    hover: str,
    style: Style,
    axes: dict[str, str],
) -> None:
    layers, hover = [row.layer for row in run], f"layer %{{x}}: {hover}<extra></extra>"
    figure.add_scatter(x=layers, y=values, hovertemplate=hover, **style, **axes)


def _line_and_dots(size: int) -> Style:
    dots = {"size": size, "color": "var(--accent)"}
    return {"mode": "lines+markers", "line": line_style("--accent", 2.0), "marker": dots}


def _runs(
    rows: Sequence[LayerFit], value: Callable[[LayerFit], T | None]
) -> list[tuple[list[LayerFit], list[T]]]:
    """Stretches of neighbouring layers that have a value, so that no band bridges a layer without."""
    valued = [(row, found) for row in rows if (found := value(row)) is not None]
    runs = groupby(enumerate(valued), key=lambda item: item[1][0].layer - item[0])
    pairs = [[pair for _, pair in run] for _, run in runs]
    return [([row for row, _ in run], [found for _, found in run]) for run in pairs]


def _roles_by_kind(fit: FitResult) -> dict[str, list[RoleProjection]]:
    """Roles by symbol: the pole a star, a default that is not the pole a diamond, the rest dots."""
    kinds: dict[str, list[RoleProjection]] = {"dot": [], "default": [], "pole": []}
    for role in fit.roles:
        kinds["pole" if role.positive else "default" if role.role == fit.default else "dot"].append(role)
    return {kind: roles for kind, roles in kinds.items() if roles}


def _marker(kind: str, roles: Sequence[RoleProjection], dimensions: int) -> Style:
    is_flat, is_dot = dimensions == 2, kind == "dot"
    default, pole = ("diamond", "star") if is_flat else ("square", "diamond")
    size = {"dot": 7 if len(roles) > CROWD else 10, "default": 13, "pole": 19}[kind]
    return {
        "symbol": {"dot": "circle", "default": default, "pole": pole}[kind],
        "size": size if is_flat else size / 2.2,
        "line": {"color": f"var(--{'outline' if is_dot else 'ink'})", "width": 0.8 if is_dot else 1.2},
        "opacity": 1,
        "color": [role.projection for role in roles],
        "coloraxis": "coloraxis",
    }


def _role_colours(fit: FitResult) -> Style:
    """Diverging, neutral halfway between the pole and the other roles' mean; each side reaches its own
    extreme."""
    values = [role.projection for role in fit.roles]
    low, high = min(values), max(values)
    share = (neutral_projection(fit) - low) / (high - low) if high > low else 0.5
    space = "<br><span style='font-size:5px'> </span>"  # plotly leaves none between title and bar
    title = f"projection (+ toward {plain(fit.poles[0], 20)}){space}"
    return _colour_scale(low, high, min(max(share, 0.01), 0.99), title)


def _colour_scale(low: float, high: float, middle: float, title: str) -> Style:
    """A colour axis with its bar below the figure; `middle` is the share of its length at which it is
    neutral."""
    return {
        "colorscale": [[0, "var(--others)"], [middle, "var(--middle)"], [1, "var(--positive)"]],
        "cmin": low,
        "cmax": high,
        "colorbar": {
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "thickness": 9,
            "outlinewidth": 0,
            "title": {"text": title, "side": "top", "font": {"size": 13}},
            "nticks": 6,
            "lenmode": "fraction",
            "len": 0.8,
            "ypad": 4,
        },
    }


def _roles_to_name(fit: FitResult) -> list[RoleProjection]:
    """Roles to label, most important first: pole, default, ends of the axis, of PC1 and of PC2."""
    named = [fit.positive_role, *(role for role in fit.roles if role.role == fit.default)]
    others = fit.other_roles
    named += [role for pair in zip(others[:NAMED], others[::-1][:NAMED], strict=True) for role in pair]
    for axis in (0, 1):
        ordered = sorted(fit.roles, key=lambda role: role.coordinates[axis])
        named += [*ordered[:2], *ordered[-2:]]
    return list({role.role: role for role in named}.values())


def _positions(roles: Sequence[RoleProjection], dimensions: int) -> dict[str, list[float]]:
    return {name: [role.coordinates[i] for role in roles] for i, name in enumerate("xyz"[:dimensions])}


def _hover(roles: Sequence[RoleProjection]) -> Style:
    texts = []
    for role in roles:
        interval = "" if role.low is None else f" [{role.low:.4g}, {role.high:.4g}]"
        place = f"projection {role.projection:.4g}{interval}"
        texts.append(f"<b>{plain(role.role)}</b><br>{place}<br>{role.n} answers")
    return {"text": texts, "hovertemplate": "%{text}<extra></extra>"}
