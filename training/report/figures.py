"""The figures of a training run over its steps: loss, held-out text, rates, gradients, speed.

A curve of a hundred thousand steps is drawn from at most `MAX_POINTS` of them; what is smooth is smoothed
over all of them first.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy import ndarray as Array

from personatlas.analysis.html.canvas import axis_style, empty_figure, line_style
from personatlas.persona.records import JsonObject
from personatlas.training.report.read import TrainingRecord

MAX_POINTS = 1500
MARGIN = {"l": 60, "r": 18, "t": 14, "b": 46}
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def training_figures(record: TrainingRecord) -> dict[str, go.Figure]:
    """Every figure that the record has numbers for."""
    figures: dict[str, go.Figure] = {}
    loss = _series(record.steps, "loss")
    if len(loss[0]) > 1:
        figures["loss"] = loss_curve(*loss, record.total)
    if len(record.held_out) > 1:
        figures["held-out"] = held_out_curve(record)
    lines = {
        "rate": ("rate", "share of the highest rates", ".0%", "--accent"),
        "gradient": ("gradient_norm", "norm of the gradient", ".3~g", "--others"),
    }
    for name, (field, title, form, colour) in lines.items():
        series = _series(record.steps, field)
        if len(series[0]) > 1:
            figures[name] = line_curve(*series, title, form, colour, record.total, rough=name == "gradient")
    speed = _series(record.steps, "tokens_a_second")
    if len(speed[0]) > 1:
        figures["speed"] = speed_curve(*speed, record)
    return figures


def loss_curve(steps: Array, losses: Array, total: int | None) -> go.Figure:
    """Raw and smoothed training loss; `layout.meta` holds logarithmic axes, to which the page can change."""
    figure = empty_figure(margin=MARGIN, showlegend=True, hovermode="x unified", legend=LEGEND)
    smooth = smoothed(steps, losses)
    thin = _thinned(len(steps))
    raw = {"mode": "lines", "line": line_style("--middle", 1.0)}
    figure.add_scatter(x=steps[thin], y=losses[thin], name="each step", hovertemplate="%{y:.3f}", **raw)
    fine = {"mode": "lines", "line": line_style("--positive", 2.0), "name": "smoothed"}
    figure.add_scatter(x=steps[thin], y=smooth[thin], hovertemplate="%{y:.4f}", **fine)
    # the first steps' fall would leave the rest of the run a flat line
    begun = smooth[min(len(smooth) - 1, max(len(smooth) // 25, 3))]
    low, high = float(losses.min()), float(max(begun, smooth[-1]) * 1.03)
    room = 0.05 * (high - low)
    end = _end(steps, total)
    figure.update_xaxes(title_text="step", type="linear", range=[0, end], **axis_style())
    figure.update_yaxes(
        title_text="loss, nats a token", type="linear", range=[low - room, high + room], **axis_style()
    )
    first, top = max(1, int(steps[0])), float(losses.max())
    x_range = [float(np.log10(first)), float(np.log10(max(end, first + 1)))]
    y_range = [float(np.log10(max(low, 1e-6) * 0.97)), float(np.log10(top * 1.03))]
    figure.layout.meta = {
        "xaxis": {"type": "log", "dtick": 1, "range": x_range},
        "yaxis": {"type": "log", "range": y_range},
    }
    return figure


def held_out_curve(record: TrainingRecord) -> go.Figure:
    """Bits per byte (or the loss) of held-out text, its last value written out."""
    name = "bits_per_byte" if record.in_bits else "loss"
    steps, values = _series(record.held_out, name)
    figure = empty_figure(margin={**MARGIN, "r": 64})
    sizes = [row.get("bytes") for row in record.held_out if row.get(name) is not None]
    whole = np.array([size == sizes[-1] for size in sizes])
    # evaluations on a part and on all of the text are not joined: the jump between them is not the model's
    for part, symbol in ((~whole, "circle-open"), (whole, "circle")):
        edge = {"width": 1.6, "color": "var(--accent)"}
        marker = {"size": 8, "color": "var(--accent)", "symbol": symbol, "line": edge}
        look = {"mode": "lines+markers", "line": line_style("--accent", 1.8), "marker": marker}
        hover = "step %{x:,}: %{y:.4f}<extra></extra>"
        figure.add_scatter(x=steps[part], y=values[part], hovertemplate=hover, cliponaxis=False, **look)
    text = {"text": f"<b>{values[-1]:.3f}</b>", "font": {"color": "var(--ink)", "size": 14}}
    end = {"x": int(steps[-1]), "y": float(values[-1]), "showarrow": False, "xanchor": "left", "xshift": 8}
    figure.add_annotation(**end, **text)
    later = values[1:] if len(values) > 2 else values  # a fresh model's value says nothing about the rest
    low, high = float(values.min()), float(later.max())
    room = 0.08 * ((high - low) or 0.1 * high)
    title = "bits per byte" if record.in_bits else "loss, nats a token"
    figure.update_xaxes(title_text="step", range=[0, _end(steps, record.total)], **axis_style())
    figure.update_yaxes(title_text=title, range=[low - room, high + room], **axis_style())
    return figure


def line_curve(
    steps: Array, values: Array, title: str, form: str, colour: str, total: int | None, *, rough: bool
) -> go.Figure:
    """One number over the steps; a rough one smoothed, and without the spikes that hide it."""
    figure = empty_figure(margin=MARGIN)
    thin, hover = _thinned(len(steps)), f"step %{{x:,}}: %{{y:{form}}}<extra></extra>"
    if rough:
        raw = {"mode": "lines", "line": line_style("--middle", 1.0), "opacity": 0.75}
        figure.add_scatter(x=steps[thin], y=values[thin], hovertemplate=hover, **raw)
        smooth = {"mode": "lines", "line": line_style(colour, 2.0), "hoverinfo": "skip"}
        figure.add_scatter(x=steps[thin], y=smoothed(steps, values)[thin], **smooth)
        top = float(np.quantile(values, 0.99)) * 1.25
    else:
        figure.add_scatter(
            x=steps[thin], y=values[thin], mode="lines", line=line_style(colour, 2.0), hovertemplate=hover
        )
        top = float(values.max()) * 1.06
    figure.update_xaxes(title_text="step", range=[0, _end(steps, total)], **axis_style())
    figure.update_yaxes(title_text=title, tickformat=form, range=[0, top or 1.0], **axis_style())
    return figure


def speed_curve(steps: Array, values: Array, record: TrainingRecord) -> go.Figure:
    """Tokens a second; at the right the same as a share of the processors' peak, where it is known."""
    figure = empty_figure(margin={**MARGIN, "r": 60})
    thin = _thinned(len(steps))
    look = {"mode": "lines", "line": line_style("--positive", 1.6)}
    figure.add_scatter(
        x=steps[thin], y=values[thin], hovertemplate="step %{x:,}: %{y:,.0f} tokens/s<extra></extra>", **look
    )
    top = float(np.quantile(values, 0.995)) * 1.12
    figure.update_xaxes(title_text="step", range=[0, _end(steps, record.total)], **axis_style())
    figure.update_yaxes(title_text="tokens a second", tickformat="~s", range=[0, top], **axis_style())
    shares = [row["utilisation"] / row["tokens_a_second"] for row in record.steps if row.get("utilisation")]
    if shares:
        share = float(np.median(shares))
        # a trace of its own holds the second axis up; it lies on the first one
        hidden = {"mode": "lines", "opacity": 0, "hoverinfo": "skip"}
        figure.add_scatter(x=steps[thin], y=values[thin] * share, yaxis="y2", **hidden)
        right = {"overlaying": "y", "side": "right", "range": [0, top * share], "tickformat": ".0%"}
        title = {"text": "of the peak"}
        figure.update_layout(yaxis2={**axis_style(), **right, "showgrid": False, "title": title})
    return figure


def smoothed(steps: Array, values: Array) -> Array:
    """The mean over a window that grows with the step, to a fiftieth of the run to either side."""
    reach = np.minimum(steps * 0.08, steps[-1] / 50)
    before = np.searchsorted(steps, steps - reach, side="left")
    behind = np.searchsorted(steps, steps + reach, side="right")
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[behind] - sums[before]) / (behind - before)


def _series(rows: Sequence[JsonObject], name: str) -> tuple[Array, Array]:
    """Steps and values, of the rows that have one."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    table: Array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _end(steps: Array, total: int | None) -> int:
    """The right end of an axis: the whole run's, unless little of it is done."""
    last = int(steps[-1])
    return total if total is not None and last < total < 10 * last else max(last, 1)


def _thinned(length: int) -> Array:
    """At most `MAX_POINTS` indices, the first and the last among them, closer together at the start."""
    if length <= MAX_POINTS:
        return np.arange(length)
    even = np.linspace(0, length - 1, MAX_POINTS - 200)
    early = np.geomspace(1, length - 1, 200)  # a logarithmic axis shows these
    return np.unique(np.concatenate([even, early]).round().astype(int))
