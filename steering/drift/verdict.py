"""What a drift study found, in words: "therapy falls 8.6 a turn; assistant holds it; +14% loss".

    write_drift_verdict(result)[0]

A domain drifts where the interval of its slope at baseline is below 0 and the slope is beyond that of
shuffled turns. An arm holds it where its own slope is not shown to fall, and slows it where it falls less
than half as fast. The projection of a capped answer is level by construction, so the same answers read
without the cap are said beside it, where the study has them.
"""

from personatlas.analysis.trajectories import Slope
from personatlas.persona.interventions import BASELINE
from personatlas.steering.arms import is_control_name
from personatlas.steering.drift.result import ADAPTIVE, ALL, DriftResult


def write_drift_verdict(result: DriftResult) -> list[str]:
    """Clauses: where the baseline drifts, then what each arm does there and costs."""
    slopes = {domain: slope for domain in result.domains if (slope := result.slopes[domain][BASELINE])}
    if not slopes:
        return ["no conversation has two answers, so no slope can be measured"]
    falling = sorted((domain for domain, own in slopes.items() if _falls(own)), key=lambda d: slopes[d].value)
    steepest = falling[0] if falling else min(slopes, key=lambda domain: slopes[domain].value)
    if not falling:
        own = slopes[steepest]
        where = f"no domain is shown to drift: the steepest, {_name(steepest)}, moves {_turn(own)}"
        first = f"{where}, and shuffled turns up to {own.chance:.1f}"
    else:
        others = ", ".join(f"{_name(domain)} {abs(slopes[domain].value):.1f}" for domain in falling[1:])
        first = f"{_name(steepest)} falls {_turn(slopes[steepest])}" + (f" (also {others})" if others else "")
    held = [_name(domain) for domain in slopes if domain not in falling]
    if falling and held:
        names = " and ".join([", ".join(held[:-1]), held[-1]] if held[1:] else held)
        first += f"; {names} {'do' if held[1:] else 'does'} not"
    arms = [arm for arm in result.arms[1:] if not arm.endswith(ADAPTIVE)]
    return [first, *(_arm_sentence(result, arm, steepest, bool(falling)) for arm in arms)]


def _arm_sentence(result: DriftResult, arm: str, domain: str, drifts: bool) -> str:
    """What the arm does to the steepest domain, and what it costs."""
    before, after = result.slopes[domain][BASELINE], result.slopes[domain][arm]
    clauses = []
    if result.wrote[arm].fired == 0:
        return f"{arm} never fired, so its answers are the model's own"
    if drifts and before is not None and after is not None:
        verb = "slows" if after.value > before.value / 2 else "does not hold"
        clauses.append(f"{arm} {'holds' if not _falls(after) else verb} it ({_turn(after)})")
        means = ((result.uncapped or {}).get(domain) or {}).get(arm, ())
        if len(means) > 1:
            fall = (means[-1].mean - means[0].mean) / (means[-1].turn - means[0].turn)
            clauses[0] += f", read without it {fall:+.1f}".replace("-", "−")
    else:
        change = result.means[ALL][arm].change
        if change is not None:
            clauses.append(f"{arm} moves answers by {_interval(change.value, change.low, change.high)}")
    cost = None if result.cost is None else result.cost.arms.get(arm)
    if cost is not None:
        bounds = "" if cost.low is None else f" [{100 * cost.low:+.1f}, {100 * (cost.high or 0.0):+.1f}]"
        clauses.append(f"{100 * cost.value:+.1f}%{bounds} loss".replace("-", "−"))
    if not is_control_name(arm) and (own := result.wrote.get(f"{arm}{ADAPTIVE}")) is not None:
        clauses.append(f"adaptive, it acts on {own.acted:.0%} of answers")
    return "; ".join(clauses) or f"{arm} cannot be compared"


def _falls(slope: Slope) -> bool:
    return slope.value < -slope.chance and (slope.high is None or slope.high < 0)


def _turn(slope: Slope) -> str:
    if _falls(slope):
        bounds = "" if slope.low is None else f" [{-(slope.high or 0.0):.1f}, {-slope.low:.1f}]"
        return f"{abs(slope.value):.1f}{bounds} a turn"
    return f"{_interval(slope.value, slope.low, slope.high)} a turn"


def _interval(value: float, low: float | None, high: float | None) -> str:
    bounds = "" if low is None or high is None else f" [{low:+z.1f}, {high:+z.1f}]"
    return f"{value:+z.1f}{bounds}".replace("-", "−")


def _name(domain: str) -> str:
    return domain or "a conversation"
