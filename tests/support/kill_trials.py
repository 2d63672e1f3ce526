"""Kills commands with SIGKILL at random moments, runs them again, and compares with undisturbed runs.

python tests/support/kill_trials.py FOLDER 100 [COMMAND ...]     # prints a line of JSON for every trial

Every command runs in a fork of this process, which has imported everything and computed nothing. Half of the
moments are points in time, half the start of a call of the file system.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

from every_command import COMMANDS, make_workbench, results
from test_os_errors import Fault

from personatlas.cli.app import main
from personatlas.training.chat import samples as reply_samples
from personatlas.training.loop import samples

STUDIES = [
    *("axis", "run record", "run fit", "calibrate", "eval", "drift", "emergence"),
    *("train tokenizer", "train base", "train chat", "train export", "roles --export", "tools import caps"),
]
MODULES = [
    "analysis.fit.pipeline",
    "analysis.emergence_page",
    "steering.calibration.calibrate",
    "steering.evals.study",
    "steering.drift.study",
    "training.pretrain",
    "training.finetune",
    "training.export.gguf",
    "persona.paper_files",
]
SECONDS = 300  # for a run that is not killed


class Killer(Fault):
    """Kills its own process at the n-th call that touches the folder."""

    def __call__(self, event, arguments):
        with contextlib.suppress(OSError):
            super().__call__(event, arguments)
        if self.folder is not None and self.fired:
            self.folder = None  # os.kill is audited too
            os.kill(os.getpid(), signal.SIGKILL)


def in_fork(folder: Path, work, *arguments) -> int:
    """Starts `work(*arguments)` in a fork whose folder and output are `folder` and `folder`.log."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(folder)
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(*arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:  # noqa: BLE001 (a fork must not go on as its parent)
        os.write(2, repr(error).encode())
    os._exit(int(status or 0))


def command(name: str) -> None:
    main(COMMANDS[name].split())


def finished(child: int) -> int:
    """The exit status of a fork, which may not take too long."""
    for _ in range(100 * SECONDS):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return -os.waitpid(child, 0)[1]


def count_calls(folder: Path, name: str) -> None:
    """Runs a command and writes how many calls touch its folder."""
    fault = Fault()
    with fault.at(folder):
        command(name)
    Path(f"{folder}.calls").write_text(str(len(fault.calls)))


def killed_command(folder: Path, name: str, number: int) -> None:
    with Killer().at(folder, number):
        command(name)


def trials(root: Path, count: int, names: list[str]):
    """Facts of every trial."""
    if not (root / "whole").exists():
        assert finished(in_fork(root, make_workbench, root / "whole")) == 0, (Path(f"{root}.log")).read_text()
    drawn, references = random.Random(count), {}
    for number in range(count):
        name = names[number % len(names)]
        folder = root / "copy"
        if name not in references:
            shutil.copytree(root / "whole", folder)
            start = time.monotonic()
            status = finished(in_fork(folder, count_calls, folder, name))
            assert status == 0, (name, Path(f"{folder}.log").read_text()[-2000:])
            references[name] = (
                results(folder),
                time.monotonic() - start,
                int(Path(f"{folder}.calls").read_text()),
            )
            shutil.rmtree(folder)
        wanted, seconds, calls = references[name]
        shutil.copytree(root / "whole", folder)
        if number // len(names) % 2:
            at = f"{(delay := drawn.uniform(0, seconds)):.2f} s"
            child = in_fork(folder, command, name)
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        else:
            call = drawn.randint(1, calls)
            at = f"call {call} of {calls}"
            child = in_fork(folder, killed_command, folder, name, call)
        was_killed = finished(child) == -signal.SIGKILL
        left = [str(path.relative_to(folder)) for path in folder.rglob(".*")]
        status = finished(in_fork(folder, command, name))
        said = Path(f"{folder}.log").read_text()
        found = results(folder)
        yield {
            "command": name,
            "at": at,
            "killed": was_killed,
            "left": left,
            "status": 0 if "already there" in said or "not an empty folder" in said else status,
            "said": said[-1000:] if status else "",
            "unequal": sorted(path for path in {*found, *wanted} if found.get(path) != wanted.get(path)),
            "leftovers": [str(path.relative_to(folder)) for path in folder.rglob(".*")],
        }
        shutil.rmtree(folder)


if __name__ == "__main__":
    samples.LENGTH = reply_samples.LENGTH = 4
    for module in MODULES:
        import_module(f"personatlas.{module}")
    for row in trials(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3:] or STUDIES):
        print(json.dumps(row), flush=True)
