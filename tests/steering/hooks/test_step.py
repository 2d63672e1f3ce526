"""The one operation of steering: its twin against the reference, the kernel against its twin, tables that
change in place.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model
from tiny_axis import ROWS, axis_of
from torch.nn.functional import normalize

from personatlas.persona.interventions import (
    Ablate,
    Add,
    Cap,
    apply_steps,
    interventions_digest,
    steps_by_layer,
)
from personatlas.persona.sampling.sampler import pad
from personatlas.steering.hooks.account import Account, Batch, accumulate
from personatlas.steering.hooks.steering import steer
from personatlas.steering.hooks.step import apply_bounds, gather_bounds
from personatlas.steering.hooks.tables import build_tables

VECTORS = normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=1)
CAP = Cap((0,), VECTORS[:1], torch.tensor([0.4]))
PLANS = [
    [CAP, Add((0,), VECTORS[1:2], torch.tensor([2.0]), phase="answer")],
    [replace(CAP, floor=torch.tensor([-0.2]), spare_first=True)],
    [Ablate((0,), VECTORS[2:], phase="prompt")],
]


def apply_plainly(h, table, given):
    return apply_bounds(h, table.vectors, gather_bounds(table, given, h.shape[1]))


def batch(tokens, rows=12, slots=None):
    generator = torch.Generator().manual_seed(tokens)
    h = torch.randn(rows, tokens, 24, generator=generator)
    highs = (len(PLANS) + 1, tokens + 1, tokens + 1, 2)
    return h, Batch(*(torch.randint(0, high, (rows,), generator=generator) for high in highs), slots)


@pytest.mark.parametrize("tokens", [1, 7])
def test_the_twin_does_to_each_row_what_its_own_plan_means(tokens):
    h, given = batch(tokens)
    moved, done = apply_plainly(h, build_tables(PLANS).at(0), given)
    length, seen = done.length, done.seen
    at = torch.arange(tokens)[None]
    for row, plan in enumerate(given.plans.tolist()):
        real = at < given.lengths[row]
        answer = real & (at >= given.starts[row])
        steps = steps_by_layer(PLANS[plan])[0] if plan < len(PLANS) else []
        fresh = bool(given.opening[row])
        expected, by = apply_steps(h[row : row + 1], steps, real & ~answer, answer, fresh=fresh)
        torch.testing.assert_close(moved[row : row + 1], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(length[row : row + 1], by, rtol=1e-5, atol=1e-6)
        phases = {step.phase for step in steps}
        there = (answer if {"answer", "both"} & phases else answer & False) | (
            real & ~answer if {"prompt", "both"} & phases else answer & False
        )
        if fresh and steps and steps[0].spare_first:
            there[:, 0] = False
        assert torch.equal(seen[row : row + 1], there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("in_order", [True, False])
def test_the_kernel_is_the_twin(triton_interpreter, dtype, tokens, in_order):
    from personatlas.steering.hooks.kernels import apply_table_on_gpu

    slots = None if in_order else torch.randperm(12, generator=torch.Generator().manual_seed(3))
    h, given = batch(tokens, slots=slots)
    h, table = h.to(dtype), build_tables(PLANS).at(0)
    twin, kernel = (Account.empty(1, 12, h.device) for _ in range(2))
    for _ in range(2):  # the second adds to the first
        expected, done = apply_plainly(h, table, given)
        accumulate(twin, slots, [(0, done)])
        found, own = apply_table_on_gpu(h, table, given, kernel.at(0))
        assert (own is None) == (tokens == 1)
        if own is not None:
            accumulate(kernel, slots, [(0, own)])
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    left = done.length == 0
    assert torch.equal(found[left], h[left])
    for one, other in zip(twin.columns, kernel.columns, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_plans_that_share_a_vector_share_its_row_and_keep_their_order():
    add = Add((0,), VECTORS[:1], torch.tensor([1.0]))
    assert len(build_tables([[CAP], [replace(CAP, floor=torch.tensor([0.0]))], [add]]).at(0).vectors) == 1
    twice = build_tables([[CAP, Ablate((0,), VECTORS[1:2]), add]]).at(0)
    assert torch.equal(twice.vectors, VECTORS[[0, 1, 0]])
    parts = replace(CAP, prompt_floor=torch.tensor([2.0]))  # another floor for prompts is one vector still
    shared = build_tables([[parts]]).at(0)
    assert len(shared.vectors) == 1
    assert shared.bounds[0, :, 0, 0].tolist() == pytest.approx([2.0, 0.4, 2.0, 0.4])


def test_rows_with_different_floors_are_capped_as_each_alone():
    model = tiny_model()
    axis = axis_of(model)
    mild, firm = (axis.quantile_cap((0, 1), level) for level in (0.25, 0.75))
    ids = pad([ROWS[0]] * 3, model.device)

    def logits(*plans, rows):
        with steer(model, *plans) as held, torch.no_grad():
            held.begin(torch.tensor(rows))
            return model.hf(input_ids=ids[: len(rows)], use_cache=False).logits, held.tally

    together, tally = logits([mild], [firm], rows=[0, 1, -1])
    for row, plan in ((0, mild), (1, firm)):
        alone, own = logits([plan], rows=[0])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)
        assert tally.fired[:, row].tolist() == own.fired[:, 0].tolist()
    assert tally.fired[:, 0].sum() < tally.fired[:, 1].sum()
    assert tally.seen[:, 2].tolist() == [0, 0]


def in_a_compiled_forward(device):
    script = Path(__file__).parents[2] / "support" / "compiled.py"
    done = subprocess.run([sys.executable, str(script), device], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_compiled_forward_is_steered_and_one_compiled_before_is_found_out():
    said = in_a_compiled_forward("cpu")
    assert "steered, compiled once, changed in place" in said
    assert "found out: the hooks of layers [0, 1] did not fire" in said


def test_plans_of_another_form_cannot_be_set():
    model = tiny_model()
    cap = axis_of(model).quantile_cap((0, 1), 0.5)
    with steer(model, [cap]) as held:
        for plans in ([[cap], [cap]], [[axis_of(model).quantile_cap((0,), 0.5)]], [[cap, cap]]):
            with pytest.raises(ValueError, match="cannot replace"):
                held.set(*plans)
        with pytest.raises(ValueError, match="plan 1 is not one of the 1"):
            held.begin(torch.tensor([0, 1]))


def test_a_plans_digest_names_what_it_does():
    assert interventions_digest([CAP]) == interventions_digest([replace(CAP, level=0.3, population="x")])
    assert interventions_digest([CAP]) != interventions_digest([replace(CAP, floor=torch.tensor([0.5]))])
    assert interventions_digest([CAP]) != interventions_digest([replace(CAP, phase="answer")])
