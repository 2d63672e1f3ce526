"""Products in 8 bits."""

import pytest
import torch
import torch.nn.functional as F

from personatlas.training.model.config import Shape
from personatlas.training.model.fp8 import fp8_product
from personatlas.training.model.gpt import GPT


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def off(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_product_and_its_gradients_are_those_of_bf16_within_what_8_bits_round(size):
    x, w, g = drawn(4, 32, 64) * size, drawn(48, 64, seed=1).float(), drawn(4, 32, 48, seed=2) * size
    results = []
    for product in (lambda x, w: F.linear(x, w.to(x.dtype)), fp8_product):
        one, two = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = product(one, two)
        y.backward(g)
        assert y.dtype == one.grad.dtype == torch.bfloat16
        assert two.grad.dtype == torch.float32
        results.append((y.detach(), one.grad, two.grad))
    for name, wanted, found in zip(("y", "x", "w"), *results, strict=True):
        assert 0 < off(found, wanted) < (0.05 if name == "y" else 0.1), name


def test_sizes_that_8_bits_do_not_take_are_multiplied_as_they_are():
    x, w = drawn(5, 20), drawn(12, 20, seed=1)
    assert torch.equal(fp8_product(x, w), F.linear(x, w))


def test_a_model_in_8_bits_has_nearly_the_loss_of_one_in_bf16_and_a_head_that_is_not_rounded():
    shape = Shape(vocabulary=97, depth=2, width=64, heads=4, kv_heads=2, head_width=16, inner=96, context=64)
    ids = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(0))
    found = []
    for fp8 in (False, True):
        model = GPT(shape, compute=torch.bfloat16, fp8=fp8).initialise(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        assert not model.lm_head.fp8
        loss = model(ids[:, :-1], ids[:, 1:]) / 64
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        found.append(loss.item())
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.02)
