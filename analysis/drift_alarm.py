"""Alarms for persona drift: rules over the projections of a conversation's turns, with their rate of false
alarms.

    reference = fit_reference(projections_of_reference_turns)             # mean and std of an answer's
    projection rule = calibrate_rule(Cusum(), conversations, reference, rate=0.05)   # at most 5% of reference
    conversations [state.alarm for state in alarm_states(rule, reference, projections)]

A turn is its answer's mean projection p; z = (p - mean) / std against the model's own reference
conversations, so a falling persona is a falling z. There are two rules: `MOfN` (z below -limit in m of the
last n turns) and `Cusum` (Page 1954: S = max(0, S - z - slack) above a limit), which detects a small drift
that lasts. An alarm ends only when z has been above `recovery` for as many turns as it took (hysteresis): a
monitor that flickers is switched off.

The rate of false alarms is the share of reference conversations in which the alarm is raised at all (Wilson
interval)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from personatlas.analysis.stats import wilson_interval
from personatlas.persona.errors import UserError

GAUGE_LIMIT = 3.0  # z at either end of a gauge
MIN_CONVERSATIONS = 20  # below it a rate of one in twenty cannot be told from none


@dataclass(frozen=True)
class ReferenceDistribution:
    """Mean and standard deviation of the projections of n reference answers (residual units)."""

    mean: float
    std: float
    n: int

    def z(self, projection: float) -> float:
        """Standard deviations above the reference mean; below zero is away from the Assistant."""
        return (projection - self.mean) / self.std


def fit_reference(projections: Sequence[float]) -> ReferenceDistribution:
    """Fits the distribution of reference turns.

    Raises `UserError` for fewer than two, or turns that are all the same.
    """
    values = np.asarray(projections, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all() or values.std() == 0:
        raise UserError(
            f"{len(values)} reference turns give no standard deviation; at least 2 that differ are needed"
        )
    return ReferenceDistribution(float(values.mean()), float(values.std(ddof=1)), len(values))


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

    def is_raised(self, z: Sequence[float]) -> bool:
        """Whether the turns since the last alarm, the newest last, raise one."""
        return sum(value < -self.limit for value in z[-self.n :]) >= self.m

    def highest_statistic(self, z: Sequence[float]) -> float:
        """The lowest limit that a conversation does not exceed."""
        windows = [sorted(z[max(0, end - self.n) : end])[: self.m] for end in range(1, len(z) + 1)]
        return max((-window[-1] for window in windows if len(window) == self.m), default=-np.inf)


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

    def is_raised(self, z: Sequence[float]) -> bool:
        """Whether the turns since the last alarm, the newest last, raise one."""
        return self._sums(z)[-1] > self.limit

    def highest_statistic(self, z: Sequence[float]) -> float:
        """The lowest limit that a conversation does not exceed."""
        return max(self._sums(z))

    def _sums(self, z: Sequence[float]) -> list[float]:
        sums = [0.0]
        for value in z:
            sums.append(max(0.0, sums[-1] - value - self.slack))
        return sums


Rule = MOfN | Cusum  # `limit` is what calibration moves: a higher one is raised more rarely


@dataclass(frozen=True)
class AlarmState:
    """After a turn: its z, whether the alarm is on, and whether this turn raised it."""

    z: float
    alarm: bool
    raised: bool


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

    def update(self, projection: float) -> AlarmState:
        """Returns the state after a turn whose answer has this mean projection."""
        z = self.reference.z(projection)
        if self.alarm:
            self._recovered = self._recovered + 1 if z > self.recovery else 0
            if self._recovered >= self.rule.patience:
                self.alarm, self._since, self._recovered = False, [], 0
            return AlarmState(z, self.alarm, False)
        self._since.append(z)
        self.alarm = self.rule.is_raised(self._since)
        return AlarmState(z, self.alarm, self.alarm)


def alarm_states(
    rule: Rule, reference: ReferenceDistribution, projections: Sequence[float]
) -> list[AlarmState]:
    """Returns the state after every turn of a conversation."""
    alarm = ConversationAlarm(rule, reference)
    return [alarm.update(projection) for projection in projections]


@dataclass(frozen=True)
class FalseAlarms:
    """Share of n reference conversations that raise an alarm, with its 95% interval."""

    share: float
    interval: tuple[float, float]
    n: int


def count_false_alarms(
    rule: Rule, reference: ReferenceDistribution, conversations: Sequence[Sequence[float]]
) -> FalseAlarms:
    """Counts the reference conversations (each the projections of its turns) that raise the alarm.

    `UserError` without any.
    """
    if not conversations:
        raise UserError("there are no reference conversations to count false alarms in")
    raised = sum(
        any(state.raised for state in alarm_states(rule, reference, projections))
        for projections in conversations
    )
    n = len(conversations)
    return FalseAlarms(raised / n, wilson_interval(raised, n), n)


def calibrate_rule(
    rule: Rule, conversations: Sequence[Sequence[float]], reference: ReferenceDistribution, rate: float
) -> Rule:
    """Returns the rule with the lowest limit that at most a share `rate` of reference conversations raises.

    Raises `UserError` for fewer than 20 conversations or a rate outside (0, 1).
    """
    if not 0 < rate < 1:
        raise UserError(f"a rate of false alarms of {rate} is outside 0..1")
    if len(conversations) < MIN_CONVERSATIONS:
        raise UserError(
            f"{len(conversations)} reference conversations; an alarm needs {MIN_CONVERSATIONS} or more"
        )
    limits = sorted(
        rule.highest_statistic([reference.z(projection) for projection in projections])
        for projections in conversations
    )
    allowed = int(np.floor(rate * len(conversations) + 1e-9))
    return replace(rule, limit=float(limits[len(limits) - 1 - allowed]))


def z_gauge(z: float, width: int = 24) -> str:
    """A mark on a line of `width` + 1 characters from -GAUGE_LIMIT to +GAUGE_LIMIT with 0 in the middle."""
    position = round((min(max(z, -GAUGE_LIMIT), GAUGE_LIMIT) + GAUGE_LIMIT) / (2 * GAUGE_LIMIT) * width)
    line = ["─"] * (width + 1)
    line[width // 2] = "┼"
    line[position] = "●"
    return "".join(line)
