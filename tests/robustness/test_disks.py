"""Real disks and processes: a second process, unreadable and read-only folders, a full disk, streams that are closed."""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest
from every_command import COMMANDS, INPUTS, results
from test_os_errors import is_one_line, run, temporary_files

from personatlas.persona.artifacts import LOCK, locked

OUTPUTS = {name: "run" if line.startswith(("run fit", "run report", "calibrate")) else "rolled" if "rolled" in line else "out"
           for name, line in COMMANDS.items() if " out" in line or line.startswith(("run ", "calibrate"))}  # fmt: skip
RUNS = [
    name for name in OUTPUTS if not name.startswith(("roles", "tools", "generate", "trace", "train export"))
]
QUICK = ["run judge", "run report", "train tokenizer", "train base", "tools import caps", "roles --export"]
is_root = os.geteuid() == 0
needs_mount = pytest.mark.skipif(not is_root or shutil.which("mount") is None, reason="only root may mount")


def refused(name, capsys, *words):
    """The one line with which a command ends, in a folder that it leaves as it was but for whole files."""
    status, error = run(name, capsys)
    assert is_one_line(status, error), (name, status, error)
    assert all(word in error for word in words), error
    return error


@pytest.mark.parametrize("name", [*RUNS, "train export"])
def test_a_second_process_on_the_same_output_is_refused_and_changes_nothing(name, workbench, capsys):
    folder = workbench()
    out = folder / OUTPUTS[name]
    if name == "train tokenizer" or name == "train export":
        lock = None
    else:
        out.mkdir(exist_ok=True)
        lock = out / ".lock"
    with locked(out, lock=lock):
        before = results(folder)
        assert "in use by another process" in refused(name, capsys, OUTPUTS[name])
        assert results(folder) == before
    assert not [path for path in temporary_files(folder) if path.name.endswith(LOCK)]


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name, paths in INPUTS.items() for path in paths if "corpus" not in path],
    ids=str,
)
def test_a_folder_where_an_input_should_be_a_file_is_one_line(name, path, workbench, capsys):
    folder = workbench()
    (folder / path).unlink()
    (folder / path).mkdir()
    status, error = run(name, capsys)
    assert is_one_line(status, error), (name, path, status, error)
    assert not temporary_files(folder)


@pytest.mark.robustness
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_file_where_an_output_folder_should_be_or_the_reverse_is_one_line(name, workbench, capsys):
    folder = workbench()
    out = folder / OUTPUTS[name]
    if OUTPUTS[name] != "out":
        shutil.rmtree(out)
        out.write_text("a file")
    elif "out.html" in COMMANDS[name]:
        (folder / "out.html").mkdir()
    elif name in ("tools import axis", "tools harm-judge fit"):
        (folder / "out.json").mkdir()
        (folder / "out.safetensors").mkdir()
    else:
        out.write_text("a file")
    before = results(folder)
    refused(name, capsys)
    assert results(folder) == before


@pytest.mark.robustness
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_name_that_is_too_long_is_one_line(name, workbench, capsys, monkeypatch):
    folder = workbench()
    if OUTPUTS[name] != "out":
        pytest.skip("it writes into a folder that is there")
    monkeypatch.setitem(COMMANDS, name, COMMANDS[name].replace(" out", " " + "o" * 300))
    before = results(folder)
    refused(name, capsys, "the name is too long")
    assert results(folder) == before


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a file system, which is unmounted at the end."""
    points = []

    def mount(folder, *arguments):
        folder.mkdir(exist_ok=True)
        if subprocess.run(["mount", *arguments, str(folder)], capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        points.append(folder)

    yield mount
    for point in reversed(points):
        subprocess.run(["umount", "-l", str(point)], check=True)


@pytest.mark.robustness
@needs_mount
@pytest.mark.parametrize("name", QUICK)
def test_a_read_only_file_system_is_one_line(name, workbench, capsys, mounted):
    folder = workbench()
    mounted(folder, "--bind", str(folder))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    os.chdir(folder)
    refused(name, capsys, "read-only")


@pytest.mark.robustness
@needs_mount
@pytest.mark.parametrize("name", QUICK)
def test_a_full_disk_is_one_line_and_the_command_resumes_when_there_is_room(
    name, workbench, capsys, mounted, tmp_path
):
    folder, small = workbench(), tmp_path / "small"
    mounted(small, "-t", "tmpfs", "-o", "size=64m", "tmpfs")
    shutil.copytree(folder, small, dirs_exist_ok=True)
    os.chdir(small)
    with (small / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"0" * 4096):
            pass
    refused(name, capsys, "the disk is full")
    assert not temporary_files(small)
    (small / "filler").unlink()
    status, error = run(name, capsys)
    assert status == 0, error
    os.chdir(folder)


@pytest.mark.robustness
@pytest.mark.skipif(not is_root or shutil.which("setpriv") is None, reason="only root may be another user")
@pytest.mark.parametrize("name", ["tools show", "roles --check", "train tokenizer"])
def test_another_user_who_may_not_read_or_write_gets_one_line(name, workbench):
    """Permissions do not bind root, so the command runs as another user."""
    folder = workbench()
    for parent in (folder, *folder.parents):
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o711)
    for path in INPUTS[name]:
        (folder / path).chmod(0)
    user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    command = [*user, sys.executable, "-m", "personatlas", *COMMANDS[name].split()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HOME": "/nonexistent"})
    if "No module named" in done.stderr or "can't open file" in done.stderr:
        pytest.skip("that user cannot read the package")
    assert is_one_line(done.returncode, done.stderr), done.stderr
    assert "permission denied" in done.stderr


@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        ("roles --json | head -1 > /dev/null; exit ${PIPESTATUS[0]}", 141, ""),
        ("roles --json > /dev/full", 2, "personatlas: standard output: the disk is full"),
        ("roles --json >&-", 0, ""),
        ("roles --json <&- > /dev/null", 0, ""),
        ("roles --json > /dev/null 2>&-", 0, ""),
    ],
)
def test_standard_streams_that_are_closed_or_full_are_quiet_or_one_line(shell, status, said):
    line = f"{sys.executable} -m personatlas {shell}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)
