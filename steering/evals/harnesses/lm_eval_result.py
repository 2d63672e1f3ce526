"""Results of lm-eval's tasks, and what its metrics differ by between arms, paired over the samples. Needs no
lm-eval.

A sample's outcome is a sum over a count: its number over 1; the numbers of its list over their number
(IFEval's instructions, which are not independent of each other, so that the sample stays the unit); the loss
of a text scored whole over its words or bytes. With S samples and N counts in all, a sample's part of the
mean is its sum * S / N, so changes are changes of `mean`, the sum of all over N (in nats a word or byte for
perplexities, whose `value` is an exponential), and samples are their own clusters.

Interval, `p`, `tost_p` (two one-sided tests against the margin) and `smallest` (the change that such samples
show with a power of 80%) are those of `paired_change`; `p_holm` is adjusted over tasks, metrics and arms.
Where no sample of a metric between 0 and 1 differs there is no scatter to go by: with a share d of samples
that differ, n samples show none with probability (1 - d)^n, which at d = margin is `tost_p`, and at 5% gives
the interval and `smallest`.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from personatlas.analysis.stats import holm, paired_change, zero_count_bound
from personatlas.persona.errors import UserError
from personatlas.persona.records import Count, Ends, FractionOrNaN, JsonRecord, NonNegativeOrNaN, Number

SampleOutcome = tuple[float, float]  # sum, count


@dataclass(frozen=True)
class MetricValue(JsonRecord):
    """A metric in one arm: lm-eval's own value, the mean over n samples (None where the metric is no mean),
    and the change from the first arm with its tests, where there is one."""

    omit_none = ("change", "interval", "p", "tost_p", "smallest", "p_holm")
    value: int | float | str | None
    mean: float | None = None
    n: Count = 0
    change: float | None = None
    interval: Ends | None = None
    p: FractionOrNaN | None = None
    tost_p: FractionOrNaN | None = None
    smallest: NonNegativeOrNaN | None = None
    p_holm: FractionOrNaN | None = None


@dataclass(frozen=True)
class TaskMetric(JsonRecord):
    """A metric by arm."""

    higher_is_better: bool | None
    arms: dict[str, MetricValue]


@dataclass(frozen=True)
class CachedAnswer(JsonRecord):
    """A row of the log of answers: a text, or a log-likelihood with whether greedy decoding gives it."""

    seen: Count
    fired: Count
    text: str | None = None
    stopped: Literal["end", "length"] | None = None
    value: Number | None = None
    greedy: bool | None = None

    omit_none = ("text", "stopped", "value", "greedy")

    def __post_init__(self) -> None:
        if (self.text is None) == (self.value is None) or (self.value is None) != (self.greedy is None):
            raise ValueError("it is neither a text nor a log-likelihood")
        if self.fired > self.seen:
            raise ValueError(f"fired {self.fired} of {self.seen}")


@dataclass(frozen=True)
class RequestCounts(JsonRecord):
    """What one arm was asked: distinct `requests`, how many of them had been answered before (`reused`) or
    were cut on the left to fit (`cut`), tokens times layers `seen` and `fired`, those of reused answers
    included, and their `share`, None without interventions."""

    requests: Count
    reused: Count
    cut: Count
    seen: Count
    fired: Count
    share: FractionOrNaN | None


@dataclass(frozen=True)
class SampleAnswer(JsonRecord):
    """One text, or a log-likelihood for each of several continuations, with the scores by metric."""

    answer: object
    scores: dict[str, object]


@dataclass(frozen=True)
class TaskSample(JsonRecord):
    """A sample in every arm."""

    doc_id: Count
    arms: dict[str, SampleAnswer]


@dataclass(frozen=True)
class TaskResult(JsonRecord):
    """A task of n samples: metrics, request counts by arm, and the samples, which a summary leaves out."""

    omit_none = ("samples",)
    n: Count
    output_type: str
    fewshot: Count | None
    version: int | float | str | None
    metrics: dict[str, TaskMetric]
    account: dict[str, RequestCounts]
    samples: tuple[TaskSample, ...] | None = None


@dataclass(frozen=True)
class LmEvalResult(JsonRecord):
    """Everything in lm_eval.json: the version of lm-eval, the model, the arms with a digest of their
    interventions, the options, the tasks by name, and notes on how their values came about."""

    kind: str
    lm_eval: str
    model: dict[str, object]
    dtype: str
    arms: dict[str, str]
    asked: dict[str, object]
    tasks: dict[str, TaskResult]
    notes: tuple[str, ...]


def require_lm_eval() -> None:
    """Raises `UserError` where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install personatlas[lm-eval]")


def parse_task_names(text: str) -> list[str]:
    """Names with commas between, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def parse_task_data(pairs: Sequence[str]) -> dict[str, Path]:
    """Files by task, from TASK=FILE.jsonl. Raises `UserError` for anything else."""
    files: dict[str, Path] = {}
    for pair in pairs:
        task, mark, file = pair.partition("=")
        if not (task and mark and file):
            raise UserError(f"--data {pair!r} is not TASK=FILE.jsonl")
        files[task.strip()] = Path(file)
    return files


def sample_outcome(score: object, *, is_whole: bool = False) -> SampleOutcome | None:
    """A sample's outcome; None where the metric is no mean over samples (F1, BLEU). `is_whole`: of a text
    scored whole."""
    if isinstance(score, tuple):
        return (-float(score[0]), float(score[1])) if is_whole and len(score) == 2 else None
    values = score if isinstance(score, list) else [score]
    if not all(isinstance(value, bool | int | float | np.number | np.bool_) for value in values):
        return None
    return float(sum(values)), float(len(values))


def compare_arms(
    tasks: Mapping[str, TaskResult],
    first: str,
    outcomes: Mapping[str, Mapping[str, Mapping[str, Mapping[int, SampleOutcome | None]]]],
    margin: float,
) -> dict[str, TaskResult]:
    """The tasks with means, changes from the arm `first` and their tests in every metric's arms. `outcomes`
    are by task, metric, arm and sample."""
    rows: dict[tuple[str, str, str], MetricValue] = {}
    tested = []
    for name, task in tasks.items():
        for metric, values in task.metrics.items():
            scored = outcomes[name].get(metric, {})
            parts = {arm: _parts(list(own.values())) for arm, own in scored.items()}
            is_share = all(
                one is not None and 0 <= one[0] <= one[1] for own in scored.values() for one in own.values()
            )
            for arm, value in values.arms.items():
                after, before = parts.get(arm), parts.get(first)
                row = replace(value, mean=None if after is None else float(after.mean()), n=task.n)
                if arm != first and after is not None and before is not None and len(after) == len(before):
                    row = _with_change(row, before, after, margin, is_share)
                    tested.append((name, metric, arm))
                rows[name, metric, arm] = row
    adjusted = holm([rows[key].p or 0.0 for key in tested])
    rows |= {key: replace(rows[key], p_holm=p) for key, p in zip(tested, adjusted, strict=True)}

    def compared(name: str, metric: str, values: TaskMetric) -> TaskMetric:
        return replace(values, arms={arm: rows[name, metric, arm] for arm in values.arms})

    return {
        name: replace(
            task, metrics={metric: compared(name, metric, own) for metric, own in task.metrics.items()}
        )
        for name, task in tasks.items()
    }


def _parts(outcomes: Sequence[SampleOutcome | None]) -> NDArray[np.float64] | None:
    """Each sample's part of the mean (S,)."""
    known = [one for one in outcomes if one is not None]
    if not known or len(known) < len(outcomes):
        return None
    sums, counts = np.array(known).T
    if not np.isfinite(sums).all() or counts.sum() <= 0:
        return None
    return np.asarray(sums * (len(sums) / counts.sum()))


def _with_change(
    row: MetricValue, before: NDArray[np.float64], after: NDArray[np.float64], margin: float, is_share: bool
) -> MetricValue:
    n = len(after)
    samples = [str(index) for index in range(n)]
    found = paired_change(before.tolist(), after.tolist(), samples, samples, margin)
    if is_share and (after == before).all():
        bound = zero_count_bound(n)
        found = replace(found, low=-bound, high=bound, p=1.0, no_loss=(1 - margin) ** n, smallest=bound)
    return replace(
        row,
        change=found.value,
        interval=(found.low, found.high),
        p=found.p,
        tost_p=found.no_loss,
        smallest=found.smallest,
    )
