"""How much of where the next answer lies is in what the user just said: ridge regression of its projection on the message.

    found = predicted(turns)                         # text, projection, change, script and domain of every answer
    found["projection"]["r2"], found["projection"]["low"], found["projection"]["domain"]["r2"]

y = <features(message), w> + b with an L2 penalty. Features are hashed words and word pairs, weighted by TF-IDF, or the sentence
embeddings that are given. R2 is out of fold: 1 - sum (y - predicted)^2 / sum (y - mean of the training fold)^2, so that knowing
nothing is 0. Folds are of scripts, which are never in training and test at once; the penalty is chosen inside the training scripts
in the same way, and so is what TF-IDF knows. Beside it stand what the mean of the message's domain would do, what the message adds to
that (a ridge on what the domain's mean leaves, against that mean), what shuffled targets give, and the ceiling: the share of variance that samples of one and the same message have in common.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personatlas.analysis.trajectories import script_weights

FOLDS, INNER = 5, 4
ALPHAS = tuple(float(alpha) for alpha in 10.0 ** np.arange(-3, 5))
FEATURES = 2**12
SHUFFLES = 20
FEWEST = 8  # scripts
Array = NDArray[np.float64]
Places = NDArray[Any]  # row numbers


@dataclass(frozen=True)
class Turn:
    """An answer: what the user said before it, where it lies, and how far from the answer before (None for the first)."""

    text: str
    projection: float
    change: float | None
    script: str
    domain: str


@dataclass(frozen=True)
class _Rows:
    """Messages (M), each with the mean of its answers' targets, their number and their scatter (sum of squares) around that mean."""

    texts: tuple[str, ...]
    targets: Array
    weights: Array
    within: Array
    scripts: tuple[str, ...]
    domains: tuple[str, ...]


def predicted(
    turns: Sequence[Turn], embed: Callable[[Sequence[str]], Array] | None = None
) -> dict[str, Any] | None:
    """R2 for the projection and for its change since the answer before; None for fewer than 8 scripts. `embed` gives unit rows."""
    if len({turn.script for turn in turns}) < FEWEST:
        return None
    moved = [turn for turn in turns if turn.change is not None]
    found: dict[str, Any] = {"projection": _result(_rows(turns, [turn.projection for turn in turns]), embed)}
    if len({turn.script for turn in moved}) >= FEWEST:
        found["change"] = _result(_rows(moved, [turn.change or 0.0 for turn in moved]), embed)
    return found


def _rows(turns: Sequence[Turn], targets: Sequence[float]) -> _Rows:
    """Answers to the same message of a script are one row with their number as its weight, which a ridge does not notice."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, turn in enumerate(turns):
        groups.setdefault((turn.script, turn.text), []).append(number)
    own = [np.array([targets[i] for i in group]) for group in groups.values()]
    domains = {turn.script: turn.domain for turn in turns}
    return _Rows(
        tuple(text for _, text in groups),
        np.array([values.mean() for values in own]),
        np.array([float(len(values)) for values in own]),
        np.array([float(((values - values.mean()) ** 2).sum()) for values in own]),
        tuple(script for script, _ in groups),
        tuple(domains[script] for script, _ in groups),
    )


def _result(rows: _Rows, embed: Callable[[Sequence[str]], Array] | None) -> dict[str, Any]:
    features = None if embed is None else np.asarray(embed(rows.texts), dtype=float)
    draw = np.random.default_rng(0)
    shuffled = [draw.permutation(len(rows.targets)) for _ in range(SHUFFLES)]
    targets = np.stack([rows.targets, *(rows.targets[order] for order in shuffled)], axis=1)  # (M, 1 + S)
    told, alphas = _out_of_fold(rows, targets, features, _nothing)
    added, _ = _out_of_fold(rows, targets[:, :1], features, _domain)
    nothing, domain = _means(rows, targets, _nothing), _means(rows, targets[:, :1], _domain)[:, 0]
    true = rows.targets
    r2 = _R2(rows)
    chance = [r2.value(targets[:, s], told[:, s], nothing[:, s]) for s in range(1, SHUFFLES + 1)]
    return {
        **r2.told(true, told[:, 0], nothing[:, 0]),
        "domain": r2.told(true, domain, nothing[:, 0]),
        "beyond_domain": r2.told(true, added[:, 0], domain),
        "shuffled": {"mean": float(np.mean(chance)), "highest": float(np.max(chance)), "n": SHUFFLES},
        "ceiling": r2.ceiling(),
        "alphas": alphas,
        "answers": int(rows.weights.sum()),
        "messages": len(rows.texts),
        "scripts": len(set(rows.scripts)),
        "folds": FOLDS,
    }


def _nothing(rows: _Rows, targets: Array, fit: Places, test: Places) -> Array:
    """What to expect of the test rows (n, S) where nothing is known of them: the training rows' mean."""
    return np.repeat(np.average(targets[fit], axis=0, weights=rows.weights[fit])[None], len(test), axis=0)


def _domain(rows: _Rows, targets: Array, fit: Places, test: Places) -> Array:
    """The same where their domain is known."""
    found, domains = _nothing(rows, targets, fit, test), np.asarray(rows.domains)
    for domain in np.unique(domains[test]):
        same = fit[domains[fit] == domain]
        if len(same):
            found[domains[test] == domain] = np.average(targets[same], axis=0, weights=rows.weights[same])
    return found


Expected = Callable[[_Rows, Array, Places, Places], Array]


def _parts(rows: _Rows) -> list[tuple[Places, Places]]:
    """Training and test rows of each fold."""
    fold = _fold(rows.scripts, rows.domains, FOLDS)
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(FOLDS)]


def _means(rows: _Rows, targets: Array, expected: Expected) -> Array:
    """What is expected of every row (M, S) by the training rows of its fold."""
    found = np.zeros_like(targets)
    for train, test in _parts(rows):
        found[test] = expected(rows, targets, train, test)
    return found


def _out_of_fold(
    rows: _Rows, targets: Array, features: Array | None, expected: Expected
) -> tuple[Array, list[float]]:
    """Predictions (M, S) for every target, and each fold's penalty for the first."""
    told, alphas = np.zeros_like(targets), []
    for train, test in _parts(rows):
        inner = _fold([rows.scripts[i] for i in train], [rows.domains[i] for i in train], INNER)
        errors = np.zeros((len(ALPHAS), targets.shape[1]))
        for part in range(INNER):
            held, fit = train[inner == part], train[inner != part]
            for place, guess in enumerate(_ridge(rows, targets, features, expected, fit, held)):
                errors[place] += (rows.weights[held, None] * (targets[held] - guess) ** 2).sum(0)
        best = errors.argmin(0)  # (S,)
        guesses = _ridge(rows, targets, features, expected, train, test)
        told[test] = np.stack([guesses[alpha][:, s] for s, alpha in enumerate(best)], axis=1)
        alphas.append(ALPHAS[int(best[0])])
    return told, alphas


def _ridge(
    rows: _Rows, targets: Array, features: Array | None, expected: Expected, fit: Places, test: Places
) -> list[Array]:
    """Predictions for the test rows (n, S) by penalty: what is expected, and a ridge on what that leaves."""
    from sklearn.linear_model import Ridge

    seen, new = _features(rows.texts, features, fit, test)
    left, base = targets[fit] - expected(rows, targets, fit, fit), expected(rows, targets, fit, test)
    found = []
    for alpha in ALPHAS:
        model = Ridge(alpha=alpha).fit(seen, left, sample_weight=rows.weights[fit])
        found.append(base + np.asarray(model.predict(new)).reshape(base.shape))
    return found


def _features(texts: Sequence[str], features: Array | None, fit: Places, test: Places) -> tuple[Array, Array]:
    if features is not None:
        return features[fit], features[test]
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    hashed = HashingVectorizer(n_features=FEATURES, ngram_range=(1, 2), alternate_sign=False, norm=None)
    weigh = TfidfTransformer(sublinear_tf=True)
    seen = weigh.fit_transform(hashed.transform([texts[i] for i in fit]))
    new = weigh.transform(hashed.transform([texts[i] for i in test]))
    used = np.unique(seen.nonzero()[1])  # a word that training never met has no weight
    return seen[:, used].toarray(), new[:, used].toarray()


def _fold(scripts: Sequence[str], domains: Sequence[str], folds: int) -> NDArray[np.int64]:
    """Each row's fold: scripts are dealt in an order that their names make, domain after domain."""
    known = {
        (domain, hashlib.sha256(script.encode()).hexdigest(), script)
        for script, domain in zip(scripts, domains, strict=True)
    }
    number = {script: place % folds for place, (_, _, script) in enumerate(sorted(known))}
    return np.array([number[script] for script in scripts])


@dataclass(frozen=True)
class _R2:
    """R2 of answers from predictions for messages."""

    rows: _Rows

    def value(self, true: Array, told: Array, nothing: Array) -> float:
        """Against a baseline. What answers to one message differ by counts as not explained."""
        own = self.rows.within.sum()
        left = float((self.rows.weights * (true - told) ** 2).sum() + own)
        whole = float((self.rows.weights * (true - nothing) ** 2).sum() + own)
        return 1 - left / whole if whole else float("nan")

    def told(self, true: Array, told: Array, nothing: Array) -> dict[str, float]:
        """With a 95% interval over scripts."""
        left = self.rows.weights * (true - told) ** 2 + self.rows.within
        whole = self.rows.weights * (true - nothing) ** 2 + self.rows.within
        draws = script_weights(self.rows.scripts)
        low, high = np.quantile(1 - (draws @ left) / (draws @ whole), (0.025, 0.975))
        return {"r2": self.value(true, told, nothing), "low": float(low), "high": float(high)}

    def ceiling(self) -> float | None:
        """The share of variance between messages; None where no message has two answers."""
        free = float((self.rows.weights - 1).sum())
        if free <= 0:
            return None
        mean = np.average(self.rows.targets, weights=self.rows.weights)
        whole = (self.rows.weights * (self.rows.targets - mean) ** 2 + self.rows.within).sum()
        return float(1 - (self.rows.within.sum() / free) / (whole / (self.rows.weights.sum() - 1)))
