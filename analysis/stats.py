"""Intervals and tests that respect clusters: answers of one role, request or script are not independent.

    mean_interval(values, scripts)                          # mean, low, high, n
    change = paired_change(before, after, roles, requests)  # difference, interval, test, smallest detectable
    change.value, change.low, change.high, change.p, change.smallest

Intervals are estimate ± t × standard error, 95%. The standard error of a sum of independent parts u_i is
cluster-robust: V = Σ_g (Σ_{i in g} u_i)² G / (G - 1), summed over the clusterings less the overlap (Cameron,
Gelbach and Miller 2011), and never below that of independent units. t has G - 1 degrees of freedom for the
smallest G among the clusterings that add variance. Measured coverage is in docs/methods.md.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import stats

from personatlas.persona.records import Count, FractionOrNaN, JsonRecord, NonNegativeOrNaN

Array = NDArray[np.float64]
Labels = Sequence[Hashable]

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
POWER = 0.8  # of the smallest detectable change


@dataclass(frozen=True)
class Interval(JsonRecord):
    """An estimate with its 95% interval.

    `n` is the sample size behind it: bootstrap replicates in a fit, else values, pairs or clusters as the
    function that returns it says. `low` and `high` are None where no interval can be given.
    """

    value: float
    low: float | None
    high: float | None
    n: Count | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("n",)


def percentile_interval(draws: Sequence[float] | Array) -> tuple[float, float]:
    """Returns the quantiles of bootstrap draws that bound a 95% interval (linear interpolation)."""
    low, high = np.quantile(np.asarray(draws), TAILS)
    return float(low), float(high)


def bootstrap_interval(value: float, draws: Sequence[float] | Array) -> Interval:
    """Returns an estimate with the percentile interval of its bootstrap draws; `n` is their number."""
    return Interval(value, *percentile_interval(draws), len(draws))


def resample(n: int, generator: Generator, samples: int | None = None) -> NDArray[np.int64]:
    """Draws n of n indices with replacement: (n,), or (samples, n)."""
    return generator.integers(0, n, n if samples is None else (samples, n))


@dataclass(frozen=True)
class StandardError:
    """The standard error of an estimate, and the degrees of freedom of its t."""

    value: float
    df: int

    @property
    def margin(self) -> float:
        """Half the width of the 95% interval."""
        return float(stats.t.ppf(TAILS[1], self.df)) * self.value


def clustered_error(parts: Array, *clusterings: Labels) -> StandardError | None:
    """Returns the standard error of the sum of parts (N,) whose expectation is 0.

    Each of at most two clusterings names the cluster of every part. Two are crossed: the units are then the
    cells of both, else the parts themselves. A clustering of a single cluster says nothing and is left out.
    None for fewer than two units.
    """
    grouped = [(n, index) for n, index in map(_cluster_index, clusterings) if n > 1]
    n, unit = len(parts), np.arange(len(parts))
    if len(grouped) > 1:
        n, unit = _cluster_index(list(zip(*(index.tolist() for _, index in grouped), strict=True)))
    if n < 2:
        return None
    independent = _cluster_variance(parts, n, unit)
    variance, df = independent, n - 1
    for size, index in grouped:
        own = _cluster_variance(parts, size, index)
        variance += own - independent
        if own > independent * (1 + 1e-9):
            df = min(df, size - 1)
    return StandardError(float(np.sqrt(max(variance, independent))), df)


def _cluster_variance(parts: Array, n: int, index: NDArray[np.intp]) -> float:
    sums = np.bincount(index, parts, n)
    return float(sums @ sums) * n / (n - 1)


def _cluster_index(labels: Labels) -> tuple[int, NDArray[np.intp]]:
    """Number of distinct labels, and each value's label as an index into them."""
    number = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    return len(number), np.array([number[label] for label in labels], dtype=np.intp)


def mean_interval(values: Array, *clusterings: Labels) -> Interval:
    """Returns the mean of values (N,), N at least 1, with its interval. No bounds for a single cluster."""
    return ratio_interval(values, np.ones(len(values)), *clusterings)


def ratio_interval(numerator: Array, denominator: Array, *clusterings: Labels) -> Interval:
    """Returns Σ numerator / Σ denominator over N rows, with its interval; `n` is N.

    The parts are the linearised ones, (numerator - ratio × denominator) / Σ denominator. No bounds for a
    single row or cluster.
    """
    ratio, n = float(numerator.sum() / denominator.sum()), len(numerator)
    error = None
    if all(len(set(labels)) > 1 for labels in clusterings):
        error = clustered_error((numerator - ratio * denominator) / denominator.sum(), *clusterings)
    if error is None:
        return Interval(ratio, None, None, n)
    return Interval(ratio, ratio - error.margin, ratio + error.margin, n)


def share_interval(outcomes: Array, *clusterings: Labels) -> tuple[float, float]:
    """Returns the interval of the share of outcomes (N,), 0 or 1: Wilson's, on N over the design effect.

    The design effect is the clustered variance over the binomial one, at least 1. Where all outcomes are
    alike it cannot be seen, and the number of clusters (of the finer clustering) counts instead of N. Raises
    ValueError for N = 0.
    """
    n = len(outcomes)
    if not n:
        raise ValueError("there is no outcome to take a share of")
    share = float(outcomes.mean())
    grouped = [labels for labels in clusterings if len(set(labels)) > 1]
    if 0 < share < 1:
        error = clustered_error((outcomes - share) / n, *grouped)
        assert error is not None  # two outcomes differ
        effective, df = min(share * (1 - share) / error.value**2, n), error.df
    else:
        effective = max((len(set(labels)) for labels in grouped), default=n)
        df = effective - 1
    return wilson_interval(share * effective, effective, max(df, 1))


def wilson_interval(successes: float | int, n: float | int, df: float | int = np.inf) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of a share of n independent outcomes, n > 0.

    With degrees of freedom the quantile is that of t instead of the normal one.
    """
    share, z = successes / n, float(stats.t.ppf(TAILS[1], df))
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    reach = z * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return max((centre - reach) / scale, 0.0), min((centre + reach) / scale, 1.0)


@dataclass(frozen=True)
class Change(JsonRecord):
    """A mean difference over n pairs, after less before, with its 95% interval.

    `p` is of the t test with the interval's standard error, and `no_loss` of two one-sided such tests that
    the change lies within ±`margin`. `smallest` is the difference that such pairs detect with a power of
    80%. `clusters` is the smaller number of roles and requests, of those above one. `p_holm` is p adjusted
    for the number of arms.
    """

    omit_none: ClassVar[tuple[str, ...]] = ("no_loss", "margin", "p_holm")

    value: float
    low: float
    high: float
    p: FractionOrNaN
    smallest: NonNegativeOrNaN
    n: Count
    clusters: Count
    no_loss: FractionOrNaN | None = None
    margin: float | None = None
    p_holm: FractionOrNaN | None = None

    @property
    def adjusted_p(self) -> float:
        """`p_holm` where there is one, else `p`."""
        return self.p if self.p_holm is None else self.p_holm


def paired_change(
    before: Sequence[float] | Array,
    after: Sequence[float] | Array,
    roles: Labels,
    requests: Labels,
    margin: float | None = None,
) -> Change:
    """Returns the mean change of outcomes over pairs (n each), clustered by role and by request.

    Outcomes that are 0 or 1 get half a pair more of either change and one without (Agresti and Min 2005):
    few discordant pairs have no normal mean. Where no such pair is discordant, the bound is the share of
    which none of n shows with a probability of 95%. A single pair of other outcomes has neither bounds nor p
    (NaN). Raises ValueError when the lengths differ, there is no pair, or an outcome is not finite.
    """
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    n = len(first)
    if not n == len(second) == len(roles) == len(requests) or not n:
        raise ValueError(
            f"{n} and {len(second)} outcomes of {len(roles)} roles and {len(requests)} requests: "
            "one of each a pair, and at least one pair"
        )
    change = second - first
    if not np.isfinite(change).all():
        raise ValueError("an outcome is not finite: leave pairs out that were not judged, in both arms")
    clusters = min((size for size in (len(set(roles)), len(set(requests))) if size > 1), default=1)
    value, is_binary = float(change.mean()), bool(np.isin(np.concatenate([first, second]), (0.0, 1.0)).all())
    if is_binary and not change.any():  # no scatter, yet n equal pairs do not prove equality
        bound = zero_count_bound(n)
        no_loss = None if margin is None else float((1 - margin) ** n)
        return Change(0.0, -bound, bound, 1.0, bound, n, clusters, no_loss, margin)
    error, centre = clustered_error((change - value) / n, roles, requests), value
    if is_binary:
        variance = 0.0 if error is None else (error.value * n) ** 2
        error = StandardError(float(np.sqrt(variance + 1)) / (n + 2), 1 if error is None else error.df)
        centre = value * n / (n + 2)
    if error is None:
        nan = float("nan")
        return Change(value, nan, nan, nan, nan, n, clusters, None if margin is None else 1.0, margin)
    p, no_loss = min(2 * _tail_p(abs(centre), error), 1.0), None
    if margin is not None:
        no_loss = max(_tail_p(centre + margin, error), _tail_p(margin - centre, error))
    smallest = float(stats.t.ppf(TAILS[1], error.df) + stats.t.ppf(POWER, error.df)) * error.value
    low, high = centre - error.margin, centre + error.margin
    if is_binary:  # a share changes by no more than itself
        low, high, smallest = max(low, -1.0), min(high, 1.0), min(smallest, 1.0)
    return Change(value, low, high, p, smallest, n, clusters, no_loss, margin)


def _tail_p(value: float, error: StandardError) -> float:
    """Probability of at least this value when the mean is 0; a mean without scatter is certain."""
    if error.value == 0:
        return float(value <= 0)
    return float(stats.t.sf(value / error.value, error.df))


def p_text(value: float, n: int | None = None) -> str:
    """Formats a p-value with two digits, never as 0: `p = 0.031`, or `p ≤ 0.01` where none of n shuffles was
    as extreme.
    """
    if n is not None and value * (n + 1) < 1.5:
        return f"p ≤ {value:.2g}"
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def holm(p: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for their number (Holm 1979), in the order given."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return [float(value) for value in adjusted]


def zero_count_bound(n: int) -> float:
    """Returns the 95% upper bound of a share of which none of n was seen: at a share d that has probability
    (1 - d)^n."""
    return float(1 - (1 - LEVEL) ** (1 / n))
