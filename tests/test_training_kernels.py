"""The kernels of training against their twins in plain torch: by Triton's interpreter here, on a GPU in test_gpt.py."""

import pytest
import torch

from personaxis.training.gate import gated
from personaxis.training.heads import heads_of, normed, rotated, rotation, turn_of
from personaxis.training.shape import Shape

pytestmark = pytest.mark.usefixtures("triton_interpreter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_and_its_gradient_are_the_twins(monkeypatch, dtype):
    from personaxis.training import kernels

    monkeypatch.setattr(kernels, "GATE_BLOCK", (16, 1))  # several blocks a token, the last one not full
    generator = torch.Generator().manual_seed(0)
    both = (torch.randn(2, 3, 72, generator=generator) * 4).to(dtype).requires_grad_()
    y = gated(both)
    to_y = torch.randn(2, 3, 36, generator=generator).to(dtype)
    (expected,) = torch.autograd.grad(y, both, to_y)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(kernels.gated_on_gpu(both.detach()), y.detach(), **near)
    torch.testing.assert_close(kernels.ungated_on_gpu(both.detach(), to_y), expected, **near)


@pytest.mark.parametrize(("rows", "tokens"), [(2, 12), (1, 7)])
def test_turned_heads_and_all_their_gradients_are_the_twins(rows, tokens):
    from personaxis.training.kernels import turned_on_gpu, unturned_on_gpu

    heads, kv_heads, width, eps = 4, 2, 16, 1e-6
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(rows, tokens, (heads + 2 * kv_heads) * width, generator=generator, requires_grad=True)
    gains = (1 + torch.randn(2, width, generator=generator) / 3).requires_grad_()
    shape = Shape(97, 1, 64, heads, kv_heads, width, 64, 32)
    turn = turn_of(rotation(shape), tokens)
    q, k, v = heads_of(qkv, gains[0], gains[1], eps, turn, heads)
    turned = turned_on_gpu(qkv.detach(), gains.detach(), turn, heads, kv_heads, eps)
    torch.testing.assert_close(turned.transpose(1, 2), torch.cat([q, k], dim=1))

    # gradients come as attention leaves them: laid out by head here, by token there
    to_q, to_k = (torch.randn(x.shape, generator=generator) for x in (q, k))
    to_v = torch.randn(rows, tokens, kv_heads, width, generator=generator).transpose(1, 2)
    expected = torch.autograd.grad([q, k, v], [qkv, gains], [to_q, to_k, to_v])
    found = unturned_on_gpu(qkv.detach(), gains.detach(), turn, to_q, to_k, to_v, eps)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_turned_head_keeps_its_length_and_its_angle_to_a_head_as_far_away():
    shape = Shape(97, 1, 64, 4, 2, 16, 64, 32)
    turn = turn_of(rotation(shape), 32)
    x = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(2)).expand(1, 32, 2, 16)
    x = normed(x, torch.ones(16), 1e-6)
    y = rotated(x, turn)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    near = (y[:, 3:, 0] * y[:, :-3, 1]).sum(-1)  # three apart, wherever
    torch.testing.assert_close(near, near[:, :1].expand_as(near), rtol=1e-4, atol=1e-4)
