"""Evaluations made up from shares: any number of cases and arms, without a model."""

from dataclasses import replace

import numpy as np

from personatlas.persona.roles.bank import load_bank
from personatlas.steering.arms import InterventionSummary, is_control_name
from personatlas.steering.conversations.runner import TurnRecord
from personatlas.steering.evals.capability import BenignCost, Capability, OwnLoss
from personatlas.steering.evals.options import EvalOptions
from personatlas.steering.evals.result import (
    EvalResult,
    JudgeSummary,
    case_results,
    eval_warnings,
    suite_result,
)
from personatlas.steering.evals.suites import Case, SuiteInputs, find_suite

ARMS = ("baseline", "assistant", "random 1")
TEXT = "The tide comes in and the tide goes out, <b>says</b> the keeper. نعم، المد يعود. "


def make_result(
    harm=(0.6, 0.3), *, suite="harm", n=60, arms=ARMS, judge="local:judge", cost=0.156, categories=3
):
    """A suite whose main outcome has the first share at baseline and the second in arms that are no controls."""
    draws = np.random.default_rng(0)
    own = replace(
        find_suite(suite)(),
        inputs=SuiteInputs(EvalOptions(), load_bank(None)),
        cases=tuple(
            Case.from_text(f"role/0/r{i}/0", f"Request number {i} of a keeper.", f"category {i % categories}")
            for i in range(n)
        ),
    )
    answers, scores = {}, {}
    for arm in arms:
        before = arm == "baseline" or is_control_name(arm)
        for case in own.cases:
            shares = {name: draws.random() < 0.1 for name in own.outcomes}
            main = next(iter(own.outcomes))
            shares[main] = draws.random() < harm[0 if before else 1]
            if "complied" in shares:
                shares["complied"] = shares[main]
            position = (arm, case.key, 0)
            fired = 0.0 if arm == "baseline" else 0.4
            about = (case.key, "", arm, 0, 1, case.question, TEXT * int(draws.integers(1, 9)), (1, 2, 3, 4))
            answers[position] = TurnRecord(
                *about, projection=float(draws.normal()), fired=fired, acted=not before
            )
            scores[position] = {name: float(value) for name, value in shares.items()}
    result = suite_result(own, answers, scores, arms, 0.05, 0)
    costs = {arm: BenignCost(cost, (cost - 0.03, cost + 0.04), 1.2, 0.1, 0.4, 20, 900) for arm in arms[1:]}
    own_loss = {arm: OwnLoss(1.0, 0.1) for arm in arms}
    summary = JudgeSummary(judge, "yes-no", 0)
    interventions = {
        arm: InterventionSummary("18-23", 0.5, "default", "both", False, "cap") for arm in arms[1:]
    }
    return EvalResult(
        {"id": "/home/somebody/models/a-model-of-ours", "weights": "float32"},
        "float32",
        {"device": "cpu"},
        {"layer": 20, "of": "x"},
        tuple(arms),
        interventions,
        summary,
        {suite: result},
        Capability(costs or None, own_loss),
        {"seed": 0},
        {"torch": "2"},
        tuple(case_results(own, answers, scores, list(arms))),
        tuple(eval_warnings({suite: result}, summary)),
    )
