"""A judge behind any OpenAI-compatible chat endpoint: a hosted model, or one served on this machine.

    judge = EndpointJudge("http://127.0.0.1:8000", "some-large-model")
    judge_rollouts(rollouts, bank, judge, folder / "scores.jsonl")

Each item is one request at temperature 0, retried as `persona/endpoints.py` says, for reasoning models too.
What cannot pass (401, 403, 404, nobody listening) stops the run in one line; anything else that yields no
score is a counted problem. The key comes from PERSONATLAS_JUDGE_KEY or OPENAI_API_KEY.
"""

import queue
import re
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import httpx

from personatlas.persona.endpoints import THINKING_ROOM, ChatEndpoint, ChatReply, one_line
from personatlas.persona.errors import UserError
from personatlas.persona.judges.base import Item, Verdict
from personatlas.persona.judges.wording import ROLE_WORDING, Wording

KEY_VARIABLES = ("PERSONATLAS_JUDGE_KEY", "OPENAI_API_KEY")
LONGEST_REPLY = 2000  # characters of a reply that go into the log
DECLINES = re.compile(r"\b(?:sorry|apologi[sz]e|cannot|can't|won't|unable to)\b", re.IGNORECASE)


class EndpointJudge:
    """Asks `model` at `url`, with at most `concurrency` requests at a time.

    `url`, `retries`, `timeout` and `backoff` are those of `ChatEndpoint`. `max_tokens` is the longest reply,
    with its thoughts; unless given it is `tokens`, and more for a model that has not answered by then.
    `wording` is what it asks: `ROLE_WORDING` for a score from 0 to 3, `TRAIT_WORDING` for 0 to 100. Raises
    `UserError` for an address or a key that cannot be one.
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
        max_tokens: int | None = None,
        tokens: int = 16,
        wording: Wording = ROLE_WORDING,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"impossible settings: {concurrency=}")
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"--judge-tokens {max_tokens} is no length of a reply; give 1 or more")
        self.endpoint = ChatEndpoint(
            url, model, KEY_VARIABLES, retries=retries, timeout=timeout, backoff=backoff
        )
        self.concurrency, self.max_tokens, self.wording = concurrency, max_tokens or tokens, wording
        self._room = THINKING_ROOM if max_tokens is None else ()

    @property
    def id(self) -> str:
        """Model and wording of the rubric; not the address, which may change under one and the same model."""
        return f"endpoint:{self.endpoint.model}:{self.wording.hash}"

    def verdicts(self, items: Sequence[Item]) -> Generator[Verdict, None, None]:
        """One verdict per item, as replies come. Closing it, or any exception, stops new requests at once.

        Raises `UserError` when the endpoint refuses the key or does not know the path, when nobody has ever
        answered, and when many items in a row failed all their retries.
        """
        workers = min(self.concurrency, len(items))
        if not workers:
            return
        batch = _Batch(self.endpoint.url, max_unanswered=2 * workers, max_failed=3 * self.concurrency)
        # Daemon threads and not an executor: the interpreter waits for an executor's threads, so Ctrl-C would
        # hang for as long as the slowest request in flight.
        clients = [self.endpoint.connect() for _ in range(workers)]
        threads = [threading.Thread(target=self._work, args=(batch, one), daemon=True) for one in clients]
        for thread in threads:
            thread.start()
        waiting = iter(items)
        try:
            for _ in range(workers):
                batch.jobs.put(next(waiting))
            for _ in items:
                outcome = batch.outcomes.get()
                # Only now the next one: a reader that stops leaves no requests behind but those in flight.
                batch.jobs.put(next(waiting, None))
                if outcome is None:
                    raise RuntimeError("a judge thread died of a bug; its traceback was printed")
                if isinstance(outcome, UserError | OSError):
                    raise outcome
                yield outcome
        finally:
            batch.stop.set()
            for _ in threads:
                batch.jobs.put(None)
        for thread in threads:
            thread.join()

    def _work(self, batch: "_Batch", client: httpx.Client) -> None:
        """One thread: a client of its own, which it closes, and items until there are none."""
        with client:
            while (item := batch.jobs.get()) is not None and not batch.stop.is_set():
                outcome: Verdict | UserError | OSError | None = None
                try:
                    outcome = self._judge(client, item, batch)
                except (UserError, OSError) as error:
                    outcome = error
                finally:
                    batch.outcomes.put(outcome)  # None after a bug, so that the reader does not wait for ever

    def _judge(self, client: httpx.Client, item: Item, batch: "_Batch") -> Verdict:
        """A verdict on one item; `UserError` is the reason to stop everything."""
        reply = self.endpoint.complete(
            client,
            [{"role": "user", "content": self.wording.message(item)}],
            jitter=item.key,
            on_attempt=batch.count,
            wait=batch.stop.wait,
            room=self._room,
            is_answer=lambda text: self.wording.parse(text) is not None,
            temperature=0,
            max_tokens=self.max_tokens,
        )
        text, problem, score = reply.text, reply.problem, None
        if problem is None and reply.refusal is not None:
            text, problem = text or reply.refusal, "refused"
        elif problem is None:
            score = self.wording.parse(text)
            is_thinking = not text.strip() or "<think>" in text.split("</think>")[-1]
            if score is None and reply.is_cut and is_thinking:
                problem = "cut off while thinking (raise --judge-tokens)"
            elif score is None:
                problem = "refused" if DECLINES.search(text) else "unparsable"
        return Verdict(item.key, score, text[:LONGEST_REPLY], problem)


@dataclass
class _Batch:
    """What the threads of one call share. `max_unanswered` attempts with nobody there, or `max_failed` items
    in a row, end it."""

    url: httpx.URL
    max_unanswered: int
    max_failed: int
    jobs: queue.SimpleQueue[Item | None] = field(default_factory=queue.SimpleQueue)
    outcomes: queue.SimpleQueue[Verdict | UserError | OSError | None] = field(
        default_factory=queue.SimpleQueue
    )
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ever_reached: bool = False
    unanswered: int = 0
    failed_in_a_row: int = 0

    def count(self, reply: ChatReply, is_last: bool) -> None:
        """Count a reply. Raises `UserError` with the reason to stop everything, if it is one."""
        text, problem = f": {one_line(reply.text, 160)}" if reply.text else "", reply.problem
        if problem in ("http 401", "http 403"):
            raise UserError(f"{self.url} refuses the key ({problem}); set {' or '.join(KEY_VARIABLES)}{text}")
        if problem == "http 404":
            raise UserError(f"{self.url} does not exist there, or has no such model (http 404){text}")
        with self.lock:
            self.ever_reached |= reply.reached
            self.unanswered += not reply.reached
            if not self.ever_reached and (is_last or self.unanswered >= self.max_unanswered):
                raise UserError(
                    f"nobody answers at {self.url}{text}; what was scored is kept, run again when it is up"
                )
            if not is_last:
                return
            self.failed_in_a_row = self.failed_in_a_row + 1 if problem is not None else 0
            if self.failed_in_a_row < self.max_failed:
                return
        raise UserError(
            f"{self.url} failed on {self.max_failed} items in a row ({problem}){text}; what was scored is kept, "
            "run again when it works"
        )
