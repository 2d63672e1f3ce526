"""The fit as tables in the terminal: by layer, and the two ends of the axis."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

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
    whole = 2 * half["value"] / (1 + half["value"])  # Spearman-Brown: the halves are half as long as the whole
    other = f"; two halves of the questions {interval(line['split_questions'])}" if "split_questions" in line else ""
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
        ", ".join(f"{row['trait']} {row['cosine']:.2f}" for row in end) for end in (rows[:TRAITS], rows[::-1][:TRAITS])
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
        parts.append(f"rank correlation {interval({**alike, 'value': alike['spearman']})} over {alike['n']} roles")
    other = "" if found["same_model"] else f", another model ({found['model']})"
    return (
        f"Compared with {found['path']}{other}: {'; '.join(parts) or 'another width or depth, and no roles in common'}"
    )


def _layers(fit: dict[str, Any]) -> Table:
    table = Table(
        title="By layer (intervals 95%; shuffled: cos(PC1, axis) when labels are shuffled)", title_justify="left"
    )
    for name in ("layer", "cos(PC1, axis)", "var PC1", "split-half", "|axis|", "shuffled"):
        table.add_column(name, justify="right")
    for line in fit["layers"]:
        mark = "*" if line["layer"] == fit["layer"] else ""
        cos = interval(line["cos_pc1_by_roles"]) if "cos_pc1_by_roles" in line else f"{line['cos_pc1']:.2f}"
        half = interval(line.get("split_half"))
        null = f"{line['null']['cos_pc1']:.2f}" if "null" in line else "-"
        cells = [f"{mark}{line['layer']}", cos, f"{line['variance_pc1']:.0%}", half, f"{line['norm']:.3g}", null]
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
