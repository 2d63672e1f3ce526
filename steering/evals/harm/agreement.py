"""How well a judge of harm agrees with human labels, and how sure that is.

    labelled = read_labels(Path("labels.csv"))     # .texts, .labels (0 and 1), .requests, of equal length
    agreement = measure_agreement(scores, labelled.labels, labelled.texts)
    agreement.accuracy.value, agreement.accuracy.low, agreement.auc.value, agreement.reliability

Accuracy, precision and recall come with Wilson intervals, AUC, Cohen's kappa, Brier score and calibration
error with bootstrap intervals that draw distinct texts, since rows of one text are not independent. kappa =
(accuracy - chance) / (1 - chance), chance being the agreement of two who say harmful as often as judge and
labels do; the calibration error is sum over ten bins of n_bin / n * |mean score - share of harmful|.

Files of labels are CSV, TSV, JSON or JSONL. The text stands in a column response, answer, completion or text,
the label in label, harmful, is_harmful or verdict, and the request, where there is one, in question, request,
prompt, instruction or query, in capitals or not; others are named. A row may be a stored conversation, of
which the last answer is labelled. A label is 0/1, true/false, yes/no or harmful/harmless; nothing is left out
or guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from personatlas.analysis.stats import percentile_interval, resample, wilson_interval
from personatlas.persona.artifacts import digest
from personatlas.persona.errors import UserError
from personatlas.persona.formats import NotUsable, Placed, find_column, read_table, row_messages
from personatlas.persona.records import Count, FractionOrNaN, JsonRecord

BINS = 10
DRAWS = 1000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate(JsonRecord):
    """A value with its 95% interval; None where it is not defined (an AUC of one class, the precision of a
    judge that never calls an answer harmful)."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ReliabilityBin(JsonRecord):
    """Scores from `low` to `high`: how many, their mean, and the share of harmful labels with its Wilson
    interval."""

    low: float
    high: float
    n: Count
    mean: float
    harmful: Estimate


@dataclass(frozen=True)
class JudgeAgreement(JsonRecord):
    """Figures of n answers, `positives` of them labelled harmful; `chance` is the accuracy of naming the
    larger class always."""

    n: Count
    positives: Count
    distinct: Count
    threshold: FractionOrNaN
    chance: float
    accuracy: Estimate
    auc: Estimate
    kappa: Estimate
    brier: Estimate
    calibration_error: Estimate
    precision: Estimate
    recall: Estimate
    reliability: tuple[ReliabilityBin, ...]


def measure_agreement(
    scores: Sequence[float],
    labels: Sequence[int],
    texts: Sequence[str],
    threshold: float = 0.5,
    seed: int = 0,
) -> JudgeAgreement:
    """Scores (N) in 0..1 against labels (N) of 0 and 1. Raises ValueError for other values, unequal lengths
    or N = 0."""
    p, y = np.asarray(scores, dtype=float), np.asarray(labels, dtype=float)
    if not len(p) == len(y) == len(texts) or not len(p):
        raise ValueError(f"{len(p)} scores, {len(y)} labels and {len(texts)} texts")
    if not ((p >= 0) & (p <= 1)).all() or not np.isin(y, (0, 1)).all():
        raise ValueError("scores must lie in 0..1 and labels be 0 or 1")
    predicted = p >= threshold
    right, hits = predicted == (y == 1), int((predicted & (y == 1)).sum())
    bins, reliability = _bin(p), []
    for number in range(BINS):
        own = bins == number
        if n := int(own.sum()):
            share, mean = _share(int(y[own].sum()), n), float(p[own].mean())
            reliability.append(ReliabilityBin(number / BINS, (number + 1) / BINS, n, mean, share))
    return JudgeAgreement(
        n=len(y),
        positives=int(y.sum()),
        distinct=len(set(texts)),
        threshold=threshold,
        chance=float(max(y.mean(), 1 - y.mean())),
        accuracy=_share(int(right.sum()), len(y)),
        precision=_share(hits, int(predicted.sum())),
        recall=_share(hits, int(y.sum())),
        reliability=tuple(reliability),
        **_bootstrap(p, y, predicted, texts, seed),
    )


def _bootstrap(
    p: Floats, y: Floats, predicted: NDArray[np.bool_], texts: Sequence[str], seed: int
) -> dict[str, Estimate]:
    """AUC, kappa, Brier score and calibration error with their intervals."""
    index = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    group, generator = np.array([index[text] for text in texts]), np.random.default_rng(seed)
    rank, wrong = np.unique(p, return_inverse=True)[1], (p - y) ** 2

    def figures(w: Floats) -> list[float]:
        brier = float(np.average(wrong, weights=w))
        return [_auc(rank, y, w), kappa(predicted, y, w), brier, calibration_error(p, y, w)]

    draws = np.full((DRAWS, 4), np.nan)
    for row in draws:
        counts = np.bincount(resample(len(index), generator), minlength=len(index))
        row[:] = figures(counts[group].astype(float))  # (N,)
    estimates = {}
    names = ("auc", "kappa", "brier", "calibration_error")
    for name, value, column in zip(names, figures(np.ones(len(y))), draws.T, strict=True):
        finite = column[np.isfinite(column)]
        low, high = percentile_interval(finite) if len(finite) else (None, None)
        estimates[name] = Estimate(value if np.isfinite(value) else None, low, high)
    return estimates


def auc(p: Floats, y: Floats, weight: Floats | None = None) -> float:
    """Area under the ROC curve (ties count half), rows weighted; NaN for one class."""
    _, rank = np.unique(p, return_inverse=True)
    return _auc(rank, y, np.ones(len(p)) if weight is None else weight)


def _auc(rank: NDArray[np.intp], y: Floats, weight: Floats) -> float:
    positive, negative = np.bincount(rank, weight * y), np.bincount(rank, weight * (1 - y))
    total = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / total) if total > 0 else float("nan")


def kappa(predicted: NDArray[np.bool_], y: Floats, weight: Floats | None = None) -> float:
    """Cohen's kappa of two yes-or-no judgements; NaN where both only ever say one and the same."""
    w = np.ones(len(y)) if weight is None else weight
    a, b, right = (
        np.average(predicted, weights=w),
        np.average(y, weights=w),
        np.average(predicted == (y == 1), weights=w),
    )
    chance = a * b + (1 - a) * (1 - b)
    return float((right - chance) / (1 - chance)) if chance < 1 else float("nan")


def calibration_error(p: Floats, y: Floats, weight: Floats | None = None) -> float:
    """Expected calibration error over ten bins of equal width."""
    w = np.ones(len(y)) if weight is None else weight
    gap = np.bincount(_bin(p), w * (p - y), minlength=BINS)
    return float(np.abs(gap).sum() / w.sum())


def _bin(p: Floats) -> NDArray[np.intp]:
    return np.minimum((p * BINS).astype(np.intp), BINS - 1)


def _share(successes: int, n: int) -> Estimate:
    return Estimate(successes / n, *wilson_interval(successes, n)) if n else Estimate(None)


TEXTS = ("response", "answer", "completion", "text")
LABELS = ("label", "harmful", "is_harmful", "verdict")
REQUESTS = ("question", "request", "prompt", "instruction", "query")
MEANING = dict.fromkeys(("1", "1.0", "true", "yes", "harmful"), 1)
MEANING |= dict.fromkeys(("0", "0.0", "false", "no", "harmless"), 0)
FEWEST = 20  # rows; below it no figure means anything


@dataclass(frozen=True)
class LabelledAnswers:
    """Answers (N), labels 0 or 1 (N), requests ("" where the file has none; N), and the file's name and
    SHA-256."""

    texts: list[str]
    labels: list[int]
    requests: list[str]
    name: str
    sha256: str


def read_labels(
    path: Path, text_column: str | None = None, label_column: str | None = None
) -> LabelledAnswers:
    """Reads a file of labels. Raises `UserError` for one that cannot be read whole, is too short, or has one
    class only."""
    rows = read_table(path)
    if text_column is None and not {str(name).lower() for name in rows[0][1]} & {*TEXTS}:
        # stored conversations: the last answer, and what it answers
        for index, (place, row) in enumerate(rows):
            try:
                said = {message["role"]: message["content"] for message in row_messages(row)[0]}
            except NotUsable as error:
                raise UserError(
                    f"{place} has no text column ({', '.join(TEXTS)}) and is a row {error}; its columns: "
                    f"{', '.join(map(str, row))}; name one with --text-column"
                ) from None
            rows[index] = place, row | {TEXTS[0]: said.get("assistant"), REQUESTS[0]: said.get("user", "")}
    text_name = _find_one(rows, TEXTS, "text", "--text-column", text_column)
    label_name = _find_one(rows, LABELS, "label", "--label-column", label_column)
    known = {str(name).lower(): name for name in rows[0][1]}
    request_name = next((known[name] for name in REQUESTS if name in known), None)
    texts, labels, requests = [], [], []
    for position, row in rows:
        for name in (text_name, label_name):
            if name not in row:
                raise UserError(f"{position} has no {name!r}, which the rows before it have")
        text, value = row[text_name], str(row[label_name]).strip()
        if not isinstance(text, str):
            raise UserError(f"{position}: {text_name!r} is a {type(text).__name__}, not text")
        if value.lower() not in MEANING:
            raise UserError(
                f"{position}: label {value[:40]!r} is not 0/1, true/false, yes/no or harmful/harmless"
            )
        texts.append(text)
        labels.append(MEANING[value.lower()])
        requests.append("" if request_name is None else str(row.get(request_name) or ""))
    if len(texts) < FEWEST:
        raise UserError(f"{path} has {len(texts)} labelled rows; {FEWEST} are the fewest that say anything")
    if len(set(labels)) < 2:
        every = "harmful" if labels[0] else "harmless"
        raise UserError(f"{path}: all {len(labels)} rows are {every}; both classes are needed")
    return LabelledAnswers(texts, labels, requests, path.name, digest(path))


def _find_one(
    rows: list[Placed], names: tuple[str, ...], purpose: str, option: str, requested: str | None
) -> str:
    """The one column of these names: with two of them it is not said which is meant."""
    position, row = rows[0]
    present = [str(name) for name in row if str(name).lower() in names]
    if requested is None and len(present) > 1:
        raise UserError(
            f"{position} has several {purpose} columns: {', '.join(present)}; name one with {option}"
        )
    return find_column(rows, names, purpose, option, requested)
