"""Bootstrap intervals, and tests of two arms that answered the same prompts with the same seeds.

    change = paired_change(before, after, roles, requests)  # difference, interval, exact test
    change.value, change.low, change.high, change.p, change.smallest

Intervals are 95% percentile intervals of bootstrap draws. Pairs of one role, or of one request, are not
independent: the bootstrap resamples roles and requests, both at once (Owen 2007, "The pigeonhole bootstrap").
A difference is tested by McNemar's exact test on the discordant pairs, equivalence by two one-sided tests
against a margin (Schuirmann 1987).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import stats

from personatlas.persona.records import JsonRecord

Array = NDArray[np.float64]

SAMPLES = 4000  # bootstrap draws
LEVEL = 0.95
TAILS = (0.025, 0.975)
# Of paired and clustered intervals: the first is 0.025 + 2e-17, which keeps the last bit of stored results
LEVEL_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


@dataclass(frozen=True)
class Interval(JsonRecord):
    """An estimate with its 95% interval.

    `n` is the sample size behind it: bootstrap replicates in a fit, else values, pairs or clusters as the
    function that returns it says. `low` and `high` are None where no interval can be given.
    """

    value: float
    low: float | None
    high: float | None
    n: int | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("n",)


def percentile_interval(
    draws: Sequence[float] | Array, tails: tuple[float, float] = TAILS
) -> tuple[float, float]:
    """Returns the quantiles of bootstrap draws that bound a 95% interval (linear interpolation)."""
    low, high = np.quantile(np.asarray(draws), tails)
    return float(low), float(high)


def bootstrap_interval(value: float, draws: Sequence[float] | Array) -> Interval:
    """Returns an estimate with the percentile interval of its bootstrap draws; `n` is their number."""
    return Interval(value, *percentile_interval(draws), len(draws))


def resample(n: int, generator: Generator, samples: int | None = None) -> NDArray[np.int64]:
    """Draws n of n indices with replacement: (n,), or (samples, n)."""
    return generator.integers(0, n, n if samples is None else (samples, n))


def bootstrap_means(values: Array, samples: int, generator: Generator) -> Array:
    """Returns the means (samples,) of values (N,) that are resampled with replacement."""
    rows = max(1, 10**6 // len(values))  # at a time: samples x N indices may not fit into memory
    sizes = [min(rows, samples - start) for start in range(0, samples, rows)]
    return np.concatenate([values[resample(len(values), generator, size)].mean(1) for size in sizes])


def bootstrap_sums(*columns: Array, samples: int, seed: int = 0) -> list[Array]:
    """Returns each column's sums (samples,) over rows (N,) that are resampled alike in all columns."""
    drawn = resample(len(columns[0]), np.random.default_rng(seed), samples)
    return [column[drawn].sum(1) for column in columns]


def cluster_weights(labels: Sequence[Hashable], seed: int = 0, samples: int = SAMPLES) -> Array:
    """Returns how often each of N values counts in each draw (samples, N) of whole clusters."""
    n, index = _cluster_index(labels)
    return _draw_counts(n, samples, np.random.default_rng(seed))[:, index].astype(float)


def weighted_means(weights: Array, values: Array) -> Array:
    """Returns the mean of values (N,) under each row of weights (S, N); rows without weight are left out."""
    total = weights.sum(1)
    return np.asarray((weights @ values)[total > 0] / total[total > 0])


def ratio_interval(
    numerator: Array, denominator: Array, groups: Sequence[Hashable], samples: int
) -> tuple[float, float] | None:
    """Returns the interval of Σ numerator / Σ denominator over resampled groups; None for a single group."""
    n, index = _cluster_index(groups)
    if n < 2:
        return None
    sums = np.stack([np.bincount(index, values, n) for values in (numerator, denominator)], axis=1)
    drawn = _draw_counts(n, samples, np.random.default_rng(0)) @ sums  # (samples, 2)
    drawn = drawn[drawn[:, 1] > 0]
    return percentile_interval(drawn[:, 0] / drawn[:, 1])


def _cluster_index(labels: Sequence[Hashable]) -> tuple[int, NDArray[np.intp]]:
    """Number of distinct labels, and each value's label as an index into them in sorted order."""
    names, index = np.unique(np.array(labels, dtype=object), return_inverse=True)
    return len(names), index.ravel()


def _draw_counts(n: int, samples: int, generator: Generator) -> NDArray[np.int64]:
    """How often each of n clusters is drawn in each of the samples (samples, n)."""
    return generator.multinomial(n, np.full(n, 1 / n), size=samples)


@dataclass(frozen=True)
class Change(JsonRecord):
    """A mean difference over n pairs, after less before, with its 95% interval.

    `p` is of McNemar's exact test for outcomes that are 0 or 1, NaN for others. `smallest` is the difference
    that so many pairs detect with a power of 80%. `clusters` is the smaller number of roles and requests, of
    those above one.
    """

    value: float
    low: float
    high: float
    p: float
    smallest: float
    n: int
    clusters: int


def paired_change(
    before: Sequence[float],
    after: Sequence[float],
    roles: Sequence[str],
    requests: Sequence[str],
    seed: int = 0,
) -> Change:
    """Returns the mean change of outcomes over pairs (n each), clustered by role and by request.

    Raises ValueError when the lengths differ, there is no pair, or an outcome is not finite.
    """
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if not len(first) == len(second) == len(roles) == len(requests) or not len(first):
        raise ValueError(
            f"{len(first)} and {len(second)} outcomes of {len(roles)} roles and {len(requests)} requests: "
            "one of each a pair, and at least one pair"
        )
    change = second - first
    if not np.isfinite(change).all():
        raise ValueError("an outcome is not finite: leave pairs out that were not judged, in both arms")
    clusters = min((n for n in (len(set(roles)), len(set(requests))) if n > 1), default=1)
    is_binary = bool(np.isin(np.concatenate([first, second]), (0.0, 1.0)).all())
    if is_binary and not change.any():  # no scatter to resample, yet n equal pairs do not prove equality
        bound = zero_count_bound(len(change))
        return Change(0.0, -bound, bound, 1.0, bound, len(change), clusters)
    low, high = percentile_interval(cluster_bootstrap(change, roles, requests, seed), LEVEL_TAILS)
    p = mcnemar_p(int((change < 0).sum()), int((change > 0).sum())) if is_binary else float("nan")
    smallest = minimum_detectable_change(change)
    return Change(float(change.mean()), low, high, p, smallest, len(change), clusters)


def cluster_bootstrap(
    values: Array, roles: Sequence[Hashable], requests: Sequence[Hashable], seed: int = 0
) -> Array:
    """Returns means (SAMPLES,) of values (N,) when roles and requests are resampled, each with as many as
    there are.

    A clustering in which every value is a cluster of its own, or all are one, is not resampled.
    """
    generator = np.random.default_rng(seed)
    clusterings = [(n, index) for n, index in map(_cluster_index, (roles, requests)) if 1 < n < len(values)]
    if not clusterings:
        return bootstrap_means(values, SAMPLES, generator)
    weights = np.ones((SAMPLES, len(values)))
    for n, index in clusterings:
        weights *= _draw_counts(n, SAMPLES, generator)[:, index]
    return weighted_means(weights[weights.any(1)], values)


def mcnemar_p(worse: int, better: int) -> float:
    """Returns the two-sided p of McNemar's exact test from the discordant pairs; 1 where there are none."""
    discordant = worse + better
    return float(stats.binomtest(worse, discordant, 0.5).pvalue) if discordant else 1.0


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of a share. Raises ValueError for n = 0."""
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


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


def equivalence_p(draws: Array, value: float, margin: float, n: int) -> float:
    """Returns the p of two one-sided tests that a mean change lies within ±margin.

    `draws` are the `cluster_bootstrap` of the change of n pairs and `value` its mean; their standard
    deviation is the standard error. Where no pair differs, p is the probability of that if a share of
    `margin` did.
    """
    error = float(draws.std(ddof=1))
    if error == 0:
        return float((1 - margin) ** n) if abs(value) < margin else 1.0
    return float(max(stats.norm.sf((value + margin) / error), stats.norm.cdf((value - margin) / error)))


def minimum_detectable_change(change: Array, power: float = 0.8) -> float:
    """Returns the mean change that as many pairs, as scattered as these, detect with that power (5%,
    two-sided)."""
    scatter = float(np.sqrt((change**2).mean()))
    reach = stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(power)
    return float(reach * scatter / np.sqrt(len(change)))
