"""Caps on disk: files that are none, caps of others, and the self-test with an axis."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from commands import refused
from families import save_tiny
from safetensors.torch import load_file, save_file
from tiny_axis import axis_of

from personatlas.cli.app import main
from personatlas.persona.artifacts import digest
from personatlas.persona.axis import load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, load_cap
from personatlas.persona.models.load import load_model


def test_the_self_test_caps_with_the_engine_and_fails_aloud(tiny_run, capsys, monkeypatch):
    argv = [
        "tools",
        "self-test",
        str(tiny_run / "tiny"),
        "--axis",
        str(tiny_run / "run"),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    main(argv)
    shown = capsys.readouterr().out
    assert "engine's account" in shown
    assert "FAILED" not in shown
    monkeypatch.setattr("personatlas.steering.hooks.steering.apply_table", lambda h, *_: (h, None))
    assert "self-test of" in refused(capsys, argv)


def cap_file(folder, **changes):
    """A cap on disk whose floor, or whose record, is another than it says."""
    vectors = torch.nn.functional.normalize(
        torch.randn(2, 24, generator=torch.Generator().manual_seed(0)), dim=1
    )
    Cap((0, 1), vectors, torch.zeros(2)).save(folder / "cap")
    tensors = load_file(folder / "cap.safetensors") | changes.get("tensors", {})
    record = json.loads((folder / "cap.json").read_text()) | changes.get("record", {})
    meta = {"meta": json.dumps({name: record[name] for name in record if name != "sha256"})}
    save_file(tensors, folder / "cap.safetensors", metadata=meta)
    record["sha256"] = digest(folder / "cap.safetensors")
    (folder / "cap.json").write_text(json.dumps(record))
    return folder / "cap"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensors": {"floor": torch.tensor([0.0, float("nan")])}}, "NaN"),
        ({"tensors": {"floor": torch.zeros(3)}}, "cap.json"),
        ({"tensors": {"vectors": torch.ones(2, 24)}}, "length 1"),
        ({"tensors": {"prompt_floor": torch.zeros(1)}}, "cap.json"),
        ({"record": {"layers": ["../../etc/passwd", 1]}}, "cap.json"),
        ({"record": {"layers": [0, 1, 2]}}, "3 layers"),
        ({"record": {"phase": "always"}}, "phase 'always'"),
        ({"record": {"kind": "axis"}}, "not 'cap'"),
    ],
)
def test_a_file_that_holds_no_cap_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        load_cap(cap_file(tmp_path, **changes))


class Evil:
    """Would make a file if anything unpickled it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_a_caps_clothes_is_never_run(tmp_path):
    stem = cap_file(tmp_path)
    (tmp_path / "cap.safetensors").write_bytes(pickle.dumps(Evil(tmp_path / "was_here")))
    with pytest.raises(UserError, match="does not match the hash"):
        load_cap(stem)
    record = json.loads((tmp_path / "cap.json").read_text())
    (tmp_path / "cap.json").write_text(json.dumps(record | {"sha256": digest(tmp_path / "cap.safetensors")}))
    with pytest.raises(UserError, match="not a readable artefact"):
        load_cap(stem)
    assert not (tmp_path / "was_here").exists()


def test_a_prompts_floor_is_kept_by_files(tmp_path):
    vectors = torch.eye(3)[:2]
    cap = Cap((0, 1), vectors, torch.tensor([1.0, 2.0]), prompt_floor=torch.tensor([3.0, 4.0]))
    cap.save(tmp_path / "cap")
    assert load_cap(tmp_path / "cap").prompt_floor.tolist() == [3.0, 4.0]


def test_the_papers_own_caps_are_used_by_name_once_they_lie_beside_the_axis(tiny_run, tmp_path, capsys):
    axis = axis_of(load_model(str(tiny_run / "tiny"), dtype="float32"))
    axis.save(tmp_path / "axis")
    vectors = {f"v{layer}": {"layer": layer, "vector": -axis.at(layer)} for layer in (0, 1)}
    steps = [{"vector": name, "cap": 0.2} for name in vectors]
    torch.save(
        {"vectors": vectors, "experiments": [{"id": "layers_0:2-p0.25", "interventions": steps}]},
        tmp_path / "c.pt",
    )
    main(["tools", "import", "caps", str(tmp_path / "c.pt"), "--out", str(tmp_path / "caps")])
    argv = [
        "generate",
        str(tiny_run / "tiny"),
        "Who?",
        "--axis",
        str(tmp_path / "axis"),
        "--arm",
        "cap:layers_0:2-p0.25",
    ]
    main([*argv, "--dtype", "float32", "--max-new-tokens", "4", "--json"])
    assert '"steered_layers": [ 0, 1 ]' in " ".join(capsys.readouterr().out.split())


def test_a_cap_that_points_away_from_the_axis_is_refused(tiny_run):
    axis = load_axis(tiny_run / "run" / "axis")
    layer = axis.layers[0]
    with pytest.raises(UserError, match="its sign is turned"):
        axis.require_sign(Cap((layer,), -axis.at(layer)[None], torch.zeros(1)))


def test_another_weight_format_needs_force_and_another_model_cannot_be_forced(tmp_path, capsys):
    save_tiny(tmp_path / "tiny")
    axis = axis_of(load_model(str(tmp_path / "tiny"), dtype="float32"))
    axis = replace(axis, model=axis.model | {"weights": "gguf Q4_1", "fingerprint": "0" * 32})
    axis.save(tmp_path / "axis")
    argv = [
        "generate",
        str(tmp_path / "tiny"),
        "Who?",
        "--axis",
        str(tmp_path / "axis"),
        "--arm",
        "cap:p75@0-2",
    ]
    argv += ["--dtype", "float32", "--max-new-tokens", "4"]
    assert "--force it across formats" in refused(capsys, argv)
    main([*argv, "--force"])
    assert "p75@0-2" in capsys.readouterr().out
    replace(axis, model=axis.model | {"weights": "float32"}).save(tmp_path / "axis")
    assert "fingerprint" in refused(capsys, [*argv, "--force"])


def test_the_packaged_axis_comes_with_a_cap_that_says_what_it_was_found_to_do():
    from personatlas.persona.runs import resolve_axis

    stem = resolve_axis("smollm2-135m")
    axis = load_axis(stem)
    cap = axis.cap("assistant")
    axis.require_sign(cap)
    assert cap.model["fingerprint"] == axis.model["fingerprint"]
    before, after = cap.calibration["assistant"]
    assert after > 2 * before
    low, high = cap.calibration["more_loss_interval"]  # on other answers than those that kept the budget
    assert low < cap.calibration["budget"] < high
    assert low < cap.calibration["more_loss"] < high
    assert len(cap.calibration["fitted_roles"]) == 25
    assert len(cap.calibration["fitted_questions"]) == 80
    moved = axis.cap("assistant-0.3").calibration  # its figures are gone, what it was fitted on is not
    assert moved == {name: cap.calibration[name] for name in ("fitted_roles", "fitted_questions")}
