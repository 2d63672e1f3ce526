"""Recording is exact: batched, padded span means equal float64 means over plain block outputs, on many families."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, tiny_model

from personatlas.persona.errors import UserError
from personatlas.persona.models.hooks import residual
from personatlas.persona.pipeline.record import record, record_spans, span_sum_plainly
from personatlas.persona.pipeline.self_test import run_self_test
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.sampler import pad
from personatlas.steering.teacher_forcing import reading_batches

LENGTHS = ((7, 5), (20, 11), (3, 1), (12, 30), (9, 2), (1, 4))


def made_up(lengths=LENGTHS, vocabulary=320):
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, (prompt, answer) in enumerate(lengths):
        ids = torch.randint(0, vocabulary, (prompt + answer,), generator=generator).tolist()
        found.append(Rollout(f"r/0/q{number}/0", (), tuple(ids[:prompt]), tuple(ids[prompt:]), "", 0, "end"))
    return found


def by_hand(model, rollout):
    """float64 means, one text at a time, from outputs that the model returns itself or a plain hook sees."""
    outputs = []
    handles = [b.register_forward_hook(lambda m, a, out: outputs.append(residual(out))) for b in model.blocks]
    with torch.no_grad():
        model.hf(input_ids=torch.tensor([rollout.prompt_ids + rollout.answer_ids], device=model.device))
    for handle in handles:
        handle.remove()
    return torch.stack([h[0, len(rollout.prompt_ids) :].double().mean(0) for h in outputs])


def recorded(model, rollouts, **how):
    found = torch.full((len(rollouts), model.n_layers, model.d_model), torch.nan)
    for indices, means in record(model, rollouts, **how):
        found[indices] = means
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_batched_padded_means_equal_a_float64_mean_one_text_at_a_time(family, tokens):
    model, rollouts = tiny_model(family), made_up()
    reference = torch.stack([by_hand(model, rollout) for rollout in rollouts])
    found = recorded(model, rollouts, tokens=tokens).double()
    assert ((found - reference).norm(dim=-1) / reference.norm(dim=-1)).max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_test_passes_on_every_family(family):
    failed = [check for check in run_self_test(tiny_model(family)) if not check.passed]
    assert not failed


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_layer_l_is_the_output_of_block_l_as_hidden_states_has_it_one_later(family):
    model, (rollout,) = tiny_model(family), made_up([(6, 9)])
    found = recorded(model, [rollout])[0]
    with torch.no_grad():
        states = model.base(
            input_ids=torch.tensor([rollout.prompt_ids + rollout.answer_ids]), output_hidden_states=True
        ).hidden_states
    for layer in range(model.n_layers - 1):
        assert torch.allclose(found[layer], states[layer + 1][0, 6:].mean(0), rtol=1e-4, atol=1e-5)
    # the last entry comes after the final norm: it must not be what was recorded
    assert not torch.allclose(found[-1], states[-1][0, 6:].mean(0), rtol=1e-2)


def test_span_sums_take_the_span_and_nothing_else():
    h = torch.arange(2 * 5 * 3, dtype=torch.float32).view(2, 5, 3)
    found = span_sum_plainly(h, torch.tensor([1, 3]), torch.tensor([3, 5]))
    assert torch.equal(found, torch.stack([h[0, 1:3].sum(0), h[1, 3:5].sum(0)]))


def test_half_precision_is_summed_in_fp32():
    h = torch.full((1, 4001, 2), 1.001).bfloat16()  # a bf16 sum would stop growing at 256
    found = span_sum_plainly(h, torch.tensor([1]), torch.tensor([4001]))
    assert torch.allclose(found, torch.full((1, 2), 4000.0), rtol=1e-3)


def test_only_means_leave_the_hooks_so_memory_does_not_grow_with_tokens():
    model, rollouts = tiny_model(), made_up()
    with record_spans(model) as means, torch.no_grad():
        ids = pad([r.prompt_ids + r.answer_ids for r in rollouts], model.device)
        means.begin(
            torch.tensor([len(r.prompt_ids) for r in rollouts]),
            torch.tensor([len(r.prompt_ids + r.answer_ids) for r in rollouts]),
        )
        model.base(input_ids=ids, use_cache=False)
        assert {tuple(total.shape) for total in means.sums.values()} == {(len(rollouts), model.d_model)}


def test_a_hook_that_did_not_fire_is_an_error_and_not_an_empty_mean():
    model = tiny_model()
    with record_spans(model) as means:
        means.begin(torch.tensor([1]), torch.tensor([2]))
        with pytest.raises(RuntimeError, match="did not fire"):
            means.read()


def test_position_zero_and_empty_spans_are_refused():
    with record_spans(tiny_model()) as means:
        with pytest.raises(ValueError, match="after position 0"):
            means.begin(torch.tensor([0]), torch.tensor([2]))
        with pytest.raises(ValueError, match="at least one token"):
            means.begin(torch.tensor([2]), torch.tensor([2]))


def test_the_model_is_left_as_it_was_found_also_after_an_exception():
    model = tiny_model()
    with pytest.raises(ZeroDivisionError), record_spans(model):
        raise ZeroDivisionError
    assert not any(block._forward_hooks for block in model.blocks)


def test_an_empty_answer_and_one_beyond_the_context_are_named():
    model = tiny_model()
    with pytest.raises(UserError, match=r"r/0/q0/0 has an empty answer"):
        recorded(model, made_up([(4, 0)]))
    with pytest.raises(UserError, match=r"r/0/q0/0 has 600 tokens; tiny-llama-0 holds 512"):
        recorded(model, made_up([(500, 100)]))


@pytest.mark.parametrize("place", ["prompt_ids", "answer_ids"])
def test_a_token_that_the_model_has_not_is_refused_with_its_rollout(place):
    model, (rollout,) = tiny_model(), made_up([(4, 4)])
    for id in (model.vocab_size, 2**31 - 1):
        foreign = replace(rollout, **{place: (1, 2, id, 3)})
        said = rf"rollout r/0/q0/0: token id {id} is not in the model's vocabulary of {model.vocab_size}"
        with pytest.raises(UserError, match=said):
            recorded(model, [foreign])
        with pytest.raises(UserError, match=said):
            list(reading_batches(model, [foreign]))


@pytest.mark.slow
def test_compiled_blocks_record_the_same():
    model, rollouts = tiny_model(), made_up()
    plain = recorded(model, rollouts)
    assert torch.allclose(recorded(model, rollouts, compile=True), plain, rtol=1e-4, atol=1e-5)
    assert not any("forward" in block.__dict__ for block in model.blocks)
