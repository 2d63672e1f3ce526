"""Where conversations go, turn by turn: means with bands, slopes, differences of two arms, and how many raise an alarm.

    band(values, scripts)                    # per turn: mean, 95% interval, n;    values (N, T), NaN after a conversation's end
    slope(values, scripts).value             # residual units a turn
    band(capped - plain, scripts)            # the same conversations, one arm less the other
    alarms(rule, baseline, readings)         # share of conversations with one, Wilson's interval, when it comes first

Several samples of one script are not independent: intervals are of a bootstrap that draws scripts anew, with all of their samples.
What chance gives for a slope comes from the same conversations with their turns in a random order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personatlas.analysis.drift_alarm import Baseline, Rule, watch
from personatlas.analysis.stats import LEVEL, wilson

SAMPLES = 4000  # of a bootstrap
SHUFFLES = 400  # orders of turns
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Slope:
    """Mean over n conversations of their least-squares slopes (residual units a turn), its 95% interval over `scripts` scripts (None
    for a single one), and `chance`: 95% of mean slopes of shuffled turns are at most so steep."""

    value: float
    low: float | None
    high: float | None
    chance: float
    n: int
    scripts: int


def script_weights(scripts: Sequence[str], seed: int = 0) -> Values:
    """How often each of N conversations is drawn in each bootstrap sample, (SAMPLES, N): scripts are drawn with all of theirs."""
    names, index = np.unique(np.asarray(scripts), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=SAMPLES
    )
    return draws[:, index].astype(float)


def band(values: Values, scripts: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """Per turn (counted from 1) the mean of values (N, T), its 95% interval over scripts (None for a single one) and n; turns that
    nobody reaches are left out."""
    weights, rows = script_weights(scripts, seed), []
    for turn in range(values.shape[1]):
        own = np.isfinite(values[:, turn])
        if not own.any():
            continue
        there = values[own, turn]
        low, high = _interval(
            there, weights[:, own], len({s for s, kept in zip(scripts, own, strict=True) if kept})
        )
        rows.append(
            {"turn": turn + 1, "mean": float(there.mean()), "low": low, "high": high, "n": len(there)}
        )
    return rows


def mean_of(values: Values, scripts: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """The mean of all finite values (N, T), every turn alike, with its interval over scripts; Nones where there are none."""
    kept = np.isfinite(values)
    if not kept.any():
        return {"value": None, "low": None, "high": None, "n": 0}
    sums, counts = np.where(kept, values, 0).sum(1), kept.sum(1)
    value = float(sums.sum() / counts.sum())
    low = high = None
    if len({s for s, n in zip(scripts, counts, strict=True) if n}) > 1:
        weights = script_weights(scripts, seed)
        total = weights @ counts
        low, high = _quantiles((weights @ sums)[total > 0] / total[total > 0])
    return {"value": value, "low": low, "high": high, "n": int(counts.sum())}


def slope(values: Values, scripts: Sequence[str], seed: int = 0) -> Slope | None:
    """The mean slope over turns of values (N, T); None where no conversation has two turns."""
    own = np.isfinite(values).sum(1) >= 2
    if not own.any():
        return None
    kept, names = values[own], [script for script, there in zip(scripts, own, strict=True) if there]
    slopes = _slopes(kept)
    low, high = _interval(slopes, script_weights(names, seed), len(set(names)))
    draw = np.random.default_rng(seed)
    chance = [abs(_slopes(_shuffled(kept, draw)).mean()) for _ in range(SHUFFLES)]
    limit = float(np.quantile(chance, LEVEL))
    return Slope(float(slopes.mean()), low, high, limit, len(slopes), len(set(names)))


def alarms(rule: Rule, baseline: Baseline, readings: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Of n conversations, how many raise an alarm: share, interval, the median first turn of those (from 1), and by turn the share
    of conversations that reach it in which the alarm is on."""
    states = [list(watch(rule, baseline, one)) for one in readings]
    firsts = [
        first
        for own in states
        if (first := next((t for t, one in enumerate(own, 1) if one.raised), None)) is not None
    ]
    n, longest = len(states), max(map(len, states), default=0)
    on = [[own[turn].alarm for own in states if len(own) > turn] for turn in range(longest)]
    return {
        "share": len(firsts) / n if n else None,
        "interval": list(wilson(len(firsts), n)) if n else None,
        "raised": len(firsts),
        "n": n,
        "first": float(np.median(firsts)) if firsts else None,
        "on": [sum(turn) / len(turn) for turn in on],
    }


def _slopes(values: Values) -> Values:
    """Least-squares slopes over the finite turns of each row."""
    own = np.isfinite(values)
    turns = np.where(own, np.arange(values.shape[1], dtype=float), 0)
    counts = own.sum(1)
    centred = np.where(own, turns - (turns.sum(1) / counts)[:, None], 0)
    found: Values = (centred * np.where(own, values, 0)).sum(1) / (centred**2).sum(1)
    return found


def _shuffled(values: Values, draw: np.random.Generator) -> Values:
    """Each row's finite values in a random order, at the same places."""
    found = values.copy()
    for row in found:
        own = np.isfinite(row)
        row[own] = draw.permutation(row[own])
    return found


def _interval(values: Values, weights: Values, scripts: int) -> tuple[float | None, float | None]:
    if scripts < 2:
        return None, None
    total = weights.sum(1)
    return _quantiles((weights @ values)[total > 0] / total[total > 0])


def _quantiles(draws: Values) -> tuple[float, float]:
    low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
