"""Projections over the turns of conversations: means by turn, slopes, differences of two arms, and rates of
alarms.

    turn_means(values, scripts)                # mean, interval, n per turn; values (N, T), NaN past the end
    slope(values, scripts).value               # residual units per turn
    turn_means(capped - baseline, scripts)     # the same conversations, one arm less the other
    alarm_rate(states, scripts)                # share of conversations with an alarm, first turn

Samples of one script are not independent: standard errors are clustered by script. The null of a slope comes
from the same conversations with their turns in random order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from personatlas.analysis.drift_alarm import AlarmState
from personatlas.analysis.stats import LEVEL, Array, Interval, mean_interval, ratio_interval, share_interval
from personatlas.persona.records import Count, Ends, Fraction, FractionOrNaN, JsonRecord

SHUFFLES = 400  # orders of turns


@dataclass(frozen=True)
class TurnMean(JsonRecord):
    """Mean projection at a turn (from 1) over n conversations, with its 95% interval (None for a single
    script)."""

    turn: Count
    mean: float
    low: float | None
    high: float | None
    n: Count


@dataclass(frozen=True)
class Slope(JsonRecord):
    """Mean of n conversations' least-squares slopes (residual units per turn) with its 95% interval.

    `scripts` is the number of scripts, the clusters (no interval for a single one); 95% of the mean
    slopes of shuffled turns are at most `chance` in size.
    """

    value: float
    low: float | None
    high: float | None
    chance: float
    n: Count
    scripts: Count


@dataclass(frozen=True)
class AlarmRate(JsonRecord):
    """How many of n conversations raise an alarm: share with interval over scripts, None without
    conversations.

    `first` is the median turn (from 1) of their first alarms. `on` holds, by turn, the share of the
    conversations that reach it in which the alarm is on.
    """

    share: FractionOrNaN | None
    interval: Ends | None
    raised: Count
    n: Count
    first: float | None
    on: tuple[Fraction, ...]


def turn_means(values: Array, scripts: Sequence[str]) -> list[TurnMean]:
    """Returns the mean of values (N, T) at each turn that a conversation reaches."""
    rows = []
    for turn, column in enumerate(values.T):
        reached = np.isfinite(column)
        if reached.any():
            mean = mean_interval(column[reached], np.asarray(scripts)[reached].tolist())
            rows.append(TurnMean(turn + 1, mean.value, mean.low, mean.high, int(reached.sum())))
    return rows


def clustered_mean(values: Array, scripts: Sequence[str]) -> Interval:
    """Returns the mean of all n finite values (N, T), every turn weighing the same; NaN without any."""
    finite = np.isfinite(values)
    sums, counts = np.where(finite, values, 0).sum(1), finite.sum(1)
    if not counts.any():
        return Interval(float("nan"), None, None, 0)
    some = counts > 0
    mean = ratio_interval(sums[some], counts[some].astype(float), np.asarray(scripts)[some].tolist())
    return replace(mean, n=int(counts.sum()))


def slope(values: Array, scripts: Sequence[str], seed: int = 0) -> Slope | None:
    """Returns the mean slope over turns of values (N, T); None where no conversation has two turns."""
    long = np.isfinite(values).sum(1) >= 2
    if not long.any():
        return None
    values, names = values[long], np.asarray(scripts)[long].tolist()
    slopes = _slopes(values)
    mean = mean_interval(slopes, names)
    generator, chance = np.random.default_rng(seed), []
    for _ in range(SHUFFLES):
        shuffled = values.copy()
        for row in shuffled:
            finite = np.isfinite(row)
            row[finite] = generator.permutation(row[finite])
        chance.append(abs(_slopes(shuffled).mean()))
    limit = float(np.quantile(chance, LEVEL))
    return Slope(mean.value, mean.low, mean.high, limit, len(slopes), len(set(names)))


def alarm_rate(states: Sequence[Sequence[AlarmState]], scripts: Sequence[str]) -> AlarmRate:
    """Returns the rate of alarms over conversations, each the states after its answers."""
    raised = [next((n for n, state in enumerate(turns, 1) if state.raised), None) for turns in states]
    firsts = [turn for turn in raised if turn is not None]
    n, longest = len(states), max(map(len, states), default=0)
    on = [[turns[turn].alarm for turns in states if len(turns) > turn] for turn in range(longest)]
    return AlarmRate(
        share=len(firsts) / n if n else None,
        interval=share_interval(np.array([turn is not None for turn in raised], float), scripts)
        if n
        else None,
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
