"""Artefacts and logs survive crashes, full disks and damage, and do not depend on the process that wrote them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from personatlas.persona.artifacts import atomic, load_tensors, read_json, save_tensors, write_json
from personatlas.persona.errors import UserError
from personatlas.persona.logs import append_lines, read_lines

WINDOW = 1 << 16  # what append_lines reads at a time when it looks for the last newline


def artefact(folder: Path, value: float = 1.0) -> Path:
    """An artefact of kind "thing" in `folder`; its stem."""
    save_tensors(folder / "thing", {"v": torch.full((3, 4), value)}, {"kind": "thing", "layers": [1, 2, 3]})
    return folder / "thing"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


def test_tensors_and_meta_come_back_as_they_were(tmp_path):
    tensors = {
        "half": torch.randn(2, 3).bfloat16(),
        "count": torch.arange(4),
        "empty": torch.empty(0, 5),
        "strided": torch.randn(4, 6).T,
        "infinite": torch.tensor([float("-inf"), float("nan")]),
    }
    meta = {"kind": "thing", "name": "naïve \u2028 ☃", "nothing": None, "nested": {"b": [1, 2.5], "a": True}}
    save_tensors(tmp_path / "thing.v1", tensors, meta)
    loaded, loaded_meta = load_tensors(tmp_path / "thing.v1", "thing")
    assert loaded_meta == {**meta, "format": 1}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing.v1.json", "thing.v1.safetensors"]


def test_equal_content_gives_equal_bytes_in_every_process(tmp_path):
    code = """
import sys, torch
from pathlib import Path
from personatlas.persona.artifacts import save_tensors
names = sys.argv[2].split(",")
tensors = {name: torch.arange(6).reshape(2, 3) * len(name) for name in names}
meta = {"kind": "thing", **{name: {n: sorted({n, "x"}) for n in names} for name in names}}
save_tensors(Path(sys.argv[1]), tensors, meta)
"""
    orders = {"0": "alpha,be,gamma,d,epsilon", "1": "epsilon,d,gamma,be,alpha"}
    processes = [
        python(code, str(tmp_path / seed), names, PYTHONHASHSEED=seed) for seed, names in orders.items()
    ]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    for suffix in (".safetensors", ".json"):
        assert (tmp_path / f"0{suffix}").read_bytes() == (tmp_path / f"1{suffix}").read_bytes()


@pytest.mark.parametrize("failure", [RuntimeError, OSError, KeyboardInterrupt])
def test_a_failure_inside_atomic_leaves_the_old_file_and_no_temporary(tmp_path, failure):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(failure), atomic(path) as temporary:  # noqa: PT012 (the write before the failure is the point)
        temporary.write_text("new, half of")
        raise failure
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_atomic_replaces_the_file_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert leftovers(tmp_path) == []


def test_written_files_have_the_permissions_that_the_umask_gives(tmp_path):
    # they were 0600 whatever the umask, so that nobody else could read a run folder on a shared machine
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "file.json", {})
        artefact(tmp_path)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o640"}


def test_the_json_of_an_artefact_is_renamed_last(tmp_path, monkeypatch):
    renamed: list[str] = []
    replace = Path.replace

    def noting(self: Path, to: Path) -> Path:
        renamed.append(to.suffix)
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", noting)
    artefact(tmp_path)
    assert renamed == [".safetensors", ".json"]


def crash_before_the_json(monkeypatch):
    replace = Path.replace

    def dying(self: Path, to: Path) -> Path:
        if to.suffix == ".json":
            raise KeyboardInterrupt
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", dying)


def test_an_artefact_without_its_json_was_never_finished(tmp_path, monkeypatch):
    crash_before_the_json(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        artefact(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thing.safetensors"]
    with pytest.raises(UserError, match=r"thing\.json does not exist: the artefact was never finished"):
        load_tensors(tmp_path / "thing", "thing")


def test_an_artefact_that_was_half_replaced_is_refused(tmp_path, monkeypatch):
    stem = artefact(tmp_path, 1.0)
    with monkeypatch.context() as patch:
        crash_before_the_json(patch)
        with pytest.raises(KeyboardInterrupt):
            artefact(tmp_path, 2.0)
    with pytest.raises(UserError, match="damaged or half replaced"):
        load_tensors(stem, "thing")
    artefact(tmp_path, 2.0)
    assert load_tensors(stem, "thing")[0]["v"][0, 0] == 2.0


def test_a_damaged_byte_anywhere_is_detected(tmp_path):
    stem = artefact(tmp_path)
    path = tmp_path / "thing.safetensors"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(UserError, match="does not match the hash"):
            load_tensors(stem, "thing")
    path.write_bytes(content)
    load_tensors(stem, "thing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "is of kind 'other', not 'thing'"),
        ({"format": 2}, "has format 2; this version reads 1"),
        ({"sha256": None}, "does not match the hash"),
    ],
)
def test_an_artefact_of_another_kind_or_format_is_refused(tmp_path, change, message):
    stem = artefact(tmp_path)
    write_json(tmp_path / "thing.json", {**read_json(tmp_path / "thing.json"), **change})
    with pytest.raises(UserError, match=message):
        load_tensors(stem, "thing")


def test_json_that_is_no_object_is_refused_in_one_line(tmp_path):
    # a list once ended in an AttributeError
    stem = artefact(tmp_path)
    (tmp_path / "thing.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"thing\.json is a list of 2, not an object"):
        load_tensors(stem, "thing")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", torch.zeros(3).numpy().tobytes() * 9])
def test_a_tensor_file_that_is_none_is_refused_even_with_the_right_hash(tmp_path, content):
    stem = artefact(tmp_path)
    (tmp_path / "thing.safetensors").write_bytes(content)
    record = {**read_json(tmp_path / "thing.json"), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(tmp_path / "thing.json", record)
    with pytest.raises(UserError, match="is not a readable artefact"):
        load_tensors(stem, "thing")


def test_nan_is_refused_in_meta_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_tensors(tmp_path / "thing", {}, {"kind": "thing", "level": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "thing.json", [float("inf")])
    assert list(tmp_path.iterdir()) == []


def test_json_errors_name_the_file_and_the_line(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"a\.json does not exist"):
        read_json(path)
    path.write_text('{\n"a": 1,\n}')
    with pytest.raises(UserError, match=r"a\.json is not valid JSON: .* line [23] "):
        read_json(path)
    path.write_bytes(b'"\xff"')
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        read_json(path)


ROWS = [{"n": 0, "text": "plain"}, {"n": 1, "text": "line\nbreak \u2028 and ☃"}, {"n": 2, "text": ""}]


def test_a_log_gives_back_its_rows_and_a_missing_log_is_empty(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == []
    append_lines(path, ROWS[:1])
    append_lines(path, iter(ROWS[1:]))
    append_lines(path, [])
    assert read_lines(path) == ROWS
    assert path.read_bytes().count(b"\n") == 3


def test_a_log_cut_at_any_byte_keeps_its_whole_lines_and_can_be_continued(tmp_path):
    path = tmp_path / "log.jsonl"
    append_lines(path, ROWS)
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = ROWS[: content[:cut].count(b"\n")]
        assert read_lines(path) == whole
        append_lines(path, [{"n": "next"}], sync=bool(cut % 2))
        assert read_lines(path) == [*whole, {"n": "next"}]


@pytest.mark.parametrize("damage", [b'{"n": 1, "text', b"", b"\xff\xfe", b'{"n": 1}{"n": 2}'])
def test_damage_in_the_middle_of_a_log_is_named_with_its_line(tmp_path, damage):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n": 0}\n' + damage + b'\n{"n": 2}\n')
    with pytest.raises(UserError, match=r"log\.jsonl:2 is damaged"):
        read_lines(path)


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1, 200_000])
def test_lines_longer_than_the_window_are_kept_and_their_halves_cut(tmp_path, length):
    path = tmp_path / "log.jsonl"
    line = b'{"t": "' + b"x" * (length - 10) + b'"}\n'
    assert len(line) == length
    for before, half in [
        (b"", line[:-1]),
        (line, b""),
        (line, b'{"t'),
        (b'{"a": 1}\n', line[:-1]),
        (line, line[:-1]),
    ]:
        path.write_bytes(before + half)
        append_lines(path, [{"n": "next"}])
        assert path.read_bytes() == before + b'{"n": "next"}\n'


def test_a_log_row_holding_nan_is_refused_and_writes_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    append_lines(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_lines(path, [{"n": 3}, {"n": float("nan")}])
    assert path.read_bytes() == before


FULL_DISK = """
import json, resource, signal, sys, torch
from pathlib import Path
from personatlas.persona.artifacts import save_tensors, write_json
from personatlas.persona.logs import append_lines

folder, limit = Path(sys.argv[1]), 4096
save_tensors(folder / "thing", {"v": torch.ones(3)}, {"kind": "thing", "layers": [1]})
write_json(folder / "plain.json", {"old": True})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def fails(act):
    try:
        act()
    except OSError as error:
        return type(error).__name__
    return None

n, found = 0, {}
while fails(lambda: append_lines(folder / "log.jsonl", [{"n": n, "text": "x" * 700}])) is None:
    n += 1
found["appended"] = n
found["several"] = fails(lambda: append_lines(folder / "log.jsonl", [{"n": n}, {"n": n + 1, "text": "y" * 3000}]))
found["large"] = fails(lambda: append_lines(folder / "log.jsonl", [{"n": n, "text": "z" * 300_000}]))
meta = {"kind": "thing", "layers": list(range(600))}
found["tensors"] = fails(lambda: save_tensors(folder / "thing", {"v": torch.zeros(5000)}, {"kind": "thing"}))
found["json"] = fails(lambda: save_tensors(folder / "thing", {"v": torch.zeros(3)}, meta))
found["plain"] = fails(lambda: write_json(folder / "plain.json", list(range(5000))))
print(json.dumps(found))
"""


def test_a_full_disk_loses_only_what_did_not_fit(tmp_path):
    # a file-size limit stands for the full disk: the write that crosses it is cut short, then refused
    process = python(FULL_DISK, str(tmp_path))
    output, _ = process.communicate()
    assert process.returncode == 0
    found = json.loads(output)
    appended = found.pop("appended")
    assert appended == 5
    assert set(found.values()) == {"OSError"}

    log = tmp_path / "log.jsonl"
    assert [row["n"] for row in read_lines(log)] == list(range(appended))
    assert log.read_bytes().endswith(
        b"\n"
    )  # half a line was left: truncating a buffered file flushes it first
    append_lines(log, [{"n": appended}])
    assert [row["n"] for row in read_lines(log)] == list(range(appended + 1))

    tensors, meta = load_tensors(
        tmp_path / "thing", "thing"
    )  # its JSON did not fit once: the tensors stayed, too
    assert tensors["v"].tolist() == [1, 1, 1]
    assert meta["layers"] == [1]
    assert read_json(tmp_path / "plain.json") == {"old": True}
    assert leftovers(tmp_path) == []
