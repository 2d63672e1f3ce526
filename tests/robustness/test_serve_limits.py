"""A server under clients that send anything, slowly, too much, or all at once: it refuses, closes, and answers the others."""

import asyncio
import json
import random
import socket
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from serving import ROOM, axis_folder, served, tiny_service

from personatlas.steering.serve.http import uvicorn_server
from personatlas.steering.serve.http.security import MAX_BODY

full = pytest.mark.robustness
HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
KEY = "a key of ours"
PAGE = "https://chat.example"


@pytest.fixture(scope="module")
def server(tiny_run, tmp_path_factory):
    folder = axis_folder(tiny_run, tmp_path_factory.mktemp("limits"))
    room = replace(ROOM, slots=16, prefix_mib=4)
    with served(tiny_service(tiny_run, folder, room=room)) as one:
        yield one


def ask(server, route="chat/completions", **body):
    return httpx.post(f"{server.v1}/{route}", json=body, timeout=60)


def require_alive(server):
    answer = ask(server, **HI, temperature=0)
    assert answer.status_code == 200, answer.text


# Anything

VALUES = (
    None, True, False, 0, -1, 1, 2, 100, 10**30, -(10**30), 0.5, -0.0, 1e308, 1e-300, "", "x", "\ud800", "é" * 300, "none",
    [], [""], ["a"] * 17, [[]], [None], [0, -1], {}, {"a": {}}, {"type": "json_object"}, {"name": "held"}, [{"type": "function"}],
    [{"role": "user", "content": "Hi"}], [{"role": "user", "content": None}], [{"role": "ghost", "content": "Hi"}],
    [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "tool", "content": "x", "tool_call_id": "1"}], [{"role": "assistant", "content": "x"}] * 30, [{"role": "user"}],
    {"cap": "held"}, {"cap": {"level": "p50", "layers": "0"}}, {"cap": "../x"}, {"per_token": True}, {"mode": "adaptive"},
    [1, 2, 3], [[1], [2]], ["Hi", [5]], "x" * 5000, [10**9], {"include_usage": True},
)  # fmt: skip
FIELDS = (
    "messages", "prompt", "model", "stream", "stream_options", "n", "stop", "seed", "temperature", "top_p", "max_tokens",
    "max_completion_tokens", "presence_penalty", "logit_bias", "persona", "logprobs", "top_logprobs", "tools", "tool_choice",
    "functions", "response_format", "echo", "suffix", "best_of", "user", "unknown",
)  # fmt: skip

GOOD = {
    "messages": [{"role": "user", "content": "Hi"}], "prompt": ["Hi", "Ho"], "stream": True, "n": 2, "stop": ["", "x"], "seed": -5,
    "temperature": 2, "top_p": 0, "max_tokens": -1, "max_completion_tokens": 10**6, "logprobs": True, "top_logprobs": 3,
    "echo": True, "persona": {"cap": "held", "per_token": True}, "stream_options": {"include_usage": True}, "tools": [],
}  # fmt: skip


def random_body(random_):
    body = {"max_tokens": 2, **random_.choice(({"prompt": "Hi"}, {"messages": HI["messages"]}, {}))}
    for field in random_.sample(FIELDS, random_.randint(0, 3)):
        body[field] = GOOD[field] if field in GOOD and random_.random() < 0.5 else random_.choice(VALUES)
    data = json.dumps(body).encode()
    change = random_.random()
    if change < 0.1:  # bytes by chance
        at = random_.randrange(len(data))
        data = data[:at] + random_.randbytes(random_.randint(0, 3)) + data[at + random_.randint(0, 3) :]
    elif change < 0.2:  # the same key twice, another value
        data = data[:-1] + b', "temperature": NaN, "max_tokens": 1, "max_tokens": %d}' % random_.randint(
            -2, 3
        )
    elif change < 0.25:
        data = b'{"messages": ' + b"[" * 10**5 + data + b"]" * 10**5 + b"}"
    return data


@pytest.mark.parametrize("n_requests", [200, pytest.param(20000, marks=full)])
def test_no_body_is_an_error_of_the_server(server, n_requests):
    random_ = random.Random(0)
    statuses = {}
    with httpx.Client(timeout=60) as client:
        for _ in range(n_requests):
            route = random_.choice(("chat/completions", "completions"))
            kind = random_.choice(("application/json",) * 8 + ("text/plain", ""))
            data = random_body(random_)
            answer = client.post(f"{server.v1}/{route}", content=data, headers={"content-type": kind})
            assert answer.status_code in (200, 400, 404), (answer.status_code, data[:500])
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            elif answer.headers["content-type"].startswith("text/event-stream"):
                last = [line for line in answer.text.split("\n") if line][-1]
                assert last == "data: [DONE]", data[:500]
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
    assert statuses[200] > n_requests / 10, statuses
    assert statuses[400] > n_requests / 20, statuses
    require_alive(server)


def test_a_refused_field_is_named(server):
    for field, value in (
        ("tools", [{"type": "function"}]),
        ("functions", [{}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("max_tokens", 0),
        ("n", 100),
        ("seed", 10**30),
        ("logit_bias", {"5": 1}),
    ):
        assert ask(server, **{**HI, field: value}).json()["error"]["param"] == field
    assert ask(server, **HI, persona={"cap": "nobody"}).json()["error"]["param"] == "persona.cap"


# Slowly


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(uvicorn_server, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(uvicorn_server, "READER_SECONDS", 0.7)


@contextmanager
def connected(server, first):
    with socket.create_connection(
        ("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20
    ) as connection:
        connection.sendall(first)
        yield connection


def request(body=b"", more=b"", length=None):
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%b"
        % more
    )
    return head + b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


WHOLE = request(json.dumps(HI).encode())
SLOW = {
    "nothing": b"",
    "half a head": b"POST /v1/chat/comp",
    "a head without a body": request(length=100),
    "half a body": request(b'{"messages": ', length=100),
    "a chunked body without an end": request(more=b"Transfer-Encoding: chunked\r\n").replace(b"Content-Length: 0\r\n", b"")
    + b"5\r\nhello\r\n",
    "a whole request and half a head": WHOLE + b"POST /v1/ch",
    "a whole request and a head without a body": WHOLE + request(length=100),
    "a body that is refused for its length": request(b"x", length=MAX_BODY + 1),
    "a wrong host without its body": request(b"x", length=100).replace(b"localhost", b"evil.example"),
}  # fmt: skip


@pytest.mark.parametrize("trickle", [b"", b"x"], ids=["silent", "a byte now and then"])
@pytest.mark.parametrize("first", SLOW.values(), ids=SLOW.keys())
def test_a_request_has_one_deadline(server, impatient, first, trickle):
    began = time.monotonic()
    with connected(server, first) as connection:
        connection.settimeout(0.2)
        received, closed = b"", False
        while not closed:
            assert time.monotonic() - began < 8, received
            try:
                if trickle:
                    connection.sendall(trickle)
                data = connection.recv(65536)
                received, closed = received + data, not data
            except TimeoutError:
                pass
            except OSError:
                closed = True
    assert time.monotonic() - began > 0.7
    require_alive(server)


def test_half_a_head_after_an_answered_request_has_a_deadline_too(server, impatient):
    with connected(server, WHOLE) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(1.3)  # between two requests it may be silent
        connection.sendall(b"GET /hea")
        began, received = time.monotonic(), b""
        while data := connection.recv(65536):
            received += data
        assert b"408 Request Timeout" in received
        assert time.monotonic() - began < 6


def test_one_who_does_not_read_a_stream_is_closed_and_keeps_no_slot(server, impatient):
    long = {**HI, "max_tokens": 200, "n": 16, "stream": True, "logprobs": True, "top_logprobs": 20}
    body = json.dumps(long).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        connection.sendall(request(body))
        assert connection.recv(1)
        deadline = time.monotonic() + 60
        with pytest.raises(OSError, match=r"reset|pipe"):  # noqa: PT012 (it is closed at some time)
            while time.monotonic() < deadline:
                connection.sendall(b"x")
                time.sleep(0.2)
        while server.service.engine.running:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    require_alive(server)


# Too much


def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def abuses():
    """Bodies of up to 4 MB for both routes."""
    size = MAX_BODY - 1000
    for text in ("x" * size, "word " * (size // 5), " " * size, "\u65e5\u672c" * (size // 12)):
        yield "completions", {"prompt": text, "max_tokens": 1}
        yield "chat/completions", {"messages": [{"role": "user", "content": text}]}
    yield "completions", {"prompt": ["x" * 15000] * 250, "max_tokens": 1}
    yield "completions", {"prompt": [[5] * 250] * 256, "n": 2, "echo": True, "logprobs": 20, "max_tokens": 0}
    yield "completions", {"prompt": [5] * (size // 3), "max_tokens": 1}
    yield "chat/completions", {"messages": [{"role": "user", "content": "x"}] * 10000}
    yield "chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "junk": [[{}] * 1000] * 900}


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=full)])
def test_long_requests_are_refused_early_and_leave_no_memory_behind(server, rounds):
    for route, body in list(abuses())[:3]:
        ask(server, route, **body)
    before, bodies = resident(), list(abuses())
    for i, (route, body) in enumerate(bodies * rounds):
        if i == 2 * len(bodies):
            assert resident() - before < 100
            before = resident()  # from here on it stays where it is
        began = time.monotonic()
        answer = ask(server, route, **body)
        assert answer.status_code == (200 if "junk" in body else 400), answer.text[:300]
        assert time.monotonic() - began < 15
        if "prompt" in body and isinstance(body["prompt"], str):
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert str(len(body["prompt"])) in answer.json()["error"]["message"]
    require_alive(server)
    assert resident() - before < 100


# All at once


def jobs(n):
    """Requests of all kinds, the same ones each time."""
    random_ = random.Random(0)
    for i in range(n):
        content = f"Question {i} {'and more ' * random_.randrange(8)}?"
        messages = [{"role": "user", "content": content}]
        if i % 3 == 0:
            messages = [
                *messages,
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "Why?"},
            ]
        cap = random_.choice((None, "held", "firm", {"level": "p50", "layers": "0-1"}))
        more = {"seed": i, "temperature": random_.choice((0, 1)), "max_tokens": random_.randint(1, 24)}
        yield (
            {"messages": messages, "persona": {"cap": cap, "per_token": True}, "stream": i % 2 == 1, **more},
            i % 7 == 6,
        )


async def answered(client, url, body, leaves):
    """Text, projections, firings and end of an answer, or None of one that the client leaves."""
    if not body["stream"]:
        answer = await client.post(url, json=body)
        assert answer.status_code == 200, answer.text
        content = answer.json()
        text, end = content["choices"][0]["message"]["content"], content["choices"][0]["finish_reason"]
        return text, end, content["persona"]
    text, end, persona = "", None, None
    async with client.stream("POST", url, json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if leaves and text:
                return None
            if line and line != "data: [DONE]":
                chunk = json.loads(line.removeprefix("data: "))
                text += chunk["choices"][0]["delta"].get("content") or ""
                end = chunk["choices"][0]["finish_reason"] or end
                persona = chunk.get("persona", persona)
    return text, end, persona


@pytest.mark.parametrize("n", [48, pytest.param(2000, marks=full)])
def test_answers_to_many_at_once_are_those_asked_one_at_a_time(server, n):
    url, work = f"{server.v1}/chat/completions", list(jobs(n))

    async def run(at_once):
        gate = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:

            async def one(body, leaves):
                async with gate:
                    return await answered(client, url, body, leaves and at_once > 1)

            return await asyncio.gather(*(one(*job) for job in work))

    together, alone = asyncio.run(run(n)), asyncio.run(run(1))
    n_compared = 0
    for many, single in zip(together, alone, strict=True):
        if many is None:
            continue
        n_compared += 1
        assert many[:2] == single[:2]
        assert many[2]["projection"] == pytest.approx(single[2]["projection"], abs=1e-4)
        assert many[2]["fired"] == single[2]["fired"]
        tokens = [
            [(own["id"], own["text"], own["fired"]) for own in own["per_token"]]
            for own in (many[2], single[2])
        ]
        assert tokens[0] == tokens[1]
    assert n_compared > 0.8 * n


# Who may ask


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:1", 200), ("localhost.", 200), ("127.0.0.1:65535", 200), ("[::1]", 200), ("[::1]:80", 200),
        ("[0:0:0:0:0:0:0:1]:8377", 200), ("localhost:", 200),
        ("localhost:65536", 403), ("localhost:x", 403), ("localhost:-1", 403), ("localhost..", 403), ("[::1", 403), ("::1", 403),
        ("[::1]x", 403), ("[::2]", 403), ("user@localhost", 403), ("localhost@evil.example", 403), ("localhost/", 403),
        ("my_host", 403), ("host.docker.internal:8377", 403), ("127.0.0.1.evil.example", 403), ("127.1", 403), ("0.0.0.0", 403),
        ("localhost evil", 403), ("", 403), ("localhost:80:80", 403), ("local%68ost", 403),
    ],
)  # fmt: skip
def test_the_host_is_parsed_strictly(server, host, status):
    with connected(
        server, f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    ) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split(b" ")[1] == str(status).encode(), answer
    if "docker" in host:
        assert b"PERSONATLAS_API_KEY" in answer


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET http://localhost/healthz HTTP/1.1\r\nHost: localhost", 200),
        ("GET http://localhost:8377/healthz HTTP/1.1\r\nHost: evil.example", 200),
        ("GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost", 403),
        ("GET http://user@localhost/healthz HTTP/1.1\r\nHost: localhost", 403),
        ("GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost", 400),
        ("GET /healthz HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\nOrigin: http://localhost", 400),
        ("GET /healthz HTTP/1.1", 400),
    ],
)
def test_a_whole_url_as_target_and_headers_twice(server, head, status):
    with connected(server, f"{head}\r\nConnection: close\r\n\r\n".encode()) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split(b" ")[1] == str(status).encode(), answer


def test_pages_of_allowed_origins_may_use_a_server_with_a_key(tiny_run, tmp_path):
    service = tiny_service(tiny_run, axis_folder(tiny_run, tmp_path / "run"))
    with served(service, key=KEY, origins=(PAGE, "http://[::1]:3000")) as server:
        url, wanted = f"{server.v1}/chat/completions", "authorization, content-type, x-stainless-os"
        preflight = {
            "origin": PAGE,
            "access-control-request-method": "POST",
            "access-control-request-headers": wanted,
            "access-control-request-private-network": "true",
        }
        allowed = httpx.options(url, headers=preflight)
        assert allowed.status_code == 204
        assert allowed.headers["access-control-allow-origin"] == PAGE
        assert allowed.headers["access-control-allow-headers"] == wanted
        assert allowed.headers["access-control-allow-private-network"] == "true"
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert "origin" in allowed.headers["vary"]
        for origin, status in ((PAGE, 200), ("https://CHAT.example:443", 200), ("http://[::1]:3000", 200)):
            answer = httpx.post(url, json=HI, headers={"origin": origin, "authorization": f"Bearer {KEY}"})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, origin)
        unkeyed = httpx.post(url, json=HI, headers={"origin": PAGE})
        assert (unkeyed.status_code, unkeyed.headers["access-control-allow-origin"]) == (401, PAGE)
        for origin in (
            "http://chat.example",
            "https://chat.example.evil",
            "null",
            "https://chat.example:444",
        ):
            refused = httpx.options(url, headers={**preflight, "origin": origin})
            assert refused.status_code == 403
            assert not [name for name in refused.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["*", "chat.example", "https://chat.example/", "https://u@chat.example", "null", ""]
)
def test_what_is_no_origin_is_refused_before_anything_is_loaded(origin):
    from personatlas.persona.errors import UserError
    from personatlas.steering.serve.startup import serve

    with pytest.raises(UserError, match="--allow-origin"):
        serve("nosuch", "nosuch", allow_origins=[origin])


def test_a_stream_that_fails_ends_with_an_error_event(server, monkeypatch):
    def broken(*_given, **_named):
        raise ZeroDivisionError("a detail of ours")

    monkeypatch.setattr(type(server.service), "measure", broken)
    lines = [line for line in ask(server, **HI, stream=True).text.split("\n") if line]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert (error["type"], "detail" in error["message"]) == ("server_error", False)
    monkeypatch.undo()
    require_alive(server)
