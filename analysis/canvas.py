"""What all figures of a report share: an empty canvas without plotly's own template, axes, lines and short names.

Colours are written as `var(--name)`: the page resolves them to its palette, so a figure follows light and dark.
"""

from typing import Any

import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CLEAR = "rgba(0,0,0,0)"
WORDS = {"color": "var(--ink)", "size": 12}


def empty_figure(**layout: Any) -> go.Figure:
    """An empty figure without plotly's own template: transparent, quiet, in the page's colours."""
    hover = {"bgcolor": "var(--card)", "bordercolor": "var(--line)", "font": {**WORDS, "family": FONT}}
    clear = {"paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "template": None, "dragmode": False, "showlegend": False}
    buttons = {"bgcolor": CLEAR, "color": "var(--line)", "activecolor": "var(--muted)"}
    font = {"family": FONT, "size": 13, "color": "var(--muted)"}
    # a fixed uirevision keeps zoom and camera when the page redraws in other colours
    quiet = {**clear, "font": font, "hoverlabel": hover, "modebar": buttons, "uirevision": "keep"}
    return go.Figure(layout={**quiet, **layout})


def axis_look(*, zero: bool = False) -> dict[str, Any]:
    line = {"zeroline": zero, "zerolinecolor": "var(--line)", "linecolor": "var(--line)"}
    # automargin would go on for ever with a colour bar below axes of equal scale: margins are given
    return {**line, "gridcolor": "var(--grid)", "automargin": False, "title_standoff": 10, "title_font_size": 13}


def line_look(colour: str, width: float, dash: str = "solid") -> dict[str, Any]:
    return {"color": f"var({colour})", "width": width, "dash": dash}


def shortened(text: str, length: int = 28) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
