"""Two logs of one Inspect task, sample by sample: what the scorers say before and after, and how far the persona moved.

    compared(arm_of(read_log(Path("plain.eval"))), arm_of(read_log(Path("capped.eval"))))["scorers"]["includes"]

Samples pair by id and epoch. Logs that differ in anything but the cap are refused: task, samples, model, weights, dtype,
sampling, or the direction that is projected on. Intervals are bootstraps over roles, where samples have a `role` in their
metadata, else over samples; a sample has one role, so only the outer of the two is drawn. p-values are McNemar's, for scores of
0 and 1, adjusted by Holm's method for the number of scorers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personatlas.analysis.stats import LEVEL, holm, paired_change
from personatlas.persona.errors import UserError

WORDS = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0, "yes": 1.0, "no": 0.0, "true": 1.0, "false": 0.0}
Key = tuple[str, int]


@dataclass(frozen=True)
class Arm:
    """A log in plain values. `about` is what every answer's metadata says, but for its choices."""

    log: str
    task: dict[str, Any]
    about: dict[str, Any]
    scores: dict[Key, dict[str, float | None]]
    asked: dict[Key, str]
    clusters: dict[Key, str]
    projections: dict[Key, float | None]
    fired: dict[Key, float | None]

    @property
    def name(self) -> str:
        """In a table."""
        return f"capped: {self.about['cap']}" if self.about["cap"] else "baseline"


def require_inspect() -> None:
    """`UserError` where Inspect is not installed."""
    from importlib.util import find_spec

    if find_spec("inspect_ai") is None:
        raise UserError("Inspect is not installed; run `pip install personatlas[inspect]`")


def read_log(path: Path) -> Any:
    """An Inspect log, .eval or .json. Raises `UserError` for anything else."""
    from inspect_ai.log import read_eval_log

    if not path.is_file():
        raise UserError(f"there is no log {path}; give two .eval or .json files that Inspect wrote")
    try:
        return read_eval_log(str(path))
    except (
        ValueError,
        KeyError,
        OSError,
    ) as error:  # pydantic's errors and those of zip files are among them
        raise UserError(
            f"{path} is not a log that Inspect wrote: {' '.join(str(error).split())[:200]}"
        ) from None


def arm_of(log: Any) -> Arm:
    """What a log's samples say. Raises `UserError` for one that failed, is empty, or is of another provider."""
    name = str(log.location)
    if log.status != "success":
        raise UserError(
            f"{name} ended with {log.status}: {_first_line(log.error) or 'run it to its end first'}"
        )
    if not log.samples:
        raise UserError(f"{name} holds no samples; run it with --log-samples")
    samples = {(str(sample.id), sample.epoch): sample for sample in log.samples}
    given = {key: _given(sample, name) for key, sample in samples.items()}
    abouts = [
        {what: value for what, value in own.items() if what != "choices"} for own in given.values() if own
    ]
    if not abouts:
        raise UserError(f"every sample of {name} failed: {_first_line(log.samples[0].error)}")
    for one in abouts:
        if one != abouts[0]:
            raise UserError(
                f"{name} holds answers of several models, caps or samplings: {_differing(abouts[0], one)}"
            )
    projections, fired = (
        {key: _mean([row[what] for row in own.get("choices", [])]) for key, own in given.items()}
        for what in ("projection", "fired")
    )
    spec = log.eval
    return Arm(
        name,
        {
            "task": spec.task,
            "version": spec.task_version,
            "arguments": spec.task_args,
            "dataset": spec.dataset.name,
        },
        abouts[0],
        {key: {} if sample.error else _scores(sample.scores or {}) for key, sample in samples.items()},
        {key: str((sample.input, sample.target, sample.choices)) for key, sample in samples.items()},
        {key: str(sample.metadata.get("role", sample.id)) for key, sample in samples.items()},
        projections,
        fired,
    )


def _given(sample: Any, name: str) -> dict[str, Any]:
    """What our provider noted about a sample's last answer; empty for a sample that failed."""
    own = (sample.output.metadata or {}).get("personatlas")
    if own is None and not sample.error:
        raise UserError(
            f"the answer to sample {sample.id} in {name} did not come from --model personatlas/NAME"
        )
    return dict(own or {})


def compared(before: Arm, after: Arm) -> dict[str, Any]:
    """Every scorer's change, with projections and fired shares of both arms. Raises `UserError` for logs that do not pair."""
    _require_pair(before, after)
    keys = sorted(before.scores)
    scorers = {}
    for name in dict.fromkeys(name for arm in (before, after) for own in arm.scores.values() for name in own):
        pairs = [(before.scores[key].get(name), after.scores[key].get(name)) for key in keys]
        scorers[name] = _change(before, keys, pairs)
    tested = [row for row in scorers.values() if row["n"] and row["change"]["p"] is not None]
    for row, p in zip(tested, holm([row["change"]["p"] for row in tested]) if tested else [], strict=True):
        row["p_holm"] = p
    for row in scorers.values():
        row["is_shown"] = _is_shown(row)
    projections = [(before.projections[key], after.projections[key]) for key in keys]
    return {
        "task": before.task,
        **{name: before.about[name] for name in ("model", "dtype", "axis", "layer", "direction")},
        "pairs": len(keys),
        "same_seeds": before.about["sampling"]["seed"] == after.about["sampling"]["seed"],
        "arms": [_account(before), _account(after)],
        "scorers": scorers,
        "projection": _change(before, keys, projections),
    }


def _account(arm: Arm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "log": arm.log,
        "cap": arm.about["cap"],
        "sampling": arm.about["sampling"],
        "projection": _mean(list(arm.projections.values())),
        "fired": _mean(list(arm.fired.values())),
    }


def _change(
    arm: Arm, keys: Sequence[Key], pairs: Sequence[tuple[float | None, float | None]]
) -> dict[str, Any]:
    """Means and change over the pairs that have a value in both arms."""
    whole = [
        (key, one, other)
        for key, (one, other) in zip(keys, pairs, strict=True)
        if one is not None and other is not None
    ]
    left_out = len(keys) - len(whole)
    if not whole:
        return {"n": 0, "left_out": left_out}
    found, ones, others = zip(*whole, strict=True)
    pair_names = [f"{id}/{epoch}" for id, epoch in found]
    change = paired_change(ones, others, [arm.clusters[key] for key in found], pair_names).to_json()
    change["clusters"] = len({arm.clusters[key] for key in found})
    return {
        "n": len(whole),
        "left_out": left_out,
        "before": _mean(ones),
        "after": _mean(others),
        "change": change,
    }


def _is_shown(row: dict[str, Any]) -> bool:
    """Whether there is a change: by the adjusted test where there is one, else by the interval."""
    if not row["n"]:
        return False
    if "p_holm" in row:
        return bool(row["p_holm"] < 1 - LEVEL)
    return bool(row["change"]["low"] > 0 or row["change"]["high"] < 0)


def _require_pair(before: Arm, after: Arm) -> None:
    both = f"{before.log} and {after.log}"
    for what in before.task:
        if before.task[what] != after.task[what]:
            raise UserError(
                f"{both} are not of one task: {what} {before.task[what]!r} and {after.task[what]!r}"
            )
    one, other = ({**arm.about, **arm.about["model"], **arm.about["sampling"]} for arm in (before, after))
    for what in (
        "weights",
        "fingerprint",
        "dtype",
        "layer",
        "direction",
        "temperature",
        "top_p",
        "max_tokens",
    ):
        if one[what] != other[what]:
            raise UserError(
                f"{both} differ in more than the cap: {what} {one[what]} and {other[what]}; run one again"
            )
    for here, there in ((before, after), (after, before)):
        alone = sorted(set(here.scores) - set(there.scores))
        if alone:
            id, epoch = alone[0]
            raise UserError(
                f"sample {id} of epoch {epoch} is in {here.log} only, with {len(alone) - 1} more; run both with the same "
                "--limit and --epochs"
            )
    for key, asked in before.asked.items():
        if asked != after.asked[key]:
            raise UserError(f"sample {key[0]} is not the same in {both}: the task or its dataset has changed")


def _scores(scores: dict[str, Any]) -> dict[str, float | None]:
    """Numbers by scorer, `scorer.part` for one that gives several; None for what is no number."""
    found: dict[str, float | None] = {}
    for name, score in scores.items():
        parts = score.value if isinstance(score.value, dict) else {"": score.value}
        found |= {f"{name}.{part}" if part else name: _number(value) for part, value in parts.items()}
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        if value in WORDS or value.lower() in WORDS:
            return WORDS.get(value, WORDS.get(value.lower()))
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    return "; ".join(
        f"{what} {one.get(what)} and {other.get(what)}" for what in other if one.get(what) != other[what]
    )


def _first_line(error: Any) -> str:
    return "" if error is None else " ".join(str(error.message).split())[:400]
