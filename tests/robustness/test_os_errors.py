"""Whatever the operating system refuses is one line with the path and exit status 2, and the same command resumes.

A trial takes a command, lets one system call of its own fail (the n-th that touches its folder), and runs the command
again: the result must be that of a run in which nothing failed, and no temporary file may be left.
"""

import contextlib
import errno
import os
import random
import re
import sys

import pytest
import torch
from every_command import COMMANDS, results

from personatlas.cli.app import main

CODES = [
    getattr(errno, name)
    for name in [
        "EACCES",
        "EROFS",
        "ENOSPC",
        "EDQUOT",
        "EIO",
        "ENAMETOOLONG",
        "ENOTDIR",
        "EISDIR",
        "ESTALE",
        "EMFILE",
        "EPERM",
    ]
]
LOCKING = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EWOULDBLOCK)
TOUCHING = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.scandir", "os.listdir"}
SAVING = [name for name, line in COMMANDS.items() if " out" in line or line.startswith(("run ", "calibrate"))]
SIZES = (0, 100, 1000, 4000, 20_000, 100_000)
QUICK = ["run judge", "run record", "train tokenizer", "train base", "train export", "roles --export"]
QUICK += [name for name in COMMANDS if name.startswith("tools import")]  # less than two seconds


class Fault:
    """Lets the n-th call fail that touches the folder, or the n-th lock; counts them otherwise."""

    folder = None

    def __init__(self):
        sys.addaudithook(self)

    @contextlib.contextmanager
    def at(self, folder, number=-1, code=errno.EIO, *, locks=False):
        self.folder, self.number, self.code, self.locks = str(folder), number, code, locks
        self.calls, self.fired = [], None
        try:
            yield self
        finally:
            self.folder = None

    def __call__(self, event, arguments):
        if self.folder is None or (event != "fcntl.flock" if self.locks else event not in TOUCHING):
            return
        path = None if self.locks else arguments[0]
        if not self.locks:
            if not isinstance(path, (str, bytes, os.PathLike)):
                return
            path = os.fsdecode(path)
            if not os.path.join(os.getcwd(), path).startswith(self.folder):
                return
        self.calls.append((event, re.sub("[0-9a-f]{12}|[0-9]+", "N", str(path))))
        if len(self.calls) == self.number:
            self.fired = f"{event} {path}"
            raise OSError(self.code, os.strerror(self.code), *([] if self.locks else [path]))


@pytest.fixture(scope="session")
def fault():
    return Fault()


def run(name, capsys):
    """Exit status and stderr of a command; anything but SystemExit fails the test as the traceback that it is."""
    capsys.readouterr()
    torch.set_num_threads(1)  # training sets its own
    status = 0
    try:
        main(COMMANDS[name].split())
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


def is_one_line(status, error):
    said = [line for line in error.splitlines() if line.startswith("personatlas: ")]
    return status == 2 and len(said) == 1 and error.endswith(said[0] + "\n") and "Traceback" not in error


def temporary_files(folder):
    return [path for path in folder.rglob(".*") if re.fullmatch(r"\..*", path.name)]


@pytest.fixture(scope="session")
def references():
    return {}


def reference(name, workbench, fault, capsys, references):
    """What a command leaves in its folder when nothing fails, and the numbers of its calls there: the first of
    each kind of call and file.
    """
    if name not in references:
        folder = workbench()
        with fault.at(folder) as counted:
            status, error = run(name, capsys)
        assert status == 0, error
        assert not temporary_files(folder)
        references[name] = (
            results(folder),
            [counted.calls.index(call) + 1 for call in dict.fromkeys(counted.calls)],
        )
    return references[name]


def assert_resumes(name, folder, capsys, wanted):
    """The same command again gives what an undisturbed run gives, and leaves nothing behind."""
    status, error = run(name, capsys)
    finished = "is already there" in error or "exists and is not an empty folder" in error
    assert status == 0 or finished, error
    assert not temporary_files(folder)
    found = results(folder)
    assert found.keys() == wanted.keys()
    for path in found:
        assert found[path] == wanted[path], path


def trial(name, number, code, workbench, fault, capsys, wanted, *, locks=False):
    folder = workbench()
    with fault.at(folder, number, code, locks=locks):
        status, error = run(name, capsys)
    where = f"{name}: {errno.errorcode[code]} at call {number}, {fault.fired}: exit {status}, {error[-600:]}"
    assert status == 0 or is_one_line(status, error), where
    assert_resumes(name, folder, capsys, wanted)
    return fault.fired is not None


@pytest.mark.parametrize("name", QUICK)
def test_a_call_that_fails_is_one_line_and_the_command_resumes(name, workbench, fault, capsys, references):
    wanted, numbers = reference(name, workbench, fault, capsys, references)
    drawn = random.Random(name)
    trial(name, drawn.choice(numbers), drawn.choice(CODES), workbench, fault, capsys, wanted)


@pytest.mark.robustness
@pytest.mark.parametrize("name", COMMANDS)
def test_every_call_that_fails_is_one_line_and_the_command_resumes(
    name, workbench, fault, capsys, references
):
    (wanted, numbers), drawn = reference(name, workbench, fault, capsys, references), random.Random(name)
    for number in numbers:
        trial(name, number, drawn.choice(CODES), workbench, fault, capsys, wanted)


@pytest.mark.robustness
@pytest.mark.parametrize("name", SAVING)
def test_a_file_system_without_locks_is_one_line_or_makes_no_difference(
    name, workbench, fault, capsys, references
):
    wanted, _ = reference(name, workbench, fault, capsys, references)
    for code in LOCKING:
        trial(name, 1, code, workbench, fault, capsys, wanted, locks=True)
