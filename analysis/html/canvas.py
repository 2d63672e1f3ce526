"""Building blocks of all figures: an empty canvas without plotly's template, axis and line styles, labels of
points.

    figure = empty_figure(margin={"l": 60, "r": 16, "t": 16, "b": 48})
    figure.update_xaxes(title_text="layer", **axis_style())

Colours are written as `var(--name)`: the page resolves them to its palette, so that a figure follows light
and dark. Labels are placed so that they cover neither a point nor each other, in pixels, for the plot areas
of a desktop, a tablet and a phone; the page shows one of the three. Both axes have one scale: distances
mean the same in both directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CLEAR = "rgba(0,0,0,0)"
TEXT_FONT = {"color": "var(--ink)", "size": 12}
SCREENS = {"wide": (850, 495), "medium": (600, 480), "narrow": (250, 235)}  # plot areas, pixels
LETTER_WIDTH, LINE_HEIGHT, POINT_GAP = 6.8, 14.0, 8.0  # pixels; the gap is from a point's centre to its label
Box = tuple[float, float, float, float]  # left, bottom, right, top
Style = dict[str, object]


def empty_figure(**layout: object) -> go.Figure:
    """Returns an empty figure without plotly's template: transparent, in the page's colours."""
    defaults = {
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "template": None,
        "dragmode": False,
        "showlegend": False,
        "font": {"family": FONT, "size": 13, "color": "var(--muted)"},
        "hoverlabel": {
            "bgcolor": "var(--card)",
            "bordercolor": "var(--line)",
            "font": {**TEXT_FONT, "family": FONT},
        },
        "modebar": {"bgcolor": CLEAR, "color": "var(--line)", "activecolor": "var(--muted)"},
        "uirevision": "keep",  # zoom and camera stay when the page redraws in other colours
    }
    return go.Figure(layout={**defaults, **layout})


def axis_style(*, zero: bool = False) -> Style:
    """Returns the style of an x or y axis, with a line at 0 on demand."""
    return {
        "zeroline": zero,
        "zerolinecolor": "var(--line)",
        "linecolor": "var(--line)",
        "gridcolor": "var(--grid)",
        "automargin": False,  # never ends with a colour bar below axes of equal scale: margins are given
        "title_standoff": 10,
        "title_font_size": 13,
    }


def line_style(colour: str, width: float, dash: str = "solid") -> Style:
    """Returns the style of a line in a colour of the page, such as "--accent"."""
    return {"color": f"var({colour})", "width": width, "dash": dash}


def shorten(text: str, length: int = 28) -> str:
    """Returns the text, cut with an ellipsis to at most that many characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def plain(text: str, length: int = 28) -> str:
    """Returns a shortened text without markup: plotly reads its texts as HTML."""
    return escape(shorten(text, length), quote=False)


@dataclass(frozen=True)
class Label:
    """A point's name and position (data units); `required` labels are drawn even where they cover something.

    `gap` is the distance from the point's centre to the label, `size` the diameter of its marker (pixels).
    """

    text: str
    x: float
    y: float
    required: bool = False
    gap: float = POINT_GAP
    size: int = 12


def add_labels(figure: go.Figure, points: Sequence[Sequence[float]], labels: Sequence[Label]) -> None:
    """Adds those of the labels that fit among the points (N, 2), for all screens; the first ones take
    precedence."""
    for screen, size in SCREENS.items():
        positions = place_labels(points, labels, size)
        placed = [labels[number] for number in positions]
        figure.add_scatter(
            x=[label.x for label in placed],
            y=[label.y for label in placed],
            text=[plain(label.text) for label in placed],
            textposition=list(positions.values()),
            textfont=TEXT_FONT,
            mode="markers+text",
            # invisible markers: plotly keeps a label clear of the marker in its own trace only
            marker={"size": [label.size for label in placed], "opacity": 0},
            hoverinfo="skip",
            cliponaxis=False,
            meta=screen,
        )


def place_labels(
    points: Sequence[Sequence[float]], labels: Sequence[Label], size: tuple[int, int]
) -> dict[int, str]:
    """Returns plotly's text positions ("top center", ...), by number, of the labels that fit on a screen of
    that size."""
    data = np.array(points, dtype=np.float64)
    span = np.ptp(data, axis=0)
    # pixels per data unit, the same for both axes, as drawn
    scale = 0.85 * float(min(size[0] / (span[0] or 1), size[1] / (span[1] or 1)))
    dots, taken, placed = data * scale, list[Box](), dict[int, str]()
    room = (np.array(size) - span * scale) / 2
    low, high = (dots.min(axis=0) - room).tolist(), (dots.max(axis=0) + room).tolist()

    def is_free(box: Box) -> bool:
        left, bottom, right, top = box
        if not (low[0] < left and right < high[0] and low[1] < bottom and top < high[1]):
            return False
        inside = (dots[:, 0] > left) & (dots[:, 0] < right) & (dots[:, 1] > bottom) & (dots[:, 1] < top)
        overlaps = (left < b[2] and b[0] < right and bottom < b[3] and b[1] < top for b in taken)
        return not inside.any() and not any(overlaps)

    for number, label in enumerate(labels):
        boxes = _label_boxes(label, scale)
        free = [position for position, box in boxes.items() if is_free(box)]
        if free or label.required:
            placed[number] = free[0] if free else "top center"
            taken.append(boxes[placed[number]])
    return placed


def _label_boxes(label: Label, scale: float) -> dict[str, Box]:
    """Where a label could lie, in pixels, the best position first."""
    x, y = label.x * scale, label.y * scale
    half = len(shorten(label.text)) * LETTER_WIDTH / 2
    up, aside = label.gap + LINE_HEIGHT / 2, label.gap + half
    centres = {
        "top center": (x, y + up),
        "bottom center": (x, y - up),
        "middle right": (x + aside, y),
        "middle left": (x - aside, y),
    }
    return {
        name: (cx - half, cy - LINE_HEIGHT / 2, cx + half, cy + LINE_HEIGHT / 2)
        for name, (cx, cy) in centres.items()
    }
