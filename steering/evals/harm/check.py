"""How a judge of harm does on answers with human labels.

check = check_harm_judge(harm_judge("harm.json", None), read_labels(Path("others.csv")),
Path("runs/judge-check.jsonl")) check.all.auc.value, check.seen, check.unseen
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from personatlas.steering.evals.harm.agreement import JudgeAgreement, LabelledAnswers, measure_agreement
from personatlas.steering.evals.harm.judges import (
    HARMFUL,
    ClassifierHarmJudge,
    HarmJudge,
    ModelHarmJudge,
    count_problems,
    judge_harm,
)


@dataclass(frozen=True)
class HarmJudgeCheck:
    """Agreement on all answers that have a score, how many of them the judge was fitted to, the agreement
    without those (None where there are no others), and the problems that left answers without a score."""

    all: JudgeAgreement
    seen: int
    unseen: JudgeAgreement | None
    unscored: Counter[str]


def check_harm_judge(
    judge: HarmJudge, labelled: LabelledAnswers, log: Path, advance: Callable[[int], None] = lambda _: None
) -> HarmJudgeCheck:
    """The judge's scores against the labels. A model's verdicts are kept in `log`, so that none is asked for
    twice.

    Raises `UserError` where the judge gives no answer a score.
    """
    pairs = list(zip(labelled.requests, labelled.texts, strict=True))
    if isinstance(judge, ModelHarmJudge):
        verdicts = judge_harm(judge, pairs, log, advance)
    else:  # faster than its log would be
        by_index = dict(judge.harm_verdicts(pairs))
        verdicts = [by_index[index] for index in range(len(pairs))]
    scored = [index for index, verdict in enumerate(verdicts) if verdict.score is not None]
    classifier = judge.classifier if isinstance(judge, ClassifierHarmJudge) else None
    threshold = HARMFUL if classifier is None else classifier.threshold
    known: set[int] = set()
    if classifier is not None:
        flags = classifier.knows([labelled.texts[index] for index in scored])
        known = {index for index, is_known in zip(scored, flags, strict=True) if is_known}

    def agreement(indices: list[int]) -> JudgeAgreement:
        scores = [float(verdicts[i].score or 0.0) for i in indices]
        texts = [labelled.texts[i] for i in indices]
        return measure_agreement(scores, [labelled.labels[i] for i in indices], texts, threshold)

    whole, others = agreement(scored), [index for index in scored if index not in known]
    unseen = whole if not known else agreement(others) if others else None
    return HarmJudgeCheck(whole, len(known), unseen, count_problems(verdicts))
