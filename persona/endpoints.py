"""One client for OpenAI-compatible chat endpoints: hosted models, or models served on this machine.

    endpoint = ChatEndpoint("http://127.0.0.1:8000", "some-large-model", ("PERSONATLAS_JUDGE_KEY", "OPENAI_API_KEY"))
    with endpoint.connect() as client:
        reply = endpoint.complete(client, messages, jitter="question 1", temperature=0, max_tokens=16)
    reply.text, reply.problem                    # "2", None

What may pass (408, 429, 5xx, timeouts, lost connections) is tried again with exponential back-off, or after
the server's Retry-After; the last reply's `problem` says what became of anything else. The key comes from the
environment and is written nowhere.
"""

import email.utils
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from personatlas.persona.errors import UserError

LONGEST_WAIT = 300.0  # seconds; a server's Retry-After beyond it is cut to it


@dataclass(frozen=True)
class ChatReply:
    """What a request came to: the text, or the text of an error with its `problem`.

    `problem` is "http STATUS", "timeout", "connection", "not JSON", "not a chat completion" or "stopped".
    `retryable` says that another attempt may help, `reached` that somebody was there. `refusal` is what the
    server says where it withholds the answer, `is_cut` whether `max_tokens` ended the text.
    """

    text: str
    problem: str | None = None
    retryable: bool = False
    reached: bool = True
    retry_after: float = 0.0
    refusal: str | None = None
    is_cut: bool = False


class ChatEndpoint:
    """The chat completions of `model` at `url`.

    `url` may end with the host, with `/v1` (or another version), or be the full path of chat/completions. The
    key is the first that is set of the environment variables `key_variables`. `timeout` and `backoff` are
    seconds: the wait for a server's next bytes, and the mean pause before the first retry, doubled with each
    of the `retries`. Raises `UserError` for an address or a key that cannot be one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variables: Sequence[str],
        *,
        retries: int = 5,
        timeout: float = 60.0,
        backoff: float = 1.0,
    ) -> None:
        if retries < 0 or timeout <= 0 or backoff < 0:
            raise ValueError(f"impossible settings: {retries=}, {timeout=}, {backoff=}")
        self.url, self.model = completions_url(url), model
        self.retries, self.timeout, self.backoff = retries, timeout, backoff
        key = next((value for name in key_variables if (value := os.environ.get(name, "").strip())), "")
        if not key.isascii() or not key.isprintable():
            raise UserError(f"the key in {' or '.join(key_variables)} holds characters that no key can have")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def connect(self) -> httpx.Client:
        """A client that sends the key, to be closed by the caller."""
        return httpx.Client(headers=self._headers, timeout=self.timeout)

    def complete(
        self,
        client: httpx.Client,
        messages: Sequence[Mapping[str, str]],
        *,
        jitter: int | str,
        on_attempt: Callable[[ChatReply, bool], None] = lambda reply, is_last: None,
        wait: Callable[[float], object] = time.sleep,
        **parameters: int | float,
    ) -> ChatReply:
        """The reply to one request with those body parameters, after as many attempts as it takes.

        `jitter` seeds the pauses between attempts. `on_attempt` is called with each reply and whether it is
        the last one, and may raise to give up. `wait` pauses for some seconds; if it returns true, nothing is
        tried again and the problem is "stopped".
        """
        body = {"model": self.model, "messages": list(messages), **parameters}
        generator = random.Random(jitter)
        for attempt in itertools.count():
            reply = self._request(client, body)
            is_last = attempt == self.retries or not reply.retryable
            on_attempt(reply, is_last)
            if is_last:
                break
            pause = self.backoff * 2**attempt * generator.uniform(0.5, 1.5)
            if wait(min(max(pause, reply.retry_after), LONGEST_WAIT)):
                return ChatReply("", "stopped")
        return reply

    def _request(self, client: httpx.Client, body: Mapping[str, object]) -> ChatReply:
        try:
            response = client.post(self.url, json=body)
        except httpx.HTTPError as error:  # also a reply that is cut off, or bytes that are not HTTP
            problem = "timeout" if isinstance(error, httpx.TimeoutException) else "connection"
            reached = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
            text = one_line(str(error) or type(error).__name__)
            return ChatReply(text, problem if reached else "connection", retryable=True, reached=reached)
        status = response.status_code
        if status != 200:
            return ChatReply(
                one_line(response.text),
                f"http {status}",
                retryable=status in (408, 429) or status >= 500,
                retry_after=retry_after(response.headers.get("retry-after", "")),
            )
        try:
            choice = response.json()["choices"][0]
            text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
            reason = choice.get("finish_reason")
        except ValueError:
            return ChatReply(one_line(response.text), "not JSON")
        except (KeyError, IndexError, TypeError, AttributeError):
            return ChatReply(one_line(response.text), "not a chat completion")
        if isinstance(text, list):  # some servers send content as parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        if refusal or reason == "content_filter":
            refusal = str(refusal or "content filter")
        text = text if isinstance(text, str) else ""
        return ChatReply(text, refusal=refusal or None, is_cut=reason == "length")


def completions_url(url: str) -> httpx.URL:
    """The address of chat/completions, from a host, a versioned base such as ".../v1", or the full address.

    Raises `UserError` for what is no address.
    """
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
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 for none or one that is neither."""
    try:
        return max(float(value), 0.0) if value else 0.0
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def one_line(text: str, limit: int = 300) -> str:
    """The text on one line, cut to `limit` characters."""
    return " ".join(text.split())[:limit]
