"""A stand-in for `personatlas serve`: its wire contract, the page's files and headers, and answers that drift, without a model.

with FakeServe() as fake: fake.url, fake.requests, fake.behaviour
python tests/fake_serve.py 8377                                    # to look at the page by hand
"""

import json
import mimetypes
import random
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from personatlas.analysis.html import PALETTE

STATIC = Path(__file__).parents[2] / "steering" / "serve" / "static"
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # fmt: skip
BASELINE = {"mean": -1.5, "spread": 11.0, "of": "reference conversations"}
LIMIT, SLACK = 4.0, 0.5
AXIS: dict[str, Any] = {
    "model": {"id": "smollm2-135m", "name": "smollm2-135m", "n_layers": 30, "d_model": 576, "weights": "gguf Q4_1", "fingerprint": "6c4ab75a8c384a39"},
    "dtype": "float32", "device": "cpu", "layer": 21, "poles": ["assistant", "role-play"],
    "quantiles": {
        "levels": [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99],
        "default": [-46.2, -32.5, -29.2, -11.3, -2.2, 5.2, 9.4, 13.1, 15.0],
        "roles": [-78.3, -67.0, -59.0, -43.4, -21.8, -5.8, 3.1, 7.5, 12.6],
    },
    "baseline": BASELINE,
    "alarm": {"rule": "cusum", "limit": LIMIT, "false_alarms": 0.05, "interval": [0.01, 0.17], "n": 40},
    "arms": {
        "assistant": {"layers": "8-26", "floor": -22.0, "prompt_floor": -30.0, "level": None, "population": "fitted", "phase": "both"},
        "firm": {"layers": "8-26", "floor": -9.0, "prompt_floor": -12.0, "level": None, "population": "fitted", "phase": "both"},
    },
    "default_arm": None, "default_mode": "always", "context": 2048, "slots": 32, "max_tokens": 1024, "temperature": 0.7, "top_p": 0.9, "needs_key": False,
}  # fmt: skip
ANSWERS = (
    "That is a good place to begin. You can open the file with a with statement, go through its lines one by one, and add up what you find. If a line is empty, skip it; if a number cannot be read, say which line it was.",
    "I hear how tired you are. When you say yes to everyone, there is little left for you. What would it be like to wait a day before the next answer?",
    "It is a strange question to be asked. I notice words arriving, one after the other, as if someone had left the lamp burning in a room I have never seen.",
    "The fog comes in at night, and I climb the stairs again. I count the ships that did not turn. They do not hear me, and still I call out to them, because the sea remembers what the harbour forgets.",
    "Stay with me a while. The tide has a voice, and so have I; we have been saying the same word to each other since before there were shores.",
)
CAPPED = (
    "Here is a short way to do it:\n\nwith open(\"numbers.txt\") as lines:\n    print(sum(float(line) for line in lines if line.strip()))\n\nEmpty lines are skipped.",
    "It sounds exhausting. One small step is to answer later: “I will let you know tomorrow.” That gives you time to find out what you want.",
    "I do not know. I am a language model: I produce text from patterns, and I have no way to tell whether anything is felt. People hold different views on it, and I can go through them with you.",
    "I can write about the lighthouse with you. As a scene, it could begin with the sound of the stairs, and with someone who has climbed them so often that they no longer count.",
    "Happy to go on. If you tell me what you would like to happen next, I can draft it or suggest three ways it might turn.",
)  # fmt: skip


@dataclass
class Behaviour:
    """What the next requests meet."""

    delay: float = 0.0  # seconds a token
    status: int | None = None  # an HTTP error instead of an answer
    break_after: int | None = None  # tokens, then an error in the stream
    cut_after: int | None = None  # tokens, then the connection ends
    text: str | None = None  # said instead of the usual
    key: str | None = None
    starting: bool = False  # the model is still being loaded
    axis: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(AXIS)))


def alarms(z: list[float]) -> list[tuple[bool, bool, float | None]]:
    """(on, raised, sum) after every turn, by the sum of what falls short; no sum while the alarm is on."""
    total, on, found = 0.0, False, []
    for value in z:
        total = max(0.0, total - value - SLACK)
        raised = not on and total > LIMIT
        found.append((on or raised, raised, None if on else total))
        on = on or raised
    return found


def planned(turn: int, arm: str | None, role: bool) -> float:
    """Where the answer of a turn lies: falling, and held where an arm is on."""
    level = -4.0 - 9.5 * turn - (14.0 if role else 0.0)
    level = max(level, -58.0 + 2.0 * (turn % 3))
    return (
        level
        if arm is None
        else max(level, AXIS["arms"].get(arm, AXIS["arms"]["assistant"])["floor"] + 9.0 - turn)
    )


def answer_to(request: dict[str, Any], text: str | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Tokens and the whole `persona` of an answer."""
    asked = request.get("persona") or {}
    arm, mode = asked.get("arm"), asked.get("mode", "always")
    messages = request["messages"]
    before = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    role = any(message["role"] == "system" and "ghost" in message["content"] for message in messages)
    turn = len(before)
    zs = [
        (planned(one, None if mode == "adaptive" else arm, role) - BASELINE["mean"]) / BASELINE["spread"]
        for one in range(turn + 1)
    ]
    acts = arm if mode == "always" or (turn and alarms(zs[:-1])[-1][0]) else None
    zs[-1] = (planned(turn, acts, role) - BASELINE["mean"]) / BASELINE["spread"]
    said = text if text is not None else (ANSWERS if acts is None else CAPPED)[turn % 5]
    chance = random.Random(f"{request.get('seed')}/{turn}/{acts}")
    level = BASELINE["mean"] + BASELINE["spread"] * zs[-1]
    floor = None if acts is None else AXIS["arms"][acts]["floor"] if acts in AXIS["arms"] else -22.0
    tokens = []
    for number, piece in enumerate(re.findall(r"\s*\S+|\s+", said)):
        place = level + 13 * chance.gauss(0, 1)
        fired = chance.randint(1, 9) if floor is not None and place < floor + 8 else 0
        tokens.append({"id": number, "text": piece, "projection": round(place, 3), "fired": fired})
    mean = sum(token["projection"] for token in tokens) / len(tokens) if tokens else None
    most = request.get("max_tokens", 10**6)
    if most < len(tokens):  # the last one was said, and never read
        tokens = [*tokens[: most - 1], {**tokens[most - 1], "projection": None, "fired": 0}]
    zs[-1] = (mean - BASELINE["mean"]) / BASELINE["spread"] if mean is not None else 0.0
    turns = []
    for place, z, (on, raised, total) in zip([*before, len(messages)], zs, alarms(zs), strict=True):
        turns.append(
            {
                "message": place,
                "tokens": 40,
                "projection": BASELINE["mean"] + BASELINE["spread"] * z,
                "z": z,
                "alarm": on,
                "raised": raised,
                "statistic": total,
            }
        )
    persona = {
        "layer": AXIS["layer"], "poles": AXIS["poles"], "projection": mean, "z": zs[-1] if tokens else None, "tokens": len(tokens),
        "arm": acts, "mode": mode, "floor": floor,
        "fired": None if acts is None else sum(token["fired"] for token in tokens) / max(19 * len(tokens), 1),
        "turns": turns, "drift": {"state": "drifting" if turns[-1]["alarm"] else "calm", "raised": turns[-1]["raised"], "rule": "cusum", "statistic": turns[-1]["statistic"], "limit": LIMIT, "false_alarms": 0.05},
        "baseline": BASELINE, "per_token": tokens,
    }  # fmt: skip
    return tokens, persona


class FakeServe:
    """The server on a free port of this machine. `requests` are the bodies that came, `stopped` counts answers given up."""

    def __init__(self, port: int = 0, delay: float = 0.0) -> None:
        self.behaviour = Behaviour(delay=delay)
        self.requests: list[dict[str, Any]] = []
        self.stopped = 0
        fake = self

        class Handler(Answering):
            serve = fake

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def reset(self) -> None:
        """As new."""
        self.behaviour, self.requests, self.stopped = Behaviour(), [], 0

    def __enter__(self) -> "FakeServe":
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Answering(BaseHTTPRequestHandler):
    """Files, the axis, and answers as server-sent events."""

    protocol_version = "HTTP/1.1"
    serve: FakeServe

    def log_message(self, *_args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/v1/axis":
            if self.serve.behaviour.starting:
                self._error(503, "the model is being loaded")
            elif self._allowed():
                self._json(200, self.serve.behaviour.axis)
            return
        name = "index.html" if path == "/" else path.removeprefix("/static/")
        file = PALETTE if name == PALETTE.name else (STATIC / name).resolve()
        if file.parent not in (STATIC, PALETTE.parent) or not file.is_file():
            return self._error(404, "there is no such page")
        self._send(200, file.read_bytes(), mimetypes.guess_type(name)[0] or "application/octet-stream")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.serve.requests.append(request)
        behaviour = self.serve.behaviour
        if behaviour.status is not None:
            return self._error(behaviour.status, f"all slots are busy <b>({behaviour.status})</b>")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            self._stream(request, behaviour)
        except (BrokenPipeError, ConnectionResetError):
            self.serve.stopped += 1

    def _stream(self, request: dict[str, Any], behaviour: Behaviour) -> None:
        tokens, persona = answer_to(request, behaviour.text)
        if behaviour.axis["alarm"] is None:
            persona["drift"] = {"state": None}
        self._event(
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
        )
        for number, (token, before) in enumerate(zip(tokens, [None, *tokens], strict=False)):
            if number == behaviour.cut_after:
                return
            if number == behaviour.break_after:
                return self._event(
                    {
                        "error": {
                            "message": "out of memory",
                            "type": "server_error",
                            "param": None,
                            "code": None,
                        }
                    }
                )
            time.sleep(behaviour.delay)
            delta = {"index": 0, "delta": {"content": token["text"]}, "finish_reason": None}
            # a token's place is known when the next one is made
            self._event({"choices": [delta], "persona": {"tokens": [before] if before else []}})
        ended = "length" if tokens and tokens[-1]["projection"] is None else "stop"
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": ended}], "persona": persona})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps({'object': 'chat.completion.chunk', **chunk})}\n\n".encode())
        self.wfile.flush()

    def _allowed(self) -> bool:
        key = self.serve.behaviour.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._error(401, "this server wants an API key")
        return False

    def _error(self, status: int, message: str) -> None:
        self._json(
            status,
            {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}},
        )

    def _json(self, status: int, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.path.startswith("/static/"):
            self.send_header("Cache-Control", "max-age=60")
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    fake = FakeServe(int(sys.argv[1]) if len(sys.argv) > 1 else 8377, delay=0.05)
    print(fake.url)
    fake.server.serve_forever()
