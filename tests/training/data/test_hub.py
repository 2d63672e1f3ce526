"""Data sets of a hub as corpora: the real client against a small hub of our own, and without any."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub.constants
import pytest
from corpora import write_parquet

from personatlas.cli.app import main
from personatlas.persona.errors import UserError
from personatlas.training.data.corpus import Corpus, locate_corpus

COMMIT = "c0ffee" + "0" * 34
NAME = "someone/stories"


class Hub(BaseHTTPRequestHandler):
    """Answers for one data set, its branch main and its commit; everything else is not there."""

    files: dict[str, bytes]
    asked: list[str]

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(f"{self.command} {path}")
        api, resolve = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/{COMMIT}/"
        if path.startswith("/api/datasets/gated/"):
            self._refuse(403, "GatedRepo")
        elif path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self._send(json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"{api}/revision/"):
            self._refuse(404, "RevisionNotFound")
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self._send(json.dumps(rows).encode())
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.files:
            self._send(self.files[path.removeprefix(resolve)])
        else:
            self._refuse(404, "RepoNotFound")

    do_GET = do_HEAD = _answer

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def point_to(monkeypatch, port):
    at = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", at)
    pattern = at + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)


def unreachable(monkeypatch):
    point_to(monkeypatch, 9)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine with one data set, and an empty cache."""
    write_parquet(tmp_path / "t.parquet", [f"a row of the table, number {n}" for n in range(30)])
    Hub.asked = []
    Hub.files = {
        "README.md": b"# stories",
        "load.py": b"raise SystemExit",
        "data/train/one.txt": b"once upon a time " * 40,
        "data/train/two.jsonl": b'{"text": "there was a king"}\n' * 20,
        "data/test/three.txt": b"the end",
        "table.parquet": (tmp_path / "t.parquet").read_bytes(),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_to(monkeypatch, server.server_port)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def documents(corpus):
    return {piece.document.split(":")[0] for piece in corpus.pieces()}


def test_a_data_set_is_fetched_once_and_only_what_can_be_read(hub, monkeypatch):
    first = Corpus.open(Path(f"hub:{NAME}"), held_share=0.1)
    assert documents(first) == {
        "data/train/one.txt",
        "data/train/two.jsonl",
        "data/test/three.txt",
        "table.parquet",
    }
    fetched = [asked for asked in Hub.asked if asked.startswith("GET /datasets/")]
    assert len(fetched) == 4
    assert not any("load.py" in asked or "README" in asked for asked in Hub.asked)
    unreachable(monkeypatch)
    assert Corpus.open(Path(f"hub:{NAME}"), held_share=0.1).digest == first.digest


def test_a_folder_or_a_file_of_it_can_be_named_and_a_revision(hub):
    assert documents(Corpus.open(Path(f"hub:{NAME}/data/train"))) == {"one.txt", "two.jsonl"}
    assert not any("table" in asked or "test" in asked for asked in Hub.asked)
    assert documents(Corpus.open(Path(f"hub:{NAME}/table.parquet@{COMMIT}"))) == {"table.parquet"}
    both = Corpus.open(Path(f"hub:{NAME}/data/train"), held_out=Path(f"hub:{NAME}/data/test@main"))
    assert documents(both) == {"one.txt", "two.jsonl", "/held-out/three.txt"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hub:nobody/nothing", "there is no such data set, or it is private"),
        ("hub:gated/one", "it must be asked for on its page first"),
        (f"hub:{NAME}@v9", "it has no revision v9"),
        (f"hub:{NAME}/pictures", "the data set has no files at pictures to read; allowed: .txt"),
        ("hub:alone", "is not hub:OWNER/NAME"),
        ("hub:some one/else", "is not hub:OWNER/NAME"),
        ("hub:-bad-/..name", "alphanumeric"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_one_line(hub, name, words):
    with pytest.raises(UserError) as error:
        Corpus.open(Path(name))
    assert words in str(error.value)
    assert str(error.value).startswith(f"--corpus {name}")
    assert "\n" not in str(error.value)


def test_without_the_hub_the_answer_comes_at_once_and_half_a_data_set_is_not_taken_for_one(hub, monkeypatch):
    locate_corpus(Path(f"hub:{NAME}/data/train"))
    unreachable(monkeypatch)
    start = time.monotonic()
    for name, words in (
        ("hub:nobody/nothing", "the hub cannot be reached, and it is not in the cache"),
        (f"hub:{NAME}", "only a part of it is in the cache, and the hub cannot be reached"),
    ):
        with pytest.raises(UserError, match=words):
            Corpus.open(Path(name))
    assert time.monotonic() - start < 5


def test_a_path_stays_as_it_is_and_asks_nobody(hub, tmp_path):
    assert locate_corpus(tmp_path / "books") == tmp_path / "books"
    assert Hub.asked == []


def test_the_verbs_take_data_sets(hub, tmp_path, capsys):
    main(["train", "plan", "--depth", "2", "--corpus", f"hub:{NAME}", "--tokens", "1000000"])
    assert "bytes, about" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "tokenizer", "--corpus", "hub:nobody/nothing", "--out", str(tmp_path / "tokenizer")])
    assert "--corpus hub:nobody/nothing: there is no such data set" in capsys.readouterr().err
    assert not (tmp_path / "tokenizer").exists()
