"""The GPT and its loss in pieces against plain references."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_gpt import SHAPE, ids_of, lively

from personatlas.training.model import cross_entropy as loss
from personatlas.training.model.config import Shape
from personatlas.training.model.cross_entropy import linear_cross_entropy
from personatlas.training.model.gpt import GPT, apply_rotary, rms_norm, rotary_table, rotary_values


def test_a_fresh_model_knows_nothing_and_all_its_blocks_are_the_identity():
    model, ids = GPT(SHAPE).initialise(3), ids_of(2, 20)
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, output: seen.append(output))
    loss = model(ids[:, :-1], ids[:, 1:]) / 38
    assert loss.item() == pytest.approx(math.log(97), abs=0.02)
    assert all(torch.equal(h, model.embed_tokens(ids[:, :-1])) for h in seen)


def test_the_first_step_reaches_the_matrices_that_write_to_the_residual():
    model, ids = GPT(SHAPE).initialise(3), ids_of(2, 20)
    model(ids[:, :-1], ids[:, 1:]).backward()
    for layer in model.layers:
        assert layer.self_attn.o_proj.weight.grad.norm() > 0
        assert layer.mlp.down_proj.weight.grad.norm() > 0


def test_a_fresh_model_learns_to_copy_what_came_ten_tokens_before():
    """Attention has to find it: what a token says about the next is nothing."""
    model, generator = GPT(SHAPE).initialise(0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(100):
        ids = torch.randint(97, (16, 10), generator=generator).repeat(1, 3)
        targets = ids[:, 1:].clone()
        targets[:, :10] = -100
        loss = model(ids[:, :-1], targets) / (targets >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (
        loss.item() < 4.2 < math.log(97)
    )  # 3.8 with two seeds; without attention no model gets below the logarithm


def test_a_seed_gives_one_model_whatever_was_drawn_before():
    first = GPT(SHAPE).initialise(5).state_dict()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = GPT(SHAPE).initialise(5).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = GPT(SHAPE).initialise(6).state_dict()
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def test_the_residual_after_a_block_is_what_came_in_plus_attention_plus_mlp():
    model, parts, into = lively(), {}, []
    layer = model.layers[1]
    layer.register_forward_hook(lambda _m, args, output: into.extend([args[0], output]))
    layer.self_attn.register_forward_hook(lambda _m, _i, output: parts.update(attention=output))
    layer.mlp.register_forward_hook(lambda _m, _i, output: parts.update(mlp=output))
    model(ids_of(2, 9))
    torch.testing.assert_close(into[1], into[0] + parts["attention"] + parts["mlp"])


def test_counted_parameters_are_the_parameters():
    model = GPT(SHAPE)
    assert sum(p.numel() for p in model.parameters()) == SHAPE.parameters
    matrices = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    assert matrices == SHAPE.matrix_parameters


def test_a_later_token_changes_no_earlier_logit():
    model, ids = lively(), ids_of(1, 12)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 97
    torch.testing.assert_close(model(ids)[:, :-1], model(other)[:, :-1], rtol=0, atol=0)


def test_packed_documents_read_as_they_do_alone():
    model = lively()
    one, two = ids_of(1, 11, seed=2), ids_of(1, 17, seed=3)
    packed = torch.cat([one, two], dim=1)
    documents = torch.tensor([[0] * 11 + [1] * 17])
    together = model(packed, documents=documents)
    torch.testing.assert_close(together[:, :11], model(one), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[:, 11:], model(two), rtol=1e-4, atol=1e-4)
    assert (model(packed)[:, 11:] - model(two)).abs().max() > 0.1  # the mask is what kept them apart


def test_documents_of_one_row_do_not_leak_into_gradients_of_another():
    model, ids = lively(), ids_of(1, 20)
    documents = torch.tensor([[4] * 10 + [2] * 10])
    held = model.embed_tokens(ids).detach().requires_grad_()
    model.embed_tokens.register_forward_hook(lambda *_: held)
    targets = torch.cat([torch.full((1, 10), -100), ids[:, 10:]], dim=1)
    model(ids, targets, documents=documents).backward()
    assert held.grad[0, :10].abs().max() == 0
    assert held.grad[0, 10:].abs().max() > 0


def test_checkpointing_changes_no_gradient():
    plain, kept, ids = lively(), lively(checkpointing=True), ids_of(2, 15)
    for model in (plain, kept):
        model(ids[:, :-1], ids[:, 1:]).backward()
    for one, two in zip(plain.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_a_turned_head_keeps_its_length_and_its_angle_to_a_head_as_far_away():
    shape = Shape(97, 1, 64, 4, 2, 16, 64, 32)
    turn = rotary_values(rotary_table(shape), 32)
    x = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(2)).expand(1, 32, 2, 16)
    x = rms_norm(x, torch.ones(16), 1e-6)
    y = apply_rotary(x, turn)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    near = (y[:, 3:, 0] * y[:, :-3, 1]).sum(-1)  # three apart, wherever
    torch.testing.assert_close(near, near[:, :1].expand_as(near), rtol=1e-4, atol=1e-4)


def in_one_graph(device):
    script = Path(__file__).parents[2] / "support" / "compiled_gpt.py"
    done = subprocess.run([sys.executable, str(script), device], capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_whole_step_is_one_graph_for_the_compiler():
    """Traced only, not compiled: what breaks the graph would cost speed on a GPU without a word."""
    assert "one graph, the same gradients" in in_one_graph("cpu")


def test_masters_stay_fp32_while_products_are_bf16():
    model, ids = lively(compute=torch.bfloat16), ids_of(2, 15)
    dtypes = []
    model.layers[0].register_forward_hook(lambda _m, _i, output: dtypes.append(output.dtype))
    loss, logits = model(ids[:, :-1], ids[:, 1:]), model(ids)
    loss.backward()
    assert dtypes == [torch.bfloat16] * 2
    assert loss.dtype == logits.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert loss.item() == pytest.approx(lively()(ids[:, :-1], ids[:, 1:]).item(), rel=0.02)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="65 tokens do not fit into a context of 64"):
        GPT(SHAPE).initialise(0)(ids_of(1, 65))


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="4 heads cannot share 3"):
        Shape(97, 1, 32, 4, 3, 8, 48, 64)
    with pytest.raises(ValueError, match="width 7"):
        Shape(97, 1, 28, 4, 2, 7, 48, 64)


def test_sampling_is_greedy_at_zero_and_follows_its_generator_otherwise():
    model, ids = lively(), ids_of(2, 5)
    longer = model.generate(ids, 3)
    assert longer.shape == (2, 8)
    assert torch.equal(longer[:, 5], model(ids)[:, -1].argmax(-1))
    drawn = [model.generate(ids, 6, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def loss_inputs(tokens=23, width=7, words=31):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(words, width, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(words, (tokens,), generator=generator)
    targets[[3, 11]] = -100
    return hidden, head, targets


@pytest.mark.parametrize("piece", [1, 5, 23, 100])
def test_the_loss_in_pieces_and_its_gradients_are_plain_cross_entropy(piece):
    hidden, head, targets = loss_inputs()
    plain = F.cross_entropy(hidden @ head.T, targets, reduction="sum") * 0.37
    wanted = torch.autograd.grad(plain, (hidden, head))
    ours = linear_cross_entropy(hidden, head, targets, piece=piece) * 0.37
    found = torch.autograd.grad(ours, (hidden, head))
    assert (ours - plain).abs().item() < 1e-9
    for one, two in zip(found, wanted, strict=True):
        assert (one - two).abs().max() < 1e-9


def test_weights_count_tokens_as_often_as_they_say():
    hidden, head, targets = loss_inputs()
    weights = torch.rand(23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    each = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    ours = linear_cross_entropy(hidden, head, targets, weights, piece=6)
    torch.testing.assert_close(ours, (each * weights).sum())
    torch.testing.assert_close(
        torch.autograd.grad(ours, head)[0], torch.autograd.grad((each * weights).sum(), head)[0]
    )


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient():
    hidden, head, targets = loss_inputs()
    loss = linear_cross_entropy(hidden, head, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == head.grad.abs().max() == 0


def test_large_logits_stay_finite():
    hidden, head, targets = loss_inputs()
    loss = linear_cross_entropy(hidden * 1e4, head, targets, piece=8)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden, head)))


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    """An evaluation multiplied twice: for the logits, and for the gradient of a head that asks for one as a parameter does."""
    hidden, head, targets = loss_inputs()
    products = []
    monkeypatch.setattr(loss, "_product", lambda a, b: products.append(1) or (a @ b).float())
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, head, targets).requires_grad
    assert len(products) == 1
    monkeypatch.undo()
    linear_cross_entropy(hidden.detach(), head, targets).backward()
    assert hidden.grad is None
    assert head.grad is not None


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
def test_on_a_gpu_logits_are_not_rounded_to_bf16():
    hidden, head, targets = (
        x.detach().float().cuda() if x.is_floating_point() else x.cuda() for x in loss_inputs()
    )
    hidden, head = hidden.bfloat16().requires_grad_(), head.bfloat16().float().requires_grad_()
    ours = linear_cross_entropy(hidden, head, targets, piece=8)
    plain = F.cross_entropy(hidden.float() @ head.T, targets, reduction="sum")
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    found, wanted = torch.autograd.grad(ours, (hidden, head)), torch.autograd.grad(plain, (hidden, head))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=0.02, atol=0.02)


@needs_gpu
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # torch 2.11's compiler looks at that of any tensor
def test_on_a_gpu_packed_documents_read_as_they_do_on_a_cpu():
    shape = Shape(vocabulary=97, depth=2, width=64, heads=4, kv_heads=2, head_width=16, inner=96, context=256)
    model = lively(shape)
    ids = ids_of(2, 256)
    documents = (torch.arange(256) // torch.tensor([[50], [90]])).contiguous()
    here = model(ids, documents=documents)
    there = model.cuda()(ids.cuda(), documents=documents.cuda()).cpu()
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-2)


@needs_gpu
def test_on_a_gpu_the_step_compiles_into_one_graph():
    assert "one graph, the same gradients" in in_one_graph("cuda")
