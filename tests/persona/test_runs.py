"""A training run is a model: what is finished, else its newest checkpoint; every result says which."""

import json
import re
import shutil
from pathlib import Path

import pytest
from families import save_tiny

from personatlas.cli.app import main
from personatlas.persona.artifacts import read_json, read_object
from personatlas.persona.axis import load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.formats import read_conversations
from personatlas.persona.models.load import load_model, load_tokenizer
from personatlas.persona.options import recorded_plan
from personatlas.persona.pipeline.activations import load_activations
from personatlas.persona.runs import (
    checkpoint_folders,
    checkpoint_name,
    default_folder,
    model_name,
    open_run,
    resolve_axis,
    resolve_model,
    versions,
)

EARLIER_NAME = "person" + "axis"  # of this project


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def run(tiny, tmp_path):
    """A training run with two checkpoints, one that is being written and one that is being removed."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"kind": "training"}))
    for step in ("step-000004", "step-000016", ".step-000032.0a1b2c"):
        shutil.copytree(tiny, folder / "checkpoints" / step)
    (folder / "checkpoints" / "step-000064").mkdir()
    return folder


def test_a_run_stands_for_its_newest_checkpoint_until_it_is_finished(run, tiny, capsys):
    assert list(checkpoint_folders(run)) == [4, 16]
    model = load_model(str(run), device="cpu", dtype="float32")
    assert model.id == str(run / "checkpoints" / "step-000016")
    assert f"{run} is a training run: the model is {run}/checkpoints/step-000016" in capsys.readouterr().err
    assert len(load_tokenizer(str(run))) == len(model.tokenizer)
    shutil.copytree(tiny, run / "model")
    assert load_model(str(run), device="cpu", dtype="float32").id == str(run / "model")
    earlier = load_model(str(run / "checkpoints" / "step-000004"), device="cpu", dtype="float32")
    assert earlier.id == str(run / "checkpoints" / "step-000004")
    assert earlier.name == model.name == "mine"  # checkpoints get the same prompts


def test_what_is_found_about_checkpoints_goes_into_folders_of_their_own(run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(default_folder("mine")) == "runs/mine-step-000016"
    assert str(default_folder("mine/checkpoints/step-000004/")) == "runs/mine-step-000004"
    monkeypatch.chdir(run / "checkpoints")
    assert checkpoint_name("step-000004") == "mine-step-000004"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "model")  # called as ours are, and no training run's
    assert (checkpoint_name("model"), model_name(tmp_path / "model")) == ("model", "model")
    assert checkpoint_name("someone/a-model") == "a-model"


def test_the_axis_of_a_run_is_that_of_a_checkpoint_and_goes_on_with_it(
    run, tiny, tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    how = f"axis mine --plan standard --bank {tiny_run / 'bank'} --device cpu --dtype float32 --judge none --keep all --max-new-tokens 4"
    main([*how.split(), "--samples", "4", "--replicates", "4"])
    capsys.readouterr()
    main(
        [
            *["chat", "mine", "--message", "Hello", "--max-new-tokens", "4"],
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ]
    )
    assert "projection" in capsys.readouterr().out
    record = json.loads((tmp_path / "runs" / "mine-step-000016" / "run.json").read_text())
    assert (
        record["asked"]["model_name"]
        == record["asked"]["model"]["id"]
        == str(run / "checkpoints" / "step-000016")
    )
    capsys.readouterr()
    shutil.copytree(tiny, run / "model")
    main(
        ["run", "record", "runs/mine-step-000016", "--device", "cpu"]
    )  # not the finished model, which is the newer one
    assert "rollouts of" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["tools", "spans", "runs/mine-step-000016"])
    told = capsys.readouterr().err
    assert f"is a run folder of {run / 'checkpoints' / 'step-000016'}: give that as the model" in told
    assert "--axis runs/mine-step-000016" in told


def test_a_run_without_a_checkpoint_and_a_folder_of_them_are_refused_in_one_line(run, tmp_path):
    with pytest.raises(
        UserError, match=r"checkpoints holds 2 checkpoints; give one of them, such as .*step-000016$"
    ):
        load_model(str(run / "checkpoints"))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(
        UserError, match=r"mine is a training run without a checkpoint yet; `personatlas run report"
    ):
        load_model(str(run))
    (run / "run.json").write_text(json.dumps({"asked": {}}))
    with pytest.raises(
        UserError, match="is a run folder: give its model as the model, and the run with --axis"
    ):
        resolve_model(str(run))


def test_a_folder_made_under_the_old_name_is_read_and_resumed(tiny_run, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(tiny_run / "run", folder)
    record = json.loads((folder / "run.json").read_text())
    record["versions"] = {EARLIER_NAME: "0.9.0", "torch": "2.0"}
    (folder / "run.json").write_text(json.dumps(record))
    axis = load_axis(resolve_axis(str(folder)))
    assert axis.layers
    assert len(load_activations(folder / "activations").keys) > 0
    with open_run(folder) as run:
        run.claim(record["asked"])
        assert run.manifest["asked"] == record["asked"]
        assert set(run.manifest["versions"]) == set(versions())
    chat = {"messages": [{"role": "user", "content": "Hello"}], EARLIER_NAME: {"format": 1, "turns": []}}
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    assert read_conversations(tmp_path / "chat.json")[0].messages == ({"role": "user", "content": "Hello"},)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The hub's cache of one repository: a folder that is called by a commit, and files by their hashes."""
    return save_tiny(tmp_path_factory.mktemp("hub") / "models--acme--Tiny-Chat" / "snapshots" / "0a1b2c3d")


def test_a_snapshot_in_the_hubs_cache_is_called_by_its_repository(cached):
    model = load_model(str(cached), device="cpu", dtype="float32")
    assert (model.name, model.id, model.revision) == ("Tiny-Chat", "acme/Tiny-Chat", "0a1b2c3d")
    assert str(default_folder(str(cached))) == "runs/Tiny-Chat"


@pytest.mark.parametrize("name", [".", "./", "../Plain-Chat", "../Plain-Chat/", "deep/..", "../link"])
def test_a_folder_has_its_own_name_however_it_is_written(name, cached, tmp_path, monkeypatch):
    folder = shutil.copytree(cached, tmp_path / "Plain-Chat")
    (folder / "deep").mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    model = load_model(name, device="cpu", dtype="float32")
    assert (model.name, model.id, str(default_folder(name))) == ("Plain-Chat", str(folder), "runs/Plain-Chat")


def test_a_gguf_file_keeps_its_own_name_where_it_is_a_link(tmp_path, monkeypatch):
    (tmp_path / "0a1b2c").touch()
    (tmp_path / "Tiny-Q4.gguf").symlink_to(tmp_path / "0a1b2c")
    monkeypatch.chdir(tmp_path)
    assert model_name(Path("Tiny-Q4.gguf")) == default_folder("Tiny-Q4.gguf").name == "Tiny-Q4"


def test_a_run_goes_on_with_its_model_elsewhere_and_not_with_another_in_its_place(
    tiny_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tiny_run)
    tokens = "--plan standard --bank bank --out run --device cpu --dtype float32 --samples 4 --chunk 32 --max-new-tokens 8"
    how = [*tokens.split(), "--judge", "none", "--keep", "all", "--replicates", "4"]
    before = (tiny_run / "run" / "rollouts.jsonl").read_bytes()
    shutil.move("tiny", tmp_path / "Moved-Chat")
    main(["axis", str(tmp_path / "Moved-Chat"), *how])
    assert (tiny_run / "run" / "rollouts.jsonl").read_bytes() == before
    asked = read_json(tiny_run / "run" / "run.json")["asked"]
    assert asked["model"]["id"] == str(tmp_path / "Moved-Chat")
    assert asked["name"] == "tiny"  # as its prompts say
    save_tiny(tiny_run / "tiny", seed=1)
    with pytest.raises(SystemExit):
        main(["axis", "tiny", *how])
    assert (tiny_run / "run" / "rollouts.jsonl").read_bytes() == before


def test_a_run_keeps_its_plan_and_a_new_one_on_a_cpu_is_a_demo(whole_run, tmp_path, capsys):
    tiny_run = shutil.copytree(whole_run, tmp_path / "own")
    rollout = ["run", "rollout", str(tiny_run / "tiny"), "--bank", str(tiny_run / "bank"), "--device", "cpu"]
    how = ["--dtype", "float32", "--max-new-tokens", "8", "--out"]
    before = read_object(tiny_run / "run" / "run.json")["asked"]
    main([*rollout, *how, str(tiny_run / "run"), "--samples", "4"])
    after = read_object(tiny_run / "run" / "run.json")["asked"]
    assert after["plan"] == before["plan"] == "standard"
    assert (after["prompts"], after["questions"]) == (2, 12)
    capsys.readouterr()
    main([*rollout, *how, str(tmp_path / "new"), "--samples", "1"])
    asked = read_object(tmp_path / "new" / "run.json")["asked"]
    assert (asked["plan"], asked["prompts"], asked["questions"]) == ("demo", 1, 16)
    assert "take about" not in capsys.readouterr().err  # too few to speak of
    main([*rollout, *how, str(tmp_path / "new"), "--samples", "8"])
    said = capsys.readouterr().err
    assert "plan demo: " in said
    assert re.search(
        r"rollouts of up to 8 tokens and their recording take about \d+ (s|min) by a short probe", said
    )
    assert recorded_plan({}) is None
    assert recorded_plan({"prompts": 2, "questions": 12, "max_new_tokens": 128}) == "standard"
    assert recorded_plan({"prompts": 2, "questions": 9, "max_new_tokens": 128}) == "paper"


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path):
    with pytest.raises(UserError), open_run(tmp_path / "new", create=True):
        raise UserError("refused")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(UserError), open_run(tmp_path / "old", create=True):
        raise UserError("refused")
    assert (tmp_path / "old").is_dir()
    with open_run(tmp_path / "begun", create=True) as run:
        run.note(steps=1)
    with pytest.raises(UserError), open_run(tmp_path / "begun", create=True):
        raise UserError("stopped")
    assert (tmp_path / "begun" / "run.json").is_file()
