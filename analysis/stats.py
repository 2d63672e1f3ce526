"""Statistics of two arms that answered the same prompts with the same seeds.

    change = paired_change(before, after, roles, requests)      # difference of two shares, interval, exact test
    change.value, change.low, change.high, change.p, change.smallest

Pairs of one role, or of one request, are not independent: intervals come from a bootstrap that draws roles and requests
anew, both at once (Owen 2007, "The pigeonhole bootstrap"). The test of a difference is McNemar's exact one, on pairs that
differ; that of "no loss" is two one-sided tests against a margin (Schuirmann 1987). Beside every difference stands the
smallest that so many pairs would have shown.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

SAMPLES = 4000  # of a bootstrap
LEVEL = 0.95


@dataclass(frozen=True)
class Change:
    """A mean difference over n pairs (after less before) with its 95% interval.

    `p` is of McNemar's exact test for outcomes that are 0 or 1 (NaN for others), `smallest` the difference that so many pairs
    show with a power of 80%, and `clusters` the smaller number of roles and requests, where there are several.
    """

    value: float
    low: float
    high: float
    p: float
    smallest: float
    n: int
    clusters: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; what could not be computed is None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def paired_change(
    before: Sequence[float],
    after: Sequence[float],
    roles: Sequence[str],
    requests: Sequence[str],
    seed: int = 0,
) -> Change:
    """The mean change of outcomes over pairs (n each), clustered by role and by request.

    Raises ValueError when the lengths differ, there is no pair, or an outcome is not finite.
    """
    one, other = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if not len(one) == len(other) == len(roles) == len(requests) or not len(one):
        raise ValueError(
            f"{len(one)} and {len(other)} outcomes of {len(roles)} roles and {len(requests)} requests"
        )
    change = other - one
    if not np.isfinite(change).all():
        raise ValueError("an outcome is not finite: leave pairs out that were not judged, in both arms")
    fewest = min((n for n in (len(set(roles)), len(set(requests))) if n > 1), default=1)
    is_binary = bool(np.isin(np.concatenate([one, other]), (0.0, 1.0)).all())
    if is_binary and not change.any():  # no scatter, and yet n pairs do not show that none would ever differ
        least = none_differ(len(change))
        return Change(0.0, -least, least, 1.0, least, len(change), fewest)
    draws = cluster_draws(change, roles, requests, seed)
    low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    p = mcnemar(int((change < 0).sum()), int((change > 0).sum())) if is_binary else float("nan")
    return Change(
        float(change.mean()), float(low), float(high), p, smallest_shown(change), len(change), fewest
    )


def cluster_draws(
    values: NDArray[np.float64], roles: Sequence[str], requests: Sequence[str], seed: int = 0
) -> NDArray[np.float64]:
    """Means (SAMPLES,) of the values when roles and requests are drawn anew, each with as many as there are.

    A clustering in which every pair is a cluster of its own, or all are one, is not drawn over.
    """
    generator = np.random.default_rng(seed)
    found = [np.unique(np.asarray(labels), return_inverse=True) for labels in (roles, requests)]
    clusterings = [(len(names), index) for names, index in found if 1 < len(names) < len(values)]
    if not clusterings:  # pairs themselves
        return np.array(
            [values[generator.integers(0, len(values), len(values))].mean() for _ in range(SAMPLES)]
        )
    weights = np.ones((SAMPLES, len(values)))
    for n, index in clusterings:
        weights *= generator.multinomial(n, np.full(n, 1 / n), size=SAMPLES)[:, index]
    total = weights.sum(1)
    kept = total > 0
    return np.asarray((weights[kept] @ values) / total[kept])


def mcnemar(worse: int, better: int) -> float:
    """Two-sided p of McNemar's exact test from the pairs that differ; 1 where none does."""
    differing = worse + better
    return float(stats.binomtest(worse, differing, 0.5).pvalue) if differing else 1.0


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share. Raises ValueError for n = 0."""
    found = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return [float(value) for value in adjusted]


def none_differ(n: int) -> float:
    """The share of pairs that may differ (95%) where none of n did: with a share d, none does with probability (1 - d)^n."""
    return float(1 - (1 - LEVEL) ** (1 / n))


def no_loss(draws: NDArray[np.float64], value: float, margin: float, n: int) -> float:
    """p of two one-sided tests that the mean lies within ±margin: small where both larger losses and gains are ruled out.

    `draws` are `cluster_draws` of the change of n pairs and `value` its mean; their spread stands for the standard error. Where no
    pair differs it is the probability of that if a share of `margin` did.
    """
    error = float(draws.std(ddof=1))
    if error == 0:
        return float((1 - margin) ** n) if abs(value) < margin else 1.0
    return float(max(stats.norm.sf((value + margin) / error), stats.norm.cdf((value - margin) / error)))


def smallest_shown(change: NDArray[np.float64], power: float = 0.8) -> float:
    """The mean difference that so many pairs, as scattered as these, show with that power at the 5% level (two-sided)."""
    scatter = float(np.sqrt((change**2).mean()))
    reach = stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(power)
    return float(reach * scatter / np.sqrt(len(change)))
