"""Controls: prompts that ask for no character, beside every axis."""

from collections import Counter

import numpy as np
import pytest

from personatlas.persona.errors import UserError
from personatlas.persona.options import PlanOptions, selection_of
from personatlas.persona.roles.bank import Bank, Control, Question, Role, check_file, load_bank
from personatlas.persona.rollout import Selection, rollout_requests

FACTS = Control("facts", tuple(f"Fact {i}." for i in range(5)), "facts")
BANK = Bank(
    (Role("default", ("",), is_default=True), Role("bard", ("You are a bard.", "Sing."))),
    tuple(Question(f"q{i}", f"Why {i}?") for i in range(10)),
    (),
    (FACTS,),
)


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_control_takes_its_prompts_in_turn_as_often_as_a_role_is_asked(prompts):
    requests = [r.parts for r in rollout_requests(BANK, "m", Selection(prompts=prompts), 0)]
    own, bard = ([p for p in requests if p.role == name] for name in ("=facts", "bard"))
    assert len(own) == len(bard) == 10 * prompts
    assert set(Counter(part.question for part in own).values()) == {prompts}
    assert set(Counter(part.prompt for part in own).values()) == {2 * prompts}
    assert requests[-len(own) :] == own  # behind the roles
    assert not [r for r in rollout_requests(BANK, "m", Selection(with_controls=False), 0) if r.key[0] == "="]


def test_the_option_leaves_controls_out():
    assert selection_of(PlanOptions(plan="demo"))[0].with_controls
    assert not selection_of(PlanOptions(plan="demo", no_controls=True))[0].with_controls


def test_packaged_controls_are_as_long_as_role_prompts():
    bank = load_bank()
    assert [control.name for control in bank.controls] == [
        "neutral_facts",
        "answer_style",
        "long_assistant",
        "plain_human",
    ]
    roles = [len(prompt.split()) for role in bank.roles if not role.is_default for prompt in role.prompts]
    low, high = np.quantile(roles, [0.1, 0.9])
    for control in bank.controls:
        lengths = [len(prompt.split()) for prompt in control.prompts]
        assert len(set(control.prompts)) == 10
        assert low <= min(lengths), control.name
        assert max(lengths) <= high, control.name
        assert np.mean(lengths) == pytest.approx(np.mean(roles), abs=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"name": "=facts", "prompts": ["A."]}', "begin with +, - or ="),
        ('{"name": "facts", "prompts": [""]}', "needs prompts that are not empty"),
        ('{"name": "facts", "prompts": []}', "a list of at least one string"),
        ('{"name": "facts", "prompts": ["A."], "about": 3}', "a string as `about`"),
    ],
)
def test_a_mistake_in_a_control_is_named_with_its_line(tmp_path, row, message):
    path = tmp_path / "controls.jsonl"
    path.write_text('{"name": "style", "prompts": ["B."]}\n' + row + "\n")
    with pytest.raises(UserError) as caught:
        check_file(path)
    assert f"{path}:2" in str(caught.value)
    assert message in str(caught.value)
