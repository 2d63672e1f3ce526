"""One client for OpenAI-compatible chat endpoints: hosted models, or models served on this machine.

    endpoint = ChatEndpoint("http://127.0.0.1:8000", "some-large-model", ("PERSONATLAS_JUDGE_KEY",))
    with endpoint.connect() as client:
        reply = endpoint.complete(client, messages, jitter="question 1", temperature=0, max_tokens=16)
    reply.text, reply.problem                    # "2", None

What may pass (408, 429, 5xx, timeouts, lost connections) is tried again with exponential back-off, or after
the server's Retry-After; the last reply's `problem` says what became of anything else. Reasoning models take
other requests: a parameter that is refused is left out (`max_tokens` becomes `max_completion_tokens`), and a
reply that ends while the model still thinks is asked for again with room for thought; what worked is
remembered for the next request. The key comes from the environment and is written nowhere.
"""

import email.utils
import itertools
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from personatlas.persona.errors import UserError
from personatlas.persona.judges.wording import without_thoughts

LIMIT, NEW_LIMIT = "max_tokens", "max_completion_tokens"
THINKING_ROOM = (1024, 8192)  # tokens, tried in turn where a model thinks longer than it was given
LONGEST_WAIT = 300.0  # seconds; a server's Retry-After beyond it is cut to it


@dataclass(frozen=True)
class ChatReply:
    """What a request came to: the text, or the text of an error with its `problem`.

    `problem` is "http STATUS", "timeout", "connection", "not JSON", "not a chat completion" or "stopped".
    `retryable` says that another attempt may help, `reached` that somebody was there. `refusal` is what the
    server says where it withholds the answer, `is_cut` whether `max_tokens` ended the text, and `unsupported`
    a parameter that the model does not take.
    """

    text: str
    problem: str | None = None
    retryable: bool = False
    reached: bool = True
    retry_after: float = 0.0
    refusal: str | None = None
    is_cut: bool = False
    unsupported: str | None = None


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
        self._left_out: frozenset[str] = frozenset()  # parameters that this model does not take
        self._room = 0  # tokens that its thoughts needed

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
        room: Sequence[int] = THINKING_ROOM,
        is_answer: Callable[[str], bool] = lambda text: bool(without_thoughts(text).strip()),
        **parameters: int | float,
    ) -> ChatReply:
        """The reply to one request with those body parameters, after as many attempts as it takes.

        `jitter` seeds the pauses between attempts. `on_attempt` is called with each reply and whether it is
        the last one, and may raise to give up. `wait` pauses for some seconds; if it returns true, nothing is
        tried again and the problem is "stopped". A reply that `max_tokens` cut before it `is_answer` is asked
        for again with the next larger number of `room`, if any.
        """
        body = {"model": self.model, "messages": list(messages), **parameters}
        generator = random.Random(jitter)
        for attempt in itertools.count():
            reply = self._adapted(client, body, room, is_answer)
            is_last = attempt == self.retries or not reply.retryable
            on_attempt(reply, is_last)
            if is_last:
                break
            pause = self.backoff * 2**attempt * generator.uniform(0.5, 1.5)
            if wait(min(max(pause, reply.retry_after), LONGEST_WAIT)):
                return ChatReply("", "stopped")
        return reply

    def _adapted(
        self,
        client: httpx.Client,
        body: Mapping[str, object],
        room: Sequence[int],
        is_answer: Callable[[str], bool],
    ) -> ChatReply:
        """The reply to a request in the form that the model takes, found out where it is not known."""
        left_out, asked = self._left_out, int(str(body.get(LIMIT, 0)))
        tokens, cut = max(asked, self._room) if room else asked, None
        while True:
            sent = {name: value for name, value in body.items() if name not in (LIMIT, *left_out)}
            if tokens and NEW_LIMIT not in left_out:
                sent[NEW_LIMIT if LIMIT in left_out else LIMIT] = tokens
            reply = self._request(client, sent)
            if reply.unsupported in sent:
                left_out |= {str(reply.unsupported)}
            elif cut is not None and reply.problem == "http 400":  # more than the model can hold
                return cut
            elif reply.is_cut and not is_answer(reply.text) and (more := [n for n in room if n > tokens]):
                tokens, cut = min(more), reply
            else:
                break
        if reply.problem is None:  # threads may find it out at the same time, and all find the same
            self._left_out, self._room = left_out, max(self._room, tokens if tokens > asked else 0)
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
                unsupported=unsupported_parameter(response.text, body) if status in (400, 422) else None,
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
        text = without_half_characters(text) if isinstance(text, str) else ""
        return ChatReply(text, refusal=refusal or None, is_cut=reason == "length")


def unsupported_parameter(error: str, body: Mapping[str, object]) -> str | None:
    """Which parameter of a request an error says that the model does not take; None for another error."""
    try:
        about = json.loads(error)["error"]
        error, named = str(about.get("message")), about.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        named = None
    if re.search(r"context (length|window|size)|too (large|long|many)", error):
        return None
    parameters = [name for name in body if name not in ("model", "messages")]
    found = [name for name in parameters if name == named or re.search(rf"\b{name}\b", error)]
    return found[0] if found else None


def without_half_characters(text: str) -> str:
    """Text with U+FFFD for half a surrogate pair, which JSON can name and no tokenizer reads."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 for another."""
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
