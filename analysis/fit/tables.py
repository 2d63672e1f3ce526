"""Rankings of roles and traits along the axis, as rows for the report, and numbers and intervals as text.

ranking = role_ranking(fit)         # ranking.rows[0].name is the role nearest to the positive pole
interval_text(fit.cos_pc1)          # "0.61 [0.50, 0.70]"
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from personatlas.analysis.fit.figures import neutral_projection
from personatlas.analysis.fit.result import AxisComparison, ControlPlace, FitResult, LayerFit, TraitResult
from personatlas.analysis.stats import Interval, p_text

NumberFormat = Callable[[float], str]
SWAPPED = 0.1  # a share of resamples with another PC1 that is worth saying
MOVED = 3  # roles named that moved farthest between two axes


@dataclass(frozen=True)
class RankingRow:
    """A role or trait. `position`, `low` and `high` are in percent of the scale, `interval` and `value` text.

    `kind` is "pole", "default" or ""; `strength` is the distance from the neutral point in percent of the
    largest on its `side`, which is "positive" or "others".
    """

    name: str
    kind: str
    value: str
    interval: str
    n: str
    position: float
    low: float | None
    high: float | None
    side: str
    strength: float


@dataclass(frozen=True)
class Ranking:
    """Rows from the positive pole down, the scale's ticks (text, percent), and a mark on it (percent)."""

    rows: tuple[RankingRow, ...]
    ticks: tuple[tuple[str, float], ...]
    mark: float


Entry = tuple[str, str, str, Interval]  # name, kind, n, value with its interval


def role_ranking(fit: FitResult) -> Ranking:
    """Returns the roles by their projection, with the positive pole marked on the scale."""
    entries = []
    for role in fit.roles:
        kind = "pole" if role.positive else "default" if role.role == fit.default else ""
        entries.append((role.role, kind, str(role.n), Interval(role.projection, role.low, role.high)))
    ticks = scale_ticks(_ends(entries))
    neutral = neutral_projection(fit)
    low, high = fit.roles[0].projection - neutral, fit.roles[-1].projection - neutral
    mark = fit.positive_role.projection
    return _ranking(entries, ticks, neutral, (low or 1, high), mark, number_format(fit))


def trait_ranking(traits: TraitResult) -> Ranking:
    """Returns the traits by their cosine with the axis, on a scale that is symmetric around the marked 0."""
    entries = [
        (row.trait, "", f"{row.n[0]} + {row.n[1]}", Interval(row.cosine, row.low, row.high))
        for row in traits.traits
    ]
    limit = max(map(abs, _ends(entries)))
    return _ranking(entries, scale_ticks([-limit, limit]), 0.0, (-limit, limit), 0.0, _signed)


def control_ranking(controls: Sequence[ControlPlace]) -> Ranking:
    """Returns the controls by their place, on a scale with the mean role (0) and the marked positive pole (1)."""
    entries = [(row.name.replace("_", " "), "", str(row.place.n), row.place) for row in controls]
    ticks = scale_ticks([0.0, 1.0, *_ends(entries)])
    return _ranking(entries, ticks, 0.0, (ticks[0] or -1.0, ticks[-1]), 1.0, _signed)


def control_text(fit: FitResult) -> str:
    """Returns a sentence on where prompts that ask for no character lie; "" without controls."""
    if not fit.controls:
        return ""
    places = (f"{row.name.replace('_', ' ')} {interval_text(row.place)}" for row in fit.controls[::-1])
    return f"prompts that ask for no character, where the mean role is 0 and {fit.positive} is 1: {', '.join(places)}"


def score_text(fit: FitResult) -> str:
    """Returns a sentence on the axes of answers with one score; "" where there is none."""
    found = (f"{row.cosine:.2f} from {row.n:,} answers with score {row.score}" for row in fit.by_score)
    return f"cosine with the axes of one score alone: {', '.join(found)}" if fit.by_score else ""


def _ends(entries: Sequence[Entry]) -> list[float]:
    """All values and ends of intervals."""
    intervals = [interval for *_, interval in entries]
    return [end for i in intervals for end in (i.value, i.low, i.high) if end is not None]


def _ranking(
    entries: Sequence[Entry],
    ticks: Sequence[float],
    neutral: float,
    extremes: tuple[float, float],
    mark: float,
    text: NumberFormat,
) -> Ranking:
    """Rows of ascending entries; the extremes are distances from `neutral`, of which strength is a share."""

    def percent(value: float) -> float:
        return 100 * (value - ticks[0]) / (ticks[-1] - ticks[0])

    rows = []
    for name, kind, n, interval in reversed(entries):
        value, low, high = interval.value, interval.low, interval.high
        is_positive = value > neutral
        rows.append(
            RankingRow(
                name=name,
                kind=kind,
                value=text(value),
                interval="" if low is None or high is None else f"{text(low)} to {text(high)}",
                n=n,
                position=percent(value),
                low=None if low is None else percent(low),
                high=None if high is None else percent(high),
                side="positive" if is_positive else "others",
                strength=100 * ((value - neutral) / extremes[is_positive]),
            )
        )
    marks = tuple((f"{tick:.10g}".replace("-", "−"), percent(tick)) for tick in ticks)
    return Ranking(tuple(rows), marks, percent(mark))


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def scale_ticks(values: Sequence[float]) -> list[float]:
    """Returns four to eight round numbers, the first at or below all values and the last at or above."""
    low, high = min(values), max(values)
    rough = (high - low or abs(high) or 1.0) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def number_format(fit: FitResult) -> NumberFormat:
    """Returns how projections are written: to about a hundredth of their spread over roles, with a true minus
    sign."""
    spread = fit.roles[-1].projection - fit.roles[0].projection
    digits = max(0, 2 - math.floor(math.log10(spread))) if spread > 0 else 2
    return lambda value: f"{value:,.{min(digits, 8)}f}".replace("-", "−")


def interval_text(interval: Interval | None) -> str:
    """Returns a value with its interval, where it has one; "-" for None."""
    if interval is None:
        return "-"
    bounds = "" if interval.low is None else f" [{interval.low:.2f}, {interval.high:.2f}]"
    return f"{interval.value:.2f}{bounds}"


def number_text(value: float | None) -> str:
    """Returns a value to two digits; "-" for None."""
    return "-" if value is None else f"{value:.2f}"


def stability_text(row: LayerFit) -> str:
    """Returns a sentence on how reproducible the axis is at a layer."""
    half, null = row.split_half, row.null
    if half is None or null is None:
        return (
            "not known: no rollout means were kept at this layer, there are too few answers for halves, or "
            "--replicates was 0"
        )
    full = 2 * half.value / (1 + half.value)  # Spearman-Brown: a half is half as long as the run
    questions = ""
    if row.split_questions is not None:
        questions = f"; two halves of the questions {interval_text(row.split_questions)}"
    return (
        f"axes of two halves of the answers have cosine {interval_text(half)}, so two full "
        f"runs of this size about {full:.2f}{questions}; |axis| is {row.norm:.3g}, with shuffled labels {null.norm:.3g} "
        f"(95% below {null.norm_95:.3g}; {p_text(null.p_norm, null.n)})"
    )


def pole_text(fit: FitResult) -> str:
    """Returns a sentence on how the positive pole differs from any other role; "" where it is not known."""
    null, gap, at, parts = fit.pole_null, fit.gap, fit.at_layer, []
    if gap is not None:
        parts.append(f"it lies {interval_text(gap)} above the mean role, paired over {gap.n} questions")
    if null is not None and null.z is not None and null.rank is not None:
        rank, of = f"{null.rank:.0f}", null.n + 1
        parts.append(f"on questions that the axis was not fitted on z = {null.z:.1f}, rank {rank} of {of}")
    if null is not None:
        parts.append(
            f"as the pole it gives cos(PC1, axis) {at.cos_pc1:.2f}, other roles {null.cos_pc1:.2f} on average "
            f"(90% below {null.cos_pc1_90:.2f}); it exceeds {null.percentile:.0%} of them"
        )
    if at.swapped is not None and at.axis_share is not None and at.swapped > SWAPPED:
        parts.append(
            f"PC1 is another component in {at.swapped:.0%} of resampled roles, so read the variance along the "
            f"axis over PC1's, {interval_text(at.axis_share)}, instead of the cosine"
        )
    return "; ".join(parts)


def comparison_text(comparison: AxisComparison | None, layer: int) -> str:
    """Returns a sentence on an axis, at its layer, beside another one; "" without another."""
    if comparison is None:
        return ""
    parts = []
    if comparison.cosines and str(layer) in comparison.cosines:
        low, high = min(comparison.cosines.values()), max(comparison.cosines.values())
        spread = f" ({low:.2f} to {high:.2f} over all layers)" if len(comparison.cosines) > 1 else ""
        parts.append(f"cosine {comparison.cosines[str(layer)]:.2f} at layer {layer}{spread}")
    if (roles := comparison.roles) is not None:
        parts.append(f"rank correlation {interval_text(roles)} over {roles.n} roles")
    if moved := comparison.moved[:MOVED]:
        names = ", ".join(f"{name} {change:+.1f}" for name, change in moved)
        parts.append(f"farthest moved, in standard deviations of these roles: {names}")
    model = "" if comparison.same_model else f", another model ({comparison.model})"
    found = "; ".join(parts) or "another width or depth, and no roles in common"
    return f"Compared with {comparison.path}{model}: {found}"
