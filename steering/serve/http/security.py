"""What stands before every route: size of bodies, the key, where a browser's request comes from, and the headers of answers.

Pure ASGI: nothing is buffered, so streams stay streams. Without a key a server listens on this machine alone, and then only requests
that name it as such are taken: a web page elsewhere can neither read it nor make it work (no CORS, foreign origins are refused,
and so are host names that merely resolve to this machine).
"""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from personatlas.steering.serve.http.responses import error_body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BODY = 4 * 2**20  # bytes
MOST_DRAINED = 64 * 2**20
LOCAL = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; font-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=(), payment=()"),
]


class SecurityMiddleware:
    """The application behind a guard. `key` None: no key is asked for, and only this machine is served."""

    def __init__(self, app: App, key: str | None) -> None:
        self.app, self.key = app, key.encode() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [pair for pair in message.get("headers", []) if pair[0].lower() != b"server"]
                cached = (
                    []
                    if any(name == b"cache-control" for name, _ in own)
                    else [(b"cache-control", b"no-store")]
                )
                message = {**message, "headers": [*own, *HEADERS, *cached]}
            await send(message)

        refused = self._refused(scope)
        if refused is not None:
            status, text, kind, code = refused
            await _drain(receive)
            await _reply(headed, status, error_body(text, kind, code=code))
            return
        await self.app(scope, _Body(receive).receive, headed)

    def _refused(self, scope: Scope) -> tuple[int, str, str, str | None] | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self.key is None and _name(host) not in LOCAL:
            return 403, "this server answers to 127.0.0.1 and localhost only", "permission_error", None
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            return 403, "requests from other web pages are refused", "permission_error", None
        try:
            size = int(headers.get(b"content-length", b"0"))
        except ValueError:
            return 400, "the content-length is no number", "invalid_request_error", None
        if size > MOST_BODY:
            return (
                413,
                f"a body of {size} bytes is more than the {MOST_BODY} that are read",
                "invalid_request_error",
                None,
            )
        if self.key is not None and _needs_key(scope["path"]):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key):
                return 401, "the API key is missing or wrong", "authentication_error", "invalid_api_key"
        return None


class _Body:
    """Counts the bytes of a body that did not say how many there are."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._size = receive, 0

    async def receive(self) -> Message:
        """The next part of the body. Raises HTTPException (413) beyond the limit."""
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > MOST_BODY:
            raise HTTPException(413, f"the body is longer than the {MOST_BODY} bytes that are read")
        return message


def _needs_key(path: str) -> bool:
    return path.startswith("/v1/") or path in ("/metrics", "/openapi.json")


def _name(host: str) -> str:
    """A host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


async def _drain(receive: Receive) -> None:
    """Read what is being sent, up to a point: who is cut off while sending never reads why."""
    size, more = 0, True
    while more and size < MOST_DRAINED:
        message = await receive()
        size += len(message.get("body", b""))
        more = bool(message.get("more_body"))


async def _reply(send: Send, status: int, content: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})
