"""Steering binds: projections after it, what it leaves alone, what it counts, on every family, and the model
as it was.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from families import FAMILIES, tiny_hf, tiny_model
from reference import apply_cap
from tiny_axis import LENGTHS, ROWS, axis_of, outputs, real
from torch.nn.functional import normalize

from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Ablate, Add, Cap, MeanAblate, apply_steps, steps_by_layer
from personatlas.persona.models.load import build_model
from personatlas.persona.runs import packaged_axis_folder
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Prompt, Sampling, pad
from personatlas.steering.hooks.steering import steer


def cap_of(axis, *quantile):
    """A cap of every token, a sequence's first one too."""
    return axis.quantile_cap(*quantile, spare_first=False)


def logits(model, rows=ROWS):
    with torch.no_grad():
        return model.hf(input_ids=pad(rows, model.device), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tokens_projection_is_below_the_floor_after_a_cap(family):
    model = tiny_model(family)
    axis = axis_of(model)
    cap = cap_of(axis, range(model.n_layers), 0.5)
    before = outputs(model)
    with steer(model, [cap]) as held:
        held.describe(lengths=LENGTHS)
        after = outputs(model)
    assert 0 < held.tally.share < 1
    for row, h in enumerate(after):
        places = (h @ cap.vectors[row])[real(h)]
        spread = (before[row] @ cap.vectors[row])[real(h)].std()
        assert (places >= cap.floor[row] - 1e-3 * spread).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_one_is_steered_as_a_batch_of_many(family):
    model = tiny_model(family)
    cap = cap_of(axis_of(model), range(model.n_layers), 0.75)
    with steer(model, [cap]) as held:
        held.describe(lengths=LENGTHS)
        together = logits(model)
        tally = held.tally
        for row, ids in enumerate(ROWS):
            held.begin()
            alone = logits(model, [ids])
            torch.testing.assert_close(alone[0], together[row, : len(ids)], rtol=1e-3, atol=1e-3)
            assert held.tally.seen.tolist() == tally.seen[:, row : row + 1].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "falcon"])
def test_with_a_cache_the_answer_is_that_without_one(family):
    model = tiny_model(family)
    cap = cap_of(axis_of(model), (0, 1), 0.75)
    ids = torch.tensor([ROWS[1]])
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with steer(model, [cap]) as held:
        found = [
            model.hf.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use, **how)
            for use in (True, False)
        ]
        assert held.tally.share > 0
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_floor_of_minus_infinity_changes_no_bit(dtype):
    model = tiny_model()
    model.hf.to(dtype)
    expected = logits(model)
    idle = cap_of(axis_of(tiny_model()), (0, 1), 0.5)
    idle = replace(idle, floor=torch.full((2,), -torch.inf), model={})
    with steer(model, [idle]) as held:
        assert torch.equal(logits(model), expected)
        assert int(held.tally.fired.sum()) == 0
        assert int(held.tally.seen.sum()) == 2 * 4 * 14


def test_the_model_is_left_as_it_was_found_also_after_an_exception():
    model = tiny_model()
    before = logits(model)
    with pytest.raises(ZeroDivisionError), steer(model, [cap_of(axis_of(model), (0,), 0.75)]):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)
    assert not any(block._forward_hooks for block in model.blocks)
    assert not model.base._forward_hooks


def test_the_step_is_that_of_the_reference_and_of_float64():
    h = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    vectors = normalize(torch.randn(2, 24, generator=torch.Generator().manual_seed(2)), dim=1)
    everything, nothing = torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, 5, dtype=torch.bool)
    cap = Cap((0, 1), vectors, torch.tensor([0.3, -0.2]), ceiling=torch.tensor([0.8, 0.1]))
    for row in (0, 1):
        found, _ = apply_steps(h, steps_by_layer([cap])[row], nothing, everything)
        torch.testing.assert_close(found, apply_cap(h, cap, row))
    v, x = vectors[0].double().numpy(), h.double().numpy()
    for act, aimed in (
        (Ablate((0,), vectors[:1]), lambda p: 0 * p),
        (MeanAblate((0,), vectors[:1], torch.tensor([1.5])), lambda p: 0 * p + 1.5),
        (Add((0,), vectors[:1], torch.tensor([-2.0])), lambda p: p - 2),
    ):
        p = x @ v
        by_hand = x + (aimed(p) - p)[..., None] * v
        found, length = apply_steps(h, steps_by_layer([act])[0], nothing, everything)
        np.testing.assert_allclose(found.double().numpy(), by_hand, atol=1e-5)
        np.testing.assert_allclose(length.double().numpy(), np.abs(aimed(p) - p), atol=1e-5)


def test_interventions_compose_in_the_order_given():
    h = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
    v = normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    everything, nothing = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool)
    add, ablate = Add((0,), v, torch.tensor([3.0])), Ablate((0,), v)
    for acts, place in (([add, ablate], 0.0), ([ablate, add], 3.0)):
        found, _ = apply_steps(h, steps_by_layer(acts)[0], nothing, everything)
        torch.testing.assert_close(found @ v[0], torch.full((1, 4), place), rtol=0, atol=1e-5)


def test_rows_that_are_left_alone_and_padding_are_bitwise_what_they_were():
    model = tiny_model()
    plain, chosen = outputs(model), torch.tensor([True, False, True, False])
    add = axis_of(model).add(5.0, (0,), spare_first=False)
    with steer(model, [add]) as held:
        held.begin(torch.where(chosen, 0, -1))
        held.describe(lengths=LENGTHS)
        moved = outputs(model)
        tally = held.tally
    assert torch.equal(moved[0][~chosen], plain[0][~chosen])
    assert torch.equal(moved[0][~real(moved[0])], plain[0][~real(plain[0])])
    assert tally.fired.tolist() == [[9, 0, 6, 0]] == tally.seen.tolist()
    assert tally.total[0].tolist() == pytest.approx([45, 0, 30, 0], rel=1e-4)
    assert tally.largest[0].tolist() == pytest.approx([5, 0, 5, 0], rel=1e-4)


@pytest.mark.parametrize(
    ("phase", "steered_tokens"),
    [("prompt", [4, 6, 2, 5]), ("answer", [5, 8, 4, 6]), ("both", [9, 14, 6, 11])],
)
def test_a_phase_takes_its_own_tokens(phase, steered_tokens):
    model, starts = tiny_model(), torch.tensor([4, 6, 2, 5])
    with steer(model, [axis_of(model).add(1.0, (1,), phase, spare_first=False)]) as held:
        held.describe(lengths=LENGTHS, answer_from=starts)
        outputs(model)
        assert held.tally.fired.tolist() == [steered_tokens]
        assert held.tally.seen.tolist() == [steered_tokens]


def test_a_hook_that_does_not_fire_cannot_be_missed():
    model = tiny_model()
    with steer(model, [cap_of(axis_of(model), (0, 1), 0.5)]) as held:
        with pytest.raises(RuntimeError, match=r"layers \[0, 1\] did not fire"):
            _ = held.tally
        logits(model)
        forward, model.blocks[1].forward = (
            model.blocks[1].forward,
            None,
        )  # a block that something else takes over
        try:
            hooks = model.blocks[1]._forward_hooks
            taken = list(hooks.items())
            hooks.clear()
            model.blocks[1].forward = forward
            logits(model)
            hooks.update(taken)
        finally:
            model.blocks[1].__dict__.pop("forward", None)
        with pytest.raises(RuntimeError, match=r"layers \[1\] did not fire"):
            _ = held.tally


def test_another_batch_size_without_begin_is_refused():
    model = tiny_model()
    with steer(model, [cap_of(axis_of(model), (0,), 0.5)]) as held:
        logits(model)
        with pytest.raises(ValueError, match="1 rows in a batch that began with 4"):
            logits(model, ROWS[:1])
        held.begin()
        logits(model, ROWS[:1])


def test_a_sampler_that_is_built_inside_proves_itself_unsteered_and_steers_its_answers():
    """Its three-row proof met "3 rows in a batch that began with 4" before."""
    model = tiny_model()
    cap = axis_of(model).quantile_cap((0, 1), 0.75)
    prompts, sampling = [Prompt(row, seed=n) for n, row in enumerate(ROWS[:3])], Sampling(max_new_tokens=6)
    with steer(model, [cap]) as steering:
        before = fastest_sampler(model, frozenset(), sampling)
        expected = {own.index: own for own in before.answers(prompts, steering.callback)}
    with steer(model, [cap]) as steering:
        logits(model)
        counts = steering.tally
        sampler = fastest_sampler(model, frozenset(), sampling)
        torch.testing.assert_close(steering.tally.seen, counts.seen)  # the proof was not counted
        assert {own.index: own for own in sampler.answers(prompts, steering.callback)} == expected
        assert steering.callback.tally.seen.tolist() == [[len(row) + 6 - 2 for row in ROWS[:3]]] * 2
        assert steering.callback.tally.share > 0
        steering.begin()
        logits(model)
        assert steering.fired == counts.share


def test_what_does_not_fit_the_model_is_refused_in_one_line():
    model = tiny_model()
    axis = axis_of(model)
    cap = cap_of(axis, (0,), 0.5)
    for wrong, said in (
        (lambda: cap_of(axis, (9,), 0.5), "layer 9 is not in this axis"),
        (lambda: cap_of(axis, (0,), 1.5), "level 1.5 is outside 0..1"),
        (lambda: cap_of(axis, (0,), 0.3), "level 0.3 is not kept in this axis"),
        (lambda: cap_of(axis, (0,), 0.5, "pooled"), "population 'pooled' is not one of default, roles"),
        (lambda: cap_of(axis, (), 0.5), "needs at least one layer"),
        (lambda: enter(model, [replace(cap, layers=(7,), model={})]), "layer 7 is not in tiny-llama-0"),
        (lambda: enter(model, [Ablate((0,), torch.eye(5)[:1])]), "is 5 wide and tiny-llama-0 is"),
        (lambda: enter(tiny_model(seed=1), [cap]), "came from tiny-llama-0"),
        (lambda: enter(model, []), "nothing to steer with"),
    ):
        with pytest.raises(UserError, match=said):
            wrong()
    with pytest.raises(ValueError, match="NaN"):
        replace(cap, floor=torch.tensor([torch.nan]))
    two = cap_of(axis_of(model), (0, 1), 0.5)
    with pytest.raises(ValueError, match="named twice"):
        replace(two, layers=(1, 1))
    with steer(model, [cap], [two]), pytest.raises(ValueError, match="which of the 2 plans"):
        model.hf(input_ids=torch.ones(2, 3, dtype=torch.long))


def enter(model, interventions):
    with steer(model, interventions):
        pass


def test_the_packaged_axis_gives_a_cap_with_its_model_level_and_population():
    from personatlas.persona.axis import load_axis

    cap = cap_of(load_axis(packaged_axis_folder("smollm2-135m") / "axis"), range(18, 24), 0.5)
    assert (cap.level, cap.population, cap.phase) == (0.5, "default", "both")
    assert cap.model["id"] == "smollm2-135m"
    assert torch.isfinite(cap.floor).all()


def test_blocks_whose_weights_are_elsewhere_until_they_are_used_are_steered_alike(tmp_path):
    decoder, model = tiny_model(), tiny_hf("llama")
    cap = cap_of(axis_of(decoder), (0, 1, 2), 0.75)
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
    places = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    spread = build_model(model, decoder.tokenizer, id=decoder.id)
    assert {next(block.parameters()).device.type for block in spread.blocks} == {"cpu", "meta"}
    found = []
    for one in (decoder, spread):
        with steer(one, [cap]) as held, torch.no_grad():
            held.begin(torch.zeros(len(ROWS), dtype=torch.long))
            found.append((one.hf(input_ids=pad(ROWS, one.device), use_cache=False).logits, held.tally.fired))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].any()


@pytest.mark.parametrize("described", [True, False])
def test_the_first_token_of_a_sequence_is_spared_unless_told_otherwise(described):
    model = tiny_model()
    axis = axis_of(model)
    high = replace(axis.quantile_cap((0, 1), 0.75), floor=torch.full((2,), 1e3))
    before = outputs(model)
    for cap in (high, replace(high, spare_first=False)):
        with steer(model, [cap]) as held:
            if described:
                held.describe(lengths=LENGTHS)
            after = outputs(model)
        assert torch.equal(after[0][:, 0], before[0][:, 0]) == cap.spare_first
        assert (after[0][:, 1:] != before[0][:, 1:]).any(-1)[real(before[0])[:, 1:]].all()
        tokens = LENGTHS if described else torch.full_like(LENGTHS, after[0].shape[1])
        assert held.tally.seen[0].tolist() == (tokens - int(cap.spare_first)).tolist()
    with steer(model, [high]) as held, torch.no_grad():
        held.begin(torch.zeros(len(ROWS), dtype=torch.long))
        held.describe(opening=False)  # these tokens go on after others
        model.base(input_ids=pad(ROWS, model.device), use_cache=False)
    assert held.tally.fired[0].tolist() == [max(map(len, ROWS))] * len(ROWS)
