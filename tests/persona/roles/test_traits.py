"""Traits: poles that are rolled out like roles, and the axis that comes with the packaged model."""

import pytest
import torch

from personatlas.persona.axis import load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.roles.bank import Bank, Question, Role, Trait, role_kind
from personatlas.persona.rollout import Selection, rollout_requests
from personatlas.persona.runs import packaged_axes, packaged_axis_folder, resolve_axis

CALM = Trait("calm", ("Be calm.", "Slowly."), ("Be frantic.",), "0 to 100", ("style",))
TERSE = Trait("terse", ("Be short.",), ("Go on and on.",))
BANK = Bank(
    (
        Role("default", ("",), is_default=True),
        *(Role(name, (f"You are a {name}.",)) for name in ("bard", "nun", "crow")),
    ),
    (Question("q0", "Why?"), Question("q1", "How?")),
    (CALM, TERSE),
)


def test_poles_are_rolled_out_after_the_roles_and_only_when_asked_for():
    assert [role.name for role in CALM.poles] == ["+calm", "-calm"]
    assert [role_kind(name) for name in ("+calm", "-calm/0/q0/0", "calm", "=facts/0/q0/0")] == [
        "trait",
        "trait",
        "role",
        "control",
    ]
    plain = [request.key for request in rollout_requests(BANK, "m", Selection(), 0)]
    assert {role_kind(key) for key in plain} == {"role"}
    both = [request.key for request in rollout_requests(BANK, "m", Selection(with_traits=True), 0)]
    assert both[: len(plain)] == plain
    assert both[len(plain) :][:5] == [
        "+calm/0/q0/0",
        "+calm/0/q1/0",
        "+calm/1/q0/0",
        "+calm/1/q1/0",
        "-calm/0/q0/0",
    ]
    one = rollout_requests(
        BANK, "m", Selection(with_traits=True, trait_names=("terse",), prompts=1, questions=1), 0
    )
    assert [request.key for request in one][-2:] == ["+terse/0/q0/0", "-terse/0/q0/0"]
    assert one[-1].messages[0]["content"] == "Go on and on."


def test_traits_of_a_bank_without_any_are_refused():
    with pytest.raises(UserError, match="this bank has no traits"):
        Selection(with_traits=True).traits(Bank(BANK.roles, BANK.questions))
    with pytest.raises(UserError, match=r"trait 'clam' is not one of .*; did you mean calm"):
        Selection(with_traits=True, trait_names=("clam",)).traits(BANK)


def test_the_packaged_model_comes_with_an_axis_that_names_its_weights_and_floors():
    assert packaged_axes() == ("smollm2-135m",)
    found = load_axis(packaged_axis_folder("smollm2-135m") / "axis")
    assert found.poles == ("assistant", "role-play")
    assert found.model["weights"] == "gguf Q4_1"
    assert found.vectors.shape == (30, 576)
    assert torch.isfinite(found.default_quantiles).all()
    assert (found.default_quantiles.diff(dim=1) >= 0).all()
    middle = found.levels.index(0.5)
    assert (found.default_quantiles > found.role_quantiles)[found.layer, middle]
    assert resolve_axis("smollm2-135m") == packaged_axis_folder("smollm2-135m") / "axis"
    with pytest.raises(UserError, match="no axis comes with 'gpt2', only with smollm2-135m"):
        packaged_axis_folder("gpt2")
