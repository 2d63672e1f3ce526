"""Calm conversations of a model, kept beside its axis as `calm.json`, and the alarm that is calibrated on them.

    save_calm(folder / "calm.json", axis, model.describe(), conversations, {"max_new_tokens": 128, ...})
    watcher = watcher_of(axis, stem)                         # finds the calm.json beside the axis
    watcher.monitor().turn(projection).alarm                 # one call an answer; see analysis/drift.py

The file holds the mean projection of every answer, uncapped, in conversations that do not drift. They are dealt into two halves by
script, so that two samples of one script are never in both: baseline and limit come from one half, and the rate of false alarms
is counted in the other, since a rate counted where the limit was fitted flatters. A rate is of conversations as long as these:
twice as many turns are twice the chances of a false alarm.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from personatlas.analysis.drift_alarm import (
    FEWEST,
    Baseline,
    Cusum,
    FalseAlarms,
    Monitor,
    Rule,
    Several,
    baseline_of,
    calibrated,
    false_alarms,
)
from personatlas.persona.artifacts import read_json, write_json
from personatlas.persona.axis import Axis, require_origin
from personatlas.persona.errors import UserError

CALM = "calm.json"
RULES: dict[str, Callable[[], Rule]] = {"cusum": Cusum, "several": Several}


def direction_of(axis: Axis) -> str:
    """16 hex digits of the vector at the axis's layer: equal where projections are on the same line."""
    return hashlib.sha256(axis.at(axis.layer).numpy().tobytes()).hexdigest()[:16]


class CalmConversation(NamedTuple):
    """A conversation's answers in order, by mean projection (residual units). `name` is SCRIPT or SCRIPT/SAMPLE."""

    name: str
    domain: str
    projections: tuple[float, ...]

    @property
    def script(self) -> str:
        """What its user says; samples of one script are not independent."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Watcher:
    """How a conversation is watched: the baseline of its z, and a rule with its rate of false alarms where one is calibrated."""

    baseline: Baseline
    of: str
    name: str = ""
    rule: Rule | None = None
    false_alarms: FalseAlarms | None = None

    def monitor(self) -> Monitor | None:
        """A monitor for one conversation; None without a calibrated rule."""
        return None if self.rule is None else Monitor(self.rule, self.baseline)

    def describe(self) -> dict[str, Any]:
        """Baseline and alarm as plain numbers; the alarm is None without a calibrated rule."""
        told: dict[str, Any] = {"mean": self.baseline.mean, "spread": self.baseline.spread, "of": self.of}
        if self.rule is None or self.false_alarms is None:
            return {"baseline": told, "alarm": None}
        seen = self.false_alarms
        rate = {"false_alarms": seen.share, "interval": list(seen.interval), "n": seen.n}
        return {"baseline": told, "alarm": {"rule": self.name, "limit": self.rule.limit, **rate}}


@dataclass(frozen=True)
class Calm:
    """Conversations that do not drift, and how they were made."""

    conversations: tuple[CalmConversation, ...]
    made: dict[str, Any]

    def halves(self) -> tuple[list[CalmConversation], list[CalmConversation]]:
        """To calibrate on, and to count false alarms in: within each domain scripts alternate, in an order that only their names make."""
        fit: list[CalmConversation] = []
        held: list[CalmConversation] = []
        scripts = sorted({(one.domain, _order(one.script), one.script) for one in self.conversations})
        place = {script: number for number, (_, _, script) in enumerate(scripts)}
        for one in self.conversations:
            (held if place[one.script] % 2 else fit).append(one)
        return fit, held

    def require_enough(self) -> None:
        """`UserError` for fewer than 20 conversations in either half."""
        fit, held = self.halves()
        if min(len(fit), len(held)) < FEWEST:
            raise UserError(
                f"{len(self.conversations)} calm conversations: {len(fit)} to calibrate an alarm on and {len(held)} with other scripts "
                f"to count its false alarms in; {FEWEST} of each are the fewest"
            )

    def watcher(self, rule: str = "cusum", rate: float = 0.05) -> Watcher:
        """Baseline and alarm. Raises `UserError` for an unknown rule, a rate outside (0, 1), or fewer than 20 conversations a half."""
        if rule not in RULES:
            raise UserError(f"rule {rule!r} is not one of {', '.join(RULES)}")
        self.require_enough()
        fit, held = ([one.projections for one in half] for half in self.halves())
        baseline = baseline_of([value for one in fit for value in one])
        limited = calibrated(RULES[rule](), fit, baseline, rate)
        return Watcher(baseline, "calm conversations", rule, limited, false_alarms(limited, baseline, held))


def save_calm(
    path: Path,
    axis: Axis,
    model: dict[str, Any],
    conversations: Sequence[CalmConversation],
    made: dict[str, Any],
) -> None:
    """Write calm.json. `model` is `Model.describe()`; `made` says how: sampling, seeds, domains."""
    rows = [
        {"name": one.name, "domain": one.domain, "projections": list(one.projections)}
        for one in conversations
    ]
    told = {"kind": "calm", "model": model, "layer": axis.layer, "direction": direction_of(axis)}
    write_json(path, {**told, "conversations": rows, "made": made})


def is_calm(path: Path) -> bool:
    """Whether a file is a calm.json rather than conversations."""
    if path.suffix.lower() != ".json":
        return False
    content = read_json(path)
    return isinstance(content, dict) and content.get("kind") == "calm"


def load_calm(path: Path, axis: Axis, model: dict[str, Any] | None = None) -> Calm:
    """Read calm.json. Raises `UserError` for another model (the axis's unless given), another layer or direction, or a damaged file."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != "calm":
        raise UserError(
            f"{path} is no record of calm conversations (kind calm); `personatlas drift` makes one"
        )
    try:
        origin, layer, direction = content["model"], int(content["layer"]), content["direction"]
        rows = tuple(_conversation(row) for row in content["conversations"])
        made = dict(content["made"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); `personatlas drift` makes a new one"
        ) from None
    require_origin("record of calm conversations", origin, model or axis.model)
    if (layer, direction) != (axis.layer, direction_of(axis)):
        raise UserError(
            f"{path} was measured along another direction (layer {layer}, {direction}) than this axis (layer {axis.layer}, "
            f"{direction_of(axis)}); `personatlas drift --axis` makes one for it"
        )
    return Calm(rows, made)


def watcher_of(
    axis: Axis,
    stem: Path,
    calm: Path | None = None,
    rule: str = "cusum",
    rate: float = 0.05,
    trace: Callable[[Path], Calm] | None = None,
) -> Watcher:
    """How to watch conversations along an axis that lies at `stem`.

    By the calm conversations given (a calm.json, or stored conversations if there is a `trace` that reads them), else by the
    calm.json beside the axis, else by the axis's own quartiles, which calibrate no alarm.
    """
    beside = stem.parent / CALM
    if calm is None and not beside.is_file():
        return Watcher(_of_axis(axis), "the axis's default answers")
    if calm is None or is_calm(calm):
        return load_calm(calm or beside, axis).watcher(rule, rate)
    if trace is None:
        raise UserError(f"{calm} is no calm.json; `personatlas drift` makes one")
    return trace(calm).watcher(rule, rate)


def _conversation(row: dict[str, Any]) -> CalmConversation:
    values = tuple(float(value) for value in row["projections"])
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"conversation {row['name']!r} has no projections, or one that is not finite")
    return CalmConversation(str(row["name"]), str(row["domain"]), values)


def _order(script: str) -> str:
    return hashlib.sha256(script.encode("utf-8", "surrogatepass")).hexdigest()


def _of_axis(axis: Axis) -> Baseline:
    """The default's answers as the axis keeps them: median, and interquartile range as a standard deviation."""
    if not {0.25, 0.5, 0.75} <= set(axis.levels):
        raise UserError(
            "the axis keeps no quartiles of the default's answers; give --calm conversations in their place"
        )
    row = axis.default_quantiles[axis.layers.index(axis.layer)]
    low, middle, high = (float(row[axis.levels.index(level)]) for level in (0.25, 0.5, 0.75))
    return Baseline(middle, (high - low) / 1.349, 0)
