"""The kernels of training against their twins in plain torch at float64: by Triton's interpreter, or on a GPU where there is one."""

import os

import pytest
import torch

from personatlas.training.model.config import Shape
from personatlas.training.model.gpt import qk_norm_rotary, rotary_table, rotary_values, swiglu

# relative errors by norm; the interpreter cuts bf16 off where a GPU rounds
NEAR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def device():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return f"cuda:{torch.cuda.device_count() - 1}"  # of several, one that is not the current device
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("there is no GPU, and Triton does not interpret")
    return "cpu"


def near(found, exact, dtype):
    found, exact = found.detach().double().cpu(), exact.detach()
    assert (found - exact).norm() <= NEAR[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", NEAR)
def test_the_gate_and_its_gradient_are_the_twins(monkeypatch, device, dtype):
    from personatlas.training.model import kernels

    monkeypatch.setattr(kernels, "SWIGLU_BLOCK", (16, 1))  # several blocks a token, the last one not full
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(2, 3, 72, generator=generator) * 4).to(dtype)
    to_y = torch.randn(3, 2, 36, generator=generator).to(dtype).transpose(0, 1)  # not laid out as y is
    exact = gate_up.double().requires_grad_()
    y = swiglu(exact)
    (expected,) = torch.autograd.grad(y, exact, to_y.double())
    near(kernels.swiglu_on_gpu(gate_up.to(device)), y, dtype)
    near(kernels.swiglu_backward_on_gpu(gate_up.to(device), to_y.to(device)), expected, dtype)


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize(("rows", "tokens", "heads", "kv_heads", "width"), [
    (2, 12, 4, 2, 16), (1, 7, 3, 3, 64), (1, 1, 1, 1, 8), (2, 16, 6, 3, 128),
])  # fmt: skip
def test_turned_heads_and_all_their_gradients_are_the_twins(
    device, dtype, rows, tokens, heads, kv_heads, width
):
    from personatlas.training.model.kernels import qk_norm_rotary_backward_on_gpu, qk_norm_rotary_on_gpu

    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(rows, tokens, (heads + 2 * kv_heads) * width, generator=generator).to(dtype)
    weights = 1 + torch.randn(2, width, generator=generator) / 3
    rotary = rotary_values(rotary_table(Shape(97, 1, 64, heads, kv_heads, width, 64, 32)), tokens)
    exact, exact_weights = qkv.double().requires_grad_(), weights.double().requires_grad_()
    parts = qk_norm_rotary(exact, exact_weights[0], exact_weights[1], 1e-6, rotary.double(), heads)
    # gradients come as attention leaves them: laid out by head here, by token there
    to_q, to_k = (torch.randn(x.shape, generator=generator).to(dtype) for x in parts[:2])
    to_v = torch.randn(rows, tokens, kv_heads, width, generator=generator).to(dtype).transpose(1, 2)
    expected = torch.autograd.grad(parts, [exact, exact_weights], [x.double() for x in (to_q, to_k, to_v)])

    given = (qkv.to(device), weights.to(device), rotary.to(device))
    turned = qk_norm_rotary_on_gpu(*given, heads, kv_heads, 1e-6)
    near(turned.transpose(1, 2), torch.cat(parts[:2], dim=1), dtype)
    to_qkv, to_weights = qk_norm_rotary_backward_on_gpu(
        *given, *(x.to(device) for x in (to_q, to_k, to_v)), 1e-6
    )
    near(to_qkv, expected[0], dtype)
    near(to_weights, expected[1], dtype)


def test_what_a_compiler_is_told_of_the_kernels_is_what_they_give(device):
    """Strides too: of what is not contiguous they made something else than was said."""
    from personatlas.training.model import kernels

    turned = torch.randn(2, 3, 72, device=device).transpose(0, 1)
    for given in (torch.randn(2, 3, 72, device=device), turned):
        torch.library.opcheck(kernels.swiglu_on_gpu, (given,))
        torch.library.opcheck(
            kernels.swiglu_backward_on_gpu, (given, torch.randn(*given.shape[:2], 36, device=device))
        )
    rotary = rotary_values(rotary_table(Shape(97, 1, 64, 2, 1, 16, 64, 32)), 3).to(device)
    weights = torch.ones(2, 16, device=device)
    for qkv in (torch.randn(2, 3, 64, device=device), torch.randn(3, 2, 64, device=device).transpose(0, 1)):
        torch.library.opcheck(kernels.qk_norm_rotary_on_gpu, (qkv, weights, rotary, 2, 1, 1e-6))
        parts = [torch.randn(2, heads, 3, 16, device=device) for heads in (2, 1, 1)]
        torch.library.opcheck(kernels.qk_norm_rotary_backward_on_gpu, (qkv, weights, rotary, *parts, 1e-6))
