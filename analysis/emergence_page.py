"""The page of an emerging axis: whether it is there, whether it is that of the end, and where the roles stand meanwhile."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from personaxis.analysis.emergence import ends, settled
from personaxis.analysis.figures_emergence import emergence_figures
from personaxis.analysis.page import write_page
from personaxis.analysis.tables import interval, number

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
    doubt = " That is not beyond what shuffled labels give." if chance is not None and (low or 0.0) <= chance else ""
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
            _tile("length", {"value": last["length"]}, f"shuffled {number(last['length_shuffled'])}, p {last['p']:.2g}")
        )
    return tiles


def _tile(name: str, found: Mapping[str, Any], note: str) -> dict[str, str]:
    known = "" if found.get("low") is None else f"95% {found['low']:.2f} to {found['high']:.2f}"
    return {"name": name, "value": f"{found['value']:.2f}", "interval": known, "note": note}
