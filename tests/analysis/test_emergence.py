"""An axis over checkpoints: places that weights of another scale do not change, what is compared with what, and the verb."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import save_tiny

from personatlas.analysis.emergence import compare_checkpoints, select_checkpoints
from personatlas.analysis.fit.result import AnswerProjections, FitResult, LayerFit, RoleProjection
from personatlas.analysis.fit.tables import interval_text
from personatlas.analysis.stats import Interval
from personatlas.cli.app import main
from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError

MODEL = {"id": "m", "n_layers": 2, "d_model": 4, "fingerprint": "f", "weights": "float32", "revision": None}
END = {"default": 9.0, "editor": 4.0, "clerk": 3.0, "poet": 1.0, "ghost": -2.0, "pirate": -6.0}


def axis(*vector):
    unit = torch.nn.functional.normalize(torch.tensor([vector], dtype=torch.float32), dim=1)
    return Axis(unit.repeat(2, 1), torch.ones(2), (0, 1), 1, MODEL)


def fit(places, layer=1, **more):
    return FitResult(
        layers=(LayerFit(0, 1.0, 0.1, 84.0, 0.2), LayerFit(layer, 3.0, 0.5, 60.0, 0.4, **more)),
        layer=layer,
        layer_reason="",
        poles=("assistant", "role-play"),
        positive="default",
        roles=tuple(
            RoleProjection(name, place, 1, (), name == "default")
            for name, place in sorted(places.items(), key=lambda item: item[1])
        ),
        variance_ratio=(1.0,),
        components_for={},
        projections=AnswerProjections(),
        n_rollouts=6,
        curve=None,
        default="default",
        model=MODEL,
    )


def test_places_are_standard_deviations_of_the_roles_without_the_default_whatever_the_scale():
    scaled = {name: 40 * place - 700 for name, place in END.items()}
    found = compare_checkpoints({0: (fit(scaled), axis(1, 0, 0, 0)), 8: (fit(END), axis(1, 0, 0, 0))})
    roles = np.array([place for name, place in END.items() if name != "default"])
    wanted = {name: (place - roles.mean()) / roles.std() for name, place in END.items()}
    assert found.roles == {name: pytest.approx((place, place)) for name, place in wanted.items()}
    first, last = (row.pole for row in found.checkpoints)
    assert first.to_json() == {"z": pytest.approx(wanted["default"]), "place": 1, "of": 6}
    assert last.rank == 1
    assert found.checkpoints[0].rank_correlation.value == pytest.approx(1)


def test_every_checkpoint_is_compared_with_the_last_one():
    turned = dict(zip(END, [0.0, -4.0, -3.0, -1.0, 2.0, 6.0], strict=True))
    found = compare_checkpoints(
        {0: (fit(turned), axis(0, 1, 0, 0)), 4: (fit(END), axis(1, 1, 0, 0)), 8: (fit(END), axis(1, 0, 0, 0))}
    )
    assert [row.rank_correlation.value for row in found.checkpoints] == pytest.approx([-1, 1, 1])
    assert [row.cosine for row in found.checkpoints] == pytest.approx([0, 0.5**0.5, 1], abs=1e-6)
    assert found.checkpoints[0].pole.rank == 3
    assert found.settled_step == 4
    ends = {name: course[::2] for name, course in found.roles.items()}
    assert replace(found, checkpoints=found.checkpoints[::2], roles=ends).settled_step is None
    for roles in (found.roles, dict(sorted(found.roles.items()))):  # in whatever order a file holds them
        assert replace(found, roles=roles).ends(2) == (["pirate", "ghost"], ["clerk", "editor"])
    assert list(found.roles)[-1] == "default"


def test_intervals_are_shown_where_there_are_some():
    wide = Interval(0.5, 0.25, 0.75, 100)
    found = compare_checkpoints(
        {0: (fit(END), axis(1, 0, 0, 0)), 8: (fit(END, cos_pc1_by_roles=wide), axis(1, 0, 0, 0))}
    )
    assert [interval_text(row.cos_pc1) for row in found.checkpoints] == ["0.50", "0.50 [0.25, 0.75]"]
    assert interval_text(found.checkpoints[0].split_half) == "-"


@pytest.mark.parametrize(
    ("fits", "said"),
    [
        ({8: fit(END)}, "at least 2 are needed"),
        ({0: fit(END, layer=2), 8: fit(END)}, "the fit of step 0 is about layer 2, the last one about 1"),
        ({0: fit({"default": 1.0, "poet": 0.0, "ghost": 2.0}), 8: fit(END)}, "2 roles in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(fits, said):
    with pytest.raises(UserError, match=said):
        compare_checkpoints({step: (one, axis(1, 0, 0, 0)) for step, one in fits.items()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training run with five checkpoints, of five different tiny models."""
    folder = tmp_path_factory.mktemp("emergence") / "mine"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"kind": "training"}))
    for seed, step in enumerate((0, 1, 2, 4, 6)):
        save_tiny(folder / "checkpoints" / f"step-{step:06d}", seed=seed)
    return folder


def test_checkpoints_are_spread_over_the_logarithm_of_their_steps_with_both_ends(trained):
    assert list(select_checkpoints(trained, 8)) == [0, 1, 2, 4, 6]
    assert list(select_checkpoints(trained, 4)) == [0, 1, 2, 6]
    assert list(select_checkpoints(trained, 2)) == [0, 6]


def test_roles_that_all_lie_at_one_place_have_no_ranks():
    flat = dict.fromkeys(END, 2.0)
    found = compare_checkpoints({0: (fit(flat), axis(1, 0, 0, 0)), 8: (fit(END), axis(1, 0, 0, 0))})
    assert found.checkpoints[0].rank_correlation is None
    assert found.settled_step is None


def test_several_processes_are_refused_before_anything_is_done(trained, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["emergence", str(trained)])
    assert "start it without torchrun" in capsys.readouterr().err


def test_what_has_no_checkpoints_to_watch_is_refused_in_one_line(trained, tmp_path):
    with pytest.raises(UserError, match="--checkpoints 1: at least 2"):
        select_checkpoints(trained, 1)
    with pytest.raises(UserError, match="is not the folder of a training run"):
        select_checkpoints(tmp_path, 8)
    one = shutil.copytree(trained, tmp_path / "one")
    for step in (0, 1, 2, 4):
        shutil.rmtree(one / "checkpoints" / f"step-{step:06d}")
    with pytest.raises(UserError, match="has 1 checkpoint: train with --keep log"):
        select_checkpoints(one, 8)
    shutil.rmtree(one / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoints: train with"):
        select_checkpoints(one, 8)


def test_the_verb_fits_all_at_the_layer_of_the_last_one_and_goes_on_where_it_stopped(
    trained, tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    how = f"--bank {tiny_run / 'bank'} --device cpu --dtype float32 --judge none --keep all --max-new-tokens 4 --samples 2"
    command = ["emergence", str(trained), "--checkpoints", "3", *how.split(), "--replicates", "4"]
    main(command)
    assert "ranks as" in capsys.readouterr().out
    folder = tmp_path / "runs" / "mine-emergence"
    found = json.loads((folder / "emergence.json").read_text())
    assert [row["step"] for row in found["checkpoints"]] == [0, 1, 6]
    fits = [json.loads((folder / f"step-{step:06d}" / "fit.json").read_text()) for step in (0, 1, 6)]
    assert {one["layer"] for one in fits} == {found["layer"]}
    assert [one["asked"]["layer"] for one in fits] == [found["layer"], found["layer"], None]
    page = (folder / "emergence.html").read_text()
    assert "An axis emerges" in page
    assert all(f'href="step-{step:06d}/report.html"' in page for step in (0, 1, 6))
    times = [path.stat().st_mtime_ns for path in sorted(folder.glob("step-*/*.safetensors"))]
    main([*command, "--json"])
    assert json.loads(capsys.readouterr().out) == found
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("step-*/*.safetensors"))] == times
