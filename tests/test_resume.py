"""A run survives kill -9 in every stage, other processes and other numbers of them, and gives the same result."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from families import save_tiny

ARTEFACTS = ("activations.safetensors", "axis.safetensors", "space.safetensors")
OPTIONS = ["--roles", "6", "--prompts", "2", "--questions", "4", "--max-new-tokens", "24", "--chunk", "8"]
OPTIONS += ["--replicates", "5", "--device", "cpu", "--keep", "all", "--dtype", "float32"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ONE, TWO = ["-m"], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517", "-m"]


def start(model: Path, out: Path, *more: str, launcher=ONE, setup="") -> subprocess.Popen:
    verb = ["personaxis.persona.cli", "axis", str(model), "--out", str(out), *OPTIONS, *more]
    command = [sys.executable, *launcher, *verb] if not setup else [sys.executable, "-c", setup, *verb[1:]]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


def result(folder: Path):
    lines = {json.loads(line)["key"]: line for line in (folder / "rollouts.jsonl").read_text().splitlines()}
    return lines, {name: (folder / name).read_bytes() for name in ARTEFACTS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An uninterrupted run by one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(model, folder))
    return folder


def killed_when(process, ready):
    """Kill -9 as soon as `ready()`; False when the process was done before."""
    while process.poll() is None:
        if ready():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.002)
    return False


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_kill_9_in_every_stage_and_resume_gives_the_uninterrupted_result(model, whole, tmp_path):
    folder = tmp_path / "run"
    log = folder / "rollouts.jsonl"
    stages = (lambda: lines_in(log) >= 3, lambda: lines_in(log) >= 20, (folder / "activations.parts").exists)
    hits = [killed_when(start(model, folder), stage) for stage in stages]
    assert hits[:2] == [True, True]
    finish(start(model, folder))
    assert result(folder) == result(whole)


def test_a_half_written_line_is_thrown_away_and_made_again(model, whole, tmp_path):
    folder = tmp_path / "run"
    killed_when(start(model, folder), lambda: lines_in(folder / "rollouts.jsonl") >= 5)
    with (folder / "rollouts.jsonl").open("ab") as file:
        file.write(b'{"key": "default/0/q0')
    finish(start(model, folder))
    assert result(folder) == result(whole)


def test_two_gloo_ranks_give_what_one_process_gives(model, whole, tmp_path):
    folder = tmp_path / "run"
    finish(start(model, folder, launcher=TWO))
    assert result(folder) == result(whole)
    assert not list(folder.glob("rollouts.*.jsonl"))


def test_a_second_call_changes_nothing(model, whole):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir() if path.name != ".lock"}
    finish(start(model, whole))
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir() if path.name != ".lock"} == before


def refused(process, *words):
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("personaxis: ")
    for word in words:
        assert word in err
    return out


def test_a_folder_in_use_another_model_and_other_options_are_refused(model, whole, tmp_path):
    before = result(whole)
    with (whole / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(start(model, whole), "in use by another process")
    other = save_tiny(tmp_path / "other", seed=1)
    refused(start(other, whole), "is a run with model")
    refused(start(model, whole, "--temperature", "0.9"), "is a run with temperature 0.7, not 0.9")
    assert result(whole) == before


def test_a_full_disk_is_one_line_and_the_run_goes_on_where_there_is_room(model, whole, tmp_path):
    folder = tmp_path / "run"
    limit = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from personaxis.persona.cli import main; main(sys.argv[1:])"
    )
    refused(start(model, folder, setup=limit), "a file grew too large")
    assert 0 < lines_in(folder / "rollouts.jsonl") < lines_in(whole / "rollouts.jsonl")
    finish(start(model, folder))
    assert result(folder) == result(whole)
