"""The server as a process: how it starts, what clients who behave badly do to it, and how it ends."""

import json
import shutil
import signal
import socket
import time

import httpx
import pytest
from server_process import START, ServerProcess

from personatlas.cli.app import main

HI = {"messages": [{"role": "user", "content": "Who are you?"}]}


IMPATIENT = (
    "from personatlas.steering.serve.http import uvicorn_server as server; server.ANSWER_SECONDS = 0.0; "
    + START
)


def streamed(url, **more):
    """Data objects of a stream, in order."""
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json={**HI, "stream": True, **more}, timeout=60
    ) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def metric(url, name):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def wait_for(what, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def processes(tiny_run, tmp_path_factory):
    """Two servers that start at the same time: a patient one without a key, from a copy of the model, and one with a key."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny_run, folder, dirs_exist_ok=True)
    with (
        ServerProcess(folder, "--context", "512", "--max-new-tokens", "400") as patient,
        ServerProcess(tiny_run, start=IMPATIENT, PERSONATLAS_API_KEY="a-key-of-ours") as with_key,
    ):
        yield (*patient.wait(), folder), with_key.wait()


@pytest.fixture(scope="module")
def shared(processes):
    """The patient one; one of the tests deletes its model, and the last one ends it."""
    return processes[0]


def test_a_client_who_leaves_stops_the_work(shared):
    _, url, _ = shared
    before = metric(url, "personatlas_cancelled_total")
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json={**HI, "stream": True, "max_tokens": 450}
    ) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json={**HI, "max_tokens": 450, "n": 16}, timeout=0.3)
    wait_for(lambda: metric(url, "personatlas_running") == 0 and metric(url, "personatlas_queue") == 0)
    assert metric(url, "personatlas_cancelled_total") >= before + 1


def test_idle_connections_and_a_slow_reader_hold_up_nobody(shared):
    _, url, _ = shared
    port = int(url.rpartition(":")[2])
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(400)]
    body = json.dumps({**HI, "stream": True, "max_tokens": 300, "persona": {"per_token": True}}).encode()
    slow = socket.create_connection(("127.0.0.1", port))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
    assert len(slow.recv(1)) == 1
    began = time.monotonic()
    assert streamed(url, max_tokens=20)[-1] == "[DONE]"
    assert time.monotonic() - began < 20
    wait_for(
        lambda: metric(url, "personatlas_running") == 0, 60
    )  # the slow one's answer is made, and waits for it
    for one in (slow, *idle):
        one.close()
    assert streamed(url, max_tokens=5)[-1] == "[DONE]"


def test_the_models_folder_may_vanish_under_it(shared):
    _, url, folder = shared
    shutil.rmtree(folder / "tiny")
    shutil.rmtree(folder / "run")
    assert streamed(url, max_tokens=5, persona={"cap": "p50@0"})[-1] == "[DONE]"
    assert httpx.get(url).status_code == 200
    assert httpx.get(f"{url}/v1/axis").json()["context"] == 512


def told_to_end(process, url, how, headers=None, **more):
    """The last line of a stream whose server is told to end in the middle, and how the process ended."""
    lines = []
    asked = {**HI, "stream": True, **more}
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=asked, timeout=60, headers=headers
    ) as answer:
        for line in answer.iter_lines():
            if not lines:
                process.send_signal(how)
                told = time.monotonic()
            lines.append(line)
    assert time.monotonic() - told < 10
    assert process.wait(20) in (0, -how, 130)  # on a busy machine the interpreter itself takes seconds to end
    assert "Traceback" not in process.stderr.read()
    return [line for line in lines if line][-1]


def test_told_to_end_it_lets_answers_end(shared):
    process, url, _ = shared
    assert told_to_end(process, url, signal.SIGTERM, max_tokens=60) == "data: [DONE]"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "set PERSONATLAS_API_KEY"),
        (["--port", "0"], "--port 0 is outside"),
        (["--host", "999.1.1.1"], "set PERSONATLAS_API_KEY"),
        (["--arm", "cap:nosuch"], "is not a name"),
        (["--arm", "cap:adaptive"], "an adaptive arm needs a calibrated alarm"),
        (["--slots", "0"], "--slots 0 is below 1"),
        (["--context", "5"], "--context 5 is below 16"),
        (["--context", "999999"], "is more than the"),
        (["--temperature", "-1"], "temperature -1.0 is outside"),
        (["--false-alarms", "2"], "--false-alarms 2.0 is outside"),
        (["--reference", "nosuch.json"], "nosuch.json"),
    ],
)
def test_what_cannot_be_served_is_one_line(tiny_run, capsys, monkeypatch, options, said):
    monkeypatch.delenv("PERSONATLAS_API_KEY", raising=False)
    with pytest.raises(SystemExit) as left:
        main(["serve", str(tiny_run / "tiny"), "--axis", str(tiny_run / "run"), "--device", "cpu", *options])
    assert left.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("personatlas: ")]
    assert said in line


def test_a_taken_port_is_found_before_the_model_is_loaded(tiny_run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit):
            main(
                [
                    "serve",
                    str(tiny_run / "tiny"),
                    "--axis",
                    str(tiny_run / "run"),
                    "--port",
                    str(taken.getsockname()[1]),
                ]
            )
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_with_a_key_everything_but_the_page_needs_it_and_what_does_not_end_is_cut(processes):
    process, url = processes[1]
    for path in ("/v1/models", "/v1/axis", "/metrics"):
        assert httpx.get(url + path).json()["error"]["code"] == "invalid_api_key"
        wrong = httpx.get(url + path, headers={"authorization": "Bearer a-key-of-theirs"})
        assert (wrong.status_code, wrong.headers["www-authenticate"]) == (401, "Bearer")
        assert httpx.get(url + path, headers={"authorization": "Bearer a-key-of-ours"}).status_code == 200
    assert httpx.get(url).status_code == 200
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    other = httpx.get(f"{url}/healthz", headers={"host": "elsewhere.example"})
    assert other.status_code == 200  # with a key it may be reached by any name
    key = {"authorization": "Bearer a-key-of-ours"}
    assert "the server is ending" in told_to_end(process, url, signal.SIGINT, key, max_tokens=450, n=16)
