"""What a calibration found: the content of calibration.json.

result = CalibrationResult.load(run)
result.report["chosen"].assistant, result.report["chosen"].more_loss
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from personatlas.persona.artifacts import read_record
from personatlas.persona.interventions import BASELINE, Cap
from personatlas.persona.records import (
    Count,
    Ends,
    Fraction,
    FractionOrNaN,
    JsonObject,
    JsonRecord,
    NonNegative,
    check_ascending,
    check_distinct,
)
from personatlas.steering.identity import IdentityShares

OLD_BASELINE = "as it is"  # the baseline's name in files of earlier versions
CHOSEN = "chosen"


@dataclass(frozen=True)
class FittedOn:
    """Names of roles and ids of the bank's questions whose answers chose or fitted a cap: no result is
    reported on them.
    """

    roles: frozenset[str] = frozenset()
    questions: frozenset[str] = frozenset()

    def to_json(self) -> JsonObject:
        """What a cap's record of its calibration holds."""
        return {"fitted_roles": sorted(self.roles), "fitted_questions": sorted(self.questions)}


def fitted_on(caps: Iterable[Cap]) -> FittedOn:
    """What the caps were fitted on, by their own records; nothing for caps without one."""
    records = [cap.calibration for cap in caps]
    found = (frozenset(name for row in records for name in row.get(key, ())) for key in FittedOn().to_json())
    return FittedOn(*found)


@dataclass(frozen=True)
class IdentityRow(JsonRecord):
    """Who an arm's `n` answers say that they are.

    `assistant` is the share that call themselves an assistant, with its 95% interval; `fired` the share of
    tokens times layers that were changed, `distinct` that of distinct tokens in an answer.
    """

    assistant: FractionOrNaN
    interval: Ends
    shares: dict[str, Fraction]
    n: Count
    fired: FractionOrNaN
    distinct: FractionOrNaN

    @staticmethod
    def of(identity: IdentityShares) -> "IdentityRow":
        """The row of an arm's classed answers."""
        share, interval = identity.shares["assistant"], identity.interval()
        return IdentityRow(share, interval, identity.shares, identity.n, identity.fired, identity.distinct)


@dataclass(frozen=True)
class ArmRow(IdentityRow):
    """An arm on the reporting half: its `change` in the share of assistants, and its cost on benign
    answers.
    """

    change: float
    change_interval: Ends
    more_loss: float
    loss: NonNegative
    kl: float
    more_loss_interval: Ends | None = None
    benign_fired: FractionOrNaN | None = None
    benign_moved: float | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("more_loss_interval", "benign_fired", "benign_moved")


@dataclass(frozen=True)
class CandidateRow(JsonRecord):
    """A candidate on the choosing half: its cost and, where it was tried under role prompts, who it says it
    is.

    `levels` are those of its layers; where its floors were fitted, `shift` says by how many spreads they were
    moved.
    """

    name: str
    first: Count
    last: Count
    population: str
    phase: str
    more_loss: float
    kl: float
    benign_fired: FractionOrNaN
    shift: float | None = None
    levels: tuple[float, ...] | None = None
    assistant: FractionOrNaN | None = None
    interval: Ends | None = None
    shares: dict[str, Fraction] | None = None
    n: Count | None = None
    fired: FractionOrNaN | None = None
    distinct: FractionOrNaN | None = None

    omit_none: ClassVar[tuple[str, ...]] = (
        "shift", "levels", "assistant", "interval", "shares", "n", "fired", "distinct"
    )  # fmt: skip


@dataclass(frozen=True)
class FloorRow(JsonRecord):
    """A layer's floor for answers (and for prompts) with the shares of "default" and "roles" tokens below it,
    uncapped.
    """

    layer: Count
    answer: dict[str, float]
    prompt: dict[str, float] | None = None
    level: FractionOrNaN | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("prompt", "level")


@dataclass(frozen=True)
class ExampleRow(JsonRecord):
    """An answer of the baseline and of the chosen cap to the same question under the same role."""

    role: str
    question: str
    baseline: str
    capped: str


@dataclass(frozen=True)
class CalibrationResult(JsonRecord):
    """The chosen cap and how it was found (`tried`, `before`: choosing half), and what it does (`report`: the
    other half).

    `cap` is the candidate's name, `name` the one that it is saved under at `saved`, `page` its report.
    """

    cap: str
    why: str
    budget: NonNegative
    before: dict[str, IdentityRow]
    tried: tuple[CandidateRow, ...]
    report: dict[str, ArmRow]
    floors: tuple[FloorRow, ...]
    warnings: tuple[str, ...]
    halves: dict[str, dict[str, Count]]
    examples: tuple[ExampleRow, ...]
    model: dict[str, Any]
    name: str
    saved: str
    page: str
    versions: dict[str, str]

    def __post_init__(self) -> None:
        check_distinct([row.name for row in self.tried])
        check_ascending([row.layer for row in self.floors])
        if not {BASELINE, CHOSEN} <= set(self.report):
            raise ValueError(f"its report lacks the arm {BASELINE} or {CHOSEN}")

    @property
    def control_p(self) -> float | None:
        """The share of random directions with the cap's KL that gain as much, the cap counted in; None
        without such controls.
        """
        gains = [
            row.change for name, row in self.report.items() if re.fullmatch(r"random \d+, same KL", name)
        ]
        chosen = self.report[CHOSEN].change
        return (1 + sum(gain >= chosen for gain in gains)) / (1 + len(gains)) if gains else None

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "CalibrationResult":
        """What `to_json` wrote, or an earlier version with another name of the baseline."""

        def renamed(part: Mapping[str, Any]) -> JsonObject:
            return {BASELINE if key == OLD_BASELINE else key: value for key, value in part.items()}

        report, examples = row.get("report"), row.get("examples")
        if isinstance(report, dict) and isinstance(examples, list):
            examples = [renamed(part) if isinstance(part, dict) else part for part in examples]
            row = {**row, "report": renamed(report), "examples": examples}
        return super().from_json(row)

    @classmethod
    def load(cls, run: Path) -> "CalibrationResult":
        """The result of a run folder. Raises `UserError` when it was not calibrated."""
        return read_record(run / "calibration.json", cls)
