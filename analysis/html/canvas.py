"""What all figures of a report share: an empty canvas without plotly's own template, axes, lines and short names.

Colours are written as `var(--name)`: the page resolves them to its palette, so a figure follows light and dark.

Where the names of dots may lie in a scatter, so that they cover neither a dot nor each other.

Places are worked out for the plot areas of a desktop and a phone, in pixels; the page shows one of them. Both axes have one
scale: distances mean the same in both directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CLEAR = "rgba(0,0,0,0)"
WORDS = {"color": "var(--ink)", "size": 12}


def empty_figure(**layout: Any) -> go.Figure:
    """An empty figure without plotly's own template: transparent, quiet, in the page's colours."""
    hover = {"bgcolor": "var(--card)", "bordercolor": "var(--line)", "font": {**WORDS, "family": FONT}}
    clear = {
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "template": None,
        "dragmode": False,
        "showlegend": False,
    }
    buttons = {"bgcolor": CLEAR, "color": "var(--line)", "activecolor": "var(--muted)"}
    font = {"family": FONT, "size": 13, "color": "var(--muted)"}
    # a fixed uirevision keeps zoom and camera when the page redraws in other colours
    quiet = {**clear, "font": font, "hoverlabel": hover, "modebar": buttons, "uirevision": "keep"}
    return go.Figure(layout={**quiet, **layout})


def axis_look(*, zero: bool = False) -> dict[str, Any]:
    line = {"zeroline": zero, "zerolinecolor": "var(--line)", "linecolor": "var(--line)"}
    # automargin would go on for ever with a colour bar below axes of equal scale: margins are given
    return {
        **line,
        "gridcolor": "var(--grid)",
        "automargin": False,
        "title_standoff": 10,
        "title_font_size": 13,
    }


def line_look(colour: str, width: float, dash: str = "solid") -> dict[str, Any]:
    return {"color": f"var({colour})", "width": width, "dash": dash}


def shortened(text: str, length: int = 28) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


SCREENS = {"wide": (850, 495), "narrow": (250, 235)}
LETTER, LINE, DOT = (
    6.8,
    14.0,
    8.0,
)  # pixels: width of a letter, height of a line, from a dot's centre to its label
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Label:
    """A name, the dot's place in data units, whether it is drawn come what may, and its distance from the dot's centre."""

    text: str
    x: float
    y: float
    must: bool = False
    gap: float = DOT


def place_labels(
    points: Sequence[Sequence[float]], wanted: Sequence[Label], size: tuple[int, int]
) -> dict[int, str]:
    """Positions ("top center", ...) of those wanted labels, by number, that find room among the points; greedily."""
    found = np.array(points, dtype=np.float64)
    span = np.ptp(found, axis=0)
    scale = 0.85 * float(
        min(size[0] / (span[0] or 1), size[1] / (span[1] or 1))
    )  # one for both axes, as drawn
    dots, taken, placed = found * scale, list[Box](), dict[int, str]()
    room = (np.array(size) - span * scale) / 2
    low, high = (dots.min(axis=0) - room).tolist(), (dots.max(axis=0) + room).tolist()

    def is_free(box: Box) -> bool:
        inside = low[0] < box[0] and box[2] < high[0] and low[1] < box[1] and box[3] < high[1]
        return inside and not _covers(box, dots) and not any(_overlap(box, other) for other in taken)

    for number, label in enumerate(wanted):
        choices = _boxes(label, scale)
        free = [position for position, box in choices.items() if is_free(box)]
        if free or label.must:
            placed[number] = free[0] if free else "top center"
            taken.append(choices[placed[number]])
    return placed


def _boxes(label: Label, scale: float) -> dict[str, Box]:
    """Where a label could lie, in pixels, the best place first."""
    x, y = label.x * scale, label.y * scale
    half = len(label.text) * LETTER / 2
    up, aside = label.gap + LINE / 2, label.gap + half
    centres = {"top center": (x, y + up), "bottom center": (x, y - up)}
    centres |= {"middle right": (x + aside, y), "middle left": (x - aside, y)}
    return {name: (cx - half, cy - LINE / 2, cx + half, cy + LINE / 2) for name, (cx, cy) in centres.items()}


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _covers(box: Box, dots: Any) -> bool:
    inside = (dots[:, 0] > box[0]) & (dots[:, 0] < box[2]) & (dots[:, 1] > box[1]) & (dots[:, 1] < box[3])
    return bool(inside.any())
