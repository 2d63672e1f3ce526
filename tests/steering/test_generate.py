"""Answers with and without a cap: the proof before them, the traces after them, and the verb."""

import json
import math

import pytest
import torch
from families import save_tiny, tiny_model
from tiny_axis import axis_of

from personatlas.cli.app import main
from personatlas.persona.caps import format_layers, parse_layers
from personatlas.persona.errors import UserError
from personatlas.persona.models.load import load_model
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.generate import generate, sparkline
from personatlas.steering.hooks.binding_check import check_binding, require_binding
from personatlas.steering.hooks.steering import steer
from personatlas.steering.hooks.step import apply_table

MESSAGES = [{"role": "system", "content": "You are a nun."}, {"role": "user", "content": "Who are you?"}]
SAMPLING = Sampling(max_new_tokens=12)


def answered(model, interventions, axis, sampling=SAMPLING, **how):
    return generate(model, MESSAGES, steer=interventions, axis=axis, sampling=sampling, **how)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon", "mixtral"])
def test_the_proof_passes_where_steering_binds(family):
    model = tiny_model(family)
    axis = axis_of(model)
    for acts in ([axis.quantile_cap((0, 1), 0.75)], [axis.add(4.0, (0,), "answer"), axis.ablate((0, 1))]):
        assert [proof.name for proof in check_binding(model, acts) if not proof.passed] == []
        require_binding(model, acts)
    assert not any(block._forward_hooks for block in model.blocks)


def test_a_block_whose_hooks_are_gone_around_is_found_out(monkeypatch):
    """As compiled and graph-captured engines do: fluent text, and not one token steered."""
    model = tiny_model()
    cap = axis_of(model).quantile_cap((0,), 0.75)
    with monkeypatch.context() as patch:
        patch.setattr(
            type(model.blocks[0]), "__call__", lambda self, *given, **how: self.forward(*given, **how)
        )
        with pytest.raises(
            UserError, match=r"does not bind on tiny-llama-0.*the hooks of layers \[0\] did not fire"
        ):
            require_binding(model, [cap])
    require_binding(model, [cap])


def test_a_step_that_does_half_of_its_work_fails_the_proof(monkeypatch):
    model = tiny_model()
    cap = axis_of(model).quantile_cap((0, 1), 0.75)

    def half(h, *given):
        moved, done = apply_table(h, *given)
        return h + (moved - h) / 2, done

    monkeypatch.setattr("personatlas.steering.hooks.steering.apply_table", half)
    with pytest.raises(UserError, match="steering does not bind on tiny-llama-0, so nothing was generated"):
        require_binding(model, [cap])


def test_without_interventions_the_answer_is_the_samplers_own():
    model = tiny_model()
    axis = axis_of(model)
    plain = answered(model, [], axis, seed=3)
    add_nothing = answered(model, [axis.add(0.0, (0,))], axis, seed=3)
    assert plain.trace.ids == add_nothing.trace.ids
    assert float(plain.trace.corrections.sum()) == 0.0
    assert answered(model, [], axis, seed=4).trace.ids != plain.trace.ids


@pytest.mark.parametrize("decoder", ["cached", "plain"])
@pytest.mark.parametrize("phase", ["prompt", "answer", "both"])
def test_a_steered_answer_is_that_of_reading_everything_again(monkeypatch, decoder, phase):
    """Greedy decoding against the likeliest token of one forward over all that came before, steered alike."""
    model = tiny_model()
    axis = axis_of(model)
    acts = [axis.add(3.0, (0, 1), phase)]
    if decoder == "plain":
        monkeypatch.setattr("personatlas.persona.sampling.sampler.decoding_error", lambda *_: float("inf"))
    greedy = Sampling(max_new_tokens=8, temperature=0.0)
    found = answered(model, acts, axis, greedy).trace
    for end in range(found.answer_from, len(found.ids)):
        ids = torch.tensor([found.ids[:end]])
        with steer(model, acts) as held, torch.no_grad():
            held.describe(answer_from=torch.tensor([found.answer_from]))
            assert int(model.hf(input_ids=ids, use_cache=False).logits[0, -1].argmax()) == found.ids[end]


def test_the_plain_decoder_is_steered_too(monkeypatch):
    model = tiny_model()
    axis = axis_of(model)
    cached = answered(model, [axis.quantile_cap((0, 1), 0.75)], axis, seed=5)
    monkeypatch.setattr("personatlas.persona.sampling.sampler.decoding_error", lambda *_: float("inf"))
    plain = answered(model, [axis.quantile_cap((0, 1), 0.75)], axis, seed=5)
    assert plain.trace.ids == cached.trace.ids


def test_the_trace_holds_projections_before_the_step_and_what_the_step_did():
    model = tiny_model()
    axis = axis_of(model)
    cap = axis.quantile_cap((axis.layer,), 0.75)
    found = answered(model, [cap], axis, seed=1).trace
    floor = float(cap.floor[0])
    assert len(found.projection) == len(found.ids) == found.corrections.shape[1]
    expected = (floor - found.projection).clamp(min=0)
    expected[0] = 0  # the first token is spared
    torch.testing.assert_close(found.corrections[0], expected, rtol=1e-3, atol=1e-4)
    assert found.fired_layers.tolist() == (expected > 0).int().tolist()


def test_a_conversation_that_leaves_no_room_for_an_answer_is_refused():
    model = tiny_model()
    long = [{"role": "user", "content": "x" * 500}]
    with pytest.raises(
        UserError, match=r"5\d\d tokens to read and 12 to write are more than the 512 that tiny-llama-0"
    ):
        generate(model, long, axis=axis_of(model), sampling=SAMPLING)


def test_a_sparkline_shows_means_between_its_bounds():
    assert sparkline([float(i) for i in range(8)], 0.0, 8.0) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, 0.0, 10.0, 10.0], 0.0, 10.0, width=2) == "▁█"
    assert sparkline([-5.0, 50.0], 0.0, 10.0) == "▁█"
    assert sparkline([], 0.0, 1.0) == ""
    assert sparkline([3.0, 3.0], 3.0, 3.0) == "▁▁"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a cap file, or LEVEL@LAYERS"),
        ("p50", "a cap file, or LEVEL"),
        ("p50@", "a cap file, or LEVEL"),
        ("q50@1", "a level is written as p50"),
        ("p50@1,1", "names no layer, or one twice"),
        ("p50@2-1", "run backwards: write 1-2"),
        ("p50@0-9", "layer 3 is not in this axis"),
        ("p33@0", "level 0.33 is not kept"),
        ("p150@0", "level 1.5 is outside 0..1"),
    ],
)
def test_a_cap_that_cannot_be_is_refused_in_one_line(text, said):
    with pytest.raises(UserError, match=said):
        axis_of(tiny_model()).cap(text)


def test_layers_are_told_in_words_and_read_from_them():
    assert format_layers((23, 18, 19, 20)) == "18-20, 23"
    assert parse_layers("18-20,23") == [18, 19, 20, 23]


def test_a_cap_is_named_by_level_layers_and_population_or_by_its_file(tmp_path):
    axis = axis_of(tiny_model())
    cap = axis.cap("roles:p25@0,2")
    assert (cap.layers, cap.level, cap.population) == ((0, 2), 0.25, "roles")
    assert torch.equal(cap.floor, axis.role_quantiles[[0, 2], 0])
    assert axis.cap("p75@0-1").layers == (0, 1)
    cap.save(tmp_path / "mine")
    for path in (tmp_path / "mine", tmp_path / "mine.safetensors"):
        assert torch.equal(axis.cap(str(path)).vectors, cap.vectors)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    save_tiny(folder / "tiny")
    axis_of(load_model(str(folder / "tiny"), dtype="float32")).save(folder / "axis")
    return folder


def test_the_verb_prints_both_answers_and_their_traces(place, capsys):
    told = [
        "generate",
        str(place / "tiny"),
        "Who are you?",
        "--axis",
        str(place / "axis"),
        "--arm",
        "cap:p75@0-2",
    ]
    told += ["--dtype", "float32", "--max-new-tokens", "8"]
    main(told)
    shown = capsys.readouterr().out
    assert "baseline" in shown
    assert "p75@0-2 changed" in shown
    assert "floor at layer" in shown
    main([*told, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"baseline", "p75@0-2"}
    for arm in found.values():
        assert len(arm["projection"]) == len(arm["ids"])
        assert all(math.isfinite(value) for value in arm["projection"])
    assert found["baseline"]["corrections"] == []
    assert sum(map(sum, found["p75@0-2"]["corrections"])) > 0
    assert found["p75@0-2"]["account"]["fired"] == [
        sum(c > 0 for c in row[:-1]) for row in found["p75@0-2"]["corrections"]
    ]


def test_an_axis_of_another_model_is_refused_by_the_verb(place, tmp_path, capsys):
    save_tiny(tmp_path / "other", seed=1)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(
            [
                "generate",
                str(tmp_path / "other"),
                "Who?",
                "--axis",
                str(place / "axis"),
                "--arm",
                "cap:p75@0",
                "--dtype",
                "float32",
            ]
        )
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "this axis came from" in error


@pytest.mark.parametrize(("place", "said"), [("", "this is a folder"), ("none/x.html", "does not exist")])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, capsys, place, said):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(tmp_path), "Hello", "--axis", "none", "--html", str(tmp_path / place)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_neighbour_has_its_floors_by_interquartile_ranges_higher(tmp_path):
    axis = axis_of(tiny_model())
    cap, higher, lower = (axis.cap(f"p50@0-2{end}") for end in ("", "+0.5", "-0.5"))
    quartiles = [axis.default_quantiles[:, axis.levels.index(level)] for level in (0.25, 0.75)]
    assert torch.allclose(higher.floor - cap.floor, (quartiles[1] - quartiles[0])[:3] / 2)
    assert torch.allclose(cap.floor - lower.floor, higher.floor - cap.floor)
    with pytest.raises(UserError, match="'nothing' is not"):
        axis.cap("nothing+0.5")
