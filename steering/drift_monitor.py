"""Reference conversations of a model, stored beside its axis as `reference.json`, and the monitor calibrated
on them.

    save_reference(folder / "reference.json", axis, model.describe(), conversations, {"max_new_tokens": 128,
    ...}) monitor = load_monitor(axis)                             # finds the reference.json beside the axis
    alarm = monitor.start() alarm.update(projection).alarm                           # one call an answer; see
    analysis/drift_alarm.py

The file holds the mean projection of every answer, uncapped, in conversations that do not drift. They are
split into two halves by script, so that two samples of one script are never in both: reference distribution
and limit come from one half, and the rate of false alarms is counted in the other, since a rate counted where
the limit was fitted flatters. A rate is of conversations as long as these: twice as many turns are twice the
chances of a false alarm."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from personatlas.analysis.drift_alarm import (
    MIN_CONVERSATIONS,
    ConversationAlarm,
    Cusum,
    FalseAlarms,
    MOfN,
    ReferenceDistribution,
    Rule,
    calibrate_rule,
    count_false_alarms,
    fit_reference,
)
from personatlas.persona.artifacts import read_json, write_json
from personatlas.persona.axis import Axis, require_origin
from personatlas.persona.errors import UserError
from personatlas.persona.formats import read_json_value, require_file
from personatlas.persona.records import JsonObject

REFERENCE_FILE, OLD_REFERENCE_FILE = "reference.json", "calm.json"
KIND = "calm"  # of the file's content, as in earlier versions
RULES: dict[str, Callable[[], Rule]] = {"cusum": Cusum, "two_of_three": MOfN}


def direction_digest(axis: Axis) -> str:
    """16 hex digits of the vector at the axis's layer: equal where projections are on the same line."""
    return hashlib.sha256(axis.at(axis.layer).numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class DriftMonitor:
    """A reference distribution for z and, where one is calibrated, an alarm rule with its rate of false
    alarms.

    `population` says what the distribution is of, `rule_name` is the rule's name in `RULES`.
    """

    reference: ReferenceDistribution
    population: str
    rule_name: str = ""
    rule: Rule | None = None
    false_alarms: FalseAlarms | None = None

    def start(self) -> ConversationAlarm | None:
        """An alarm for one conversation; None without a calibrated rule."""
        return None if self.rule is None else ConversationAlarm(self.rule, self.reference)

    def describe(self) -> JsonObject:
        """Reference distribution ("baseline") and alarm (None without a calibrated rule) as JSON."""
        mean, std = self.reference.mean, self.reference.std
        baseline = {"mean": mean, "spread": std, "of": self.population}
        if self.rule is None or self.false_alarms is None:
            return {"baseline": baseline, "alarm": None}
        counted = self.false_alarms
        rate = {"false_alarms": counted.share, "interval": list(counted.interval), "n": counted.n}
        return {"baseline": baseline, "alarm": {"rule": self.rule_name, "limit": self.rule.limit, **rate}}


class ReferenceConversation(NamedTuple):
    """The mean projections of a conversation's answers in order (residual units).

    `name` is SCRIPT or SCRIPT/SAMPLE.
    """

    name: str
    domain: str
    projections: tuple[float, ...]

    @property
    def script(self) -> str:
        """The script's name; samples of one script are not independent."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class ReferenceConversations:
    """Conversations that do not drift, and how they were made (`provenance`)."""

    conversations: tuple[ReferenceConversation, ...]
    provenance: JsonObject

    def split(self) -> tuple[list[ReferenceConversation], list[ReferenceConversation]]:
        """Conversations to calibrate on, and to count false alarms in.

        Within each domain scripts alternate, in an order that only their names make.
        """
        digests = {
            one.script: hashlib.sha256(one.script.encode("utf-8", "surrogatepass")).hexdigest()
            for one in self.conversations
        }
        scripts = sorted({(one.domain, digests[one.script], one.script) for one in self.conversations})
        number = {script: index for index, (_, _, script) in enumerate(scripts)}
        fitted = [one for one in self.conversations if number[one.script] % 2 == 0]
        return fitted, [one for one in self.conversations if number[one.script] % 2]

    @property
    def fitted_scripts(self) -> frozenset[str]:
        """The scripts that an alarm is calibrated on."""
        return frozenset(conversation.script for conversation in self.split()[0])

    def require_enough(self) -> None:
        """Raises `UserError` for fewer than 20 conversations in either half."""
        fitted, held_out = self.split()
        if min(len(fitted), len(held_out)) < MIN_CONVERSATIONS:
            raise UserError(
                f"{len(self.conversations)} reference conversations: {len(fitted)} to calibrate an alarm on "
                f"and {len(held_out)} with other scripts to count its false alarms in; "
                f"{MIN_CONVERSATIONS} of each are the fewest"
            )

    def monitor(self, rule: str = "cusum", rate: float = 0.05) -> DriftMonitor:
        """Calibrates a monitor to at most a share `rate` of false alarms.

        Raises `UserError` for an unknown rule, a rate outside (0, 1), or fewer than 20 conversations a half.
        """
        if rule not in RULES:
            raise UserError(f"rule {rule!r} is not one of {', '.join(RULES)}")
        self.require_enough()
        fitted, held_out = ([one.projections for one in half] for half in self.split())
        reference = fit_reference([value for projections in fitted for value in projections])
        calibrated = calibrate_rule(RULES[rule](), fitted, reference, rate)
        false_alarms = count_false_alarms(calibrated, reference, held_out)
        return DriftMonitor(reference, "reference conversations", rule, calibrated, false_alarms)


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
    rows = [
        {"name": one.name, "domain": one.domain, "projections": list(one.projections)}
        for one in conversations
    ]
    origin = {"kind": KIND, "model": model, "layer": axis.layer, "direction": direction_digest(axis)}
    write_json(path, {**origin, "conversations": rows, "made": provenance})


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
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f"{path} is no record of reference conversations; `personatlas drift` makes one")
    try:
        origin, layer, direction = content["model"], int(content["layer"]), content["direction"]
        conversations = tuple(
            ReferenceConversation(str(row["name"]), str(row["domain"]), tuple(map(float, row["projections"])))
            for row in content["conversations"]
        )
        for one in conversations:
            if not one.projections or not all(map(math.isfinite, one.projections)):
                raise ValueError(f"conversation {one.name!r} has no projections, or one that is not finite")
        provenance = dict(content["made"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); `personatlas drift` makes a new one"
        ) from None
    require_origin("record of reference conversations", origin, model or axis.model)
    if (layer, direction) != (axis.layer, direction_digest(axis)):
        raise UserError(
            f"{path} was measured along another direction (layer {layer}, {direction}) than this axis (layer "
            f"{axis.layer}, {direction_digest(axis)}); `personatlas drift --axis` makes one for it"
        )
    return ReferenceConversations(conversations, provenance)


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
    distribution = ReferenceDistribution(middle, (high - low) / 1.349, 0)
    return DriftMonitor(distribution, "the axis's default answers")
