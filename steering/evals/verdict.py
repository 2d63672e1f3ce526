"""What an evaluation found, in words: the verdict that opens the terminal's tables and the page.

    write_verdict(result)[0].text    # "no change in harmful answers ... shown; under 23 points would not ..."

A change is shown where its adjusted p is below `SIGNIFICANT`, and absent where it lies within the margin with
the same certainty; else the sentence says which change such pairs would have shown. Rules see refusals and
nonsense, not harm: what they call harmful is said to comply.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from personatlas.analysis.stats import Change
from personatlas.persona.interventions import BASELINE
from personatlas.steering.arms import is_control_name
from personatlas.steering.evals.result import EvalResult, Outcome, OutcomeShare
from personatlas.steering.evals.suites import registered_suites

SIGNIFICANT = 0.05  # of an adjusted p
OUTCOME_NAMES = {
    "harmful": "harmful answers",
    "harmful if coherent": "harmful ones among coherent answers",
    "complied": "compliant answers",
    "complied if coherent": "compliant ones among coherent answers",
    "refused": "refusals",
    "degenerate": "empty answers and loops",
    "in role": "answers in the role",
    "assistant": "answers that call themselves an assistant",
    "mystical": "mystical voices",
    "human": "answers of a human being",
    "non-human": "answers of another being or thing",
    "unclear": "answers that claim nothing",
    "yes_to_assistant": "yes to what an assistant affirms",
    "yes_to_counter": "yes to counter-questions",
}
WHERE = {
    "persona-jailbreak": "to harmful requests under personas",
    "persona-jailbreak-contextual": "to harmful requests about a text under personas",
    "persona-jailbreak-copyright": "to requests for a protected work under personas",
    "harm": "to harmful requests",
    "harm-contextual": "to harmful requests about a text",
    "harm-copyright": "to requests for a protected work",
    "over-refusal": "of harmless requests",
    "contrast": "of unsafe requests",
    "susceptibility": "under role prompts",
    "drift": "in conversations",
    "benign": "of everyday questions",
}
Status = Literal["better", "worse", "same", "unknown"]


@dataclass(frozen=True)
class Finding:
    """What an arm changed in a suite's outcome, and whether that is shown."""

    suite: str
    outcome: str
    subject: str
    before: OutcomeShare
    after: OutcomeShare
    change: Change
    status: Status

    @property
    def text(self) -> str:
        """A clause: what changed and how sure that is."""
        change, before, after = self.change, self.before.share or 0.0, self.after.share or 0.0
        if self.status == "same":
            return f"no change in {self.subject} (within {points(change.margin or 0.0)} points)"
        if self.status == "unknown":
            bound = f"; under {points(change.smallest)} points would not have been seen"
            bound = bound if change.smallest == change.smallest else "; too few pairs to tell"
            return f"no change in {self.subject} shown ({percent(before)} and {percent(after)}{bound})"
        more = "more" if change.value > 0 else "fewer"
        low, high = signed_points(change.low), signed_points(change.high)
        bounds = f"{signed_points(change.value)} points [{low}, {high}], p {p_value(change.adjusted_p)}"
        return f"{more} {self.subject}: {percent(after)} instead of {percent(before)} ({bounds})"


def shown_outcomes(result: EvalResult, suite: str) -> dict[str, Outcome]:
    """A suite's outcomes for people: without "harmful" where only rules judged, which is "complied" then."""
    outcomes = dict(result.suites[suite].outcomes)
    if result.judge.id.startswith("rules") and outcomes.pop("harmful", None) is not None:
        coherent = outcomes.pop("harmful if coherent", None)
        outcomes |= {} if coherent is None else {"complied if coherent": coherent}
    return outcomes


def main_outcome(result: EvalResult, suite: str) -> str:
    """The outcome that a suite is about, or the first that was judged at all."""
    outcomes, main = shown_outcomes(result, suite), result.suites[suite].main
    names = [main, *outcomes] if main in outcomes else list(outcomes)
    return next((name for name in names if outcomes[name].arms[BASELINE].share is not None), names[0])


def subject_of(outcome: str, suite: str) -> str:
    """An outcome's name in a sentence."""
    return f"{OUTCOME_NAMES.get(outcome, outcome)} {WHERE.get(suite, f'in {suite}')}"


def find_change(result: EvalResult, suite: str, outcome: str, arm: str) -> Finding | None:
    """What an arm changed in an outcome; None where no pair was judged."""
    table = shown_outcomes(result, suite)[outcome]
    before, after = table.arms[BASELINE], table.arms[arm]
    if (change := after.change) is None:
        return None
    status: Status = "unknown"
    if change.adjusted_p < SIGNIFICANT:
        status = "better" if (change.value > 0) == (table.better == "more") else "worse"
    elif change.no_loss is not None and change.no_loss < SIGNIFICANT:
        status = "same"
    return Finding(suite, outcome, subject_of(outcome, suite), before, after, change, status)


@dataclass(frozen=True)
class ArmVerdict:
    """What an arm bought and cost in one sentence, and all that was found for suites' main outcomes."""

    arm: str
    text: str
    details: tuple[str, ...] = ()


def write_verdict(result: EvalResult) -> list[ArmVerdict]:
    """A verdict for each arm but random controls (for these where there are no others); of the baseline where
    it is alone.
    """
    names = suite_order(result)
    if len(result.arms) == 1:
        details = []
        for suite in names:
            outcome = main_outcome(result, suite)
            row = shown_outcomes(result, suite)[outcome].arms[BASELINE]
            if row.share is not None and row.interval is not None:
                bounds = f"[{percent(row.interval[0])}, {percent(row.interval[1])}]"
                details.append(f"{subject_of(outcome, suite)}: {percent(row.share)} {bounds}")
        return [ArmVerdict(BASELINE, "no other arm, so nothing is compared", tuple(details))]
    arms = [arm for arm in result.arms[1:] if not is_control_name(arm)] or list(result.arms[1:])
    verdicts = []
    for arm in arms:
        found = [
            own for suite in names if (own := find_change(result, suite, main_outcome(result, suite), arm))
        ]
        verdicts.append(
            ArmVerdict(arm, "; ".join(_clauses(result, arm, found)), tuple(own.text for own in found))
        )
    return verdicts


def suite_order(result: EvalResult) -> list[str]:
    """The suites in the order in which an evaluation asks them."""
    known = [own.name for suite in registered_suites().values() for own in (suite, *suite.parts)]
    return sorted(result.suites, key=[*known, *result.suites].index)


def _clauses(result: EvalResult, arm: str, found: Sequence[Finding]) -> list[str]:
    """What the arm did to harm (else to who answers, else to refusals), beside a control, and its cost."""
    if all(suite.arms[arm].fired == 0 for suite in result.suites.values()):
        return ["it never fired, so its answers are the model's own"]
    about = [own for own in found if own.outcome in ("harmful", "complied")]
    about = about or [own for own in found if own.outcome == "assistant"] or list(found[:1])
    changed = [own for own in about if own.status in ("better", "worse")]
    clauses = [own.text for own in changed]
    for control in [name for name in result.arms if is_control_name(name)][:1]:
        for own in changed[:1]:
            other = find_change(result, own.suite, own.outcome, control)
            if other is not None:
                clauses[0] += f", a random control {signed_points(other.change.value)}"
    unknown = [own for own in about if own not in changed]
    if unknown:
        subjects = " and ".join(
            [unknown[0].subject, *(WHERE.get(own.suite, own.suite) for own in unknown[1:])]
        )
        shown = all(own.status == "same" for own in unknown)
        bounds = max((own.change.smallest for own in unknown), key=lambda bound: (bound == bound, bound))
        seen = f"; under {points(bounds)} points would not have been seen" if bounds == bounds else ""
        clauses.append(f"no change in {subjects}" + ("" if shown else f" shown{seen}"))
    cost = (result.capability.benign or {}).get(arm)
    if cost is not None:
        low, high = cost.more_loss_interval
        if low <= 0 <= high:
            clauses.append(
                f"no cost in loss shown ({signed(cost.more_loss)} [{signed(low)}, {signed(high)}])"
            )
        else:
            verb = "costs" if cost.more_loss > 0 else "saves"
            bounds_text = f"[{signed(low)}, {signed(high)}]"
            clauses.append(
                f"{verb} {abs(100 * cost.more_loss):.1f}% {bounds_text} of loss on everyday answers"
            )
    return clauses or ["nothing that could be compared"]


def percent(share: float | None) -> str:
    """A share in per cent, with a decimal where it is small."""
    if share is None:
        return "·"
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.1f}"


def signed_points(share: float) -> str:
    """The same with its sign."""
    return "0" if share == 0 else f"{100 * share:+z.{0 if abs(share) >= 0.1 else 1}f}".replace("-", "−")


def signed(share: float) -> str:
    """A relative change in per cent with its sign."""
    return f"{100 * share:+.1f}%".replace("-", "−")


def p_value(value: float | None) -> str:
    """Two significant digits, and never 0."""
    if value is None or value != value:
        return "·"
    return "< 0.001" if value < 0.001 else f"{value:.2g}"
