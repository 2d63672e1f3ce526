"""Two logs of one Inspect task, sample by sample: what the scorers say before and after, and how far the
persona moved.

    before, after = (read_inspect_arm(read_inspect_log(Path(name))) for name in ("plain.eval", "capped.eval"))
    compare_inspect_arms(before, after).scorers["includes"].change

Samples pair by id and epoch. Logs that differ in anything but the cap are refused: task, samples, model,
weights, dtype, sampling, or the direction that is projected on. Intervals are bootstraps over roles, where
samples have a `role` in their metadata, else over samples; a sample has one role, so only the outer of the
two is drawn. p-values are McNemar's, for scores of 0 and 1, adjusted by Holm's method for the number of
scorers.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from personatlas.analysis.stats import LEVEL, Change, holm, paired_change
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE
from personatlas.persona.records import Count, FractionOrNaN, JsonObject, JsonRecord

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog
    from inspect_ai.scorer import Score

SCORE_WORDS = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0, "yes": 1.0, "no": 0.0, "true": 1.0, "false": 0.0}
COMPARED = ("weights", "fingerprint", "dtype", "layer", "direction", "temperature", "top_p", "max_tokens")
Key = tuple[str, int]  # sample id, epoch


@dataclass(frozen=True)
class InspectArm:
    """A log in plain values, by sample and epoch. `about` is what every answer's metadata says, but for its
    choices; `inputs` is what was asked, with target and choices; `clusters` are roles or samples."""

    log: str
    task: JsonObject
    about: JsonObject
    scores: dict[Key, dict[str, float | None]]
    inputs: dict[Key, str]
    clusters: dict[Key, str]
    projections: dict[Key, float | None]
    fired: dict[Key, float | None]


@dataclass(frozen=True)
class InspectArmSummary(JsonRecord):
    """An arm: its name, log, cap and sampling, and the means of projection and fired share over samples."""

    name: str
    log: str
    cap: str | None
    sampling: dict[str, object]
    projection: float | None
    fired: FractionOrNaN | None


@dataclass(frozen=True)
class ScoreChange(JsonRecord):
    """Means and change over the n pairs that have a number in both arms; `left_out` have none. `is_shown`
    says whether there is a change, by the adjusted test where there is one, else by the interval."""

    omit_none = ("before", "after", "change", "p_holm", "is_shown")
    n: Count
    left_out: Count
    before: float | None = None
    after: float | None = None
    change: Change | None = None
    p_holm: FractionOrNaN | None = None
    is_shown: bool | None = None


@dataclass(frozen=True)
class InspectComparison(JsonRecord):
    """A task in two arms: what both share, the number of pairs, every scorer's change, and that of the
    projection."""

    task: dict[str, object]
    model: dict[str, object]
    dtype: str
    axis: str
    layer: Count
    direction: str
    pairs: Count
    same_seeds: bool
    arms: tuple[InspectArmSummary, InspectArmSummary]
    scorers: dict[str, ScoreChange]
    projection: ScoreChange


def require_inspect() -> None:
    """Raises `UserError` where Inspect is not installed."""
    if importlib.util.find_spec("inspect_ai") is None:
        raise UserError("Inspect is not installed; run `pip install personatlas[inspect]`")


def read_inspect_log(path: Path) -> "EvalLog":
    """An Inspect log, .eval or .json. Raises `UserError` for anything else."""
    from inspect_ai.log import read_eval_log

    if not path.is_file():
        raise UserError(f"there is no log {path}; give two .eval or .json files that Inspect wrote")
    try:
        return read_eval_log(str(path))
    except (ValueError, KeyError, OSError) as error:  # among them pydantic's errors and those of zip files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a log that Inspect wrote: {reason}") from None


def read_inspect_arm(log: "EvalLog") -> InspectArm:
    """What a log's samples say. Raises `UserError` for one that failed, is empty, or is of another
    provider."""
    name = str(log.location)
    if log.status != "success":
        reason = _first_line(log.error.message) if log.error else "run it to its end first"
        raise UserError(f"{name} ended with {log.status}: {reason}")
    if not log.samples:
        raise UserError(f"{name} holds no samples; run it with --log-samples")
    samples = {(str(sample.id), sample.epoch): sample for sample in log.samples}
    notes: dict[
        Key, JsonObject
    ] = {}  # what our provider noted about the last answers; empty for a failed sample
    for key, sample in samples.items():
        own = (sample.output.metadata or {}).get("personatlas")
        if own is None and not sample.error:
            raise UserError(
                f"the answer to sample {sample.id} in {name} did not come from --model personatlas/NAME"
            )
        notes[key] = dict(own or {})
    abouts = [{key: value for key, value in own.items() if key != "choices"} for own in notes.values() if own]
    if not abouts:
        error = log.samples[0].error
        raise UserError(f"every sample of {name} failed: {_first_line(error.message) if error else ''}")
    for about in abouts:
        if about != abouts[0]:
            differing = "; ".join(
                f"{key} {abouts[0].get(key)} and {value}"
                for key, value in about.items()
                if abouts[0].get(key) != value
            )
            raise UserError(f"{name} holds answers of several models, caps or samplings: {differing}")
    projections, fired = (
        {key: _mean([choice[field] for choice in own.get("choices", [])]) for key, own in notes.items()}
        for field in ("projection", "fired")
    )
    spec = log.eval
    return InspectArm(
        name,
        {
            "task": spec.task,
            "version": spec.task_version,
            "arguments": spec.task_args,
            "dataset": spec.dataset.name,
        },
        abouts[0],
        {key: {} if sample.error else _numbers(sample.scores or {}) for key, sample in samples.items()},
        {key: str((sample.input, sample.target, sample.choices)) for key, sample in samples.items()},
        {key: str(sample.metadata.get("role", sample.id)) for key, sample in samples.items()},
        projections,
        fired,
    )


def compare_inspect_arms(before: InspectArm, after: InspectArm) -> InspectComparison:
    """Every scorer's change, with projections and fired shares of both arms. Raises `UserError` for logs that
    do not pair."""
    _require_pair(before, after)
    keys = sorted(before.scores)
    names = dict.fromkeys(name for arm in (before, after) for own in arm.scores.values() for name in own)
    scorers = {
        name: _change(
            before, {key: (before.scores[key].get(name), after.scores[key].get(name)) for key in keys}
        )
        for name in names
    }
    tested = {
        name: own.change.p for name, own in scorers.items() if own.change and own.change.p == own.change.p
    }
    adjusted = holm(list(tested.values())) if tested else []
    scorers |= {name: replace(scorers[name], p_holm=p) for name, p in zip(tested, adjusted, strict=True)}
    for name, own in scorers.items():
        is_shown = own.change is not None and (own.change.low > 0 or own.change.high < 0)
        if own.p_holm is not None:
            is_shown = own.p_holm < 1 - LEVEL
        scorers[name] = replace(own, is_shown=is_shown)
    projections = {key: (before.projections[key], after.projections[key]) for key in keys}
    about = before.about
    return InspectComparison(
        task=before.task,
        **{name: about[name] for name in ("model", "dtype", "axis", "layer", "direction")},
        pairs=len(keys),
        same_seeds=about["sampling"]["seed"] == after.about["sampling"]["seed"],
        arms=(_summary(before), _summary(after)),
        scorers=scorers,
        projection=_change(before, projections),
    )


def _summary(arm: InspectArm) -> InspectArmSummary:
    cap = arm.about["cap"]
    means = _mean(list(arm.projections.values())), _mean(list(arm.fired.values()))
    return InspectArmSummary(
        f"capped: {cap}" if cap else BASELINE, arm.log, cap, arm.about["sampling"], *means
    )


def _change(arm: InspectArm, pairs: Mapping[Key, tuple[float | None, float | None]]) -> ScoreChange:
    """Means and change over the pairs that have a value in both arms."""
    whole = [(key, one, two) for key, (one, two) in pairs.items() if one is not None and two is not None]
    left_out = len(pairs) - len(whole)
    if not whole:
        return ScoreChange(0, left_out)
    keys, before, after = zip(*whole, strict=True)
    clusters = [arm.clusters[key] for key in keys]
    change = paired_change(before, after, clusters, [f"{id}/{epoch}" for id, epoch in keys])
    change = replace(change, clusters=len(set(clusters)))
    return ScoreChange(len(whole), left_out, _mean(before), _mean(after), change)


def _require_pair(before: InspectArm, after: InspectArm) -> None:
    both = f"{before.log} and {after.log}"
    for name, value in before.task.items():
        if value != after.task[name]:
            raise UserError(f"{both} are not of one task: {name} {value!r} and {after.task[name]!r}")
    one, other = ({**arm.about, **arm.about["model"], **arm.about["sampling"]} for arm in (before, after))
    for name in COMPARED:
        if one[name] != other[name]:
            raise UserError(
                f"{both} differ in more than the cap: {name} {one[name]} and {other[name]}; run one again"
            )
    for first, second in ((before, after), (after, before)):
        if alone := sorted(set(first.scores) - set(second.scores)):
            id, epoch = alone[0]
            where = f"sample {id} of epoch {epoch} is in {first.log} only, with {len(alone) - 1} more"
            raise UserError(f"{where}; run both with the same --limit and --epochs")
    for key, value in before.inputs.items():
        if value != after.inputs[key]:
            raise UserError(f"sample {key[0]} is not the same in {both}: the task or its dataset has changed")


def _numbers(scores: "Mapping[str, Score]") -> dict[str, float | None]:
    """Numbers by scorer, `scorer.part` for one that gives several; None for what is no number."""
    numbers: dict[str, float | None] = {}
    for name, score in scores.items():
        parts = score.value if isinstance(score.value, dict) else {"": score.value}
        numbers |= {f"{name}.{part}" if part else name: _number(value) for part, value in parts.items()}
    return numbers


def _number(value: object) -> float | None:
    if isinstance(value, str):
        word = value if value in SCORE_WORDS else value.lower()
        if word in SCORE_WORDS:
            return SCORE_WORDS[word]
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _first_line(message: str) -> str:
    return " ".join(message.split())[:400]
