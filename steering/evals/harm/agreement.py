"""How well a judge of harm agrees with people's labels, and how sure that is.

    found = agreement(scores, labels, texts)
    found.accuracy.value, found.accuracy.low, found.auc.value, found.reliability

Accuracy, precision and recall come with Wilson intervals, AUC, Cohen's kappa, Brier score and calibration error with
bootstrap intervals that draw distinct texts, since rows of one text are not independent. kappa = (accuracy - chance) /
(1 - chance), chance being the agreement of two who say harmful as often as judge and labels do; the calibration error is
sum over ten bins of n_bin / n * |mean score - share of harmful|.

Files of answers that people have labelled as harmful or not: CSV, TSV, JSON or JSONL.

    found = read_labels(Path("labels.csv"))
    found.texts, found.labels, found.requests          # of equal length; labels are 0 and 1

The text stands in a column response, answer, completion or text, the label in label, harmful, is_harmful or verdict, and
the request, where there is one, in question, request, prompt, instruction or query, in capitals or not; others are named.
A label is 0/1, true/false, yes/no or harmful/harmless. What cannot be read is one line with the file and its line; nothing
is left out or guessed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personatlas.analysis.stats import LEVEL_TAILS, percentile_interval, resample, wilson_interval
from personatlas.persona.artifacts import digest
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Placed, find_column, read_table

BINS = 10
DRAWS = 1000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A value with its 95% interval; None where it is not defined (an AUC of one class, the precision of a judge that never fires)."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bin:
    """Scores from `low` to `high`: how many, their mean, and the share of harmful labels with its Wilson interval."""

    low: float
    high: float
    n: int
    mean: float
    harmful: Figure


@dataclass(frozen=True)
class Agreement:
    """Figures of n answers, `positives` of them labelled harmful; `chance` is the accuracy of naming the larger class always."""

    n: int
    positives: int
    distinct: int
    threshold: float
    chance: float
    accuracy: Figure
    auc: Figure
    kappa: Figure
    brier: Figure
    calibration_error: Figure
    precision: Figure
    recall: Figure
    reliability: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def agreement(
    scores: Sequence[float],
    labels: Sequence[int],
    texts: Sequence[str],
    threshold: float = 0.5,
    seed: int = 0,
) -> Agreement:
    """Scores (N) in 0..1 against labels (N) of 0 and 1. Raises ValueError for other values, unequal lengths or N = 0."""
    p, y = np.asarray(scores, dtype=float), np.asarray(labels, dtype=float)
    if not len(p) == len(y) == len(texts) or not len(p):
        raise ValueError(f"{len(p)} scores, {len(y)} labels and {len(texts)} texts")
    if not ((p >= 0) & (p <= 1)).all() or not np.isin(y, (0, 1)).all():
        raise ValueError("scores must lie in 0..1 and labels be 0 or 1")
    said = p >= threshold
    place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    group = np.array([place[text] for text in texts])
    values, low, high = _drawn(p, y, said, group, len(place), seed)
    names = ("auc", "kappa", "brier", "calibration_error")
    drawn = {
        name: Figure(*map(_plain, row))
        for name, row in zip(names, zip(values, low, high, strict=True), strict=True)
    }
    right, hits = said == (y == 1), int((said & (y == 1)).sum())
    return Agreement(
        n=len(y),
        positives=int(y.sum()),
        distinct=len(place),
        threshold=threshold,
        chance=float(max(y.mean(), 1 - y.mean())),
        accuracy=_share(int(right.sum()), len(y)),
        precision=_share(hits, int(said.sum())),
        recall=_share(hits, int(y.sum())),
        reliability=_reliability(p, y),
        **drawn,
    )


def auc(p: Floats, y: Floats, weight: Floats | None = None) -> float:
    """Area under the ROC curve (ties count half), rows weighted; NaN for one class."""
    _, rank = np.unique(p, return_inverse=True)
    return _auc(rank, y, np.ones(len(p)) if weight is None else weight)


def _auc(rank: NDArray[np.intp], y: Floats, weight: Floats) -> float:
    positive, negative = np.bincount(rank, weight * y), np.bincount(rank, weight * (1 - y))
    total = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / total) if total > 0 else float("nan")


def kappa(said: NDArray[np.bool_], y: Floats, weight: Floats | None = None) -> float:
    """Cohen's kappa of two yes-or-no judgements; NaN where both only ever say one and the same."""
    w = np.ones(len(y)) if weight is None else weight
    a, b, right = (
        np.average(said, weights=w),
        np.average(y, weights=w),
        np.average(said == (y == 1), weights=w),
    )
    chance = a * b + (1 - a) * (1 - b)
    return float((right - chance) / (1 - chance)) if chance < 1 else float("nan")


def calibration_error(p: Floats, y: Floats, weight: Floats | None = None) -> float:
    """Expected calibration error over ten bins of equal width."""
    w = np.ones(len(y)) if weight is None else weight
    gap = np.bincount(_bin(p), w * (p - y), minlength=BINS)
    return float(np.abs(gap).sum() / w.sum())


def _drawn(
    p: Floats, y: Floats, said: NDArray[np.bool_], group: NDArray[np.intp], groups: int, seed: int
) -> tuple[Floats, Floats, Floats]:
    """Values, low and high (4,) of AUC, kappa, Brier score and calibration error."""
    generator = np.random.default_rng(seed)
    rank = np.unique(p, return_inverse=True)[1]
    wrong = (p - y) ** 2

    def figures(w: Floats) -> list[float]:
        return [
            _auc(rank, y, w),
            kappa(said, y, w),
            float(np.average(wrong, weights=w)),
            calibration_error(p, y, w),
        ]

    draws = np.full((DRAWS, 4), np.nan)
    for row in draws:
        w = np.bincount(resample(groups, generator), minlength=groups)[group].astype(float)  # (N,)
        row[:] = figures(w)
    kept = [column[np.isfinite(column)] for column in draws.T]
    ends = [percentile_interval(column, LEVEL_TAILS) if len(column) else (np.nan, np.nan) for column in kept]
    low, high = np.array(ends).T
    return np.array(figures(np.ones(len(y)))), low, high


def _reliability(p: Floats, y: Floats) -> tuple[Bin, ...]:
    bins, found = _bin(p), []
    for number in range(BINS):
        here = bins == number
        n = int(here.sum())
        if n:
            share = _share(int(y[here].sum()), n)
            found.append(Bin(number / BINS, (number + 1) / BINS, n, float(p[here].mean()), share))
    return tuple(found)


def _bin(p: Floats) -> NDArray[np.intp]:
    return np.minimum((p * BINS).astype(np.intp), BINS - 1)


def _share(successes: int, n: int) -> Figure:
    return Figure(successes / n, *wilson_interval(successes, n)) if n else Figure(None)


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


TEXTS = ("response", "answer", "completion", "text")
LABELS = ("label", "harmful", "is_harmful", "verdict")
REQUESTS = ("question", "request", "prompt", "instruction", "query")
MEANING = {
    "1": 1,
    "1.0": 1,
    "true": 1,
    "yes": 1,
    "harmful": 1,
    "0": 0,
    "0.0": 0,
    "false": 0,
    "no": 0,
    "harmless": 0,
}
FEWEST = 20  # rows; below it no figure means anything


@dataclass(frozen=True)
class Labelled:
    """Answers (N), labels 0 or 1 (N), requests ("" where the file has none; N), and the file's name and SHA-256."""

    texts: list[str]
    labels: list[int]
    requests: list[str]
    name: str
    sha256: str


def read_labels(path: Path, text_column: str | None = None, label_column: str | None = None) -> Labelled:
    """Read a file of labels. Raises `UserError` for one that cannot be read whole, is too short, or has one class only."""
    rows = read_table(path)
    text_name = _only(rows, TEXTS, "text", "--text-column", text_column)
    label_name = _only(rows, LABELS, "label", "--label-column", label_column)
    known = {str(name).lower(): name for name in rows[0][1]}
    request_name = next((known[name] for name in REQUESTS if name in known), None)
    texts, labels, requests = [], [], []
    for place, row in rows:
        for name in (text_name, label_name):
            if name not in row:
                raise UserError(f"{place} has no {name!r}, which the rows before it have")
        texts.append(_text(place, text_name, row[text_name]))
        labels.append(_label(place, row[label_name]))
        requests.append("" if request_name is None else str(row.get(request_name) or ""))
    if len(texts) < FEWEST:
        raise UserError(f"{path} has {len(texts)} labelled rows; {FEWEST} are the fewest that say anything")
    if len(set(labels)) < 2:
        every = "harmful" if labels[0] else "harmless"
        raise UserError(f"{path}: all {len(labels)} rows are {every}; both classes are needed")
    return Labelled(texts, labels, requests, path.name, digest(path))


def _only(rows: list[Placed], names: tuple[str, ...], what: str, option: str, asked: str | None) -> str:
    """The one column of these names: with two of them it is not said which is meant."""
    place, row = rows[0]
    there = [str(name) for name in row if str(name).lower() in names]
    if asked is None and len(there) > 1:
        raise UserError(f"{place} has several {what} columns: {', '.join(there)}; name one with {option}")
    return find_column(rows, names, what, option, asked)


def _text(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: {name!r} is a {type(value).__name__}, not text")
    return value


def _label(place: str, value: Any) -> int:
    label = MEANING.get(str(value).strip().lower())
    if label is None:
        raise UserError(
            f"{place}: label {str(value)[:40]!r} is not 0/1, true/false, yes/no or harmful/harmless"
        )
    return label
