"""`tools import` names files after what others' files hold: a name that is no file's is refused before any is written."""

import pytest
import torch

from personatlas.cli.app import main


def caps_file(path, *ids):
    steps = [{"vector": "at1", "cap": 0.5}]
    vectors = {"at1": {"layer": 1, "vector": torch.ones(8)}}
    torch.save({"vectors": vectors, "experiments": [{"id": id, "interventions": steps} for id in ids]}, path)
    return path


@pytest.mark.parametrize(
    "ids",
    [
        (".",), ("..",), ("a", "../b"), ("a\0b",), ("a/b", "a_b"), ("A", "a"), ("a" * 256,), ("é" * 127,),
        ("",), (" ",), ("a.",), ("NUL",), ("com1.p",), ("a\nb",), ("a\\b",), (".hidden",), ("\u202eabc",), ("\ud800",),
    ],
)  # fmt: skip
def test_a_cap_whose_id_is_no_file_name_is_refused_and_nothing_is_written(tmp_path, capsys, ids):
    source = caps_file(tmp_path / "caps.pt", "good", *ids)
    with pytest.raises(SystemExit) as stop:
        main(["tools", "import", "caps", str(source), "--out", str(tmp_path / "out" / "caps")])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert "rename" in error
    assert len(error) < 400
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["caps.pt"]


def test_a_slash_in_an_id_becomes_an_underscore(tmp_path, capsys):
    source = caps_file(tmp_path / "caps.pt", "window/a-p0.5", "window/b-p0.5")
    main(["tools", "import", "caps", str(source), "--out", str(tmp_path / "caps")])
    names = {path.name for path in (tmp_path / "caps").glob("*.json")}
    assert names == {"window_a-p0.5.json", "window_b-p0.5.json"}
