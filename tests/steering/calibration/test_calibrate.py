"""Calibration on a tiny run, from the verb to the cap: floors, costs, the search, the control, resuming, and
bad inputs.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import tiny_model
from sklearn.decomposition import PCA
from tiny_axis import axis_of

from personatlas.analysis.fit.axis import fit_axis
from personatlas.cli.app import main
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import load_cap
from personatlas.persona.pipeline.activations import Activations, cell_sums
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.sampler import Prompt, Sampler, Sampling
from personatlas.steering.calibration.calibrate import split_groups
from personatlas.steering.calibration.control_caps import control_axes, match_kl
from personatlas.steering.calibration.fit_floors import DescentOptions, Floors, fit_floors
from personatlas.steering.calibration.grid_search import Candidate, default_windows
from personatlas.steering.calibration.measure import Half, Measurements
from personatlas.steering.calibration.quantile_floors import read_projections
from personatlas.steering.calibration.result import FittedOn, fitted_on
from personatlas.steering.loss_cost import benign_costs
from personatlas.steering.random_caps import fired_shares, random_cap
from personatlas.steering.teacher_forcing import project_batches

SEARCH = {
    "--windows": "0-1,1-2", "--levels": "0.1,0.5", "--budget": "5", "--roles": "4", "--prompts": "1", "--answers": "6",
    "--steps": "2", "--max-new-tokens": "6", "--device": "cpu",
}  # fmt: skip


def texts(count=6, start=0):
    """Made-up conversations of uneven lengths."""
    made = []
    for i in range(start, start + count):
        prompt = tuple((k * 37 + i * 11 + 5) % 300 + 3 for k in range(5 + i % 4))
        answer = tuple((k * 53 + i * 29 + 7) % 300 + 3 for k in range(4 + i % 5))
        made.append(Rollout(f"default/0/q{i}/0", (), prompt, answer, "x", i, "length"))
    return made


def by_length(text):
    """Stands for the rules: what random models say claims nothing."""
    return ("assistant", "human", "mystical", "unclear")[len(text) % 4]


@pytest.fixture(autouse=True)
def classes(monkeypatch):
    monkeypatch.setattr("personatlas.steering.identity.identity_class", by_length)
    monkeypatch.setattr("personatlas.steering.calibration.fit_floors.identity_class", by_length)


def calibrated(tiny_run, **told):
    options = SEARCH | {f"--{name}": value for name, value in told.items()}
    main(
        [
            "calibrate",
            str(tiny_run / "run"),
            "--bank",
            str(tiny_run / "bank"),
            *(part for pair in options.items() for part in pair),
        ]
    )


def refused(capsys, tiny_run, **told):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        calibrated(tiny_run, **told)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("personatlas:")]
    assert len(lines) == 1
    return lines[0]


def test_a_calibration_saves_a_cap_and_reports_what_it_did_on_the_other_half(tiny_run, capsys):
    calibrated(tiny_run, arm="cap:p50@1")
    assert "chosen" in capsys.readouterr().out
    content = json.loads((tiny_run / "run" / "calibration.json").read_text())
    cap = load_cap(tiny_run / "run" / "caps" / "assistant")
    assert cap.calibration["name"] == content["cap"]
    assert {"baseline", "chosen", "random 1", "random 2", "random 3", "add 4", "p50@1"} <= set(
        content["report"]
    )
    same = {name: row["kl"] for name, row in content["report"].items() if name.endswith(", same KL")}
    assert {"shuffled labels, same KL", "PC2, same KL", "random 1, same KL"} >= set(same) - {
        "random 2, same KL",
        "random 3, same KL",
    }
    halves = content["halves"]
    assert halves["choose"]["roles"] == halves["report"]["roles"] == 2
    tried = {one["name"]: one for one in content["tried"]}
    assert tried[content["cap"]]["more_loss"] <= 5
    best = max(one["assistant"] for one in tried.values() if "assistant" in one and one["more_loss"] <= 5)
    assert tried[content["cap"]]["assistant"] == best
    assert any(name.startswith("fitted") for name in tried)
    assert content["report"]["baseline"]["fired"] == 0
    page = (tiny_run / "run" / "calibration.html").read_text()
    assert content["cap"] in page
    assert "baseline" in page


def test_no_identity_question_and_no_role_is_both_fitted_and_reported(tiny_run):
    calibrated(tiny_run)
    cap = load_cap(tiny_run / "run" / "caps" / "assistant")
    fitted = fitted_on([cap])
    log = [json.loads(line) for line in (tiny_run / "run" / "trials.jsonl").read_text().splitlines()]
    asked = {
        half: {tuple(key.split("/")) for row in log if row["half"] == half for key in row.get("keys", ())}
        for half in ("choose", "report")
    }
    for part in (0, 2):  # role and question
        assert {key[part] for key in asked["choose"]}
        assert not {key[part] for key in asked["choose"]} & {key[part] for key in asked["report"]}
    assert fitted.roles == {key[0] for key in asked["choose"]}
    assert fitted.questions
    assert fitted_on([replace(cap, calibration={})]) == FittedOn()


def test_caps_along_other_directions_are_made_to_cost_the_same_kl(tmp_path):
    model = tiny_model()
    axis = axis_of(model)
    benign = texts(6)
    measurements = Measurements(
        model, {"choose": Half((), tuple(benign))}, Sampling(4), tmp_path / "trials.jsonl"
    )
    axes = control_axes(axis, None, "default", count=4, seed=1)
    assert list(axes) == ["random 1", "random 2", "random 3", "random 4"]
    projections = read_projections(model, axis, {"default": benign})
    target = benign_costs(model, benign, {"cap": [projections.cap(axis, [0, 1], 0.5)]})["cap"].kl
    caps = match_kl(measurements, axes, [0, 1], benign, target, "choose")
    assert len(caps) >= 3
    costs = benign_costs(model, benign, {name: [cap] for name, cap in caps.items()})
    assert all(cost.kl == pytest.approx(target, rel=0.06) for cost in costs.values())
    for name, cap in caps.items():
        assert torch.equal(cap.vectors, torch.stack([axes[name].at(layer) for layer in (0, 1)]))


def test_shuffled_labels_and_pc2_are_directions_of_the_runs_own_answers():
    g = np.random.default_rng(0)
    names, width = ["default", "a", "b", "c", "d"], 8
    keys = [f"{name}/0/q{q}/0" for name in names for q in range(40)]
    centre = g.normal(0, 1, (5, width)) + np.outer([8, 0, 0, 0, 0], np.eye(width)[0])
    centre[1:] += np.outer([-6, 6, -6, 6], np.eye(width)[1]) + np.outer([-2, -2, 2, 2], np.eye(width)[2])
    means = torch.tensor(np.repeat(centre, 40, 0) + g.normal(0, 0.5, (200, width))).float()[:, None]
    cells, count, mean, square = cell_sums([(key.split("/")[0], None) for key in keys], means)
    model = {
        "id": "m",
        "fingerprint": "0",
        "weights": "float32",
        "d_model": width,
        "n_layers": 1,
        "revision": None,
    }
    recorded = Activations(cells, count, mean, square, tuple(keys), (None,) * 200, (0,), means, model, "")
    axis = fit_axis(recorded, keys, scores=None, default="default", replicates=0).axis
    axes = control_axes(axis, recorded, "default", count=1, seed=0)
    own = PCA().fit(centre[1:]).components_
    assert abs(float(axes["PC2"].at(0) @ torch.tensor(own[1]).float())) > 0.98
    shuffled = axes["shuffled labels"].at(0)
    assert abs(float(shuffled @ axis.at(0))) < 0.9
    assert float(shuffled.norm()) == pytest.approx(1)


def test_a_second_calibration_measures_nothing_again(tiny_run, capsys, monkeypatch):
    calibrated(tiny_run)
    first = load_cap(tiny_run / "run" / "caps" / "assistant")

    def nothing(_model, _requests, arms, *_):
        assert not arms, "this was measured before"
        return []

    def never(*_):
        raise AssertionError("this was measured before")

    monkeypatch.setattr("personatlas.steering.calibration.measure.run_arms", nothing)
    monkeypatch.setattr("personatlas.steering.calibration.measure.benign_costs", never)
    monkeypatch.setattr("personatlas.steering.calibration.measure.fit_floors", never)
    calibrated(tiny_run, name="again")
    again = load_cap(tiny_run / "run" / "caps" / "again")
    assert torch.equal(first.floor, again.floor)
    assert first.calibration == again.calibration


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("--levels 0.1,1.5", "1.5 is outside 0..1"),
        ("--levels nan", "nan is outside 0..1"),
        ("--levels high", "not numbers with commas"),
        ("--windows 2-7", "window 2-7 is outside the model"),
        ("--windows 2-1", "2-1"),
        ("--windows upper", "upper"),
        ("--population nobody", "nobody"),
        ("--roles 2", "--roles 2 is below 4"),
        ("--prompts 9", "--prompts 9: this bank has"),
        ("--steps -1", "--steps -1 is below 0"),
        ("--budget 0", "--budget 0"),
        ("--name ../x", "cannot be a file's name"),
        ("--arm cap:p200@1", "level 2.0 is outside 0..1"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(tiny_run, capsys, told, said):
    name, value = told.split()
    assert said in refused(capsys, tiny_run, **{name[2:]: value})


def test_a_budget_that_no_cap_keeps_names_the_cheapest(tiny_run, capsys):
    error = refused(capsys, tiny_run, budget="1e-9", levels="0.99")
    assert "no cap costs at most" in error
    assert "give lower --levels" in error


def test_floors_are_quantiles_of_a_population_and_the_share_below_is_that_of_its_tokens():
    model = tiny_model()
    axis = axis_of(model)
    places = read_projections(model, axis, {"default": texts(), "roles": texts(start=10)})
    cap = places.cap(axis, (0, 2), 0.5, "roles")
    assert cap.floor.tolist() == pytest.approx(places.means["roles"][:, [0, 2]].quantile(0.5, dim=0).tolist())
    below = (places.tokens["default"][:, [0, 2]] < cap.floor).float().mean(0)
    assert torch.equal(places.below(cap, "default"), below)
    assert len(places.prompts["default"]) == sum(len(text.prompt_ids) - 1 for text in texts())
    for levels in (1.5, -0.1, math.nan):
        with pytest.raises(UserError, match=r"outside 0\.\.1"):
            places.cap(axis, (0,), levels)


@pytest.mark.parametrize("apart", [False, True])
def test_a_random_cap_fires_as_often_as_the_cap_that_it_controls(apart):
    model = tiny_model()
    axis = axis_of(model)
    material = texts(40)
    cap = axis.quantile_cap((0, 1, 2), 0.25)
    if apart:
        cap = replace(cap, prompt_floor=cap.floor + 0.2)
    shares = fired_shares(model, cap, material)
    assert shares.shape == (3, 2 if apart else 1)
    assert ((shares > 0.02) & (shares < 0.98)).all()
    control = random_cap(model, cap, shares, material, seed=1)
    assert (control.vectors @ cap.vectors.T).diagonal().abs().max() < 0.9
    assert torch.allclose(fired_shares(model, control, material), shares, atol=0.02)
    assert not torch.equal(control.vectors, random_cap(model, cap, shares, material, seed=2).vectors)


def test_texts_are_read_once_for_a_random_cap_of_any_number_of_layers():
    model, material = tiny_model(), texts(40)
    cap, counts = axis_of(model).quantile_cap((0, 1, 2), 0.25, spare_first=False), [0] * model.n_layers
    for layer, block in enumerate(model.blocks):
        original = block.mlp.forward

        def counted(*args, _layer=layer, _original=original):
            counts[_layer] += 1
            return _original(*args)

        block.mlp.forward = counted
    shares = fired_shares(model, cap, material)
    n_batches = counts[0]
    control = random_cap(model, cap, shares, material, seed=1)
    assert counts[:3] == [2 * n_batches] * 3
    # floors are those that reading everything again for each layer gives
    for row, layer in enumerate(cap.layers):
        below = replace(
            control, layers=cap.layers[:row], vectors=control.vectors[:row], floor=control.floor[:row]
        )
        batches = project_batches(model, material, [below] if row else [], layer, control.vectors[row])
        values = torch.cat([own[batch.real] for batch, own in batches])
        assert float(values.quantile(float(shares[row, 0]))) == float(control.floor[row])


def test_a_cap_that_does_nothing_costs_nothing_and_a_hard_one_costs_more():
    model = tiny_model()
    cap = axis_of(model).quantile_cap((0, 1), 0.75)
    idle = replace(cap, floor=torch.full((2,), -torch.inf))
    costs = benign_costs(model, texts(), {"idle": [idle], "firm": [cap]})
    assert costs["idle"].more == 0
    assert costs["idle"].kl == 0
    assert costs["idle"].fired.tolist() == [0, 0]
    assert costs["firm"].kl > 0
    low, high = costs["firm"].more_interval
    assert low <= costs["firm"].more <= high
    again = benign_costs(model, texts()[::-1], {"firm": [cap]})["firm"]
    assert again.loss == pytest.approx(costs["firm"].loss, rel=1e-5)


def test_fitted_floors_make_the_wanted_texts_likelier_within_the_budget():
    model = tiny_model()
    axis = axis_of(model)
    benign, wanted = texts(12), texts(12, start=20)
    places = read_projections(model, axis, {"default": benign, "roles": wanted})
    asking = [parameter.requires_grad for parameter in model.hf.parameters()]
    how = DescentOptions(budget=0.05, steps=40, wanted=12, benign=12, rate=0.1)
    floors = fit_floors(model, axis, (0, 1, 2), places, wanted, benign, how)
    assert [parameter.requires_grad for parameter in model.hf.parameters()] == asking
    start = fit_floors(model, axis, (0, 1, 2), places, wanted, benign, replace(how, steps=1, rate=0.0))
    loss = {
        name: benign_costs(model, wanted, {"cap": [one.cap(axis)]})["cap"].loss
        for name, one in (("start", start), ("end", floors))
    }
    assert loss["end"] < loss["start"]
    assert benign_costs(model, benign, {"cap": [floors.cap(axis)]})["cap"].more < 0.15
    assert Floors.from_json(floors.to_json()).cap(axis, 0.1).floor.tolist() == pytest.approx(
        (floors.floors[1] + 0.1 * floors.spreads[1]).tolist()
    )


def test_floors_that_would_begin_over_the_budget_begin_lower(monkeypatch):
    monkeypatch.setattr("personatlas.steering.calibration.fit_floors.START", (0.9, 0.9))
    model = tiny_model()
    axis, made = axis_of(model), texts(12)
    written = Sampler(model, frozenset(), Sampling(8, 0.0)).answers(
        [Prompt(text.prompt_ids, 0) for text in made]
    )
    benign = [replace(made[answer.index], answer_ids=answer.ids) for answer in written]  # what it says itself
    places = read_projections(model, axis, {"default": benign, "roles": texts(12, start=20)})
    how = DescentOptions(budget=0.01, steps=1, rate=0.0)
    high, low = (
        fit_floors(model, axis, (0, 1, 2), places, texts(12, start=20), benign, replace(how, budget=budget))
        for budget in (100.0, 0.01)
    )
    assert (low.floors < high.floors).all()
    costs = benign_costs(model, benign, {"high": [high.cap(axis)], "low": [low.cap(axis)]})
    assert costs["low"].more <= 0.01 + 1e-6 < costs["high"].more


def test_names_of_candidates_and_windows_to_begin_with():
    names = [Candidate(18, 23, 0.5), Candidate(18, 23, 0.9, "roles"), Candidate(6, 27, 0.2, fitted=True)]
    assert [one.name for one in names] == ["p50@18-23", "roles:p90@18-23", "fitted+0.2@6-27"]
    for n_layers in (1, 3, 12, 30, 80):
        assert all(0 <= first <= last < n_layers for first, last in default_windows(n_layers))


def test_halves_keep_groups_whole():
    one, other = split_groups(["a1", "a2", "b1", "c1", "b2"], lambda item: item[0])
    assert (one, other) == (["a1", "a2", "c1"], ["b1", "b2"])
