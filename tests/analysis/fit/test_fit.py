"""Fitting: identities, scikit-learn and numpy as oracles, and coverage of what is claimed about uncertainty."""

import json

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from personatlas.analysis.fit.axis import LEVELS, fit_axis
from personatlas.analysis.fit.geometry import (
    Groups,
    components,
    components_for,
    cosine,
    direction,
    first_component,
)
from personatlas.analysis.fit.uncertainty import (
    learning_curve,
    pc1_agreement,
    random_ranks,
    resampled_weights,
    shuffled_null,
    split_half,
    split_questions,
    split_roles,
)
from personatlas.persona.errors import UserError
from personatlas.persona.pipeline.activations import (
    Activations,
    cell_sums,
    join_activations,
    kept_layers,
    load_activations,
)

MODEL = {
    "id": "made-up",
    "fingerprint": "0",
    "weights": "float32",
    "d_model": 24,
    "n_layers": 3,
    "revision": None,
}


def planted(n_roles=20, per_role=12, d=24, signal=3.0, seed=0):
    """Rollout means with a planted axis: the default at +signal, roles spread below along one direction, plus noise."""
    g = np.random.default_rng(seed)
    v = g.normal(size=d)
    v /= np.linalg.norm(v)
    names = ("default", *(f"role{i:02d}" for i in range(n_roles)))
    places = np.concatenate([[signal], g.uniform(-signal, signal * 0.8, n_roles)])
    index = np.repeat(np.arange(n_roles + 1), per_role)
    x = places[index, None] * v + g.normal(size=(len(index), d)) + 5
    return x, Groups(index, names), v


def as_activations(x, groups, scores=None, n_layers=3):
    scores = scores or [None] * len(x)
    names = [groups.names[place] for place in groups.index]
    keys = [f"{name}/0/q{i:03d}/0" for i, name in enumerate(names)]
    means = torch.tensor(x).float()[:, None].repeat(1, n_layers, 1)
    cells, count, mean, square = cell_sums(list(zip(names, scores, strict=True)), means)
    layers = tuple(range(n_layers))
    return Activations(
        cells, count, mean, square, tuple(keys), tuple(scores), layers, means, MODEL, "content"
    )


def fitted(x, groups, **how):
    activations = as_activations(x, groups)
    return fit_axis(activations, activations.keys, scores=None, default="default", replicates=30, **how)


def test_the_axis_is_the_default_mean_minus_the_mean_of_role_means():
    x, groups, _ = planted()
    fit = fitted(x, groups)
    by_hand = x[groups.index == 0].mean(0) - np.mean(
        [x[groups.index == r].mean(0) for r in range(1, 21)], axis=0
    )
    assert np.allclose(fit.axis.vectors[1].numpy() * float(fit.axis.norms[1]), by_hand, atol=1e-4)
    assert torch.allclose(fit.axis.vectors.norm(dim=1), torch.ones(3), atol=1e-5)


def test_roles_weigh_the_same_whatever_their_number_of_rollouts():
    x, groups, _ = planted(n_roles=4)
    twice = np.concatenate([x, x[groups.index == 2]])
    index = np.concatenate([groups.index, np.full((groups.index == 2).sum(), 2)])
    again = Groups(index, groups.names)
    assert np.allclose(direction(again.means(twice)[0]), direction(groups.means(x)[0]))


def test_a_planted_axis_is_found_and_points_to_the_default():
    x, groups, v = planted()
    fit = fitted(x, groups)
    assert cosine(fit.axis.vectors[0].double().numpy(), v) > 0.85
    assert fit.result.roles[-1].projection >= fit.result.positive_role.projection - 3
    assert float(fit.space.coordinates[0, 0]) > 0  # the default on the positive side of PC1


def test_components_equal_those_of_scikit_learn_up_to_sign():
    x, groups, _ = planted()
    means, _ = groups.means(x)
    _, vectors, ratio = components(means[1:])
    oracle = PCA(svd_solver="full").fit(means[1:])
    assert np.allclose(np.abs((vectors[:5] * oracle.components_[:5]).sum(1)), 1)
    assert np.allclose(ratio[:5], oracle.explained_variance_ratio_[:5])
    pc1, variance = first_component(means)
    assert abs(cosine(pc1, vectors[0])) == pytest.approx(1)
    assert variance == pytest.approx(ratio[0])


def test_weights_of_roles_act_as_repeated_roles():
    x, groups, _ = planted(n_roles=5)
    means, _ = groups.means(x)
    repeated = means[[0, 1, 1, 2, 4, 4, 5]]
    weight = np.array([2.0, 1, 0, 2, 1])
    assert np.allclose(direction(means, weight), direction(repeated))
    assert cosine(first_component(means, weight)[0], first_component(repeated)[0]) == pytest.approx(1)


def test_more_rollouts_give_halves_that_agree_better():
    few, many = (planted(per_role=n, signal=2.0) for n in (4, 60))
    low = split_half(*few[:2], np.random.default_rng(0), 40)
    high = split_half(*many[:2], np.random.default_rng(0), 40)
    assert low.value < high.value
    assert high.value > 0.8
    assert low.low <= low.value <= low.high


def test_without_signal_the_null_is_not_rejected_and_with_signal_it_is():
    g = np.random.default_rng(3)
    _, groups, _ = planted()
    noise = shuffled_null(g.normal(size=(len(groups.index), 24)), groups, np.random.default_rng(1), 60)
    assert noise.p_norm > 0.02
    x, groups, _ = planted()
    assert shuffled_null(x, groups, np.random.default_rng(1), 60).p_norm == pytest.approx(1 / 61)


def test_agreement_has_an_interval_around_the_estimate_over_roles_and_rollouts():
    x, groups, _ = planted()
    found = pc1_agreement(x, groups, np.random.default_rng(0), 60)
    assert 0.8 < found.by_roles.value <= 1
    assert found.by_roles.low <= found.by_roles.value
    assert found.by_questions.high <= 1
    assert 0 < found.angle_resampled < 30


def test_splitting_roles_uses_each_rollout_of_the_default_once():
    x, groups, _ = planted()
    assert split_roles(x, groups, np.random.default_rng(0), 20).value > 0.7


def test_the_axis_of_another_character_has_its_own_poles():
    x, groups, _ = planted()
    fit = fitted(x, groups, positive="role03")
    assert fit.axis.poles == ("role03", "others")
    assert "default" in [role.role for role in fit.result.roles]
    with pytest.raises(UserError, match="'nobody' has no kept rollout"):
        fitted(x, groups, positive="nobody")


def test_quantiles_are_those_of_rollout_projections():
    x, groups, _ = planted()
    fit = fitted(x, groups)
    projections = x[groups.index == 0] @ fit.axis.vectors[0].double().numpy()
    assert np.allclose(fit.axis.default_quantiles[0].numpy(), np.quantile(projections, LEVELS), atol=1e-3)


def test_a_layer_that_is_not_there_and_too_few_roles_are_refused():
    x, groups, _ = planted()
    with pytest.raises(UserError, match=r"layer 9 is not in this model \(0\.\.2\)"):
        fitted(x, groups, layer=9)
    x, groups, _ = planted(n_roles=2)
    with pytest.raises(UserError, match="at least 3"):
        fitted(x, groups)


def test_scores_choose_the_cells_that_make_a_role():
    x, groups, _ = planted(n_roles=5)
    scores = [None if group == 0 else int(i % 2) * 3 for i, group in enumerate(groups.index)]
    activations = as_activations(x, groups, scores)
    kept = [k for k, s in zip(activations.keys, scores, strict=True) if s in (None, 3)]
    fit = fit_axis(activations, kept, scores=frozenset({3}), default="default", replicates=0)
    role = x[(groups.index == 1) & (np.array([s == 3 for s in scores]))].mean(0)
    assert np.allclose(activations.role_mean("role00", {3})[0][0].numpy(), role, atol=1e-4)
    assert fit.result.n_rollouts == len(kept)


def test_sums_do_not_depend_on_order_and_parts_join(tmp_path):
    x, groups, _ = planted(n_roles=4)
    whole = as_activations(x, groups)
    assert torch.allclose(whole.mean[1, 0], torch.tensor(x[groups.index == 1].mean(0)).float(), atol=1e-5)
    spread = ((x[groups.index == 1] - x[groups.index == 1].mean(0)) ** 2).sum(0)
    assert torch.allclose(whole.square[1, 0], torch.tensor(spread).float(), rtol=1e-4)
    parts = [
        as_activations(x[groups.index == r], Groups(np.zeros((groups.index == r).sum(), int), (name,)))
        for r, name in enumerate(groups.names)
    ]
    assert torch.equal(join_activations(parts).mean, whole.mean)
    whole.save(tmp_path / "activations")
    again = load_activations(tmp_path / "activations")
    assert again.cells == whole.cells
    assert torch.equal(again.rollout_means, whole.rollout_means)


def test_kept_layers_are_all_or_an_even_spread_within_the_budget():
    assert kept_layers(30, 576, 100) == tuple(range(30))
    some = kept_layers(64, 5120, 300_000)
    assert len(some) == 1
    assert 24 < some[0] < 40
    assert len(kept_layers(32, 1000, 1000, budget=8 * 1000 * 1000 * 4)) == 8


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1), (0.8, 2), (0.81, 3), (1.0, 3)])
def test_components_for_a_share_of_variance(share, expected):
    assert components_for(np.array([0.5, 0.3, 0.2]), share) == expected


def test_the_learning_curve_rises_and_says_how_many_answers_are_needed():
    x, groups, _ = planted(n_roles=20, per_role=32, signal=3)
    curve = learning_curve(x, groups, np.random.default_rng(0))
    values = [found.value for found in curve.cosines]
    assert curve.answers == (1, 2, 4, 8, 16)  # half of 2, 4, ... 32 answers
    assert values == sorted(values)
    assert curve.needed is not None
    n, r = curve.answers[-1], values[-1]
    k = r / (1 - r) / n  # Spearman and Brown, by hand
    assert curve.needed == pytest.approx(0.9 / 0.1 / k)
    at_half = split_half(x, groups, np.random.default_rng(1), 50)
    assert values[-1] == pytest.approx(at_half.value, abs=0.05)


def test_a_curve_of_one_answer_a_role_says_nothing():
    x, groups, _ = planted(n_roles=5, per_role=1)
    curve = learning_curve(x, groups, np.random.default_rng(0))
    assert (curve.answers, curve.needed) == ((), None)


def test_layers_on_all_cores_give_the_very_numbers_of_one(monkeypatch):
    x, groups, _ = planted()
    alone = fitted(x, groups).result.layers
    monkeypatch.setattr("personatlas.analysis.fit.axis.PARALLEL_FROM", 0)
    assert fitted(x, groups).result.layers == alone


def with_questions(question_effect, n_roles=30, n_questions=12, prompts=5, d=24, seed=0):
    """A run's design: every role answers the same questions under every prompt; questions move all roles alike."""
    g = np.random.default_rng(seed)
    v = g.normal(size=d)
    v /= np.linalg.norm(v)
    effects = question_effect * g.normal(size=(n_questions, d))
    places = np.concatenate([[3.0], g.uniform(-3, 2, n_roles)])
    index, _, question = (
        part.ravel()
        for part in np.meshgrid(range(n_roles + 1), range(prompts), range(n_questions), indexing="ij")
    )
    x = places[index, None] * v + effects[question] + g.normal(size=(len(index), d))
    return x, Groups(index, tuple(map(str, range(n_roles + 1))), question)


def test_what_questions_do_to_every_role_alike_is_no_instability():
    """Halves that mixed questions anyhow found 0.7 where a second run of the same questions would agree to 0.95."""
    quiet, groups = with_questions(0.0)
    loud, _ = with_questions(4.0)
    plain = Groups(groups.index, groups.names)
    for measure in (split_half, split_roles):
        still = measure(quiet, groups, np.random.default_rng(0), 40).value
        assert measure(loud, groups, np.random.default_rng(0), 40).value == pytest.approx(still, abs=0.06)
    assert split_half(loud, plain, np.random.default_rng(0), 40).value < still - 0.1
    apart = split_questions(loud, groups, np.random.default_rng(0), 40)
    assert apart is not None
    assert apart.value > 0.85
    assert split_questions(loud, plain, np.random.default_rng(0), 40) is None


def test_halves_hold_half_of_every_roles_answers_to_each_question():
    _, groups = with_questions(0.0, prompts=4)
    place = random_ranks(groups, np.random.default_rng(3))
    for role in range(3):
        own = groups.index == role
        assert sorted(place[own]) == list(range(48))
        for question in range(12):
            assert (place[own & (groups.question == question)] % 2).sum() == 2


@pytest.mark.parametrize(
    ("n_roles", "prompts", "n_questions"), [(3, 1, 16), (3, 2, 3), (4, 1, 1), (5, 1, 2), (3, 5, 1)]
)
def test_the_smallest_runs_are_fitted_without_a_number_that_is_none(n_roles, prompts, n_questions):
    """A half without the pole or without another role gave NaN, and fit.json could not be written after all the work."""
    x, groups = with_questions(1.0, n_roles=n_roles, n_questions=n_questions, prompts=prompts)
    keys = [
        f"{'default' if i == 0 else f'r{i}'}/{n}/q{q}/0"
        for n, (i, q) in enumerate(zip(groups.index, groups.question, strict=True))
    ]
    means = torch.tensor(x).float()[:, None].repeat(1, 3, 1)
    cells, count, mean, square = cell_sums([(key.split("/")[0], None) for key in keys], means)
    activations = Activations(
        cells, count, mean, square, tuple(keys), (None,) * len(keys), (0, 1, 2), means, MODEL, "c"
    )
    for seed in range(5):
        report = fit_axis(activations, keys, scores=None, default="default", replicates=20, seed=seed).result
        json.dumps(report.to_json(), allow_nan=False)


def test_a_split_without_the_pole_on_either_side_is_not_counted():
    """One answer of the pole once gave an axis from nothing minus the roles, and cosines near 1."""
    x, groups = with_questions(1.0)
    keep = (groups.index > 0) | (np.cumsum(groups.index == 0) == 1)
    alone = groups.only(keep)
    assert (alone.index == 0).sum() == 1
    assert split_half(x[keep], alone, np.random.default_rng(0), 10) is None
    assert split_questions(x[keep], alone, np.random.default_rng(0), 10) is None
    assert learning_curve(x[keep], alone, np.random.default_rng(0), 10).answers == ()


def test_resampled_questions_are_the_same_for_every_role_and_count_as_often_as_they_were_drawn():
    x, groups = with_questions(2.0, n_roles=10)
    weight = resampled_weights(groups, np.random.default_rng(4))
    assert weight.sum() == len(x)
    for question in range(12):
        assert len(set(weight[groups.question == question])) == 1
    loud, quiet = (
        pc1_agreement(with_questions(size)[0], groups_of, np.random.default_rng(0), 40)
        for size, groups_of in ((4.0, with_questions(4.0)[1]), (0.0, with_questions(0.0)[1]))
    )
    assert loud.angle_resampled == pytest.approx(
        quiet.angle_resampled, abs=3
    )  # what moves all roles alike cancels
