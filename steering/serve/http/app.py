"""The routes: OpenAI's, what is loaded, metrics, and the page.

    app = make_app(service, key=None)      # an ASGI application; its lifespan starts and closes the service

Every error is OpenAI's error object with the status that OpenAI gives it. Nothing of a request is ever a
path: the page's files are read once, at the start, and found by name.
"""

import asyncio
import logging
import math
import mimetypes
import re
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from personatlas.analysis.html import PALETTE
from personatlas.persona.errors import UserError, explain_os_error
from personatlas.persona.progress import say
from personatlas.persona.records import JsonObject
from personatlas.steering.serve.engine.scheduler import ServerBusy
from personatlas.steering.serve.http.completions import ChatCompletion, TextCompletion
from personatlas.steering.serve.http.responses import error_object, stream_line
from personatlas.steering.serve.http.security import SecurityMiddleware
from personatlas.steering.serve.schema import ChatRequest, CompletionRequest, ErrorReply
from personatlas.steering.serve.service import ContextOverflow, InvalidField, PersonaService, UnknownModel

log = logging.getLogger(__name__)
STATIC = Path(__file__).parent.parent / "static"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in (
        (400, "The request is malformed or cannot be answered"),
        (401, "The API key is missing or wrong"),
        (403, "Asked from another web page, or by another name than this machine's"),
        (404, "There is no such model"),
        (413, "The body is too long"),
        (500, "The engine failed"),
        (503, "Too many requests wait, or the server is ending"),
    )
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or a stream of its chunks",
        # no schema: some readers take one for that of each event, others for that of the whole text
        "content": {"text/event-stream": {}},
    }
}
# in the location of a validation error, and errors that say that another branch was meant
UNION_BRANCH = re.compile(r"str|constrained-(?:str|int)|literal\[.*|list\[.*|CapBy\w+")
WRONG_BRANCH = re.compile(r".*_type|missing|extra_forbidden|literal_error")
BUG = "an error of the server itself; its log says more"
CLIENT_CLOSED = 499  # the status that is logged for a client who left


class EventStream(StreamingResponse):
    """A stream that ends with its connection, also where it waits for a client who does not read."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the lines."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


class ClientDisconnected(Exception):
    """The client left before its answer was there."""


def make_app(service: PersonaService, key: str | None, origins: Sequence[str] = ()) -> SecurityMiddleware:
    """The application behind its security checks.

    `key` is the API key of clients, None for none; pages of the `origins` may use it. Raises `UserError` like
    `require_origins`.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    app = FastAPI(title="personatlas", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_error_handlers(app, service)
    _add_completions(app, service)
    _add_descriptions(app, service, key is not None)
    _add_page(app)
    original = app.openapi

    def openapi() -> JsonObject:
        """The schema without FastAPI's 422, which is never sent: malformed requests get a 400 here."""
        schema = original()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
    return SecurityMiddleware(app, key, origins)


def _add_completions(app: FastAPI, service: PersonaService) -> None:
    @app.post("/v1/chat/completions", response_model=None, responses={**REFUSALS, **STREAMED})
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        completion = ChatCompletion(service, body, await service.prepare_chat(body))
        return await _respond(service, "chat", completion, bool(body.stream), request)

    @app.post("/v1/completions", response_model=None, responses={**REFUSALS, **STREAMED})
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Go on with texts."""
        completion = TextCompletion(service, body, await service.prepare_texts(body))
        return await _respond(service, "completions", completion, bool(body.stream), request)


def _add_descriptions(app: FastAPI, service: PersonaService, needs_key: bool) -> None:
    def model_object(name: str) -> JsonObject:
        return {"id": name, "object": "model", "created": 0, "owned_by": "personatlas"}

    @app.get("/v1/models", response_model=None, responses=REFUSALS)
    async def models() -> Response:
        """The model, by itself and with each arm."""
        return JSONResponse({"object": "list", "data": [model_object(name) for name in service.model_names]})

    @app.get("/v1/models/{name:path}", response_model=None, responses=REFUSALS)
    async def one_model(name: str) -> Response:
        """One of them."""
        service.require_model(name)
        return JSONResponse(model_object(name))

    @app.get("/v1/axis", response_model=None, responses=REFUSALS)
    async def axis() -> Response:
        """What is loaded: model, axis, arms, baseline, alarm, limits."""
        return JSONResponse({**_describe(service), "needs_key": needs_key})

    @app.get("/metrics", response_model=None, response_class=PlainTextResponse, responses=REFUSALS)
    async def metrics() -> Response:
        """For Prometheus."""
        text = service.metrics.to_text(service.engine.running, service.engine.queued)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/healthz", response_model=None, responses=REFUSALS)
    @app.get("/health", response_model=None, responses=REFUSALS, include_in_schema=False)
    async def health() -> Response:
        """Whether requests are answered."""
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "down"}, 200 if alive else 503)


def _describe(service: PersonaService) -> JsonObject:
    axis, model, options = service.axis, service.model, service.options
    quantiles: JsonObject = {"levels": [], "default": [], "roles": []}
    if axis is not None and axis.levels:
        row = axis.layers.index(axis.layer)
        quantiles["levels"] = list(axis.levels)
        for population, table in (("default", axis.default_quantiles), ("roles", axis.role_quantiles)):
            quantiles[population] = [value if math.isfinite(value) else None for value in table[row].tolist()]
    monitor = (
        {"baseline": None, "alarm": None} if service.tracker is None else service.tracker.monitor.describe()
    )
    arms, default = service.arms.describe(), service.options.arm
    return {
        "model": {**model.describe(), "name": service.name},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "layer": None if axis is None else axis.layer,
        "poles": None if axis is None else list(axis.poles),
        "no_axis": service.no_axis,
        "injected_system": service.chat.injected,
        "quantiles": quantiles,
        **monitor,
        "arms": arms,
        "default_arm": default,
        "caps": {name: arm for name, arm in arms.items() if arm["kind"] == "cap"},
        "default_cap": default if default is not None and arms[default]["kind"] == "cap" else None,
        "default_mode": options.mode,
        "context": service.limits.context,
        "slots": service.limits.slots,
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }


def _add_page(app: FastAPI) -> None:
    files = {path.name: path.read_bytes() for path in (PALETTE, *STATIC.glob("*")) if path.is_file()}

    def file_response(name: str) -> Response:
        media_type = MEDIA_TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0]
        headers = {"cache-control": "no-cache"}
        return Response(files[name], media_type=media_type or "application/octet-stream", headers=headers)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return file_response("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "there is no such file")
        return file_response(name)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return file_response("icon.svg")


async def _respond(
    service: PersonaService,
    route: str,
    completion: ChatCompletion | TextCompletion,
    as_stream: bool,
    request: Request,
) -> Response:
    """The whole answer or a stream. A client who leaves early is counted, and its work cancelled."""
    count = service.metrics.requests.labels(route, "200").inc
    if not as_stream:
        content = await _unless_disconnected(completion.respond(), request)
        count()
        return Response(content, media_type="application/json")
    lines = completion.stream()
    first = await anext(lines)  # it submits the requests: a refusal can still have its status
    count()

    async def body() -> AsyncIterator[bytes]:
        complete = False
        try:
            if first:
                yield first
            async for line in lines:
                yield line
            complete = True
        except Exception:
            log.exception("a stream failed")
            yield stream_line(error_object(BUG, "server_error"))
        finally:
            if not complete:
                service.metrics.cancelled.inc()
            await lines.aclose()  # type: ignore[attr-defined]

    return EventStream(body(), headers={"x-accel-buffering": "no"})


async def _unless_disconnected(work: Awaitable[bytes], request: Request) -> bytes:
    """The result of `work`. Cancels it and raises `ClientDisconnected` when the client leaves."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


def _add_error_handlers(app: FastAPI, service: PersonaService) -> None:
    """Makes OpenAI's error objects of all errors."""

    def reply(
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> Response:
        service.metrics.requests.labels("refused", str(status)).inc()
        headers = {"retry-after": "1"} if status == 503 else None
        return JSONResponse(error_object(message, kind, param, code), status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> Response:
        location, message = _explain(error.errors())
        return reply(400, f"{location}: {message}" if location else message, param=location or None)

    @app.exception_handler(UserError)
    async def refused(_request: Request, error: UserError) -> Response:
        if isinstance(error, ServerBusy):
            return reply(503, str(error), "server_error", code="overloaded")
        if isinstance(error, UnknownModel):
            return reply(404, str(error), code="model_not_found", param="model")
        if isinstance(error, InvalidField):
            code = "context_length_exceeded" if isinstance(error, ContextOverflow) else None
            return reply(400, str(error), param=error.param, code=code)
        return reply(400, str(error))

    @app.exception_handler(HTTPException)
    async def http_error(_request: Request, error: HTTPException) -> Response:
        return reply(error.status_code, str(error.detail))

    @app.exception_handler(ClientDisconnected)
    async def closed(_request: Request, _error: ClientDisconnected) -> Response:
        service.metrics.cancelled.inc()
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(OSError)
    async def system_error(_request: Request, error: OSError) -> Response:
        say(explain_os_error(error))  # with its path, which is not for the client
        return reply(500, f"the server cannot do this now: {error.strerror or error}", "server_error")

    @app.exception_handler(RuntimeError)
    async def failed(_request: Request, error: RuntimeError) -> Response:
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return reply(500, f"the engine failed: {text}", "server_error")

    @app.exception_handler(Exception)
    async def bug(_request: Request, _error: Exception) -> Response:
        return reply(500, BUG, "server_error")


def _explain(errors: Sequence[Any]) -> tuple[str, str]:
    """Location and text of the first validation error; of a union's branches the best fit is told."""
    same_field = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    best = max(same_field, key=lambda error: (not WRONG_BRANCH.fullmatch(error["type"]), len(error["loc"])))
    if best["type"] == "json_invalid":
        return "", f"the body is not valid JSON: {best.get('ctx', {}).get('error', 'malformed')}"
    if best["loc"] == ("body",) and best["type"] in ("model_attributes_type", "missing"):
        return "", "the body must be a JSON object, sent with content-type application/json"
    names = [str(part) for part in best["loc"][1:] if not UNION_BRANCH.fullmatch(str(part))]
    return ".".join(names)[:200], str(best["msg"]).removeprefix("Value error, ")
