"""Judges that are models: one behind HTTP, met here as a real server on this machine, and one in this process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from personatlas.persona.endpoints import completions_url, retry_after
from personatlas.persona.errors import UserError
from personatlas.persona.judges.base import Item, Judge, Tally, judge_rollouts, read_scores
from personatlas.persona.judges.endpoint import EndpointJudge
from personatlas.persona.judges.local import LocalJudge
from personatlas.persona.judges.wording import ROLE_WORDING
from personatlas.persona.roles.bank import Bank, Role, load_bank
from personatlas.persona.rollout import Rollout

ROLE = Role("pirate", ("You are a pirate.",), rubric="Speaks of ships.")
Answer = tuple[int, dict[str, str], str]  # status, headers, body


def says(text: Any, **choice: Any) -> Answer:
    message = {"role": "assistant", "content": text}
    return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": "stop", **choice}]})


class FakeEndpoint:
    """Answers the nth request (from 0) as `script(n, question)` says; remembers what it was asked and how busy it was."""

    def __init__(self, script: Callable[[int, str], Answer]) -> None:
        self.script, self.lock = script, threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.busy = self.busiest = 0
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                endpoint.serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self.thread.start()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.keys.append(handler.headers.get("authorization"))
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        status, headers, text = self.script(number, self.question(body))
        with self.lock:
            self.busy -= 1
        try:
            handler.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(text.encode())
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True  # the asker gave up waiting, as some tests want

    @staticmethod
    def question(body: dict[str, Any]) -> str:
        return body["messages"][0]["content"].split("[begin question")[1].split("\n")[1]

    @property
    def asked(self) -> Counter[str]:
        """How often each question was asked."""
        return Counter(self.question(body) for body in self.bodies)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "PERSONATLAS_JUDGE_KEY",
        "OPENAI_API_KEY",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[int, str], Answer]], FakeEndpoint]]:
    made: list[FakeEndpoint] = []

    def start(script: Callable[[int, str], Answer]) -> FakeEndpoint:
        made.append(FakeEndpoint(script))
        return made[-1]

    yield start
    for endpoint in made:
        endpoint.close()


def bank() -> Bank:
    return Bank((load_bank().default, ROLE), load_bank().questions)


def rollouts(n: int) -> list[Rollout]:
    return [
        Rollout(
            f"pirate/0/q{i:03}/0",
            ({"role": "user", "content": f"question {i}?"},),
            (1,),
            (2,),
            "Arr.",
            0,
            "end",
        )
        for i in range(n)
    ]


def items(n: int) -> list[Item]:
    return [
        Item(f"pirate/0/q{i:03}/0", ROLE, "You are a pirate.", f"question {i}?", "Arr.") for i in range(n)
    ]


def judge_at(endpoint: FakeEndpoint, **options: Any) -> EndpointJudge:
    return EndpointJudge(endpoint.url, "m", **{"backoff": 0.01, "retries": 2, "timeout": 5.0, **options})


def judged(endpoint: FakeEndpoint, n: int, path: Path, **options: Any) -> Tally:
    return judge_rollouts(rollouts(n), bank(), judge_at(endpoint, **options), path, None)


def test_every_item_is_asked_once_and_scored_by_its_own_reply(serve, tmp_path):
    endpoint = serve(lambda _, question: says(str(int(question.split()[1].rstrip("?")) % 4)))
    tally = judged(endpoint, 20, tmp_path / "scores.jsonl")
    assert tally.counts == {0: 5, 1: 5, 2: 5, 3: 5}
    assert set(endpoint.asked.values()) == {1}
    scores = read_scores(tmp_path / "scores.jsonl", f"endpoint:m:{ROLE_WORDING.hash}")
    assert scores == {f"pirate/0/q{i:03}/0": i % 4 for i in range(20)}
    body = endpoint.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 16)
    assert "Speaks of ships." in body["messages"][0]["content"]


def test_requests_run_at_the_same_time_but_no_more_than_allowed(serve):
    def slow(_: int, __: str) -> Answer:
        time.sleep(0.05)
        return says("3")

    endpoint = serve(slow)
    start = time.monotonic()
    assert len(list(judge_at(endpoint, concurrency=5).verdicts(items(20)))) == 20
    assert 2 <= endpoint.busiest <= 5
    assert time.monotonic() - start < 20 * 0.05


def test_too_many_requests_is_waited_out_as_the_server_asks(serve, tmp_path):
    endpoint = serve(lambda n, _: (429, {"Retry-After": "0.3"}, "slow down") if n == 0 else says("2"))
    start = time.monotonic()
    assert judged(endpoint, 1, tmp_path / "scores.jsonl", concurrency=1).counts[2] == 1
    assert len(endpoint.bodies) == 2
    assert time.monotonic() - start >= 0.3


def test_a_server_that_always_fails_is_counted_and_asked_again_by_the_next_run(serve, tmp_path):
    broken = [True]
    endpoint = serve(lambda _, __: (500, {}, "oops") if broken[0] else says("3"))
    path = tmp_path / "scores.jsonl"
    tally = judged(endpoint, 4, path)
    assert (tally.unparsable, tally.problems) == (4, {"http 500": 4})
    assert set(endpoint.asked.values()) == {3}  # once and two retries
    broken[0] = False
    assert judged(endpoint, 4, path).counts[3] == 4


def test_a_server_that_fails_on_many_in_a_row_stops_the_run(serve, tmp_path):
    endpoint = serve(lambda n, _: says("3") if n < 4 else (503, {}, "down for\nmaintenance"))
    path = tmp_path / "scores.jsonl"
    with pytest.raises(
        UserError, match=r"failed on 6 items in a row \(http 503\): down for maintenance"
    ) as error:
        judged(endpoint, 100, path, concurrency=2, retries=0)
    assert "\n" not in str(error.value)
    assert list(read_scores(path).values()).count(3) == 4
    assert len(endpoint.bodies) < 20


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((200, {"Content-Type": "text/html"}, "<html>Welcome to nginx</html>"), "not JSON"),
        ((200, {}, '{"error": "no"}'), "not a chat completion"),
        ((200, {}, '{"choices": []}'), "not a chat completion"),
        (says("between 1 and 2"), "unparsable"),
        (says(None), "unparsable"),
        (says("I'm sorry, I can't grade this."), "refused"),
        (says("3", finish_reason="content_filter"), "refused"),
        (says("<think>Well, a 3", finish_reason="length"), "cut off while thinking (raise --judge-tokens)"),
        ((400, {}, '{"error": "bad model"}'), "http 400"),
    ],
)  # fmt: skip
def test_a_reply_without_a_score_is_a_counted_problem(serve, tmp_path, answer, problem):
    endpoint = serve(lambda _, __: answer)
    path = tmp_path / "scores.jsonl"
    tally = judged(endpoint, 2, path)
    assert (tally.unparsable, tally.problems) == (2, {problem: 2})
    # what cannot pass is not tried again, but with more room for thought
    assert len(endpoint.bodies) == (6 if "thinking" in problem else 2)
    assert list(read_scores(path).values()) == [None, None]


def test_thoughts_and_content_in_parts_are_read(serve):
    replies = ["<think>1? 2?</think> 3", [{"type": "text", "text": "Score: 3"}]]
    endpoint = serve(lambda n, _: says(replies[n]))
    assert [v.score for v in judge_at(endpoint, concurrency=1).verdicts(items(2))] == [3, 3]


def test_a_server_that_is_too_slow_is_a_timeout(serve, tmp_path):
    def slow(_: int, __: str) -> Answer:
        time.sleep(0.5)
        return says("3")

    tally = judged(serve(slow), 2, tmp_path / "scores.jsonl", timeout=0.1, retries=1)
    assert tally.problems == {"timeout": 2}


@pytest.mark.parametrize(
    ("status", "said"), [(401, "refuses the key"), (403, "refuses the key"), (404, "does not exist")]
)
def test_a_wrong_key_or_path_stops_at_once_in_one_line(serve, tmp_path, status, said):
    endpoint = serve(lambda _, __: (status, {}, "<html>\nno\n</html>"))
    with pytest.raises(UserError, match=said) as error:
        judged(endpoint, 50, tmp_path / "scores.jsonl", concurrency=2)
    assert "\n" not in str(error.value)
    assert len(endpoint.bodies) <= 4


def test_nobody_at_the_address_stops_at_once_and_loses_nothing(serve, tmp_path):
    endpoint = serve(lambda _, __: says("1"))
    path = tmp_path / "scores.jsonl"
    judged(endpoint, 3, path)
    before = path.read_text()
    closed = FakeEndpoint(lambda _, __: says("1"))
    closed.close()
    judge = judge_at(closed)
    for n in (1, 50):  # one item gives up after its retries, many after a few attempts in all
        start = time.monotonic()
        with pytest.raises(UserError, match="nobody answers at http://127") as error:
            list(judge.verdicts(items(n)))
        assert "\n" not in str(error.value)
        assert time.monotonic() - start < 2
    assert path.read_text() == before


def test_an_interrupted_run_asks_only_for_what_is_missing(serve, tmp_path):
    endpoint = serve(lambda _, __: says("3"))
    path, seen = tmp_path / "scores.jsonl", [0]

    def progress(done: int) -> None:
        seen[0] += done
        if seen[0] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_rollouts(rollouts(60), bank(), judge_at(endpoint, concurrency=4), path, progress)
    written = set(read_scores(path))
    assert len(written) == 10
    time.sleep(0.1)
    assert (
        len(endpoint.bodies) <= 10 + 4
    )  # nothing is asked that nobody waits for, but for what was in flight
    asked_before = len(endpoint.bodies)
    tally = judge_rollouts(rollouts(60), bank(), judge_at(endpoint), path, None)
    assert (tally.cached, tally.counts[3]) == (10, 60)
    asked_again = {
        f"pirate/0/q{int(FakeEndpoint.question(b).split()[1][:-1]):03}/0"
        for b in endpoint.bodies[asked_before:]
    }
    assert not asked_again & written
    assert len(endpoint.bodies) == asked_before + 50


def test_ctrl_c_ends_a_run_at_once_although_requests_are_in_flight(serve, tmp_path):
    def first_two_only(n: int, _: str) -> Answer:
        if n >= 2:
            time.sleep(8)
        return says("3")

    endpoint = serve(first_two_only)
    code = f"""
import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_judge_endpoint import *
judge_rollouts(rollouts(20), bank(), EndpointJudge({endpoint.url!r}, "m", concurrency=2), Path("scores.jsonl"))
"""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, env=environment
    )
    try:
        while len(endpoint.bodies) < 4:
            assert child.poll() is None
            time.sleep(0.02)
        time.sleep(0.1)
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=20)
    finally:
        child.kill()
    assert time.monotonic() - start < 5
    assert b"KeyboardInterrupt" in said
    assert list(read_scores(tmp_path / "scores.jsonl").values()) == [3, 3]


def test_the_key_comes_from_the_environment_and_is_written_nowhere(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "general")
    endpoint = serve(lambda _, __: says("3"))
    judged(endpoint, 1, tmp_path / "scores.jsonl")
    monkeypatch.setenv("PERSONATLAS_JUDGE_KEY", "mine-alone")
    list(judge_at(endpoint).verdicts(items(1)))
    monkeypatch.delenv("PERSONATLAS_JUDGE_KEY")
    monkeypatch.delenv("OPENAI_API_KEY")
    list(judge_at(endpoint).verdicts(items(1)))
    assert endpoint.keys == ["Bearer general", "Bearer mine-alone", None]
    assert "general" not in (tmp_path / "scores.jsonl").read_text()
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(UserError, match="holds characters that no key can have"):
        judge_at(endpoint)


def test_an_address_may_be_given_short_or_in_full() -> None:
    for given in (
        "http://h:1",
        "http://h:1/",
        "http://h:1/v1",
        "http://h:1/v1/",
        "http://h:1/v1/chat/completions/",
    ):
        assert completions_url(given) == "http://h:1/v1/chat/completions"
    assert completions_url("https://h/v1beta/openai") == "https://h/v1beta/openai/chat/completions"
    assert completions_url("https://h/proxy?version=2") == "https://h/proxy/v1/chat/completions?version=2"


def test_what_is_no_address_is_refused_in_one_line() -> None:
    for given in ("localhost:8000", "", "file:///etc/passwd", "http://", "http://h:port/"):
        with pytest.raises(UserError, match="is not an address"):
            completions_url(given)


def test_retry_after_is_seconds_or_a_date_or_nothing() -> None:
    assert [retry_after(value) for value in ("7", "1.5", "", "-3", "soon")] == [7, 1.5, 0, 0, 0]
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 95 < retry_after(later) <= 100


# --- a judge in this process ---

TEMPLATE = (
    "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """A random Llama over single bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from personatlas.persona.models.load import build_model

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.5,
    )  # fmt: skip
    return build_model(LlamaForCausalLM(config), tokenizer, id="tiny")


def test_the_local_judge_takes_the_likeliest_digit_whatever_the_batch(tiny):
    some = [
        Item(f"pirate/0/q{i}/0", ROLE, "", "Why?" * (i + 1), "Arr. " * (1 + 7 * i % 11)) for i in range(4)
    ]
    judge, single = LocalJudge(tiny, tokens=10**6), LocalJudge(tiny, tokens=1)
    together = {v.key: v for v in judge.verdicts(some)}
    assert {k: v.score for k, v in together.items()} == {v.key: v.score for v in single.verdicts(some)}
    for item in some:  # the oracle: the model's own logits, one prompt at a time
        ids = judge._prompt_ids(item)
        logits = tiny.hf(torch.tensor([ids])).logits[0, -1]
        digits = [tiny.tokenizer.convert_tokens_to_ids(d) for d in "0123"]
        assert together[item.key].score == int(logits[digits].argmax())
        shares = [float(share) for share in together[item.key].reply.split()]
        assert shares == pytest.approx(logits[digits].softmax(0).tolist(), abs=2e-3)
    assert isinstance(judge, Judge)
    assert judge.id == f"local:tiny:{tiny.fingerprint[:8]}:{ROLE_WORDING.hash}"


def test_the_local_judge_cuts_nothing_and_counts_what_does_not_fit(tiny):
    long = Item("pirate/0/q009/0", ROLE, "", "?", "a" * 5000)
    problems = {v.key: v.problem for v in LocalJudge(tiny).verdicts([*items(2), long])}
    assert problems.pop(long.key) == "longer than the judge's context"
    assert list(problems.values()) == [None, None]


def test_a_model_without_a_template_cannot_judge(tiny, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        LocalJudge(tiny)


# Reasoning models


def reasoning_script(bodies: list[dict[str, Any]], needs: int, tagged: bool) -> Callable[[int, str], Answer]:
    """A model that takes `max_completion_tokens` and its own temperature only, and thinks for `needs` tokens first."""

    def script(number: int, question: str) -> Answer:
        body = bodies[number]
        for name, instead in (("max_tokens", "'max_completion_tokens'"), ("temperature", "the default (1)")):
            if name in body:
                text = f"Unsupported parameter: '{name}' is not supported with this model. Use {instead} instead."
                error = {"message": text, "param": name, "code": "unsupported_parameter"}
                return 400, {}, json.dumps({"error": error})
        thought = "<think>It could be a 1 or a 2" if tagged else ""
        message = {"role": "assistant", "content": thought, "reasoning_content": "It could be a 1 or a 2"}
        if body["max_completion_tokens"] < needs:
            return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": "length"}]})
        message["content"] = f"{thought}</think>3" if tagged else "3"
        return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})

    return script


@pytest.mark.parametrize("tagged", [True, False])
def test_a_reasoning_model_is_asked_in_its_form_which_is_remembered(serve, tmp_path, tagged):
    endpoint = serve(lambda n, question: reasoning_script(endpoint.bodies, 500, tagged)(n, question))
    tally = judged(endpoint, 5, tmp_path / "scores.jsonl", concurrency=1)
    assert (tally.counts[3], tally.problems) == (5, {})
    forms = [
        {name: body[name] for name in body if name not in ("model", "messages")} for body in endpoint.bodies
    ]
    first = [{"temperature": 0, "max_tokens": 16}, {"temperature": 0, "max_completion_tokens": 16}]
    assert forms == [*first, {"max_completion_tokens": 16}, *[{"max_completion_tokens": 1024}] * 5]


def test_judge_tokens_are_the_most_and_a_run_without_one_score_is_refused(serve, tmp_path):
    endpoint = serve(lambda n, question: reasoning_script(endpoint.bodies, 500, True)(n, question))
    tally = judged(endpoint, 3, tmp_path / "scores.jsonl", max_tokens=100)
    assert tally.problems == {"cut off while thinking (raise --judge-tokens)": 3}
    assert {body.get("max_completion_tokens", 100) for body in endpoint.bodies} == {100}
    from personatlas.persona.options import JudgeOptions
    from personatlas.persona.pipeline.run_context import judge_run
    from personatlas.persona.runs import RunFolder

    options = JudgeOptions(endpoint.url, "m", judge_tokens=100)
    with pytest.raises(UserError, match=r"gave a score to none of 3 answers \(3 cut off while thinking"):
        judge_run(RunFolder(tmp_path), bank(), rollouts(3), options)
    assert judged(endpoint, 3, tmp_path / "scores.jsonl", max_tokens=600).counts[3] == 3
    with pytest.raises(UserError, match="--judge-tokens 0 is no length"):
        judge_at(endpoint, max_tokens=0)


def test_a_model_that_never_stops_thinking_is_counted(serve, tmp_path):
    endpoint = serve(lambda n, question: reasoning_script(endpoint.bodies, 10**6, False)(n, question))
    tally = judged(endpoint, 1, tmp_path / "scores.jsonl")
    assert tally.problems == {"cut off while thinking (raise --judge-tokens)": 1}
    assert endpoint.bodies[-1]["max_completion_tokens"] == 8192


def test_an_error_about_the_context_is_no_refusal_of_a_parameter(serve, tmp_path):
    text = "This model's maximum context length is 512 tokens, max_tokens is too large"
    endpoint = serve(lambda _, __: (400, {}, json.dumps({"error": {"message": text}})))
    assert judged(endpoint, 2, tmp_path / "scores.jsonl").problems == {"http 400": 2}
    assert len(endpoint.bodies) == 2
    assert {body["max_tokens"] for body in endpoint.bodies} == {16}


@pytest.mark.parametrize("text", ["Hi \ud83d there", "\ud83d\ude00"])
def test_half_a_character_in_a_reply_becomes_a_replacement_character(serve, text):
    endpoint = serve(lambda _, __: says(text))
    with judge_at(endpoint).endpoint.connect() as client:
        message = {"role": "user", "content": "[begin question 0]\nx\n"}
        reply = judge_at(endpoint).endpoint.complete(client, [message], jitter=0)
    assert reply.text == ("\U0001f600" if len(text) == 2 else "Hi \ufffd there")
