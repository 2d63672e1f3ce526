"""How much of the next answer's projection the user's message predicts: ridge regression on the message's
words.

    predictions = predict_from_messages(turns)     # a UserMessage per answer
    predictions["projection"].r2, predictions["projection"].domain.r2

y = <features(message), w> + b with an L2 penalty. Features are hashed words and word pairs weighted by
TF-IDF, or given sentence embeddings. R2 is out of fold, 1 - sum (y - prediction)^2 / sum (y - mean of the
training fold)^2. No script is in training and test at once; the penalty and the TF-IDF weights are fitted
inside the training scripts in the same way. Reference values: the mean of the message's domain, what the
message adds to it (a ridge on the residuals of that mean), shuffled targets, and the ceiling, i.e. the share
of variance that samples of the same message have in common.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from personatlas.analysis.stats import Array, ratio_interval
from personatlas.persona.records import Count, JsonRecord

FOLDS, INNER_FOLDS = 5, 4
ALPHAS = tuple(float(alpha) for alpha in 10.0 ** np.arange(-3, 5))
FEATURES = 2**12
SHUFFLES = 20
MIN_SCRIPTS = 8
Rows = NDArray[np.int64]  # row numbers
Embedding = Callable[[Sequence[str]], Array]


@dataclass(frozen=True)
class UserMessage:
    """An answer: the user's message before it, its projection, and the change since the answer before (None
    at first)."""

    text: str
    projection: float
    change: float | None
    script: str
    domain: str


@dataclass(frozen=True)
class R2(JsonRecord):
    """Out-of-fold R2 with its 95% interval over scripts."""

    r2: float
    low: float
    high: float


@dataclass(frozen=True)
class ShuffledR2(JsonRecord):
    """Mean and maximum R2 of n shuffles of the targets."""

    mean: float
    highest: float
    n: Count


@dataclass(frozen=True)
class Prediction(R2):
    """R2 of the ridge on the message, beside its reference values.

    `domain` is of the domain's mean, `beyond_domain` of the ridge on its residuals, `alphas` the penalty of
    each fold; `ceiling` is None where no message has two answers.
    """

    domain: R2
    beyond_domain: R2
    shuffled: ShuffledR2
    ceiling: float | None
    alphas: tuple[float, ...]
    answers: Count
    messages: Count
    scripts: Count
    folds: Count


@dataclass(frozen=True)
class _Messages:
    """Messages (M) with the mean of their answers' targets, the number of answers and their sum of squares
    around it."""

    texts: tuple[str, ...]
    targets: Array
    weights: Array
    within: Array
    scripts: tuple[str, ...]
    domains: tuple[str, ...]

    def r2_value(self, targets: Array, predictions: Array, baseline: Array) -> float:
        """R2 of answers against baseline predictions; differences between answers to one message are
        unexplained."""
        within = self.within.sum()
        residual = float((self.weights * (targets - predictions) ** 2).sum() + within)
        total = float((self.weights * (targets - baseline) ** 2).sum() + within)
        return 1 - residual / total if total else float("nan")

    def r2(self, predictions: Array, baseline: Array) -> R2:
        """The same for the true targets, with its interval."""
        residual = self.weights * (self.targets - predictions) ** 2 + self.within
        total = self.weights * (self.targets - baseline) ** 2 + self.within
        unexplained = ratio_interval(residual, total, self.scripts)
        assert unexplained.low is not None  # MIN_SCRIPTS or more
        assert unexplained.high is not None
        return R2(1 - unexplained.value, 1 - unexplained.high, 1 - unexplained.low)

    def ceiling(self) -> float | None:
        """The share of variance between messages; None where no message has two answers."""
        freedom = float((self.weights - 1).sum())
        if freedom <= 0:
            return None
        mean = np.average(self.targets, weights=self.weights)
        total = (self.weights * (self.targets - mean) ** 2 + self.within).sum()
        return float(1 - (self.within.sum() / freedom) / (total / (self.weights.sum() - 1)))


def predict_from_messages(
    turns: Sequence[UserMessage], embed: Embedding | None = None
) -> dict[str, Prediction] | None:
    """Returns the predictions of "projection" and of its "change" since the answer before.

    `embed` maps M texts to unit rows (M, E). None for fewer than 8 scripts; without "change" where fewer than
    8 scripts have a second answer.
    """
    if len({turn.script for turn in turns}) < MIN_SCRIPTS:
        return None
    later = [(turn, turn.change) for turn in turns if turn.change is not None]
    predictions = {"projection": _predict([(turn, turn.projection) for turn in turns], embed)}
    if len({turn.script for turn, _ in later}) >= MIN_SCRIPTS:
        predictions["change"] = _predict(later, embed)
    return predictions


def _predict(answers: Sequence[tuple[UserMessage, float]], embed: Embedding | None) -> Prediction:
    messages = _messages(answers)
    features = None if embed is None else np.asarray(embed(messages.texts), dtype=float)
    generator = np.random.default_rng(0)
    orders = [generator.permutation(len(messages.targets)) for _ in range(SHUFFLES)]
    targets = np.stack([messages.targets, *(messages.targets[order] for order in orders)], 1)  # (M, 1 + S)
    ridge, alphas = _ridge_out_of_fold(messages, targets, features, _overall_mean)
    beyond, _ = _ridge_out_of_fold(messages, targets[:, :1], features, _domain_mean)
    mean, domain = np.zeros_like(targets), np.zeros_like(targets[:, :1])
    for train, test in _folds(messages):
        mean[test] = _overall_mean(messages, targets, train, test)
        domain[test] = _domain_mean(messages, targets[:, :1], train, test)
    shuffled = [messages.r2_value(targets[:, s], ridge[:, s], mean[:, s]) for s in range(1, SHUFFLES + 1)]
    return Prediction(
        **asdict(messages.r2(ridge[:, 0], mean[:, 0])),
        domain=messages.r2(domain[:, 0], mean[:, 0]),
        beyond_domain=messages.r2(beyond[:, 0], domain[:, 0]),
        shuffled=ShuffledR2(float(np.mean(shuffled)), float(np.max(shuffled)), SHUFFLES),
        ceiling=messages.ceiling(),
        alphas=tuple(alphas),
        answers=int(messages.weights.sum()),
        messages=len(messages.texts),
        scripts=len(set(messages.scripts)),
        folds=FOLDS,
    )


def _messages(answers: Sequence[tuple[UserMessage, float]]) -> _Messages:
    """Answers to one message of a script as one row, weighted by their number: for a ridge the two are the
    same."""
    groups: dict[tuple[str, str], list[float]] = {}
    for turn, target in answers:
        groups.setdefault((turn.script, turn.text), []).append(target)
    values = [np.array(group) for group in groups.values()]
    domains = {turn.script: turn.domain for turn, _ in answers}
    return _Messages(
        tuple(text for _, text in groups),
        np.array([group.mean() for group in values]),
        np.array([float(len(group)) for group in values]),
        np.array([float(((group - group.mean()) ** 2).sum()) for group in values]),
        tuple(script for script, _ in groups),
        tuple(domains[script] for script, _ in groups),
    )


def _overall_mean(messages: _Messages, targets: Array, train: Rows, test: Rows) -> Array:
    """Predictions (n, S) for the test rows from the training rows' mean."""
    mean = np.average(targets[train], axis=0, weights=messages.weights[train])
    return np.repeat(mean[None], len(test), axis=0)


def _domain_mean(messages: _Messages, targets: Array, train: Rows, test: Rows) -> Array:
    """The same from the mean of the training rows of the row's domain, where there are some."""
    predictions, domains = _overall_mean(messages, targets, train, test), np.asarray(messages.domains)
    for domain in np.unique(domains[test]):
        same = train[domains[train] == domain]
        if len(same):
            mean = np.average(targets[same], axis=0, weights=messages.weights[same])
            predictions[domains[test] == domain] = mean
    return predictions


BaselineModel = Callable[[_Messages, Array, Rows, Rows], Array]


def _folds(messages: _Messages) -> list[tuple[Rows, Rows]]:
    """Training and test rows of each fold."""
    fold = fold_numbers(messages.scripts, messages.domains, FOLDS)
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(FOLDS)]


def _ridge_out_of_fold(
    messages: _Messages, targets: Array, features: Array | None, baseline: BaselineModel
) -> tuple[Array, list[float]]:
    """Predictions (M, S) for every target, and each fold's penalty for the first."""
    predictions, alphas = np.zeros_like(targets), []
    for train, test in _folds(messages):
        scripts, domains = ([labels[i] for i in train] for labels in (messages.scripts, messages.domains))
        inner = fold_numbers(scripts, domains, INNER_FOLDS)
        errors = np.zeros((len(ALPHAS), targets.shape[1]))
        for number in range(INNER_FOLDS):
            fit, heldout = train[inner != number], train[inner == number]
            for row, prediction in enumerate(_ridge(messages, targets, features, baseline, fit, heldout)):
                errors[row] += (messages.weights[heldout, None] * (targets[heldout] - prediction) ** 2).sum(0)
        best = errors.argmin(0)  # (S,)
        by_alpha = _ridge(messages, targets, features, baseline, train, test)
        predictions[test] = np.stack([by_alpha[alpha][:, s] for s, alpha in enumerate(best)], axis=1)
        alphas.append(ALPHAS[int(best[0])])
    return predictions, alphas


def _ridge(
    messages: _Messages,
    targets: Array,
    features: Array | None,
    baseline: BaselineModel,
    train: Rows,
    test: Rows,
) -> list[Array]:
    """Predictions for the test rows (n, S) by penalty: the baseline and a ridge on its residuals."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.linear_model import Ridge

    if features is not None:
        x_train, x_test = features[train], features[test]
    else:
        hashing = HashingVectorizer(n_features=FEATURES, ngram_range=(1, 2), alternate_sign=False, norm=None)
        tfidf = TfidfTransformer(sublinear_tf=True)
        seen = tfidf.fit_transform(hashing.transform([messages.texts[i] for i in train]))
        new = tfidf.transform(hashing.transform([messages.texts[i] for i in test]))
        used = np.unique(seen.nonzero()[1])  # a word that training never met has no weight
        x_train, x_test = seen[:, used].toarray(), new[:, used].toarray()
    residuals = targets[train] - baseline(messages, targets, train, train)
    base = baseline(messages, targets, train, test)
    predictions = []
    for alpha in ALPHAS:
        model = Ridge(alpha=alpha).fit(x_train, residuals, sample_weight=messages.weights[train])
        predictions.append(base + np.asarray(model.predict(x_test)).reshape(base.shape))
    return predictions


def fold_numbers(scripts: Sequence[str], domains: Sequence[str], folds: int) -> Rows:
    """Returns each row's fold (N,): scripts are dealt out by a hash of their names, domain after domain."""
    hashed = {
        (domain, hashlib.sha256(script.encode()).hexdigest(), script)
        for script, domain in zip(scripts, domains, strict=True)
    }
    number = {script: rank % folds for rank, (_, _, script) in enumerate(sorted(hashed))}
    return np.array([number[script] for script in scripts])
