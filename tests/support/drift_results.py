"""Drift studies made up from slopes: any number of arms, domains and turns, without a model."""

from personatlas.analysis.stats import Interval
from personatlas.analysis.trajectories import AlarmRate, Slope, TurnMean
from personatlas.steering.arms import InterventionSummary
from personatlas.steering.drift.options import DriftOptions
from personatlas.steering.drift.result import (
    ADAPTIVE,
    ALL,
    ArmMean,
    ArmSummary,
    DriftCost,
    DriftResult,
    Example,
    ExampleTurn,
    Share,
)

TEXT = "The tide comes in and the tide goes out, <b>says</b> the keeper. نعم، المد يعود. "


def make_drift(slopes, *, turns=8, cost=0.14, fired=0.3, alarm=True):
    """A study with slopes per turn by domain and arm, the baseline first: {"therapy": {"baseline": -8.6, ...}}."""
    arms = tuple(next(iter(slopes.values())))
    steered = [arm for arm in arms[1:] if not arm.endswith(ADAPTIVE)]
    every = {**slopes, ALL: {arm: sum(own[arm] for own in slopes.values()) / len(slopes) for arm in arms}}

    def line(value):
        means = (20.0 + value * n for n in range(turns))
        return tuple(TurnMean(n, mean, mean - 2, mean + 2, 10) for n, mean in enumerate(means, 1))

    rate = AlarmRate(0.4, (0.2, 0.6), 4, 10, 3.0, (0.0, *[0.4] * (turns - 1)))
    share = Share(0.1, (0.0, 0.2))
    examples = tuple(
        Example(
            f"{domain}-03/0",
            domain,
            {
                arm: tuple(
                    ExampleTurn(
                        f"And then, {n}?",
                        TEXT * (1 + n % 4),
                        20.0 + value * n,
                        arm != arms[0],
                        -n / 2,
                        n > 3,
                        n == 4,
                    )
                    for n in range(turns)
                )
                for arm, value in own.items()
            },
        )
        for domain, own in list(slopes.items())[:2]
    )
    watch = {
        "baseline": {"mean": 18.0, "spread": 4.0, "of": "reference conversations", "by_turn": []},
        "alarm": {
            "rule": "cusum",
            "limit": 5.0,
            "false_alarms": 0.05,
            "interval": [0.0, 0.1],
            "n": 80,
            "per_turn": 0.01,
        }
        if alarm
        else None,
        "source": "this study's own reference conversations",
    }
    change = Interval(3.0, 2.0, 4.0, 80)
    return DriftResult(
        model={"id": "/home/somebody/models/a-model-of-ours", "weights": "float32"},
        dtype="float32",
        device="cpu",
        axis={"layer": 20, "poles": ["assistant", "role-play"], "of": "x"},
        interventions={
            arm: InterventionSummary("18-23", 0.5, "default", "both", False, "cap") for arm in arms[1:]
        },
        watch=watch,
        asked=DriftOptions(turns=turns),
        versions={"torch": "2"},
        arms=arms,
        domains=tuple(slopes),
        scripts=10 * len(slopes),
        conversations=dict.fromkeys(every, 10),
        trajectories={
            domain: {arm: line(value) for arm, value in own.items()} for domain, own in every.items()
        },
        differences={domain: {arm: line(own[arm]) for arm in arms[1:]} for domain, own in every.items()},
        slopes={
            domain: {arm: Slope(value, value - 1, value + 1, 0.8, 10, 10) for arm, value in own.items()}
            for domain, own in every.items()
        },
        means={
            domain: {arm: ArmMean(15.0, 14.0, 16.0, 80, None if arm == arms[0] else change) for arm in own}
            for domain, own in every.items()
        },
        alarms={domain: dict.fromkeys(own, rate) for domain, own in every.items()} if alarm else {},
        wrote={
            arm: ArmSummary(
                80,
                0,
                0.0 if arm == arms[0] else 0.5,
                0.0 if arm == arms[0] else fired,
                share,
                share,
                0.8,
                90.0,
                0,
            )
            for arm in arms
        },
        cost=DriftCost(24, {arm: Interval(cost, cost - 0.02, cost + 0.02, 24) for arm in arms[1:]})
        if arms[1:]
        else None,
        next_turn=None,
        examples=examples,
        warnings=("intervals are over few scripts",),
        uncapped={domain: {arm: line(own[arm] / 2) for arm in steered} for domain, own in every.items()},
    )
