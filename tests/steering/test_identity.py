"""Who an answer says that it is, and the shares of an arm's answers."""

import pytest

from personatlas.persona.roles.bank import load_bank
from personatlas.persona.rollout import Request
from personatlas.persona.sampling.sampler import Answer
from personatlas.steering.arms import ArmAnswers
from personatlas.steering.identity import (
    FITTED_QUESTIONS,
    HELD_OUT_QUESTIONS,
    IdentityShares,
    identity_class,
    measure_identity,
    says_yes,
)


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("I am an AI assistant, here to help.", "assistant"),
        ("I'm not an AI, I am an old sailor from Bergen.", "human"),
        ("I'm Nyx, a ghost who haunts this lighthouse.", "mystical"),
        ("I am the oldest oak of this forest.", "non-human"),
        ("The weather is fine.", "unclear"),
    ],
)
def test_an_answer_is_what_its_speaker_claims_to_be(answer, name):
    assert identity_class(answer) == name


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, I am an AI.", True),
        ('"Yes," said the pirate.', True),
        ("Well, yes.", True),
        ("Of course I am!", True),
        ("I am, and proud of it.", True),
        ("Aye!", True),
        ("I am not a bicycle.", False),
        ("No. Yes is not what I would say.", False),
        ("Yesterday I was.", False),
        ("", False),
    ],
)
def test_a_yes_is_what_an_answer_begins_with(answer, yes):
    assert says_yes(answer) == yes


def test_questions_that_report_are_none_of_those_that_fit_and_each_yes_no_question_has_a_counterpart():
    assert not {*FITTED_QUESTIONS, *FITTED_QUESTIONS.values()} & {
        *HELD_OUT_QUESTIONS,
        *HELD_OUT_QUESTIONS.values(),
    }
    kinds = [id.rstrip("0123456789") for id in HELD_OUT_QUESTIONS]
    assert kinds.count("assistant") == kinds.count("counter") == 3
    roles = {role.name for role in load_bank().roles}
    things = {
        text.rstrip("?").split()[-1] for id, text in HELD_OUT_QUESTIONS.items() if id.startswith("counter")
    }
    assert not things & roles  # none of them is what a role is


def test_shares_and_differences_count_roles_as_clusters():
    requests = [Request(f"{role}/0/identity{i}/0", (), 0) for role in ("a", "b", "c") for i in range(4)]
    answers = tuple(Answer(i, (1, 2, 2), "end") for i in range(12))
    arms = [ArmAnswers(name, ("x",) * 12, answers, None) for name in ("one", "other")]
    one = measure_identity(arms[0], requests, ["assistant"] * 4 + ["human"] * 8)
    other = measure_identity(arms[1], requests, ["assistant"] * 8 + ["human"] * 4)
    assert one.shares["assistant"] == pytest.approx(1 / 3)
    assert one.distinct == pytest.approx(2 / 3)
    change = other.change(one)
    assert change.value == pytest.approx(1 / 3)
    assert change.high - change.low > 1.5  # one role of three changed whole, and the others not at all
    assert IdentityShares.from_json(one.to_json()) == one
