"""A command that is killed at any moment and run again gives what an undisturbed run gives, and leaves no file behind."""

import json
import os
import shutil
import subprocess
import sys

import kill_trials
import pytest


def trials(workbench, folder, count, *names):
    shutil.copytree(workbench, folder / "whole")
    line = [sys.executable, kill_trials.__file__, str(folder), str(count), *names]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(row) for row in done.stdout.splitlines()]
    assert len(rows) == count
    assert any(row["killed"] for row in rows)
    bad = [row for row in rows if row["status"] or row["unequal"] or row["leftovers"]]
    assert not bad, json.dumps(bad, indent=1)


def test_a_killed_command_gives_the_same_and_leaves_nothing_when_it_is_run_again(whole_workbench, tmp_path):
    trials(
        whole_workbench,
        tmp_path / "trials",
        4,
        "train tokenizer",
        "train export",
        "run judge",
        "tools import caps",
    )


@pytest.mark.robustness
def test_a_hundred_kills_change_nothing_and_leave_nothing(whole_workbench, tmp_path):
    trials(whole_workbench, tmp_path / "trials", 104)
