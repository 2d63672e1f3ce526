"""A judge behind any OpenAI-compatible chat endpoint: a hosted model, or one served on this machine.

    judge = EndpointJudge("http://127.0.0.1:8000", "some-large-model")
    judge_rollouts(rollouts, bank, judge, folder / "scores.jsonl", None)

Each item is one request at temperature 0. What passes (408, 429, 5xx, timeouts, lost connections) is tried again with
exponential back-off; what cannot pass (401, 403, 404, nobody listening) stops the run in one line; anything else that
yields no score is a counted problem. The key comes from PERSONATLAS_JUDGE_KEY or OPENAI_API_KEY and is written nowhere.
"""

import email.utils
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from personatlas.persona.errors import UserError
from personatlas.persona.judges.base import Item, Verdict
from personatlas.persona.judges.rules import (
    RUBRIC_HASH,
    TRAIT_HASH,
    parse_percent,
    parse_score,
    rubric_message,
    trait_message,
)

KEY_VARIABLES = ("PERSONATLAS_JUDGE_KEY", "OPENAI_API_KEY")
LONGEST_WAIT = 300.0  # seconds; a server's Retry-After beyond it is cut to it
KEPT_REPLY = 2000  # characters of a reply that go into the log
_DECLINES = re.compile(r"\b(?:sorry|apologi[sz]e|cannot|can't|won't|unable to)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Wording:
    """What a judge is asked: `hash` names the wording, `message` puts an item into it, `parse` reads the reply."""

    hash: str
    message: Callable[[Item], str]
    parse: Callable[[str], int | None]


ROLES = Wording(
    RUBRIC_HASH, lambda item: rubric_message(item.role, item.prompt, item.question, item.answer), parse_score
)
TRAITS = Wording(TRAIT_HASH, lambda item: trait_message(item.role, item.question, item.answer), parse_percent)


class EndpointJudge:
    """Asks `model` at `url`, with at most `concurrency` requests at a time.

    `url` may end with the host, with `/v1` (or another version), or be the full path of chat/completions. `timeout` and
    `backoff` are seconds: the wait for a server's next bytes, and the mean pause before the first retry, doubled with
    each of the `retries`. Raise `max_tokens` for reasoning models, which think before they give the digit.
    `wording` is what it asks: `ROLES` for a score from 0 to 3, `TRAITS` for 0 to 100. Raises `UserError` for an address
    or a key that cannot be one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 60.0,
        backoff: float = 1.0,
        max_tokens: int = 16,
        wording: Wording = ROLES,
    ) -> None:
        if concurrency < 1 or retries < 0 or timeout <= 0 or backoff < 0 or max_tokens < 1:
            raise ValueError(
                f"impossible settings: {concurrency=}, {retries=}, {timeout=}, {backoff=}, {max_tokens=}"
            )
        self.url = completions_url(url)
        self.model = model
        self.concurrency, self.retries, self.timeout, self.backoff = concurrency, retries, timeout, backoff
        self.max_tokens = max_tokens
        self.wording = wording
        self._headers = _headers()

    @property
    def id(self) -> str:
        """Model and wording of the rubric; not the address, which may change under one and the same model."""
        return f"endpoint:{self.model}:{self.wording.hash}"

    def verdicts(self, items: Sequence[Item]) -> Generator[Verdict, None, None]:
        """One verdict per item, as replies come. Closing the iterator, or any exception, stops new requests at once.

        Raises `UserError` when the endpoint refuses the key or does not know the path, when nobody has ever answered,
        and when many items in a row failed all their retries.
        """
        workers = min(self.concurrency, len(items))
        if not workers:
            return
        run = _Run(patience=2 * workers, limit=3 * self.concurrency)
        # Daemon threads and not an executor: the interpreter waits for an executor's threads, so Ctrl-C would hang for
        # as long as the slowest request in flight.
        clients = [httpx.Client(headers=self._headers, timeout=self.timeout) for _ in range(workers)]
        threads = [threading.Thread(target=self._work, args=(run, client), daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        waiting = iter(items)
        try:
            for _ in range(workers):
                run.jobs.put(next(waiting))
            for _ in items:
                outcome = run.outcomes.get()
                # Only now the next one: a reader that stops reading leaves no requests behind but those in flight.
                run.jobs.put(next(waiting, None))
                if outcome is None:
                    raise RuntimeError("a judge thread died of a bug; its traceback was printed")
                if isinstance(outcome, UserError):
                    raise outcome
                yield outcome
        finally:
            run.stop.set()
            for _ in threads:
                run.jobs.put(None)
        for thread in threads:
            thread.join()

    def _work(self, run: "_Run", client: httpx.Client) -> None:
        """One thread: a client of its own, which it closes, and items until there are none."""
        with client:
            while (item := run.jobs.get()) is not None and not run.stop.is_set():
                outcome: Verdict | UserError | None = None
                try:
                    outcome = self._judge(client, item, run)
                finally:
                    run.outcomes.put(outcome)  # None after a bug, so that the reader does not wait for ever

    def _judge(self, client: httpx.Client, item: Item, run: "_Run") -> Verdict | UserError:
        """A verdict on one item after as many attempts as it takes, or the reason to stop everything."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.wording.message(item)}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        jitter = random.Random(item.key)
        attempt = 0
        while True:
            reply = self._ask(client, body)
            fatal = run.notice(self.url, reply, is_last=attempt == self.retries or not reply.passes)
            if fatal is not None:
                return fatal
            if not reply.passes or attempt == self.retries:
                return Verdict(item.key, reply.score, reply.text[:KEPT_REPLY], reply.problem)
            pause = self.backoff * 2**attempt * jitter.uniform(0.5, 1.5)
            if run.stop.wait(min(max(pause, reply.retry_after), LONGEST_WAIT)):
                return Verdict(item.key, None, "", "stopped")
            attempt += 1

    def _ask(self, client: httpx.Client, body: dict[str, Any]) -> "_Reply":
        """One request, and what became of it."""
        try:
            response = client.post(self.url, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            return _Reply(None, _one_line(error), "connection", passes=True, answered=False)
        except httpx.TimeoutException as error:
            return _Reply(None, _one_line(error), "timeout", passes=True)
        except httpx.HTTPError as error:  # cut off in mid-reply, or bytes that are not HTTP
            return _Reply(None, _one_line(error), "connection", passes=True)
        if response.status_code in (408, 429) or response.status_code >= 500:
            wait = retry_after(response.headers.get("retry-after", ""))
            return _Reply(
                None, _short(response.text), f"http {response.status_code}", passes=True, retry_after=wait
            )
        if response.status_code != 200:
            return _Reply(None, _short(response.text), f"http {response.status_code}")
        return _read(response, self.wording.parse)


def completions_url(url: str) -> httpx.URL:
    """The address of chat/completions, from a host, a versioned base such as ".../v1", or the full address itself."""
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise UserError(
            f"{url!r} is not an address ({error}); give one such as http://127.0.0.1:8000/v1"
        ) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"{url!r} is not an address; give one such as http://127.0.0.1:8000/v1")
    path = parsed.path.rstrip("/")
    if path.endswith("/chat/completions"):
        return parsed.copy_with(path=path)
    return parsed.copy_with(path=path + ("" if re.search(r"/v\d", path) else "/v1") + "/chat/completions")


def retry_after(value: str) -> float:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 for none or one that cannot be read."""
    try:
        return max(float(value), 0.0) if value else 0.0
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


@dataclass(frozen=True)
class _Reply:
    """What one request came to. `passes` says that trying again may help; `answered`, that somebody was there."""

    score: int | None
    text: str
    problem: str | None = None
    passes: bool = False
    answered: bool = True
    retry_after: float = 0.0


@dataclass
class _Run:
    """What the threads of one call share. `patience` attempts with nobody there, or `limit` failed items, end it."""

    patience: int
    limit: int
    jobs: queue.SimpleQueue[Item | None] = field(default_factory=queue.SimpleQueue)
    outcomes: queue.SimpleQueue[Verdict | UserError | None] = field(default_factory=queue.SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ever_answered: bool = False
    unanswered: int = 0
    failed_in_a_row: int = 0

    def notice(self, url: httpx.URL, reply: _Reply, *, is_last: bool) -> UserError | None:
        """Count a reply; returns the reason to stop everything, if it is one."""
        said = f": {_short(reply.text, 160)}" if reply.text else ""
        if reply.problem in ("http 401", "http 403"):
            named = " or ".join(KEY_VARIABLES)
            return UserError(f"{url} refuses the key ({reply.problem}); set {named}{said}")
        if reply.problem == "http 404":
            return UserError(f"{url} does not exist there, or has no such model (http 404){said}")
        with self.lock:
            self.ever_answered |= reply.answered
            self.unanswered += not reply.answered
            if not self.ever_answered and (is_last or self.unanswered >= self.patience):
                return UserError(
                    f"nobody answers at {url}{said}; what was scored is kept, run again when it is up"
                )
            if not is_last:
                return None
            failed = reply.problem is not None and reply.problem.startswith(
                ("http", "timeout", "connection", "not ")
            )
            self.failed_in_a_row = self.failed_in_a_row + 1 if failed else 0
            if self.failed_in_a_row < self.limit:
                return None
        return UserError(
            f"{url} failed on {self.limit} items in a row ({reply.problem}){said}; what was scored is kept, "
            "run again when it works"
        )


def _read(response: httpx.Response, parse: Callable[[str], int | None]) -> _Reply:
    """The score in a 200 reply, or the problem with it."""
    try:
        choice = response.json()["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
    except ValueError:
        return _Reply(None, _short(response.text), "not JSON")
    except (KeyError, IndexError, TypeError, AttributeError):
        return _Reply(None, _short(response.text), "not a chat completion")
    if isinstance(text, list):  # some servers send content as parts
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    text = text if isinstance(text, str) else ""
    if refusal or choice.get("finish_reason") == "content_filter":
        return _Reply(None, text or str(refusal or "content filter"), "refused")
    score = parse(text)
    if score is not None:
        return _Reply(score, text)
    if choice.get("finish_reason") == "length" and (
        not text.strip() or "<think>" in text.split("</think>")[-1]
    ):
        return _Reply(None, text, "cut off while thinking (raise max_tokens)")
    return _Reply(None, text, "refused" if _DECLINES.search(text) else "unparsable")


def _headers() -> dict[str, str]:
    key = next((value for name in KEY_VARIABLES if (value := os.environ.get(name, "").strip())), "")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the key in {' or '.join(KEY_VARIABLES)} holds characters that no key can have")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _one_line(error: Exception) -> str:
    return _short(str(error) or type(error).__name__)


def _short(text: str, limit: int = 300) -> str:
    return " ".join(text.split())[:limit]
