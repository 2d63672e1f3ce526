"""The checks before every route (host, origin, size, API key) and the headers of every response.

Pure ASGI: nothing is buffered, so streams stay streams. Without a key the server listens on this machine only
and takes only requests that name it as such. A web page elsewhere can neither read it nor make it work,
unless its origin is allowed: other origins are refused, and so are host names that merely resolve to this
machine.
"""

import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException

from personatlas.persona.errors import UserError
from personatlas.steering.serve.http.responses import error_object
from personatlas.steering.serve.options import API_KEY

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 4 * 2**20  # bytes
MAX_DRAINED = 64 * 2**20
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{0,5}))?")
ABSOLUTE_TARGET = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)", re.IGNORECASE)
DEFAULT_PORTS = {"http": "80", "https": "443"}
SINGLE_HEADERS = (b"host", b"origin", b"authorization", b"content-length", b"content-type")
HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:[ \t]*,[ \t]*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
ANY_ORIGIN = "*"
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


def parse_authority(text: str) -> tuple[str, str]:
    """Host name and port ("" for none) of a Host header, in the form in which they can be compared.

    Raises ValueError for all but `name`, `address` or `[address]` with or without a port.
    """
    found = AUTHORITY.fullmatch(text)
    if found is None or int(found[2] or 0) > 65535:
        raise ValueError("malformed")
    name, port = found[1].lower(), (found[2] or "").lstrip("0")
    if name.startswith("["):
        return str(ipaddress.IPv6Address(name[1:-1])), port
    name = name.removesuffix(".")
    if not name or ".." in name or name.startswith("."):
        raise ValueError("malformed")
    return name, port


def parse_origin(text: str) -> tuple[str, str, str]:
    """Scheme, host name and port of an origin; a scheme's own port is "". Raises ValueError for all else."""
    found = ORIGIN.fullmatch(text)
    if found is None:
        raise ValueError("malformed")
    scheme, (name, port) = found[1].lower(), parse_authority(found[2])
    return scheme, name, "" if port == DEFAULT_PORTS.get(scheme) else port


def require_origins(origins: Sequence[str], key: str | None) -> None:
    """Raises `UserError` for allowed origins that are none, and for `*` without a key."""
    for origin in origins:
        if origin == ANY_ORIGIN:
            if key is None:
                raise UserError(
                    f"--allow-origin * lets every web page in: set {API_KEY} to a key, or name origins"
                )
            continue
        try:
            parse_origin(origin)
        except ValueError:
            raise UserError(
                f"--allow-origin {origin!r} is no origin: give scheme, host and port, as https://chat.example:8443"
            ) from None


class SecurityMiddleware:
    """An application behind these checks. Without a `key` only this machine is served.

    Pages of the `origins` may use it too. Raises `UserError` like `require_origins`.
    """

    def __init__(self, app: App, key: str | None, origins: Sequence[str] = ()) -> None:
        require_origins(origins, key)
        self.app, self.key = app, key.encode() if key is not None else None
        self.any_origin = ANY_ORIGIN in origins
        self.origins = {parse_origin(origin) for origin in origins if origin != ANY_ORIGIN}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin", "")
        cors = [(b"vary", b"origin")] if self.any_origin or self.origins else []
        if origin and self._is_allowed(origin):
            cors.append((b"access-control-allow-origin", origin.encode("latin-1")))
            cors.append((b"access-control-expose-headers", b"retry-after"))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [pair for pair in message.get("headers", []) if pair[0].lower() != b"server"]
                has_cache_control = any(name == b"cache-control" for name, _ in own)
                no_store = [] if has_cache_control else [(b"cache-control", b"no-store")]
                message = {**message, "headers": [*own, *HEADERS, *cors, *no_store]}
            await send(message)

        scope = _origin_form(scope, headers)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _drain(receive)
            await _send_refusal(send_with_headers, refusal)
            return
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await _send_preflight(send_with_headers, headers)
            return
        refusal = self._missing_key(scope["path"], headers)
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

    def _is_allowed(self, origin: str) -> bool:
        try:
            return parse_origin(origin) in self.origins or self.any_origin
        except ValueError:
            return False

    def _refusal(self, scope: Scope, headers: dict[bytes, str]) -> Refusal | None:
        for header in SINGLE_HEADERS:
            if sum(own == header for own, _ in scope["headers"]) > 1:
                return Refusal(400, f"more than one {header.decode()} header")
        host = headers.get(b"host", "")
        try:
            name, port = parse_authority(host)
        except ValueError:
            name = port = ""
        if self.key is None and name not in LOCAL_NAMES:
            return Refusal(
                403,
                f"this server answers to 127.0.0.1 and localhost only, not to {host[:80]!r}: to reach it by "
                f"other names, start it with a key in {API_KEY}",
                "permission_error",
            )
        if not name:
            return Refusal(400, f"the host {host[:80]!r} is malformed: it is a name or address, and a port")
        origin = headers.get(b"origin", "")
        if origin and not self._is_allowed(origin):
            try:
                scheme, *own = parse_origin(origin)
                is_own = own == [name, "" if port == DEFAULT_PORTS.get(scheme) else port]
            except ValueError:  # "null" too
                is_own = False
            if not is_own:
                message = (
                    f"requests from other web pages are refused: --allow-origin {origin[:80]} allows this one"
                )
                return Refusal(403, message, "permission_error")
        try:
            size = int(headers.get(b"content-length", "0"))
        except ValueError:
            return Refusal(400, "the content-length is no number")
        if size > MAX_BODY:
            return Refusal(413, f"a body of {size} bytes is more than the {MAX_BODY} that are read")
        return None

    def _missing_key(self, path: str, headers: dict[bytes, str]) -> Refusal | None:
        if self.key is not None and (path.startswith("/v1/") or path in ("/metrics", "/openapi.json")):
            scheme, _, key = headers.get(b"authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self.key):
                return Refusal(
                    401, "the API key is missing or wrong", "authentication_error", "invalid_api_key"
                )
        return None


def _origin_form(scope: Scope, headers: dict[bytes, str]) -> Scope:
    """A request to a whole URL (`GET http://host/path`) as one to its path, at the URL's host."""
    found = ABSOLUTE_TARGET.fullmatch(scope["path"])
    if found is None:
        return scope
    headers[b"host"] = found[1]
    path = found[2] or "/"
    raw = scope.get("raw_path", path.encode("utf-8", "surrogateescape")).split(b"/", 3)
    return {**scope, "path": path, "raw_path": b"/" + (raw[3] if len(raw) > 3 else b"")}


async def _send_preflight(send: Send, headers: dict[bytes, str]) -> None:
    """Answers a browser that asks whether a page may send a request."""
    wanted = headers.get(b"access-control-request-headers", "")
    answer = [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600")]
    if HEADER_NAMES.fullmatch(wanted):
        answer.append((b"access-control-allow-headers", wanted.encode("latin-1")))
    if headers.get(b"access-control-request-private-network") == "true":
        answer.append((b"access-control-allow-private-network", b"true"))
    await send({"type": "http.response.start", "status": 204, "headers": answer})
    await send({"type": "http.response.body", "body": b""})


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
