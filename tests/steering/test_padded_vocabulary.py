"""A padded vocabulary, whose logits of minus infinity are healthy: their differences, NaN, are nowhere taken."""

import json
import math

import pytest
import torch
from families import tiny_hf, tokenizer
from tiny_axis import axis_of

from personatlas.persona.models.load import build_model
from personatlas.persona.models.parity import bounded_log_probs, count_changed, relative_error
from personatlas.persona.pipeline.self_test import run_self_test
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.generate import generate
from personatlas.steering.hooks.binding_check import require_binding, run_cap_test
from personatlas.steering.loss_cost import benign_costs

ROLLOUTS = [Rollout(f"r/0/{n}/0", (), (5, 6, 7 + n), (8, 9, 10, 11), "", 0, "end") for n in range(3)]


@pytest.fixture(scope="module")
def padded():
    """Ids from 263 on have no token."""
    model = tiny_hf("phi")
    with torch.no_grad():
        model.lm_head.bias[263:] = -torch.inf
    return build_model(model, tokenizer(), id="padded")


def test_it_passes_the_self_test_and_is_steered(padded):
    axis = axis_of(padded)
    checks = [*run_self_test(padded), *run_cap_test(padded, axis)]
    assert [check for check in checks if not check.passed] == []
    cap = axis.quantile_cap((0, 1), 0.5)
    require_binding(padded, [cap])
    messages = [{"role": "user", "content": "Who are you?"}]
    made = generate(
        padded, messages, steer=[cap], axis=axis, sampling=Sampling(12, temperature=1.5, top_p=1.0)
    )
    assert max(made.trace.ids) < 263


def test_what_a_cap_costs_it_is_a_number(padded):
    axis = axis_of(padded)
    (cost,) = benign_costs(padded, ROLLOUTS, {"cap": [axis.quantile_cap((0, 1), 0.75)]}).values()
    assert math.isfinite(cost.kl)
    assert cost.kl > 0


def test_equal_infinities_are_equal_and_nan_never_is():
    row = torch.tensor([1.0, 2.0, -torch.inf])
    assert count_changed(row, row.clone()) == 0
    assert relative_error(row, row.clone()) == 0.0
    assert relative_error(torch.tensor([1.0, 3.0, -torch.inf]), row) == pytest.approx(1 / 5**0.5)
    assert relative_error(torch.tensor([1.0, 2.0, 3.0]), row) == math.inf
    assert relative_error(torch.tensor([1.0, -torch.inf, -torch.inf]), row) == math.inf
    spoilt = torch.tensor([1.0, torch.nan, -torch.inf])
    assert count_changed(spoilt, spoilt) == 1
    assert not relative_error(spoilt, row) <= 1e9
    assert not relative_error(row, torch.tensor([1.0, 2.0, torch.nan])) <= 1e9


def test_log_probabilities_of_masked_tokens_can_be_written_as_json():
    scores = bounded_log_probs(torch.tensor([0.0, 0.0, -torch.inf])).tolist()
    assert scores == [pytest.approx(math.log(0.5)), pytest.approx(math.log(0.5)), -9999.0]
    json.dumps(scores, allow_nan=False)
