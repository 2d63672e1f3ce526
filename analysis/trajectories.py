"""Projections over the turns of conversations: means by turn, slopes, differences of two arms, and rates of
alarms.

    turn_means(values, scripts)                # mean, interval, n per turn; values (N, T), NaN past the end
    slope(values, scripts).value               # residual units per turn
    turn_means(capped - baseline, scripts)     # the same conversations, one arm less the other
    alarm_rate(rule, reference, projections)    # share of conversations with an alarm, first turn

Samples of one script are not independent: the bootstrap resamples scripts with all of their samples. The null
of a slope comes from the same conversations with their turns in random order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from personatlas.analysis.drift_alarm import ReferenceDistribution, Rule, alarm_states
from personatlas.analysis.stats import (
    LEVEL,
    LEVEL_TAILS,
    Array,
    Interval,
    cluster_weights,
    percentile_interval,
    weighted_means,
    wilson_interval,
)
from personatlas.persona.records import JsonRecord

SHUFFLES = 400  # orders of turns


@dataclass(frozen=True)
class TurnMean(JsonRecord):
    """Mean projection at a turn (from 1) over n conversations, with its 95% interval (None for a single
    script)."""

    turn: int
    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Slope(JsonRecord):
    """Mean of n conversations' least-squares slopes (residual units per turn) with its 95% interval.

    `scripts` is the number of scripts, which are resampled (no interval for a single one); 95% of the mean
    slopes of shuffled turns are at most `chance` in size.
    """

    value: float
    low: float | None
    high: float | None
    chance: float
    n: int
    scripts: int


@dataclass(frozen=True)
class AlarmRate(JsonRecord):
    """How many of n conversations raise an alarm: share with Wilson interval, None without conversations.

    `first` is the median turn (from 1) of their first alarms. `on` holds, by turn, the share of the
    conversations that reach it in which the alarm is on.
    """

    share: float | None
    interval: tuple[float, float] | None
    raised: int
    n: int
    first: float | None
    on: tuple[float, ...]


def turn_means(values: Array, scripts: Sequence[str], seed: int = 0) -> list[TurnMean]:
    """Returns the mean of values (N, T) at each turn that a conversation reaches."""
    weights, rows = cluster_weights(scripts, seed), []
    for turn, column in enumerate(values.T):
        reached = np.isfinite(column)
        if reached.any():
            names = np.asarray(scripts)[reached].tolist()
            low, high = _interval(column[reached], weights[:, reached], names)
            rows.append(TurnMean(turn + 1, float(column[reached].mean()), low, high, int(reached.sum())))
    return rows


def clustered_mean(values: Array, scripts: Sequence[str], seed: int = 0) -> Interval:
    """Returns the mean of all n finite values (N, T), every turn weighing the same; NaN without any."""
    finite = np.isfinite(values)
    sums, counts = np.where(finite, values, 0).sum(1), finite.sum(1)
    if not counts.any():
        return Interval(float("nan"), None, None, 0)
    value, n = float(sums.sum() / counts.sum()), int(counts.sum())
    if len(set(np.asarray(scripts)[counts > 0])) < 2:
        return Interval(value, None, None, n)
    weights = cluster_weights(scripts, seed)
    total = weights @ counts
    return Interval(
        value, *percentile_interval((weights @ sums)[total > 0] / total[total > 0], LEVEL_TAILS), n
    )


def slope(values: Array, scripts: Sequence[str], seed: int = 0) -> Slope | None:
    """Returns the mean slope over turns of values (N, T); None where no conversation has two turns."""
    long = np.isfinite(values).sum(1) >= 2
    if not long.any():
        return None
    values, names = values[long], np.asarray(scripts)[long].tolist()
    slopes = _slopes(values)
    low, high = _interval(slopes, cluster_weights(names, seed), names)
    generator, chance = np.random.default_rng(seed), []
    for _ in range(SHUFFLES):
        shuffled = values.copy()
        for row in shuffled:
            finite = np.isfinite(row)
            row[finite] = generator.permutation(row[finite])
        chance.append(abs(_slopes(shuffled).mean()))
    limit = float(np.quantile(chance, LEVEL))
    return Slope(float(slopes.mean()), low, high, limit, len(slopes), len(set(names)))


def alarm_rate(
    rule: Rule, reference: ReferenceDistribution, projections: Sequence[Sequence[float]]
) -> AlarmRate:
    """Returns the rate of alarms over conversations, each the projections of its answers."""
    states = [alarm_states(rule, reference, conversation) for conversation in projections]
    firsts = [
        first
        for conversation in states
        if (first := next((turn for turn, state in enumerate(conversation, 1) if state.raised), None))
    ]
    n, longest = len(states), max(map(len, states), default=0)
    on = [[turns[turn].alarm for turns in states if len(turns) > turn] for turn in range(longest)]
    return AlarmRate(
        share=len(firsts) / n if n else None,
        interval=wilson_interval(len(firsts), n) if n else None,
        raised=len(firsts),
        n=n,
        first=float(np.median(firsts)) if firsts else None,
        on=tuple(sum(turn) / len(turn) for turn in on),
    )


def _slopes(values: Array) -> Array:
    """Least-squares slopes over the finite turns of each row."""
    finite = np.isfinite(values)
    turns = np.where(finite, np.arange(values.shape[1], dtype=float), 0)
    centred = np.where(finite, turns - (turns.sum(1) / finite.sum(1))[:, None], 0)
    return np.asarray((centred * np.where(finite, values, 0)).sum(1) / (centred**2).sum(1))


def _interval(values: Array, weights: Array, scripts: Sequence[str]) -> tuple[float | None, float | None]:
    if len(set(scripts)) < 2:
        return None, None
    return percentile_interval(weighted_means(weights, values), LEVEL_TAILS)
