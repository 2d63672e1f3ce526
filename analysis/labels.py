"""Where the names of dots may lie in a scatter, so that they cover neither a dot nor each other.

Places are worked out for the plot areas of a desktop and a phone, in pixels; the page shows one of them. Both axes have one
scale: distances mean the same in both directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCREENS = {"wide": (850, 495), "narrow": (250, 235)}
LETTER, LINE, DOT = 6.8, 14.0, 8.0  # pixels: width of a letter, height of a line, from a dot's centre to its label
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Label:
    """A name, the dot's place in data units, whether it is drawn come what may, and its distance from the dot's centre."""

    text: str
    x: float
    y: float
    must: bool = False
    gap: float = DOT


def place_labels(points: Sequence[Sequence[float]], wanted: Sequence[Label], size: tuple[int, int]) -> dict[int, str]:
    """Positions ("top center", ...) of those wanted labels, by number, that find room among the points; greedily."""
    found = np.array(points, dtype=np.float64)
    span = np.ptp(found, axis=0)
    scale = 0.85 * float(min(size[0] / (span[0] or 1), size[1] / (span[1] or 1)))  # one for both axes, as drawn
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
