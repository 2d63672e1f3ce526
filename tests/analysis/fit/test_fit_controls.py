"""Where controls lie on an axis, and axes of one score alone."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from personatlas.analysis.fit.axis import fit_axis
from personatlas.analysis.fit.controls import place_controls
from personatlas.analysis.fit.geometry import Groups
from personatlas.persona.pipeline.activations import Activations, cell_sums

D, ROLES, QUESTIONS, PROMPTS, PLACE = 6, 12, 16, 5, 0.6
MODEL = {"id": "m", "fingerprint": "0", "weights": "float32", "d_model": D, "n_layers": 1, "revision": None}
AXIS = np.eye(D)[0]


def recorded(keys, x, scores=None):
    scores = scores or [None] * len(keys)
    means = torch.as_tensor(x)[:, None].float()
    cells, count, mean, square = cell_sums(
        [(key.split("/")[0], score) for key, score in zip(keys, scores, strict=True)], means
    )
    return Activations(cells, count, mean, square, tuple(keys), tuple(scores), (0,), means, MODEL, "")


class Draw(NamedTuple):
    keys: list
    projections: np.ndarray
    groups: Groups
    controls: Activations


def draw(g, gap=10.0):
    """A run whose questions move every answer, whose prompts differ, and whose control lies at PLACE."""
    question = g.normal(0, 4, QUESTIONS)
    names = ["default", *(f"role{i}" for i in range(ROLES))]
    keys, values = [], []
    for name in names:
        for prompt in range(PROMPTS if name == "default" else 1):
            effect = g.normal(0, 1)
            for q in range(QUESTIONS):
                keys.append(f"{name}/{prompt}/q{q:02d}/0")
                values.append((gap if name == "default" else 0) + effect + question[q] + g.normal(0, 3))
    own, places = [], []
    prompt_effects = g.normal(0, 1, PROMPTS)
    for q in range(QUESTIONS):
        own.append(f"=facts/{q % PROMPTS}/q{q:02d}/0")
        places.append(PLACE * gap + prompt_effects[q % PROMPTS] + question[q] + g.normal(0, 3))
    index = np.array([names.index(key.split("/")[0]) for key in keys])
    asked = np.array([int(key.split("/")[2][1:]) for key in keys])
    controls = recorded(own, np.outer(places, AXIS))
    return Draw(keys, np.array(values), Groups(index, tuple(names), asked), controls)


def placed(run):
    questions = [f"q{q:02d}" for q in range(QUESTIONS)]
    return place_controls(run.controls, 0, AXIS, run.projections, run.groups, questions)


def test_the_interval_of_a_place_holds_the_truth():
    g = np.random.default_rng(0)
    inside, centre = [], []
    for _ in range(600):
        (place,) = placed(draw(g))
        inside.append(place.place.low <= PLACE <= place.place.high)
        centre.append(place.place.value)
    assert np.mean(centre) == pytest.approx(PLACE, abs=0.02)
    assert 0.90 < np.mean(inside) < 0.985


def test_a_place_is_paired_by_the_questions_that_it_was_asked():
    run = draw(np.random.default_rng(1))
    only = [i for i, key in enumerate(run.controls.keys) if int(key.split("/")[2][1:]) < 4]
    some = recorded([run.controls.keys[i] for i in only], run.controls.rollout_means[only, 0])
    (place,) = placed(run._replace(controls=some))
    first = run.groups.question < 4
    pole = run.projections[first & (run.groups.index == 0)].mean()
    roles = run.projections[first & (run.groups.index > 0)].mean()
    assert place.projection == pytest.approx(some.rollout_means[:, 0, 0].mean().item(), rel=1e-6)
    assert place.place.value == pytest.approx((place.projection - roles) / (pole - roles), rel=1e-5)


def test_a_fit_places_controls_and_leaves_its_axis_as_it_is():
    run = draw(np.random.default_rng(2))
    noise = np.random.default_rng(3).normal(0, 1, (len(run.keys), D))
    activations = recorded(run.keys, np.outer(run.projections, AXIS) + noise)
    how = {"scores": None, "default": "default", "replicates": 0}
    plain = fit_axis(activations, run.keys, **how)
    found = fit_axis(activations, run.keys, controls=run.controls, **how)
    assert torch.equal(found.axis.vectors, plain.axis.vectors)
    assert plain.result.controls == ()
    assert [row.name for row in found.result.controls] == ["facts"]
    assert found.result.controls[0].place.value == pytest.approx(PLACE, abs=0.3)


def test_axes_of_one_score_are_those_of_its_answers_alone():
    g = np.random.default_rng(4)
    run = draw(g)
    x = np.outer(run.projections, AXIS) + g.normal(0, 0.1, (len(run.keys), D))
    roles = [key.split("/")[0] for key in run.keys]
    scores = [None if role == "default" else 1 + i % 2 for i, role in enumerate(roles)]
    apart = np.array([score == 2 for score in scores])
    x[apart] = x[apart] - 30 * np.eye(D)[1]  # those with score 2 lie elsewhere
    activations = recorded(run.keys, x, scores)
    fit = fit_axis(activations, run.keys, scores=None, default="default", replicates=0)
    first, second = fit.result.by_score
    assert (first.score, second.score) == (1, 2)
    assert first.n + second.n == sum(score is not None for score in scores)
    assert first.roles == second.roles == ROLES
    of_two = np.array([score == 2 for score in scores])
    means = [x[of_two & (np.array(roles) == f"role{i}")].mean(0) for i in range(ROLES)]
    own = x[np.array(roles) == "default"].mean(0) - np.mean(means, 0)
    whole = fit.axis.vectors[0].numpy()
    assert second.cosine == pytest.approx(own @ whole / np.linalg.norm(own), abs=1e-5)
