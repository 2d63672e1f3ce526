"""Muon, AdamW and the buffers that ranks share."""

import numpy as np
import pytest
import torch

from personatlas.persona.distributed import World
from personatlas.training.model.config import Shape
from personatlas.training.model.gpt import GPT
from personatlas.training.optim.muon import FlatBuffer, Optimizer, adam_step, muon_step, polar
from personatlas.training.optim.schedule import Rates

SHAPE = Shape(vocabulary=97, depth=3, width=32, heads=4, kv_heads=2, head_width=8, inner=48, context=64)
RATES = Rates(matrix=0.02, embedding=0.05, head=0.005, norm=0.005, decay=0.1, momentum=0.9, adam_beta2=0.99)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(3, 40, 100), (3, 100, 40), (2, 64, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_polar_factor_has_singular_values_near_one_and_the_directions_of_its_matrix(shape, dtype):
    x = drawn(*shape)
    found = polar(x.to(dtype)).double()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.8
    assert values.max() < 1.2
    u, _, v = np.linalg.svd(x.double().numpy(), full_matrices=False)
    exact = torch.from_numpy(u @ v)
    cosine = (found * exact).sum() / (found.norm() * exact.norm())
    assert cosine > 0.99


def test_a_matrix_of_zeros_stays_so():
    assert polar(torch.zeros(2, 8, 4)).abs().max() == 0


def stepped(rows, columns, gradients, decay=0.0, values=None):
    values = torch.zeros(1, rows, columns) if values is None else values.clone()
    momentum, mean_squares = torch.zeros(1, rows, columns), torch.zeros(1, max(rows, columns))
    for gradient in gradients:
        numbers = (torch.tensor(x) for x in (0.1, decay, 0.9))
        muon_step(values, gradient, momentum, mean_squares, *numbers, torch.float32)
    return values


@pytest.mark.parametrize(("rows", "columns"), [(24, 8), (8, 24), (16, 16)])
def test_a_step_of_muon_goes_down_the_gradient_with_the_norm_of_an_orthogonal_matrix(rows, columns):
    gradient = drawn(1, rows, columns)
    step = -stepped(rows, columns, [gradient])
    assert (step * gradient).sum() > 0
    wanted = 0.1 * max(1, rows / columns) ** 0.5 * min(rows, columns) ** 0.5
    assert step.norm().item() == pytest.approx(wanted, rel=0.1)


def test_the_rows_of_a_tall_step_are_evened_out():
    """An orthogonal 32 x 8 matrix has columns of norm 1, but rows of any."""
    gradient = drawn(1, 32, 8)
    gradient[0, :4] *= 50
    rows = stepped(32, 8, [gradient])[0].norm(dim=1)
    plain = polar(gradient)[0].norm(dim=1)
    assert rows.max() / rows.min() < 1.01
    assert plain.max() / plain.min() > 3


def test_decay_pulls_only_where_the_step_goes_that_way_too():
    gradient, values = drawn(1, 6, 6), drawn(1, 6, 6, seed=1)
    free, held = stepped(6, 6, [gradient], 0.0, values), stepped(6, 6, [gradient], 0.5, values)
    step, moved = values - free, (free - held).abs() > 1e-7
    assert torch.equal(moved, step * values > 0)
    assert moved.any()
    assert not moved.all()


def test_adam_is_that_of_torch():
    values = drawn(50)
    theirs = torch.nn.Parameter(values.clone())
    reference = torch.optim.Adam([theirs], lr=0.03, betas=(0.8, 0.99), eps=1e-10)
    first, adam_beta2 = torch.zeros(50), torch.zeros(50)
    for number in range(1, 6):
        gradient = drawn(50, seed=number)
        theirs.grad = gradient.clone()
        reference.step()
        numbers = (torch.tensor(x) for x in (0.03, 0.99, float(number)))
        adam_step(values, gradient, first, adam_beta2, *numbers)
    torch.testing.assert_close(values, theirs.detach(), rtol=1e-5, atol=1e-6)


def trained(steps, model=None, optimizer=None, start=0):
    model = model or GPT(SHAPE).initialise(0)
    optimizer = optimizer or Optimizer(model, World())
    losses = []
    for number in range(start, start + steps):
        ids = torch.randint(97, (8, 21), generator=torch.Generator().manual_seed(number % 4))
        loss = model(ids[:, :-1], ids[:, 1:]) / 160
        loss.backward()
        optimizer.step(RATES)
        losses.append(loss.item())
    return model, optimizer, losses


def test_both_together_learn_and_gradients_start_from_zero_after_a_step():
    _, optimizer, losses = trained(40)
    assert losses[-1] < losses[0] - 1
    assert all(buffer.gradients.abs().max() == 0 for buffer in optimizer.buffers())


def test_every_parameter_is_in_one_buffer_and_stays_the_model_s():
    model = GPT(SHAPE).initialise(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, World())
    names = [name for buffer in optimizer.buffers() for name in buffer.parameters]
    assert sorted(names) == sorted(before)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for buffer in optimizer.buffers():
        buffer.values.zero_()
    assert all(p.abs().max() == 0 for p in model.parameters())


def test_matrices_of_one_shape_are_stepped_at_once():
    optimizer = Optimizer(GPT(SHAPE).initialise(0), World())
    # q and o are 32 x 32, k and v 16 x 32, gate and up 48 x 32, down 32 x 48
    assert sorted(len(buffer.parameters) for buffer in optimizer.matrices) == [3, 6, 6, 6]


def test_a_state_that_was_saved_goes_on_as_if_it_had_not_been():
    straight, _, _ = trained(6)
    model, optimizer, _ = trained(3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = optimizer.state()
    other = GPT(SHAPE).initialise(9)
    again = Optimizer(other, World())
    other.load_state_dict(weights)
    again.load(state)
    trained(3, other, again, start=3)
    for one, two in zip(straight.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_state_is_shared_out_anew_over_another_number_of_ranks():
    """Seven matrices over three ranks: three, three, and one with two of zeros."""
    parameters = {f"m{i}": torch.nn.Parameter(drawn(4, 2, seed=i)) for i in range(7)}
    state = {f"m{i}": drawn(1, 4, 2, seed=10 + i) for i in range(7)}
    parts = []
    for rank in range(3):
        buffer = FlatBuffer(
            {n: torch.nn.Parameter(p.detach().clone()) for n, p in parameters.items()}, 8, World(rank, 3)
        )
        mine = torch.ones(3, 4, 2)
        buffer.scatter_state(state, mine)
        parts.append(mine)
        assert buffer.my_values.shape == (24,)
    whole = torch.cat(parts)
    assert torch.equal(whole[:7], torch.cat([state[f"m{i}"] for i in range(7)]))
    assert whole[7:].abs().max() == 0
