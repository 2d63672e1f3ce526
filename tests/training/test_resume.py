"""A run of training goes on after any end: killed between any two writes, with files damaged, changed or left out."""

import errno
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from base_runs import command, environment, losses, train

from personatlas.persona.artifacts import read_json, write_json
from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.persona.logs import read_lines
from personatlas.training.export.huggingface import load_exported
from personatlas.training.loop import checkpoints, trainer
from personatlas.training.loop import step as stepping
from personatlas.training.loop.checkpoints import checkpoints_in
from personatlas.training.loop.distributed import init_distributed
from personatlas.training.loop.run_log import read_metrics
from personatlas.training.loop.trainer import steps_in
from personatlas.training.plan import CHIPS, make_plan


class Killed(BaseException):
    """The end of a process, as far as its files go: nothing after it is written."""


def killed_at(monkeypatch, at):
    """Every way of cleaning up fails too, as it does in a process that is gone."""
    step = stepping.Stepper.step

    def dying(self, number, *how):
        if number == at:
            raise Killed
        return step(self, number, *how)

    monkeypatch.setattr(stepping.Stepper, "step", dying)


def copied(base_run, tmp_path):
    return shutil.copytree(base_run, tmp_path / "run")


def test_a_run_that_keeps_the_last_only_saves_none_at_the_start_whatever_the_machines_clock(
    base_run, books, tmp_path, monkeypatch
):
    """`time.monotonic` may count from the start of the machine: on one that ran for ten minutes step 0 was due."""
    train(books, tmp_path / "run", like=base_run, keep="last")
    assert [one.step for one in checkpoints_in(tmp_path / "run")] == [39]


def test_rows_from_before_the_first_checkpoint_are_not_written_twice(base_run, books, tmp_path, monkeypatch):
    killed_at(monkeypatch, 5)
    with pytest.raises(Killed):
        train(books, tmp_path / "run", like=base_run, keep="last")
    assert not checkpoints_in(tmp_path / "run")
    monkeypatch.undo()
    train(books, tmp_path / "run", like=base_run, keep="last")
    steps = [(row["kind"], row["step"]) for row in read_metrics(tmp_path / "run") if row["kind"] != "event"]
    assert len(steps) == len(set(steps))
    samples = [(row["step"], row["prompt"]) for row in read_lines(tmp_path / "run/samples.jsonl")]
    assert len(samples) == len(set(samples))


def test_what_a_kill_leaves_half_written_is_removed_when_the_run_goes_on(base_run, books, tmp_path):
    """The weights are written under a name with two dots, which was not looked for; the model's links, by no one."""
    run = copied(base_run, tmp_path)
    hexes = "1b3d5f70a2c4", "2c4e6081b3d5"
    halves = [".model.{}", "checkpoints/.step-000039.{}", "checkpoints/..step-000032.{}.{}"]
    halves = [half.format(*hexes) for half in halves]
    for half in halves:
        (run / half).mkdir()
        (run / half / "model.safetensors").write_text("half")
    for half in (".samples.jsonl.{}", ".tokenizer.{}", "tokens/.train-00000.npy.{}"):
        (run / half.format(*hexes)).write_text("half")
    (run / ".notes").write_text("a user's")
    train(books, run)
    assert [path.name for path in run.rglob(".*")] == [".notes"]


def test_a_kill_between_saving_and_pruning_leaves_no_more_than_two_to_go_on_from(
    base_run, books, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:

        def dying(run, steps, every=True):
            if (run / "checkpoints/step-000039").is_dir():
                raise Killed
            checkpoints.prune_checkpoints(run, steps, every)

        patch.setattr(trainer, "prune_checkpoints", dying)
        with pytest.raises(Killed):
            train(books, tmp_path / "run", like=base_run)
    assert [one.step for one in checkpoints_in(tmp_path / "run") if one.is_resumable] == [16, 32, 39]
    train(books, tmp_path / "run", like=base_run)
    assert [one.step for one in checkpoints_in(tmp_path / "run") if one.is_resumable] == [32, 39]


def test_checkpoints_of_later_steps_do_not_take_the_place_of_those_to_go_on_from(
    base_run, books, tmp_path, monkeypatch
):
    """Where no state is left the run begins again; its own checkpoints lost their state to later ones that had none."""
    run = copied(base_run, tmp_path)
    for one in checkpoints_in(run):
        (one.path / "optimizer.safetensors").unlink(missing_ok=True)
    killed_at(monkeypatch, 5)
    with pytest.raises(Killed):
        train(books, run)
    assert [one.step for one in checkpoints_in(run) if one.is_resumable] == [2, 4]
    monkeypatch.undo()
    train(books, run)
    assert losses(run) == losses(base_run)


def test_what_is_written_over_the_model_does_not_change_a_checkpoint_unseen(base_run, books, tmp_path):
    """The weights in RUN/model are the checkpoint's own file: whoever writes over them has changed both."""
    run = copied(base_run, tmp_path)
    train(books, run)  # links the copy's model
    last, model = checkpoints_in(run)[-1].path, run / "model"
    assert os.path.samefile(model / "model.safetensors", last / "model.safetensors")
    before = (last / "generation_config.json").read_text()
    (model / "generation_config.json").write_text("{}")
    assert (last / "generation_config.json").read_text() == before
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-2] ^= 64
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(
        UserError, match=r"model\.safetensors is damaged or was changed; remove .*step-000039"
    ):
        train(books, run)
    shutil.rmtree(last)
    train(books, run)
    one, two = (load_exported(folder / "model").state_dict() for folder in (run, base_run))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_figures_that_are_lost_are_told_of_in_one_line(base_run, books, tmp_path):
    run = copied(base_run, tmp_path)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="does not tell of the last steps"):
        train(books, run)
    shutil.rmtree(checkpoints_in(run)[-1].path)
    train(books, run)
    assert losses(run)[39] == losses(base_run)[39]


def test_a_full_disk_leaves_no_half_of_a_model(base_run, books, tmp_path, monkeypatch):
    run = copied(base_run, tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("personatlas.training.run.shutil.copyfile", full)
    with pytest.raises(OSError, match="No space"):
        train(books, run)
    assert (run / "model/config.json").is_file()
    assert not list(run.glob(".model.*"))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("run.json", "[]", "is a list of 0, not an object"),
        ("run.json", '{"kind": "tr', "is not valid JSON"),
        ("tokens/train-00000.npy", "", "cannot be read: .*make it again"),
        ("checkpoints/step-000039/optimizer.safetensors", "", "remove .*step-000039 and the run goes on"),
        ("checkpoints/step-000039/model.safetensors", "cut", "remove .*step-000039 and the run goes on"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(base_run, books, tmp_path, file, content, said):
    run = copied(base_run, tmp_path)
    (run / file).write_text(content)
    with pytest.raises(UserError, match=said):
        train(books, run)


def test_a_plan_of_another_version_is_one_line(base_run, books, tmp_path):
    run = copied(base_run, tmp_path)
    record = read_json(run / "run.json")
    del record["plan"]["second"]
    write_json(run / "run.json", record)
    with pytest.raises(UserError, match="a plan whose second is missing: damaged, or of another version"):
        train(books, run)


def test_a_folder_in_which_nothing_can_be_written_is_one_line(base_run, books):
    with pytest.raises(UserError, match="/proc cannot be written to"):
        train(books, Path("/proc"), like=base_run)


@pytest.mark.parametrize("device", ["gpu", "cuda:1", "mps"])
def test_another_device_than_cuda_or_cpu_is_refused(device):
    """`cuda:1` was taken for the first GPU."""
    with pytest.raises(UserError, match="is not cuda or cpu"):
        init_distributed(World(), device)


def test_processes_wait_for_the_one_that_tokenises_as_long_as_it_takes(monkeypatch):
    """Ten minutes, which is usual with NCCL, is less than a large corpus takes."""
    given = []
    with monkeypatch.context() as patch:
        patch.setattr(dist, "init_process_group", lambda *_, **how: given.append(how["timeout"]))
        init_distributed(World(1, 2, 1), "cpu")
    make = dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda **how: given.append(how["timeout"]) or make(**how))
    monkeypatch.setattr(dist, "get_backend", lambda: "cpu:gloo,cuda:nccl")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        World(0, 2).barrier()
    finally:
        dist.destroy_process_group()
    assert given == [timedelta(days=1)] * 2


@pytest.mark.slow
def test_several_processes_save_between_lasting_checkpoints_too(base_run, tmp_path):
    """They saved at powers of two alone, and with --keep last at the end alone: a killed run lost half its hours or all."""
    program = (
        "from personatlas.training.loop import trainer; trainer.steps_in = lambda plan, seconds: 3\n"
        "from personatlas.cli.app import main; import sys; main(sys.argv[1:])"
    )
    (tmp_path / "often.py").write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*command(base_run, tmp_path / "run", 5000), "--keep", "last"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "often.py"), *options], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert [one.step for one in checkpoints_in(tmp_path / "run")] == [6, 9]


def test_seconds_are_steps_by_the_plans_speed():
    plan = make_plan(2, tokens=10**7, chip=CHIPS["cpu"], speed=1000.0, batch=5120)
    assert steps_in(plan, 600.0) == 117
    assert steps_in(plan, 1.0) == 1
