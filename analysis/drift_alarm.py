"""Alarms for persona drift: rules over the projections of a conversation's turns, with their rate of false
alarms.

    reference = fit_reference(conversations)            # mean by turn and std of an answer's projection
    rule = calibrate_rule(Cusum(), conversations, scripts, reference, rate=0.05)
    [state.alarm for state in alarm_states(rule, reference, projections)]

A turn is its answer's mean projection p; z = (p - mean) / std against the model's own reference conversations
at the same turn (their mean falls as conversations go on), so a falling persona is a falling z. There are two
rules: `MOfN` (z below -limit in m of the last n turns) and `Cusum` (Page 1954: S = max(0, S - z - slack)
above a limit), which detects a small drift that lasts. An alarm ends only when z has been above `recovery`
for as many turns as it took (hysteresis): a monitor that flickers is switched off.

The limit is the lowest with (Σ_s f_s + 1) / (S + 1) <= rate, where f_s is the share of script s's samples
that raise the alarm: the expected rate in a conversation of a new script is then at most `rate` (conformal
risk control, Angelopoulos et al. 2024). The rate is of conversations as long as these; by turn it is the
number of first alarms over the turns until then.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np

from personatlas.analysis.stats import share_interval
from personatlas.persona.errors import UserError

GAUGE_LIMIT = 3.0  # z at either end of a gauge
CALM_BAND = 2.0  # z on either side of the reference mean


@dataclass(frozen=True)
class ReferenceDistribution:
    """Mean and standard deviation of the projections of n reference answers (residual units).

    `by_turn` holds the mean at each turn, where it is known; the standard deviation is then around those.
    """

    mean: float
    std: float
    n: int
    by_turn: tuple[float, ...] = ()

    def z(self, projection: float, turn: int | None = None) -> float:
        """Standard deviations above the reference mean at a turn (from 0; the last known one for later
        turns), or above the mean of all turns; below zero is away from the Assistant."""
        at_turn = turn is not None and self.by_turn
        mean = self.by_turn[min(turn, len(self.by_turn) - 1)] if at_turn and turn is not None else self.mean
        return (projection - mean) / self.std


def fit_reference(conversations: Sequence[Sequence[float]]) -> ReferenceDistribution:
    """Fits the distribution of reference conversations, each the projections of its turns.

    A turn has a mean of its own where half of the conversations reach it. Raises `UserError` for fewer than
    two turns, or turns that are all the same.
    """
    values = np.array([value for turns in conversations for value in turns], dtype=float)
    longest = max(map(len, conversations), default=0)
    columns = [[turns[turn] for turns in conversations if len(turns) > turn] for turn in range(longest)]
    enough = [column for column in columns if len(column) >= max(2, len(conversations) / 2)]
    by_turn = tuple(float(np.mean(column)) for column in enough)
    last = len(by_turn) - 1
    around = [
        value - (by_turn[min(turn, last)] if by_turn else values.mean())
        for turns in conversations
        for turn, value in enumerate(turns)
    ]
    degrees = len(values) - max(len(by_turn), 1)
    std = float(np.sqrt(np.square(around).sum() / degrees)) if degrees > 0 else 0.0
    if not np.isfinite(values).all() or not std > 0:
        raise UserError(
            f"{len(values)} reference turns give no standard deviation; more that differ are needed"
        )
    return ReferenceDistribution(float(values.mean()), std, len(values), by_turn)


@dataclass(frozen=True)
class MOfN:
    """Raised by z below -limit in at least m of the last n turns. Raises `ValueError` unless 1 <= m <= n."""

    limit: float = 2.0
    m: int = 2
    n: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.m <= self.n:
            raise ValueError(f"m of n turns needs 1 <= m <= n, not {self.m} of {self.n}")

    @property
    def patience(self) -> int:
        """Turns above `recovery` that end the alarm: as many as raise it."""
        return self.m

    def statistic(self, z: Sequence[float]) -> float:
        """By how much the m-th lowest of the last n turns is below zero."""
        window = sorted(z[-self.n :])
        return -window[self.m - 1] if len(window) >= self.m else -np.inf


@dataclass(frozen=True)
class Cusum:
    """Raised by the sum of shortfalls below -slack, never below zero, above the limit (standard deviations x
    turns).
    """

    limit: float = 4.0
    slack: float = 0.5

    @property
    def patience(self) -> int:
        """Turns above `recovery` that end the alarm."""
        return 2

    def statistic(self, z: Sequence[float]) -> float:
        """The sum of shortfalls after the last turn."""
        return reduce(lambda total, value: max(0.0, total - value - self.slack), z, 0.0)


# A rule's `statistic` is of the turns since the last alarm, the newest last; above `limit` it raises an
# alarm. Calibration moves the limit: a higher one is exceeded more rarely.
Rule = MOfN | Cusum


@dataclass(frozen=True)
class AlarmState:
    """After a turn: its z, whether the alarm is on, and whether this turn raised it.

    `statistic` is the rule's (0 where it is below): above the rule's limit it raises the alarm. None while
    an earlier turn's alarm is on.
    """

    z: float
    alarm: bool
    raised: bool
    statistic: float | None = None


@dataclass
class ConversationAlarm:
    """The alarm of one conversation as it goes on; it ends after `rule.patience` turns in a row with z above
    `recovery`.
    """

    rule: Rule
    reference: ReferenceDistribution
    recovery: float = -0.5
    alarm: bool = False
    _since: list[float] = field(default_factory=list)
    _recovered: int = 0
    _turn: int = 0

    def update(self, projection: float) -> AlarmState:
        """Returns the state after a turn whose answer has this mean projection."""
        z = self.reference.z(projection, self._turn)
        self._turn += 1
        if self.alarm:
            self._recovered = self._recovered + 1 if z > self.recovery else 0
            if self._recovered >= self.rule.patience:
                self.alarm, self._since, self._recovered = False, [], 0
            return AlarmState(z, self.alarm, False)
        self._since.append(z)
        statistic = self.rule.statistic(self._since)
        self.alarm = statistic > self.rule.limit
        return AlarmState(z, self.alarm, self.alarm, max(0.0, statistic))


def alarm_states(
    rule: Rule, reference: ReferenceDistribution, projections: Sequence[float]
) -> list[AlarmState]:
    """Returns the state after every turn of a conversation."""
    alarm = ConversationAlarm(rule, reference)
    return [alarm.update(projection) for projection in projections]


def first_alarm(rule: Rule, reference: ReferenceDistribution, projections: Sequence[float]) -> int | None:
    """Returns the turn (from 1) that first raises the alarm in a conversation, None where none does."""
    states = alarm_states(rule, reference, projections)
    return next((turn for turn, state in enumerate(states, 1) if state.raised), None)


@dataclass(frozen=True)
class FalseAlarms:
    """Share of n reference conversations that raise an alarm, with its 95% interval over scripts.

    `per_turn` is the number of first alarms over the turns until then: 1 / `per_turn` is the mean number of
    turns to a false alarm.
    """

    share: float
    interval: tuple[float, float]
    n: int
    per_turn: float


def false_alarms(firsts: Sequence[int | None], lengths: Sequence[int], scripts: Sequence[str]) -> FalseAlarms:
    """Counts false alarms from each reference conversation's `first_alarm`, length in turns and script.

    `UserError` without any conversation.
    """
    if not firsts:
        raise UserError("there are no reference conversations to count false alarms in")
    raised = np.array([first is not None for first in firsts], dtype=float)
    turns = sum(length if first is None else first for first, length in zip(firsts, lengths, strict=True))
    per_turn = float(raised.sum() / turns) if turns else 0.0
    return FalseAlarms(float(raised.mean()), share_interval(raised, scripts), len(firsts), per_turn)


def highest_statistic(rule: Rule, reference: ReferenceDistribution, projections: Sequence[float]) -> float:
    """Returns the lowest limit of the rule that a conversation does not exceed."""
    z = [reference.z(value, turn) for turn, value in enumerate(projections)]
    return max((rule.statistic(z[:turn]) for turn in range(1, len(z) + 1)), default=-np.inf)


def fewest_scripts(rate: float) -> int:
    """Returns the fewest scripts that can set a limit for a share `rate` of conversations."""
    return int(np.ceil(1 / rate - 1e-9)) - 1


def calibrate_rule(
    rule: Rule,
    conversations: Sequence[Sequence[float]],
    scripts: Sequence[str],
    reference: ReferenceDistribution,
    rate: float,
) -> Rule:
    """Returns the rule with the lowest limit for a share `rate` of conversations of new scripts.

    Raises `UserError` for a rate outside (0, 1), or fewer than 1 / rate - 1 scripts.
    """
    if not 0 < rate < 1:
        raise UserError(f"a rate of false alarms of {rate} is outside 0..1")
    names, counts = np.unique(np.asarray(scripts), return_counts=True)
    if len(names) < fewest_scripts(rate):
        raise UserError(
            f"reference conversations of {len(names)} scripts; a rate of {rate:g} needs "
            f"{fewest_scripts(rate)} or more"
        )
    weight = dict(zip(names.tolist(), (1 / counts).tolist(), strict=True))
    highest = [highest_statistic(rule, reference, projections) for projections in conversations]
    allowed, limit, above = rate * (len(names) + 1) - 1 + 1e-9, -np.inf, 0.0
    for statistic, script in sorted(zip(highest, scripts, strict=True), reverse=True):
        above += weight[script]  # raised if the limit were below this conversation's statistic
        if above > allowed:
            limit = statistic
            break
    return replace(rule, limit=float(limit))


def z_gauge(z: float, width: int = 24) -> str:
    """A mark on a line of `width` + 1 characters from -GAUGE_LIMIT to +GAUGE_LIMIT with 0 in the middle."""
    position = round((min(max(z, -GAUGE_LIMIT), GAUGE_LIMIT) + GAUGE_LIMIT) / (2 * GAUGE_LIMIT) * width)
    line = ["─"] * (width + 1)
    line[width // 2] = "┼"
    line[position] = "●"
    return "".join(line)
