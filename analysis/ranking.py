"""Rankings for the report's tables: rows along a scale, with places in percent of its length, and the scale's ticks."""

import math
from typing import Any

from personaxis.analysis.figures import middle


def ranking(fit: dict[str, Any]) -> dict[str, Any]:
    """Rows from the first pole down, with places in percent of the scale, and the scale's ticks."""
    roles, centre, show = fit["roles"], middle(fit), number_format(fit)
    ticks = ticks_over([role[name] for role in roles for name in ("projection", "low", "high") if name in role])
    first, span = ticks[0], ticks[-1] - ticks[0]
    least, most = roles[0]["projection"], roles[-1]["projection"]
    rows = []
    for role in reversed(roles):
        value = role["projection"]
        far = (value - centre) / (most - centre if value > centre else least - centre or 1)
        places = {name: 100 * (role[name] - first) / span for name in ("projection", "low", "high") if name in role}
        rows.append(
            {
                "role": role["role"],
                "kind": "pole" if role["positive"] else "default" if role["role"] == fit["default"] else "",
                "projection": show(value),
                "interval": f"{show(role['low'])} to {show(role['high'])}" if "low" in role else "",
                "n": role["n"],
                "places": places,
                "side": "positive" if value > centre else "others",
                "far": 100 * far,
            }
        )
    pole = next(row["places"]["projection"] for row in rows if row["kind"] == "pole")
    marks = [(f"{tick:.10g}".replace("-", "−"), 100 * (tick - first) / span) for tick in ticks]
    return {"rows": rows, "ticks": marks, "pole": pole}


def trait_ranking(traits: dict[str, Any]) -> dict[str, Any]:
    """The same for traits, by their cosine with the axis, on a scale that is even around 0."""
    rows = traits["traits"]
    most = max(abs(row[name]) for row in rows for name in ("cosine", "low", "high") if name in row)
    ticks = ticks_over([-most, most])
    first, span = ticks[0], ticks[-1] - ticks[0]
    found = []
    for row in reversed(rows):
        places = {"projection": 100 * (row["cosine"] - first) / span}
        places |= {name: 100 * (row[name] - first) / span for name in ("low", "high") if name in row}
        found.append(
            {
                "role": row["trait"],
                "kind": "",
                "projection": _signed(row["cosine"]),
                "interval": f"{_signed(row['low'])} to {_signed(row['high'])}" if "low" in row else "",
                "n": " + ".join(map(str, row["n"])),
                "places": places,
                "side": "positive" if row["cosine"] > 0 else "others",
                "far": 100 * abs(row["cosine"]) / most,
            }
        )
    marks = [(f"{tick:.10g}".replace("-", "−"), 100 * (tick - first) / span) for tick in ticks]
    return {"rows": found, "ticks": marks, "pole": 100 * -first / span}


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def ticks_over(values: list[float]) -> list[float]:
    """Four to eight round numbers, the first at or below all values and the last at or above."""
    low, high = min(values), max(values)
    rough = (high - low or abs(high) or 1.0) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def number_format(fit: dict[str, Any]) -> Any:
    """How projections are written: to a hundredth or so of their spread over roles, with a true minus sign."""
    spread = fit["roles"][-1]["projection"] - fit["roles"][0]["projection"]
    digits = max(0, 2 - math.floor(math.log10(spread))) if spread > 0 else 2
    return lambda value: f"{value:,.{min(digits, 8)}f}".replace("-", "−")
