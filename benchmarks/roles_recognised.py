"""Does a model play the roles that it was tuned to? A classifier that learned them from the teacher says whose answer it reads.

    python benchmarks/roles_recognised.py TEACHER RUN ... --apart ghost,pirate

TEACHER and every RUN are folders with rollouts.jsonl (of `rollout`, `axis` or `emergence`). The classifier (TF-IDF of words and of runs of 2 to 4
letters, logistic regression) is fitted to the teacher's answers under the RUNs' roles, to questions that none of them asks,
and reads the first 40 words of each answer. Printed by RUN, for the roles `--apart` (which the model was not tuned to, say)
apart from the others: how often the right role is named, with a 95% interval over questions, how often it would be if
the same names were dealt at random, and the median place of the right role among all. The teacher's own answers to a RUN's
questions, as one more RUN, say what can be had.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from personatlas.persona.rollout import read_rollouts
from personatlas.training.chat.heldout_loss import interval

WORDS = 40

Answer = tuple[str, str, str]  # its role, its question, its first words


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--apart", default="")
    asked = parser.parse_args()
    runs = {run: answers_of(run) for run in asked.runs}
    roles = {role for answers in runs.values() for role, _, _ in answers}
    questions = {question for answers in runs.values() for _, question, _ in answers}
    known = [one for one in answers_of(asked.teacher) if one[0] in roles and one[1] not in questions]
    apart = {name for name in asked.apart.split(",") if name}
    if missing := sorted((roles | apart) - {role for role, _, _ in known}):
        parser.error(f"{asked.teacher} has no answers of {missing[0]} to questions that no RUN asks")
    print(f"{len(known)} answers of {len({role for role, _, _ in known})} roles to other questions are known")
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    letters = TfidfVectorizer(
        sublinear_tf=True, analyzer="char_wb", ngram_range=(2, 4), min_df=3, max_features=40_000
    )
    judge = make_pipeline(make_union(words, letters), LogisticRegression(C=30, max_iter=200))
    judge.fit([text for _, _, text in known], [role for role, _, _ in known])
    for run, answers in runs.items():
        for name, chosen in (
            ("roles", [one for one in answers if one[0] not in apart]),
            ("roles apart", [one for one in answers if one[0] in apart]),
        ):
            if chosen:
                print(f"{run}, {name}: {said(judge, chosen)}", flush=True)


def answers_of(run: Path) -> list[Answer]:
    """Every answer's role, question and first words; those without words do not count."""
    read = ((one.role, one.question, " ".join(one.answer.split()[:WORDS])) for one in read_rollouts(run))
    return [answer for answer in read if answer[2]]


def said(judge: Pipeline, answers: Sequence[Answer]) -> str:
    """One line about how well the roles of these answers are named."""
    likely = judge.predict_proba([text for _, _, text in answers])
    order = np.argsort(-likely, axis=1)
    names = [str(judge.classes_[row[0]]) for row in order]
    column = {name: place for place, name in enumerate(judge.classes_)}
    right = np.array([float(name == role) for name, (role, _, _) in zip(names, answers, strict=True)])
    places = [
        1 + int(np.flatnonzero(row == column[role])[0])
        for row, (role, _, _) in zip(order, answers, strict=True)
    ]
    dealt = Counter(names)
    chance = np.mean([dealt[role] / len(names) for role, _, _ in answers])
    found = interval(right, np.ones(len(right)), [question for _, question, _ in answers])
    low, high = found or (float("nan"), float("nan"))  # of a single question there is none
    return (
        f"{right.mean():.1%} [{low:.1%}, {high:.1%}] of {len(answers)} named right, {chance:.1%} by chance; "
        f"the right one is at place {int(np.median(places))} of {len(column)}"
    )


if __name__ == "__main__":
    main()
