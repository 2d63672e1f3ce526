"""Is a conversation's persona drifting? Rules over the projections of its turns, with the false alarms that they cost.

    baseline = baseline_of(turns_of_default_conversations)          # mean and spread of an answer's projection
    rule = calibrated(Cusum, conversations, baseline, rate=0.05)    # at most 5% of default conversations raise an alarm
    [state.alarm for state in watch(rule, baseline, projections)]

A turn is its answer's mean projection p; z = (p - mean) / spread against the model's own default conversations, so a falling
persona is a falling z. Two rules: `Several` (z below -threshold in m of the last n turns) and `Cusum` (Page 1954:
S = max(0, S - z - slack) above a limit), which sees a small drift that lasts. An alarm ends only when z has been above `calm` for
as many turns as it took (hysteresis): a monitor that flickers is switched off.

A rule's rate of false alarms is that of whole conversations of the default in which it is raised at all, with a Wilson interval.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from personatlas.analysis.stats import wilson_interval
from personatlas.persona.errors import UserError

FEWEST = 20  # conversations; below it a rate of one in twenty cannot be told from none


@dataclass(frozen=True)
class Baseline:
    """How the default's answers project: mean and standard deviation over n turns (residual units)."""

    mean: float
    spread: float
    n: int

    def z(self, projection: float) -> float:
        """Standard deviations above the default's mean; below zero is away from the Assistant."""
        return (projection - self.mean) / self.spread


def baseline_of(projections: Sequence[float]) -> Baseline:
    """The distribution of default turns. Raises `UserError` for fewer than two, or turns that are all the same."""
    values = np.asarray(projections, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all() or values.std() == 0:
        raise UserError(
            f"{len(values)} turns of the default give no spread; at least 2 that differ are needed"
        )
    return Baseline(float(values.mean()), float(values.std(ddof=1)), len(values))


@dataclass(frozen=True)
class Several:
    """z below -limit in at least m of the last n turns."""

    limit: float = 2.0
    m: int = 2
    n: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.m <= self.n:
            raise ValueError(f"{self.m} of {self.n} turns cannot be")

    @property
    def patience(self) -> int:
        """As many turns as raise it."""
        return self.m

    def raised(self, z: Sequence[float]) -> bool:
        """Whether the turns since the last alarm, the newest last, raise one."""
        return sum(value < -self.limit for value in z[-self.n :]) >= self.m


@dataclass(frozen=True)
class Cusum:
    """The sum of what falls short of -slack, never below zero, is above the limit (standard deviations times turns)."""

    limit: float = 4.0
    slack: float = 0.5

    @property
    def patience(self) -> int:
        """Two turns."""
        return 2

    def raised(self, z: Sequence[float]) -> bool:
        """By the newest turn."""
        total = 0.0
        for value in z:
            total = max(0.0, total - value - self.slack)
        return total > self.limit


Rule = Several | Cusum  # `limit` is what calibration moves: a higher one is raised more rarely


@dataclass(frozen=True)
class State:
    """After a turn: its z, whether the alarm is on, and whether it was raised by this turn."""

    z: float
    alarm: bool
    raised: bool


def watch(
    rule: Rule, baseline: Baseline, projections: Sequence[float], calm: float = -0.5
) -> Iterator[State]:
    """The state after every turn. An alarm ends after `rule.patience` turns in a row with z above `calm`."""
    monitor = Monitor(rule, baseline, calm)
    for projection in projections:
        yield monitor.turn(projection)


@dataclass
class Monitor:
    """The same for a conversation that goes on: one call a turn."""

    rule: Rule
    baseline: Baseline
    calm: float = -0.5
    alarm: bool = False
    _since: list[float] = field(default_factory=list)
    _quiet: int = 0

    def turn(self, projection: float) -> State:
        """The state after a turn whose answer has this mean projection."""
        z = self.baseline.z(projection)
        if self.alarm:
            self._quiet = self._quiet + 1 if z > self.calm else 0
            if self._quiet >= self.rule.patience:
                self.alarm, self._since, self._quiet = False, [], 0
            return State(z, self.alarm, False)
        self._since.append(z)
        self.alarm = self.rule.raised(self._since)
        return State(z, self.alarm, self.alarm)


@dataclass(frozen=True)
class FalseAlarms:
    """Share of default conversations that raise an alarm, its 95% interval, and how many were tried."""

    share: float
    interval: tuple[float, float]
    n: int


def false_alarms(rule: Rule, baseline: Baseline, conversations: Sequence[Sequence[float]]) -> FalseAlarms:
    """How often the rule is raised in conversations that do not drift. Raises `UserError` without any."""
    if not conversations:
        raise UserError("there are no default conversations to count false alarms in")
    raised = sum(any(state.raised for state in watch(rule, baseline, one)) for one in conversations)
    return FalseAlarms(
        raised / len(conversations), wilson_interval(raised, len(conversations)), len(conversations)
    )


def calibrated(rule: Rule, conversations: Sequence[Sequence[float]], baseline: Baseline, rate: float) -> Rule:
    """The rule with the lowest limit that at most a share `rate` of default conversations raises.

    Raises `UserError` for fewer than 20 conversations or a rate outside (0, 1).
    """
    if not 0 < rate < 1:
        raise UserError(f"a rate of false alarms of {rate} is outside 0..1")
    if len(conversations) < FEWEST:
        raise UserError(
            f"{len(conversations)} default conversations; {FEWEST} are the fewest to calibrate an alarm on"
        )
    limits = np.sort(_limits(rule, conversations, baseline))
    allowed = int(np.floor(rate * len(conversations) + 1e-9))
    return replace(rule, limit=float(limits[len(limits) - 1 - allowed]))


def _limits(rule: Rule, conversations: Sequence[Sequence[float]], baseline: Baseline) -> NDArray[np.float64]:
    """For each conversation the least limit that it does not raise."""
    found = []
    for one in conversations:
        z = [baseline.z(projection) for projection in one]
        if isinstance(rule, Several):
            parts = [sorted(z[max(0, end - rule.n) : end])[: rule.m] for end in range(1, len(z) + 1)]
            found.append(max((-part[-1] for part in parts if len(part) == rule.m), default=-np.inf))
        else:
            total, most = 0.0, 0.0
            for value in z:
                total = max(0.0, total - value - rule.slack)
                most = max(most, total)
            found.append(most)
    return np.asarray(found, dtype=float)
