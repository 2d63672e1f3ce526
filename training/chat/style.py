"""Do generated answers sound like the ones that a model was tuned on? Measures with intervals and what chance gives.

    found = compare({"teacher": theirs, "before": untuned, "after": tuned}, recogniser_of(train), known_texts)
    found["after"]["all"]["recognised"]      # {"value": 0.81, "low": 0.74, "high": 0.87, "n": 200}
    found["after"]["all"]["chance"]          # 0.26

**Recognised**: a classifier learns from the teachers' answers whose style is whose (a logistic regression on hashed runs of 2
to 4 letters) and is asked about answers to questions that it has not met. The teachers' own rate there is what can be had; the
untuned model's is what the prompts alone give; **chance** is what the same guesses would hit if they were dealt to the answers of
their source at random. A high rate is no proof of quality: a model that recites is recognised, so **recited** is beside it. The
other measures (words, distinct pairs of words, repeats, openings, ends) are read against the teacher's.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray as Array

from personatlas.persona.rollout import spread
from personatlas.training.chat.conversations import Conversation
from personatlas.training.chat.heldout_loss import interval

STYLES = 40  # that the classifier can tell apart: more would cost minutes
TEXTS = 6000  # that it is fitted to
FEATURES = 2**14
STRENGTH = 10.0  # scikit-learn's C
OPENING = 4  # words
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Answer:
    """An answer to a held-out question, by a teacher or by a model."""

    text: str
    label: str
    source: str
    question: str
    ended: bool = True
    apart: bool = False
    "whether the model was not tuned on its role"

    @property
    def group(self) -> str:
        """Under which name its figures are given."""
        return f"{self.source}, held-out roles" if self.apart else self.source


@dataclass(frozen=True)
class Recogniser:
    """Says whose style a text is in."""

    labels: tuple[str, ...]
    vectorizer: Any
    model: Any
    texts: int

    def styles(self, texts: Sequence[str]) -> list[str]:
        """The likeliest label of each."""
        return [str(one) for one in self.model.predict(self.vectorizer.transform(texts))] if texts else []


def recogniser_of(conversations: Sequence[Conversation], labels: Iterable[str] = ()) -> Recogniser | None:
    """Fit to last answers, equal ones of a style once. None where there are not two styles.

    Only labels with a style count: what no prompt asks for cannot be recognised in an answer. `labels` are those that it is to
    know before any others, which are spread over the rest.
    """
    texts: dict[str, dict[str, None]] = defaultdict(dict)
    for one in conversations:
        if one.style:
            texts[one.label][one.answers[-1]] = None
    first = sorted(texts.keys() & set(labels))[:STYLES]
    known = sorted([*first, *spread(sorted(texts.keys() - set(first)), STYLES - len(first))])
    if len(known) < 2:
        return None
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    each = {label: spread(list(texts[label]), TEXTS // len(known)) for label in known}
    fitted = [text for label in known for text in each[label]]
    named = [label for label in known for _ in each[label]]
    vectorizer = HashingVectorizer(
        analyzer="char_wb", ngram_range=(2, 4), n_features=FEATURES, alternate_sign=False
    )
    model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=300, tol=1e-3)
    model.fit(vectorizer.transform(fitted), named)
    return Recogniser(tuple(known), vectorizer, model, len(fitted))


def compare(
    answers: Mapping[str, Sequence[Answer]], recogniser: Recogniser | None, known: frozenset[str]
) -> dict[str, dict[str, Any]]:
    """Every measure of everyone's answers by source, held-out roles apart, and under "all" without those. `known` are the
    texts that were tuned on."""
    return {who: _measured(listed, recogniser, known) for who, listed in answers.items() if listed}


def _measured(
    answers: Sequence[Answer], recogniser: Recogniser | None, known: frozenset[str]
) -> dict[str, Any]:
    columns = measures([one.text for one in answers])
    columns["ended"] = np.array([float(one.ended) for one in answers])
    columns["recited"] = np.array([float(one.text.strip() in known) for one in answers])
    guesses = np.array(recogniser.styles([one.text for one in answers]) if recogniser else [], dtype=object)
    found: dict[str, dict[str, Any]] = {}
    dealt = _dealt(answers, guesses) if recogniser else guesses
    alone = all(one.apart for one in answers)
    for group in ["all", *sorted({one.group for one in answers})]:
        mine = [
            place
            for place, one in enumerate(answers)
            if group == one.group or (group == "all" and (alone or not one.apart))
        ]
        questions = [answers[place].question for place in mine]
        found[group] = {name: _mean(column[mine], questions) for name, column in columns.items()}
        told = [
            place for place in mine if recogniser is not None and answers[place].label in recogniser.labels
        ]
        if told:
            right = np.array([float(guesses[place] == answers[place].label) for place in told])
            found[group]["recognised"] = _mean(right, [answers[place].question for place in told])
            found[group]["chance"] = float(dealt[told].mean())
    return found


def _dealt(answers: Sequence[Answer], guesses: Array) -> Array:
    """How likely each answer's own style is among the guesses for its source: dealt at random, it would be right so often."""
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for one, guess in zip(answers, guesses.tolist(), strict=True):
        said[one.source][guess] += 1
    return np.array([said[one.source][one.label] / said[one.source].total() for one in answers])


def measures(texts: Sequence[str]) -> dict[str, Array]:
    """Of each text: words; the share of its word pairs that are distinct; the share of its runs of four words that it has
    said before; and whether another of the texts opens with the same four words."""
    spoken = [[word.lower() for word in _WORD.findall(text)] for text in texts]
    openings = Counter(tuple(words[:OPENING]) for words in spoken)
    columns: dict[str, list[float]] = {"words": [], "distinct pairs": [], "repeats": [], "shared opening": []}
    for words in spoken:
        pairs, fours = _runs(words, 2), _runs(words, 4)
        columns["words"].append(float(len(words)))
        columns["distinct pairs"].append(len(set(pairs)) / len(pairs) if pairs else 1.0)
        columns["repeats"].append(1 - len(set(fours)) / len(fours) if fours else 0.0)
        columns["shared opening"].append(float(openings[tuple(words[:OPENING])] > 1))
    return {name: np.array(column) for name, column in columns.items()}


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def _mean(values: Array, questions: Sequence[str]) -> dict[str, Any]:
    low, high = interval(values, np.ones(len(values)), questions) or (None, None)
    return {"value": float(values.mean()), "low": low, "high": high, "n": len(values)}
