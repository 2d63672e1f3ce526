"""The checks before every route (host, origin, size, API key) and the headers of every response.

Pure ASGI: nothing is buffered, so streams stay streams. Without a key the server listens on this machine only
and takes only requests that name it as such. A web page elsewhere can neither read it nor make it work: there
is no CORS, foreign origins are refused, and so are host names that merely resolve to this machine.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException

from personatlas.steering.serve.http.responses import error_object

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 4 * 2**20  # bytes
MAX_DRAINED = 64 * 2**20
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
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


class Refusal(NamedTuple):
    """An error response: status, and message, type and code of OpenAI's error object."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None


class SecurityMiddleware:
    """An application behind these checks. Without a `key` only this machine is served."""

    def __init__(self, app: App, key: str | None) -> None:
        self.app, self.key = app, key.encode() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [pair for pair in message.get("headers", []) if pair[0].lower() != b"server"]
                has_cache_control = any(name == b"cache-control" for name, _ in own)
                no_store = [] if has_cache_control else [(b"cache-control", b"no-store")]
                message = {**message, "headers": [*own, *HEADERS, *no_store]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await _drain(receive)
            await _send_refusal(send_with_headers, refusal)
            return
        size = 0

        async def receive_limited() -> Message:
            """Counts the bytes of a body that did not say how many there are."""
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, f"the body is longer than the {MAX_BODY} bytes that are read")
            return message

        await self.app(scope, receive_limited, send_with_headers)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self.key is None and name not in LOCAL_NAMES:
            return Refusal(403, "this server answers to 127.0.0.1 and localhost only", "permission_error")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            return Refusal(403, "requests from other web pages are refused", "permission_error")
        try:
            size = int(headers.get(b"content-length", b"0"))
        except ValueError:
            return Refusal(400, "the content-length is no number")
        if size > MAX_BODY:
            return Refusal(413, f"a body of {size} bytes is more than the {MAX_BODY} that are read")
        path = scope["path"]
        if self.key is not None and (path.startswith("/v1/") or path in ("/metrics", "/openapi.json")):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.key):
                return Refusal(
                    401, "the API key is missing or wrong", "authentication_error", "invalid_api_key"
                )
        return None


async def _drain(receive: Receive) -> None:
    """Reads what is being sent, up to a limit: a client that is cut off while sending never reads why."""
    size, more = 0, True
    while more and size < MAX_DRAINED:
        message = await receive()
        size += len(message.get("body", b""))
        more = bool(message.get("more_body"))


async def _send_refusal(send: Send, refusal: Refusal) -> None:
    content = error_object(refusal.message, refusal.kind, code=refusal.code)
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})
