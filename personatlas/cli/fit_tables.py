"""The tables of a fit and of an emerging axis in the terminal."""

from pathlib import Path

from rich.text import Text

from personatlas.analysis.emergence import EmergenceResult
from personatlas.analysis.fit.result import LOW_ROLE_PLAY, FitResult, RoleProjection
from personatlas.analysis.fit.tables import (
    comparison_text,
    control_text,
    interval_text,
    number_text,
    pole_text,
    score_text,
    stability_text,
)
from personatlas.cli.output import print_line, print_path, print_table, with_interval

ENDS, TRAITS = 10, 5  # at either end of the axis


def print_fit(fit: FitResult, page: Path) -> None:
    """Prints the layers, the ten lowest and highest roles, what was dropped, and where the report is."""
    if fit.role_play is not None and fit.role_play.share < LOW_ROLE_PLAY:
        share = f"{fit.role_play.share:.0%} of the judged answers show their role"
        print_line(
            f"The model plays no roles: {share}. What follows says little of characters.", style="bold"
        )
    rows = []
    for row in fit.layers:
        is_used = row.layer == fit.layer
        cells = [
            f"{'*' if is_used else ''}{row.layer}",
            interval_text(row.cos_pc1_by_roles) if row.cos_pc1_by_roles else f"{row.cos_pc1:.2f}",
            f"{row.variance_pc1:.0%}",
            interval_text(row.split_half),
            f"{row.norm:.3g}",
            number_text(row.null.cos_pc1 if row.null else None),
        ]
        rows.append([Text(cell, style="bold" if is_used else "") for cell in cells])
    print_table(
        ("layer", "cos(PC1, axis)", "var PC1", "split-half", "|axis|", "shuffled"),
        rows,
        title="By layer (intervals 95%; shuffled: cos(PC1, axis) with shuffled labels)",
        left=(),
    )
    print_line(f"* layer {fit.layer}: {fit.layer_reason}", style="dim")
    others = fit.other_roles
    count, (first, second) = min(ENDS, len(others)), fit.poles
    pairs = zip(others[:count], others[::-1][:count], strict=True)
    ends = [[low.role, _projection(low), high.role, _projection(high)] for low, high in pairs]
    pole = fit.positive_role
    print_table(
        ("lowest", "projection", "highest", "projection"),
        [*ends, ["", "", Text(pole.role, style="bold"), _projection(pole)]],
        title=f"Projection at layer {fit.layer}: lowest ({second}) and highest ({first}), with 95% intervals",
        left=(0, 2),
    )
    print_line(f"Stability: {stability_text(fit.at_layer)}")
    if text := pole_text(fit):
        print_line(f"{pole.role}: {text}")
    for text in filter(None, (control_text(fit), score_text(fit))):
        print_line(text[0].upper() + text[1:])
    if fit.curve is not None and fit.curve.needed is not None:
        needed, goal = fit.curve.needed, fit.curve.goal
        print_line(f"About {needed:,.0f} answers per role would make the cosine of two such halves {goal}")
    _print_traits(fit)
    if fit.comparison is not None:
        print_line(comparison_text(fit.comparison, fit.layer))
    dropped = ", ".join(sorted(fit.dropped.roles)) or "none"
    print_line(f"{fit.n_rollouts} rollouts fitted; whole roles dropped: {dropped}")
    print_path("report", page)


def _projection(role: RoleProjection) -> str:
    return with_interval(role.projection, role.low, role.high, ".1f")


def _print_traits(fit: FitResult) -> None:
    """The traits at either end, and how many are beyond chance; or why there is no trait space."""
    if fit.traits is None:
        if fit.trait_problem:
            print_line(f"No trait space: {fit.trait_problem}")
        return
    rows, chance = fit.traits.traits, fit.traits.chance
    lowest, highest = (
        ", ".join(f"{row.trait} {row.cosine:.2f}" for row in end[:TRAITS]) for end in (rows, rows[::-1])
    )
    beyond = ""
    if chance is not None:
        beyond = f"; {fit.traits.n_beyond_chance} of {len(rows)} beyond the ±{chance:.2f} of shuffled answers"
    print_line(f"Traits, cosine with the axis: lowest {lowest}; highest {highest}{beyond}")


def print_emergence(result: EmergenceResult, page: Path) -> None:
    """Prints a row per checkpoint, and where the page is."""
    columns = ("step", "cos(PC1, axis)", "shuffled", "split-half", "|axis|", "shuffled", result.positive)
    rows = [
        [
            f"{row.step:,}",
            interval_text(row.cos_pc1),
            number_text(row.cos_pc1_shuffled),
            interval_text(row.split_half),
            f"{row.norm:.3g}",
            "-" if row.norm_shuffled is None else f"{row.norm_shuffled:.3g}",
            f"{row.pole.z:+.1f}, {row.pole.rank} of {row.pole.n}",
            interval_text(row.rank_correlation),
        ]
        for row in result.checkpoints
    ]
    title = f"Layer {result.layer} (intervals 95%)"
    print_table((*columns, "ranks as at the end"), rows, title=title, left=())
    print_path("page", page)
