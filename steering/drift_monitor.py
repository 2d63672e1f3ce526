"""Reference conversations of a model, stored beside its axis as `reference.json`, and the monitor calibrated
on them.

    save_reference(folder / "reference.json", axis, model.describe(), conversations, {"max_new_tokens": 128,
    ...}) monitor = load_monitor(axis)                             # finds the reference.json beside the axis
    alarm = monitor.start() alarm.update(projection).alarm                           # one call an answer; see
    analysis/drift_alarm.py

The file holds the mean projection of every answer, uncapped, in conversations that do not drift. Reference
distribution and limit come from all of them, and the rate of false alarms from cross-validation over scripts:
each script's conversations are tried with a limit that the others set, since a rate counted where the limit
was fitted flatters. A rate is of conversations as long as these: twice as many turns are twice the chances of
a false alarm."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from personatlas.analysis.drift_alarm import (
    ConversationAlarm,
    Cusum,
    FalseAlarms,
    MOfN,
    ReferenceDistribution,
    Rule,
    calibrate_rule,
    false_alarms,
    fewest_scripts,
    first_alarm,
    fit_reference,
)
from personatlas.persona.artifacts import read_record, write_json
from personatlas.persona.axis import Axis, require_origin
from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.formats import read_json_value, require_file
from personatlas.persona.records import Count, JsonObject, JsonRecord, ModelFacts, Number, check_distinct

REFERENCE_FILE, OLD_REFERENCE_FILE = "reference.json", "calm.json"
KIND: Literal["calm"] = "calm"  # of the file's content, as in earlier versions
FOLDS = 10  # of the scripts, in cross-validation
RULES: dict[str, Callable[[], Rule]] = {"cusum": Cusum, "two_of_three": MOfN}


def direction_digest(axis: Axis) -> str:
    """16 hex digits of the vector at the axis's layer: equal where projections are on the same line."""
    return hashlib.sha256(axis.at(axis.layer).numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class HeldOutRule:
    """What reference conversations without some scripts calibrate."""

    scripts: frozenset[str]
    reference: ReferenceDistribution
    rule: Rule


@dataclass(frozen=True)
class DriftMonitor:
    """A reference distribution for z and, where one is calibrated, an alarm rule with its rate of false
    alarms.

    `population` says what the distribution is of, `rule_name` is the rule's name in `RULES`. `folds` are the
    rules for the reference conversations' own scripts.
    """

    reference: ReferenceDistribution
    population: str
    rule_name: str = ""
    rule: Rule | None = None
    false_alarms: FalseAlarms | None = None
    folds: tuple[HeldOutRule, ...] = ()

    def start(self, script: str | None = None) -> ConversationAlarm | None:
        """An alarm for one conversation; None without a calibrated rule.

        A script of the reference conversations gets the rule that the others calibrate.
        """
        if self.rule is None:
            return None
        fold = next((fold for fold in self.folds if script in fold.scripts), None)
        if fold is not None:
            return ConversationAlarm(fold.rule, fold.reference)
        return ConversationAlarm(self.rule, self.reference)

    def describe(self) -> JsonObject:
        """Reference distribution ("baseline") and alarm (None without a calibrated rule) as JSON."""
        mean, std, by_turn = self.reference.mean, self.reference.std, list(self.reference.by_turn)
        baseline = {"mean": mean, "spread": std, "of": self.population, "by_turn": by_turn}
        if self.rule is None or self.false_alarms is None:
            return {"baseline": baseline, "alarm": None}
        counted = self.false_alarms
        rate = {
            "false_alarms": counted.share,
            "interval": list(counted.interval),
            "n": counted.n,
            "per_turn": counted.per_turn,
        }
        return {"baseline": baseline, "alarm": {"rule": self.rule_name, "limit": self.rule.limit, **rate}}


@dataclass(frozen=True)
class ReferenceConversation(JsonRecord):
    """The mean projections of a conversation's answers in order (residual units).

    `name` is SCRIPT or SCRIPT/SAMPLE.
    """

    name: str
    domain: str
    projections: tuple[Number, ...]

    @property
    def script(self) -> str:
        """The script's name; samples of one script are not independent."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class ReferenceConversations:
    """Conversations that do not drift, and how they were made (`provenance`)."""

    conversations: tuple[ReferenceConversation, ...]
    provenance: JsonObject

    @property
    def scripts(self) -> list[str]:
        """The scripts, in an order that only their names make, domain by domain."""
        digests = {
            (one.domain, hashlib.sha256(one.script.encode("utf-8", "surrogatepass")).hexdigest(), one.script)
            for one in self.conversations
        }
        return list(dict.fromkeys(script for _, _, script in sorted(digests)))

    def require_enough(self, rate: float) -> None:
        """Raises `UserError` for fewer scripts than cross-validated limits at that rate need."""
        n, needed = len(self.scripts), fewest_scripts(rate)
        fewest = math.ceil(needed * FOLDS / (FOLDS - 1))
        if n < fewest:
            raise UserError(
                f"reference conversations of {n} script{'s' * (n != 1)}; to set an alarm's limit at a rate of {rate:g} and to "
                f"count its false alarms in other scripts {fewest} are the fewest"
            )

    def monitor(self, rule: str = "cusum", rate: float = 0.05) -> DriftMonitor:
        """Calibrates a monitor to at most a share `rate` of false alarms.

        Raises `UserError` for an unknown rule, a rate outside (0, 1), or too few scripts.
        """
        if rule not in RULES:
            raise UserError(f"rule {not_one_of(rule, RULES)}")
        if not 0 < rate < 1:
            raise UserError(f"a rate of false alarms of {rate} is outside 0..1")
        self.require_enough(rate)
        scripts, folds, firsts = self.scripts, [], []
        for fold in range(FOLDS):
            left_out = frozenset(scripts[fold::FOLDS])
            kept = [one for one in self.conversations if one.script not in left_out]
            folds.append(HeldOutRule(left_out, *_calibrate(kept, rule, rate)))
        of_script = {script: fold for fold in folds for script in fold.scripts}
        for one in self.conversations:
            own = of_script[one.script]
            firsts.append(first_alarm(own.rule, own.reference, one.projections))
        counted = false_alarms(
            firsts,
            [len(one.projections) for one in self.conversations],
            [one.script for one in self.conversations],
        )
        reference, calibrated = _calibrate(self.conversations, rule, rate)
        return DriftMonitor(reference, "reference conversations", rule, calibrated, counted, tuple(folds))


def _calibrate(
    conversations: Sequence[ReferenceConversation], rule: str, rate: float
) -> tuple[ReferenceDistribution, Rule]:
    projections = [one.projections for one in conversations]
    reference = fit_reference(projections)
    scripts = [one.script for one in conversations]
    return reference, calibrate_rule(RULES[rule](), projections, scripts, reference, rate)


@dataclass(frozen=True)
class StoredReference(JsonRecord):
    """The content of reference.json: the conversations, the line that they were measured on, and how they were made."""

    model: ModelFacts
    layer: Count
    direction: str
    conversations: tuple[ReferenceConversation, ...]
    made: JsonObject
    kind: Literal["calm"] = KIND

    def __post_init__(self) -> None:
        check_distinct([one.name for one in self.conversations])
        if empty := [one.name for one in self.conversations if not one.projections]:
            raise ValueError(f"conversation {empty[0]!r} has no projections")


def save_reference(
    path: Path,
    axis: Axis,
    model: JsonObject,
    conversations: Sequence[ReferenceConversation],
    provenance: JsonObject,
) -> None:
    """Writes reference.json.

    `model` is `Model.describe()`; `provenance` says how: sampling, seeds, domains.
    """
    content = StoredReference(model, axis.layer, direction_digest(axis), tuple(conversations), provenance)
    write_json(path, content.to_json())


def is_reference_file(path: Path) -> bool:
    """Whether a file is a reference.json (or calm.json) rather than stored conversations."""
    require_file(path)
    if path.suffix.lower() != ".json":
        return False
    try:
        content = read_json_value(path)
    except UserError:  # several values, or none: the reader of conversations says so
        return False
    return isinstance(content, dict) and content.get("kind") == KIND


def find_reference(axis: Axis) -> Path | None:
    """The reference.json (or calm.json of an earlier version) beside an axis, None where there is none."""
    if axis.folder is None:
        return None
    paths = (axis.folder / name for name in (REFERENCE_FILE, OLD_REFERENCE_FILE))
    return next((path for path in paths if path.is_file()), None)


def load_reference(path: Path, axis: Axis, model: JsonObject | None = None) -> ReferenceConversations:
    """Reads reference.json.

    Raises `UserError` for another model (the axis's unless given), another layer or direction, or a damaged
    file."""
    if not is_reference_file(path):
        raise UserError(f"{path} is no record of reference conversations; `personatlas drift` makes one")
    stored = read_record(path, StoredReference, "delete it and `personatlas drift` makes a new one")
    require_origin("record of reference conversations", stored.model, model or axis.model)
    if (stored.layer, stored.direction) != (axis.layer, direction_digest(axis)):
        raise UserError(
            f"{path} was measured along another direction (layer {stored.layer}, {stored.direction}) than this "
            f"axis (layer {axis.layer}, {direction_digest(axis)}); `personatlas drift --axis` makes one for it"
        )
    return ReferenceConversations(stored.conversations, stored.made)


def load_monitor(
    axis: Axis, reference: Path | None = None, rule: str = "cusum", rate: float = 0.05
) -> DriftMonitor:
    """Loads the monitor of an axis: calibrated on the reference.json given, else on the one beside the axis.

    Without either, z is against the axis's own quartiles and there is no alarm. Raises `UserError` for a file
    that is no reference.json of this axis, and for an axis without quartiles."""
    if reference is not None and not is_reference_file(reference):
        raise UserError(f"{reference} is no {REFERENCE_FILE}; `personatlas drift` makes one")
    path = reference or find_reference(axis)
    if path is not None:
        return load_reference(path, axis).monitor(rule, rate)
    if not {0.25, 0.5, 0.75} <= set(axis.levels):
        raise UserError(
            "the axis keeps no quartiles of the default's answers; give --reference conversations instead"
        )
    # median, and interquartile range as a standard deviation
    row = axis.default_quantiles[axis.layers.index(axis.layer)]
    low, middle, high = (float(row[axis.levels.index(level)]) for level in (0.25, 0.5, 0.75))
    if not high > low:
        raise UserError(
            f"the axis's quartiles at layer {axis.layer} are unknown or equal; give --reference conversations"
        )
    distribution = ReferenceDistribution(middle, (high - low) / 1.349, 0)
    return DriftMonitor(distribution, "the axis's default answers")
