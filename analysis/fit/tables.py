"""Rankings for the report's tables: rows along a scale, with places in percent of its length, and the scale's ticks.

The fit as tables in the terminal: by layer, and the two ends of the axis.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from personatlas.analysis.fit.figures import middle


def ranking(fit: dict[str, Any]) -> dict[str, Any]:
    """Rows from the first pole down, with places in percent of the scale, and the scale's ticks."""
    roles, centre, show = fit["roles"], middle(fit), number_format(fit)
    ticks = ticks_over(
        [role[name] for role in roles for name in ("projection", "low", "high") if name in role]
    )
    first, span = ticks[0], ticks[-1] - ticks[0]
    least, most = roles[0]["projection"], roles[-1]["projection"]
    rows = []
    for role in reversed(roles):
        value = role["projection"]
        far = (value - centre) / (most - centre if value > centre else least - centre or 1)
        places = {
            name: 100 * (role[name] - first) / span for name in ("projection", "low", "high") if name in role
        }
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


ENDS, TRAITS = 10, 5


def print_fit(fit: dict[str, Any], page: Path) -> None:
    """Print the layer table, the ten lowest and highest roles, what was dropped, and where the report is."""
    console = Console()
    console.print(_layers(fit))
    console.print(Text(f"* layer {fit['layer']}: {fit['why']}", style="dim"))
    console.print(_ends(fit))
    line = next(line for line in fit["layers"] if line["layer"] == fit["layer"])
    console.print(Text(f"How stable: {stability(line)}"))
    for said in (say_needed(fit), say_traits(fit), say_compared(fit)):
        if said:
            console.print(Text(said))
    dropped = fit["dropped"]
    whole = ", ".join(sorted(dropped.get("roles", {}))) or "none"
    console.print(Text(f"{fit['n_rollouts']} rollouts fitted; roles dropped whole: {whole}"))
    print(f"report: {page}")  # noqa: T201 (never wrapped: it is a path to click or copy)


def stability(line: dict[str, Any]) -> str:
    """One sentence on how far the axis at a layer can be trusted."""
    if "split_half" not in line:
        return "no rollout means were kept at this layer, there are too few answers for halves, or --replicates was 0, so it is not known"
    half, null = line["split_half"], line["null"]
    whole = (
        2 * half["value"] / (1 + half["value"])
    )  # Spearman-Brown: the halves are half as long as the whole
    other = (
        f"; two halves of the questions {interval(line['split_questions'])}"
        if "split_questions" in line
        else ""
    )
    return (
        f"two halves of the answers give axes of cosine {interval(half)}, so two whole runs of this size would agree to "
        f"about {whole:.2f}{other}; with shuffled labels |axis| is {null['norm']:.3g} (95% below {null['norm_95']:.3g}), here {line['norm']:.3g}"
        f" (p = {null['p_norm']:.3g})"
    )


def say_needed(fit: dict[str, Any]) -> str:
    """How many answers a role would make two axes agree."""
    curve = fit.get("curve")
    if not curve or curve["needed"] is None:
        return ""
    return f"About {curve['needed']:,.0f} answers a role would make the cosine of two such halves {curve['goal']}"


def say_traits(fit: dict[str, Any]) -> str:
    """The traits at either end, and how many are further out than chance; or why there is no trait space."""
    traits = fit.get("traits")
    if not traits:
        return f"No trait space: {fit['trait_problem']}" if fit.get("trait_problem") else ""
    rows, chance = traits["traits"], traits["chance"]
    ends = [
        ", ".join(f"{row['trait']} {row['cosine']:.2f}" for row in end)
        for end in (rows[:TRAITS], rows[::-1][:TRAITS])
    ]
    beyond = sum(abs(row["cosine"]) > chance for row in rows) if chance is not None else None
    more = "" if beyond is None else f"; {beyond} of {len(rows)} beyond the ±{chance:.2f} of shuffled answers"
    return f"Traits, cosine with the axis: lowest {ends[0]}; highest {ends[1]}{more}"


def say_compared(fit: dict[str, Any]) -> str:
    """The axis beside another one."""
    found = fit.get("compared")
    if not found:
        return ""
    parts = []
    if found["cosines"]:
        parts += [
            f"cosine {value:.2f} at layer {layer}"
            for layer, value in found["cosines"].items()
            if int(layer) == fit["layer"]
        ]
    if "roles" in found:
        alike = found["roles"]
        parts.append(
            f"rank correlation {interval({**alike, 'value': alike['spearman']})} over {alike['n']} roles"
        )
    other = "" if found["same_model"] else f", another model ({found['model']})"
    return f"Compared with {found['path']}{other}: {'; '.join(parts) or 'another width or depth, and no roles in common'}"


def _layers(fit: dict[str, Any]) -> Table:
    table = Table(
        title="By layer (intervals 95%; shuffled: cos(PC1, axis) when labels are shuffled)",
        title_justify="left",
    )
    for name in ("layer", "cos(PC1, axis)", "var PC1", "split-half", "|axis|", "shuffled"):
        table.add_column(name, justify="right")
    for line in fit["layers"]:
        mark = "*" if line["layer"] == fit["layer"] else ""
        cos = interval(line["cos_pc1_by_roles"]) if "cos_pc1_by_roles" in line else f"{line['cos_pc1']:.2f}"
        half = interval(line.get("split_half"))
        null = f"{line['null']['cos_pc1']:.2f}" if "null" in line else "-"
        cells = [
            f"{mark}{line['layer']}",
            cos,
            f"{line['variance_pc1']:.0%}",
            half,
            f"{line['norm']:.3g}",
            null,
        ]
        table.add_row(*cells, style="bold" if mark else None)
    return table


def _ends(fit: dict[str, Any]) -> Table:
    roles = [role for role in fit["roles"] if not role["positive"]]
    first, second = fit["poles"]
    title = f"Projection at layer {fit['layer']}: lowest ({second}) and highest ({first}), with 95% intervals"
    # no borders: two names and two intervals just fit into 80 columns
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("lowest", "projection", "highest", "projection"):
        table.add_column(name, justify="right" if name == "projection" else "left", no_wrap=True)
    count = min(ENDS, len(roles))
    for low, high in zip(roles[:count], roles[::-1][:count], strict=True):
        table.add_row(Text(low["role"]), _place(low), Text(high["role"]), _place(high))
    pole = next(role for role in fit["roles"] if role["positive"])
    table.add_row("", "", Text(pole["role"], style="bold"), _place(pole))
    return table


def _place(role: dict[str, Any]) -> str:
    if "low" not in role:
        return f"{role['projection']:.1f}"
    return f"{role['projection']:.1f} [{role['low']:.1f}, {role['high']:.1f}]"


def interval(found: Mapping[str, Any] | None) -> str:
    """A value with its interval, where it has one, for people."""
    if found is None:
        return "-"
    known = "" if found.get("low") is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['value']:.2f}{known}"


def number(value: float | None) -> str:
    """The same of a value alone."""
    return "-" if value is None else f"{value:.2f}"
