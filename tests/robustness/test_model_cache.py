"""The cache of dequantised models: what is not as it was written is made again, and nothing of a killed process stays."""

import fcntl
import os
import shutil
import threading

import numpy as np
import pytest
from exported import exported_in

from personatlas.persona.artifacts import read_json, write_json
from personatlas.persona.models.load import load_model
from personatlas.training.export.gguf import write_gguf


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A GGUF file and the cache with its folder."""
    folder = tmp_path_factory.mktemp("gguf")
    path = write_gguf(exported_in(folder), folder / "model.gguf", "f32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSONATLAS_CACHE", str(folder / "cache"))
        load_model(str(path), device="cpu", dtype="float32")
    return path, folder / "cache"


@pytest.fixture
def cache(made, tmp_path, monkeypatch):
    """A copy of that cache, which a test may damage."""
    monkeypatch.setenv("PERSONATLAS_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(made[1], tmp_path / "cache")


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(path):
    return load_model(str(path), device="cpu", dtype="float32")


def overwrite_values(folder):
    values = np.memmap(folder / "model.safetensors", np.uint8, "r+")
    values[-4000::40] ^= 1  # the lowest bits of 100 weights
    values.flush()


def flip_one_bit_and_keep_the_time(folder):
    path = folder / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def drop_a_value(folder):
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 4)


def edit_the_config(folder):
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "rms_norm_eps": 0.5})


def remove_the_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def add_a_template(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")


def cut_the_record(folder):
    (folder / "source.json").write_text('{"sha256": ')


def make_it_by_an_earlier_version(folder):
    record = read_json(folder / "source.json")
    del record["files"]
    write_json(folder / "source.json", record)


@pytest.mark.parametrize(
    "damage",
    [
        overwrite_values,
        flip_one_bit_and_keep_the_time,
        drop_a_value,
        edit_the_config,
        remove_the_tokenizer,
        add_a_template,
        cut_the_record,
        make_it_by_an_earlier_version,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_folder_that_is_not_as_it_was_written_is_made_again_and_said(made, cache, capsys, damage):
    path, _ = made
    before = content(cache)
    damage(next(cache.glob("gguf-*")))
    assert content(cache) != before
    capsys.readouterr()
    load(path)
    assert capsys.readouterr().err.count("is not as it was written: it is made again") == 1
    assert content(cache) == before
    load(path)
    assert capsys.readouterr().err == ""


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_stay(made, cache):
    path, _ = made
    dead, alive, foreign = (
        cache / f".smollm2-135m.{hex}" for hex in ("0123456789ab", "abcdef012345", "notes")
    )
    for folder in (dead, alive, foreign):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    (cache / ".smollm2-135m.000000000000").touch()  # its lock
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    load(path)
    assert sorted(cache.glob(".*")) == sorted([alive, foreign])
    os.close(descriptor)
    load(path)
    assert list(cache.glob(".*")) == [foreign]


def test_processes_that_come_at_once_make_it_once(made, tmp_path, monkeypatch):
    from personatlas.persona.models import packaged

    monkeypatch.setenv("PERSONATLAS_CACHE", str(tmp_path / "cache"))
    calls, dequantise = [], packaged._dequantise
    monkeypatch.setattr(packaged, "_dequantise", lambda *given: (calls.append(given), dequantise(*given))[1])
    threads = [threading.Thread(target=packaged.gguf_folder, args=(made[0],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert not list((tmp_path / "cache").glob(".*"))
    assert content(tmp_path / "cache") == content(made[1])
