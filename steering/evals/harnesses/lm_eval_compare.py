"""What lm-eval's metrics differ by between arms, paired over the samples.

A sample's outcome is a sum over a count: its number over 1; the numbers of its list over their number (IFEval's instructions,
which are not independent of each other, so that the sample stays the unit); the loss of a text scored whole over its words or
bytes. With S samples and N counts in all, a sample's part of the mean is its sum * S / N, so changes are changes of `mean`, the
sum of all over N (in nats a word or byte for perplexities, whose `value` is an exponential), and samples are their own clusters.

`p` is of McNemar's exact test where parts are 0 or 1, else of random sign flips, adjusted (Holm) over tasks, metrics and arms in
`p_holm`; `tost_p` is of two one-sided tests against the margin; `smallest` is the change that so many samples show with a power of
80%. Where no sample of a metric between 0 and 1 differs there is no scatter to go by: with a share d of samples that differ, n
samples show none with probability (1 - d)^n, which at d = margin is `tost_p`, and at 5% gives the interval and `smallest`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personatlas.analysis.stats import cluster_bootstrap, equivalence_p, holm, paired_change, zero_count_bound

Outcome = tuple[float, float]  # sum, count
FLIPS = 10_000


def outcome_of(score: Any, *, is_whole: bool = False) -> Outcome | None:
    """A sample's outcome; None where the metric is no mean over samples (F1, BLEU). `is_whole`: of a text scored whole."""
    if isinstance(score, tuple):
        return (-float(score[0]), float(score[1])) if is_whole and len(score) == 2 else None
    values = score if isinstance(score, list) else [score]
    if not all(isinstance(value, bool | int | float | np.number | np.bool_) for value in values):
        return None
    return float(sum(values)), float(len(values))


def compare_arms(
    tasks: Mapping[str, Any], first: str, outcomes: Mapping[str, Mapping[str, Any]], margin: float
) -> None:
    """Add means, changes from the arm `first` and their tests to every metric's arms."""
    tested: list[dict[str, Any]] = []
    for name, task in tasks.items():
        for metric, told in task["metrics"].items():
            scored = outcomes[name].get(metric, {})
            parts = {arm: _parts(list(own.values())) for arm, own in scored.items()}
            is_share = all(
                one is not None and 0 <= one[0] <= one[1] for own in scored.values() for one in own.values()
            )
            for arm, row in told["arms"].items():
                own, before = parts.get(arm), parts.get(first)
                row["mean"] = None if own is None else float(own.mean())
                row["n"] = task["n"]
                if arm != first and own is not None and before is not None and len(own) == len(before):
                    row |= (
                        _same(len(own), margin)
                        if is_share and (own == before).all()
                        else _change(before, own, margin)
                    )
                    tested.append(row)
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p


def _parts(outcomes: Sequence[Outcome | None]) -> NDArray[np.float64] | None:
    """Each sample's part of the mean (S,)."""
    known = [one for one in outcomes if one is not None]
    if not known or len(known) < len(outcomes):
        return None
    sums, counts = np.array(known).T
    if not np.isfinite(sums).all() or counts.sum() <= 0:
        return None
    return np.asarray(sums * (len(sums) / counts.sum()))


def _change(before: NDArray[np.float64], after: NDArray[np.float64], margin: float) -> dict[str, Any]:
    samples = [str(place) for place in range(len(before))]
    found = paired_change(before.tolist(), after.tolist(), samples, samples)
    change = after - before
    draws = cluster_bootstrap(change, samples, samples)
    return {
        "change": found.value, "interval": [found.low, found.high], "p": flip_p(change) if found.p != found.p else found.p,
        "tost_p": equivalence_p(draws, found.value, margin, len(change)), "smallest": found.smallest,
    }  # fmt: skip


def _same(n: int, margin: float) -> dict[str, Any]:
    """What n samples say of which none differs."""
    least = zero_count_bound(n)
    return {
        "change": 0.0, "interval": [-least, least], "p": 1.0, "tost_p": float((1 - margin) ** n), "smallest": least
    }  # fmt: skip


def flip_p(change: NDArray[np.float64], seed: int = 0) -> float:
    """Two-sided p that the mean of changes (S,) is 0, when each might as well have had the other sign."""
    differing = change[change != 0]
    if not len(differing):
        return 1.0
    generator, observed, reached = np.random.default_rng(seed), abs(differing.sum()) * (1 - 1e-12), 0
    for _ in range(FLIPS // 500):
        signs = generator.integers(0, 2, (500, len(differing))) * 2 - 1
        reached += int((abs(signs @ differing) >= observed).sum())
    return (reached + 1) / (FLIPS + 1)
