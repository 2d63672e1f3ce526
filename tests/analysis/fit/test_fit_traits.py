"""Traits along a planted axis, and one axis beside another."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from personatlas.analysis.fit.comparison import compare_axes
from personatlas.analysis.fit.result import AxisComparison
from personatlas.analysis.fit.tables import comparison_text
from personatlas.analysis.fit.traits import fit_traits
from personatlas.persona.artifacts import write_json
from personatlas.persona.axis import Axis, load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.pipeline.activations import Activations, cell_sums
from personatlas.persona.roles.traits import load_traits

D, L, EACH = 24, 3, 30
MODEL = {"id": "m", "weights": "float32", "fingerprint": "abc", "n_layers": L, "d_model": D}
UNIT = torch.nn.functional.normalize(torch.arange(1.0, D + 1), dim=0)


def axis(layers=range(L), layer=1, **more):
    rows = UNIT.repeat(len(layers), 1)
    return Axis(rows, torch.ones(len(layers)), tuple(layers), layer, {**MODEL, **more})


def planted(along: dict[str, float], kept=(0, 1, 2), seed=0):
    """Answers of both poles of traits whose vectors have the given cosine with the axis and length 10, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    names, rows = [], []
    for name, cosine in along.items():
        other = torch.randn(D, generator=generator)
        other = torch.nn.functional.normalize(other - (other @ UNIT) * UNIT, dim=0)
        half = 5 * (cosine * UNIT + (1 - cosine**2) ** 0.5 * other)
        for sign in (1, -1):
            names += [("+" if sign > 0 else "-") + name] * EACH
            rows.append(3 + sign * half + torch.randn(EACH, D, generator=generator))
    means = torch.cat(rows)[:, None].repeat(1, L, 1)
    cells, count, mean, square = cell_sums([(name, None) for name in names], means)
    keys = tuple(f"{name}/0/q{i % EACH}/0" for i, name in enumerate(names))
    held = means[:, list(kept)]
    return Activations(
        cells, count, mean, square, keys, (None,) * len(keys), tuple(kept), held, MODEL, "content"
    )


PLACES = {"up": 0.9, "across": 0.0, "down": -0.7, "askew": 0.4}


def test_planted_traits_are_found_at_their_places_with_intervals_that_hold_them():
    found = fit_traits(planted(PLACES), axis())
    rows = {row.trait: row for row in found.result.traits}
    assert [row.trait for row in found.result.traits] == ["down", "across", "askew", "up"]
    for name, place in PLACES.items():
        assert rows[name].cosine == pytest.approx(place, abs=0.1)
        assert rows[name].low < rows[name].cosine < rows[name].high
        assert rows[name].low - 0.1 < place < rows[name].high + 0.1
        assert rows[name].n == (EACH, EACH)
    assert abs(rows["across"].cosine) < 2 * found.result.chance
    assert 0 < found.result.chance < 0.3 < rows["up"].cosine


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rows = [
        row
        for seed in range(60)
        for row in fit_traits(planted(PLACES, kept=(1,), seed=seed), axis(), replicates=2).result.traits
    ]
    covered = [row.low <= PLACES[row.trait] <= row.high for row in rows]
    assert 0.92 <= np.mean(covered) <= 0.98
    raw = [row.along / row.norm for row in rows if row.trait == "up"]  # noise in the norm makes it too small
    corrected = [row.cosine for row in rows if row.trait == "up"]
    assert abs(np.mean(corrected) - 0.9) < abs(np.mean(raw) - 0.9)


def test_trait_vectors_are_positive_minus_negative_means_as_unit_rows():
    activations = planted(PLACES)
    space = fit_traits(activations, axis(), replicates=0).space
    x = activations.rollout_means[:, 1].double().numpy()
    own = np.array([key.split("/")[0] for key in activations.keys])
    by_hand = x[own == "+up"].mean(0) - x[own == "-up"].mean(0)
    place = space.traits.index("up")
    assert np.allclose(space.vectors[place, 1].numpy() * float(space.norms[place, 1]), by_hand, atol=1e-4)
    assert torch.allclose(space.vectors.norm(dim=-1), torch.ones(4, L), atol=1e-5)
    assert (space.components @ UNIT)[0] > 0


def test_without_rollout_means_at_the_layer_there_are_places_and_no_intervals():
    result = fit_traits(planted(PLACES, kept=(0,)), axis()).result
    assert result.chance is None
    assert not any(row.low or row.high for row in result.traits)
    assert "low" not in result.to_json()["traits"][0]
    assert result.traits[-1].cosine == pytest.approx(0.9, abs=0.1)


def test_a_trait_space_is_read_as_it_was_written(tmp_path):
    space = fit_traits(planted(PLACES), axis(), replicates=0).space
    space.save(tmp_path / "traits")
    back = load_traits(tmp_path / "traits")
    assert back.traits == space.traits
    assert torch.equal(back.vectors, space.vectors)
    with pytest.raises(UserError, match="is of kind 'traits', not 'axis'"):
        load_axis(tmp_path / "traits")


def scored(activations, scores):
    """The same rollouts, carrying scores: whether each shows its own side."""
    names = [key.split("/")[0] for key in activations.keys]
    cells, count, mean, square = cell_sums(list(zip(names, scores, strict=True)), activations.rollout_means)
    return replace(activations, cells=cells, count=count, mean=mean, square=square, scores=tuple(scores))


def test_answers_that_do_not_show_their_side_are_dropped_where_they_were_judged():
    whole = planted(PLACES)
    kept = [i % 3 > 0 for i in range(len(whole.keys))]
    found = fit_traits(scored(whole, [int(own) for own in kept]), axis(), replicates=20).result
    assert found.judged is True
    assert (found.other_side, found.unjudged) == (kept.count(False), 0)
    assert {row.n for row in found.traits} == {(20, 20)}
    x = whole.rollout_means[:, 1].double()
    up = [
        torch.stack(
            [x[i] for i, key in enumerate(whole.keys) if kept[i] and key.startswith(sign + "up")]
        ).mean(0)
        for sign in "+-"
    ]
    by_hand = float(torch.nn.functional.cosine_similarity(up[0] - up[1], UNIT.double(), dim=0))
    row = next(row for row in found.traits if row.trait == "up")
    assert row.along / row.norm == pytest.approx(by_hand, abs=1e-5)


def test_a_trait_without_answers_at_a_pole_is_left_out_and_named():
    whole = planted({**PLACES, "mute": 0.5})
    scores = [0 if key.startswith("-mute") else 1 for key in whole.keys]
    found = fit_traits(scored(whole, scores), axis(), replicates=0)
    assert found.result.left_out == ("mute",)
    assert found.space.traits == tuple(PLACES)


def test_too_few_traits_are_said():
    with pytest.raises(UserError, match="only 2 traits have answers at both poles; a trait space needs 3"):
        fit_traits(planted({"a": 0.5, "b": 0.1}), axis())


def test_an_axis_is_compared_with_another_layer_by_layer_and_by_the_rank_of_roles(tmp_path):
    turned = torch.nn.functional.normalize(UNIT + 0.5 * UNIT.roll(3), dim=0)
    other = Axis(turned.repeat(2, 1), torch.ones(2), (1, 2), 1, MODEL)
    other.save(tmp_path / "axis")
    theirs = [
        {"role": name, "projection": place}
        for name, place in (("a", 1.0), ("b", 5.0), ("c", 3.0), ("d", 0.0))
    ]
    write_json(tmp_path / "fit.json", {"roles": theirs})
    found = compare_axes(axis(), {"a": 10.0, "b": 50.0, "c": 30.0, "e": 2.0}, tmp_path)
    assert found.cosines == {
        "1": pytest.approx(float(UNIT @ turned)),
        "2": pytest.approx(float(UNIT @ turned)),
    }
    assert (found.roles.n, found.roles.value) == (3, pytest.approx(1.0))
    assert found.same_model is True
    assert found.projections == {"a": (10.0, 1.0), "b": (50.0, 5.0), "c": (30.0, 3.0)}
    assert [change for _, change in found.moved] == pytest.approx([0, 0, 0])
    moved = compare_axes(axis(), {"a": 50.0, "b": 10.0, "c": 30.0}, tmp_path)
    assert dict(moved.moved) == pytest.approx({"a": 6**0.5, "b": -(6**0.5), "c": 0.0}, abs=1e-9)
    assert comparison_text(moved, 1).endswith(
        "over 3 roles; farthest moved, in standard deviations of these roles: a +2.4, b -2.4, c +0.0"
    )
    assert AxisComparison.from_json(json.loads(json.dumps(moved.to_json()))) == moved
    named = compare_axes(axis(), {}, tmp_path / "axis.safetensors")
    assert (named.cosines, named.roles) == (found.cosines, None)
    with pytest.raises(UserError, match=r"no axis at .*nothing"):
        compare_axes(axis(), {}, tmp_path / "nothing")


def test_axes_of_another_width_have_no_cosines(tmp_path):
    other = {**MODEL, "d_model": 4, "fingerprint": "x"}
    Axis(torch.eye(4)[:L], torch.ones(L), (0, 1, 2), 1, other).save(tmp_path / "axis")
    found = compare_axes(axis(), {}, tmp_path / "axis")
    assert (found.cosines, found.same_model, found.roles) == (None, False, None)
    assert comparison_text(found, 1).endswith(
        "another model (m): another width or depth, and no roles in common"
    )
