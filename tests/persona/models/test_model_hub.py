"""Models by hub id: with a hub that answers, one that does not, and a cache."""

import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from families import save_tiny

from personatlas.persona.errors import UserError
from personatlas.persona.models.hub import hub_or_cache, require_model_name
from personatlas.persona.models.load import load_model, load_tokenizer

COMMIT = "c0ffee" + "0" * 34


class EmptyHub(BaseHTTPRequestHandler):
    """A hub without models."""

    def do_HEAD(self):
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        """Nothing on stderr."""


@pytest.fixture
def point_to(monkeypatch, tmp_path):
    """Makes a port of this machine the hub, with a cache of its own."""

    def point(port):
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        pattern = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)

    return point


@contextmanager
def silent_port():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def cached_model(tmp_path):
    """A tiny model in the hub's cache, as tiny/chat."""
    folder = tmp_path / "cache" / "models--tiny--chat"
    save_tiny(folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize("silent", [True, False])
def test_a_hub_out_of_reach_is_one_line_within_three_seconds(point_to, silent):
    with silent_port() as port:
        point_to(port if silent else 9)
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            load_tokenizer("Some/SmolLM2_135M-Instruct")
    assert time.monotonic() - start < 3
    text = str(error.value)
    near = "did you mean smollm2-135m?"
    for words in (near, "models--Some--SmolLM2_135M-Instruct", "127.0.0.1", "HF_HUB_OFFLINE"):
        assert words in text
    assert "\n" not in text


def test_without_a_hub_a_cached_model_is_read_at_once(point_to, tmp_path):
    cached_model(tmp_path)
    point_to(9)
    start = time.monotonic()
    model = load_model("tiny/chat", device="cpu")
    assert time.monotonic() - start < 20  # the hub's own client would ask it again for a minute
    assert (model.id, model.revision) == ("tiny/chat", COMMIT)
    assert not huggingface_hub.is_offline_mode()


def test_the_hub_is_asked_again_after_it_was_out_of_reach(point_to, tmp_path):
    cached_model(tmp_path)
    point_to(9)
    with hub_or_cache("tiny/chat"):
        assert huggingface_hub.is_offline_mode()
    assert not huggingface_hub.is_offline_mode()


def test_half_a_cached_model_is_not_taken_for_one(point_to, tmp_path):
    cached_model(tmp_path)
    (tmp_path / "cache" / "models--tiny--chat" / "snapshots" / COMMIT / "config.json").unlink()
    point_to(9)
    with pytest.raises(UserError, match=r"cannot load tiny/chat: .*cache"):
        load_model("tiny/chat", device="cpu")


def test_a_model_that_the_hub_does_not_have_is_one_line(point_to):
    server = ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        point_to(server.server_port)
        with pytest.raises(UserError) as error:
            load_tokenizer("nobody/nothing")
    finally:
        server.shutdown()
        server.server_close()
    assert "cannot load nobody/nothing" in str(error.value)
    assert "the model hub has none" in str(error.value)
    assert "\n" not in str(error.value)


def test_switched_off_the_hub_is_not_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids asking the hub"):
        require_model_name("nobody/nothing")


@pytest.mark.parametrize("name", ["a b", "-/-", "x..y/z", "a/b/c", "./no", "no.gguf", "~/no"])
def test_what_cannot_be_a_name_on_the_hub_asks_nobody(point_to, name):
    with silent_port() as port:
        point_to(port)
        start = time.monotonic()
        with pytest.raises(UserError):
            require_model_name(name)
        assert time.monotonic() - start < 1


def test_a_command_refuses_an_unknown_model_before_it_imports_torch(tmp_path):
    code = """
import sys
from personatlas.cli.app import main
try:
    main(["generate", "nobody/nothing", "Hello"])
except SystemExit as stop:
    assert stop.code == 2
assert "torch" not in sys.modules
"""
    path = ":".join(sys.path)
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("personatlas: cannot load nobody/nothing: ")
    assert done.stderr.count("\n") == 1
