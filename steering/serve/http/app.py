"""The routes: OpenAI's, what is loaded, how it goes, and the page.

    app = make_app(host, key=None)          # an ASGI application; its lifespan starts and ends the host's engine

Every error is OpenAI's error object with the status that OpenAI gives. Nothing of a request is a path: the page's files are
read once, at the start, and found by their names.
"""

import asyncio
import mimetypes
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from personatlas.persona.errors import UserError
from personatlas.steering.serve.engine.scheduler import ServerBusy
from personatlas.steering.serve.http.completions import ChatCompletionHandler, CompletionHandler
from personatlas.steering.serve.http.responses import error_body
from personatlas.steering.serve.http.security import SecurityMiddleware
from personatlas.steering.serve.schema import ChatRequest, CompletionRequest, ErrorReply
from personatlas.steering.serve.service import ContextOverflow, PersonaService, UnknownModel

STATIC = Path(__file__).parent.parent / "static"
KINDS = {
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
STREAMED = {
    200: {
        "description": "The answer, or a stream of its chunks",
        # no schema: some readers of it take one for that of each event, others for that of the whole text
        "content": {"text/event-stream": {}},
    }
}
BRANCH = re.compile(r"str|constrained-str|list\[.*|CapBy\w+")  # of a union, in the place of a mistake
MISFIT = re.compile(r".*_type|missing|extra_forbidden")  # mistakes that say that another branch was meant
GONE = 499  # the status that is logged for a client who left
Answer = TypeVar("Answer")


class ClientDisconnected(Exception):
    """The client left before its answer was there."""


def make_app(host: PersonaService, key: str | None) -> Any:
    """The application behind its guard."""

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        await host.open()
        try:
            yield
        finally:
            await asyncio.to_thread(host.close)

    app = FastAPI(title="personatlas", version="1", lifespan=life, docs_url=None, redoc_url=None)
    _answer_errors(app, host)
    _talking(app, host)
    _telling(app, host, key is not None)
    _pages(app)
    _document(app)
    return SecurityMiddleware(app, key)


def _talking(app: FastAPI, host: PersonaService) -> None:
    @app.post("/v1/chat/completions", response_model=None, responses={**REFUSALS, **STREAMED})  # type: ignore[dict-item]
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        ready = await host.prepare_chat(asked)
        talk = ChatCompletionHandler(host, asked, ready)
        return await _sent(host, "chat", bool(asked.stream), talk.stream, talk.whole, request)

    @app.post("/v1/completions", response_model=None, responses={**REFUSALS, **STREAMED})  # type: ignore[dict-item]
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """Go on with texts."""
        ready = [await host.prepare_completion(asked, prompt) for prompt in asked.prompts]
        run = CompletionHandler(host, asked, ready)
        return await _sent(host, "completions", bool(asked.stream), run.stream, run.whole, request)


def _telling(app: FastAPI, host: PersonaService, needs_key: bool) -> None:
    @app.get("/v1/models", response_model=None, responses=REFUSALS)
    async def models() -> Response:
        """The model, by itself and with each cap."""
        return JSONResponse({"object": "list", "data": [_model(name) for name in host.models]})

    @app.get("/v1/models/{name:path}", response_model=None, responses=REFUSALS)
    async def one_model(name: str) -> Response:
        """One of them."""
        if name not in host.models:
            raise UnknownModel(f"the model {name[:80]!r} does not exist; served are {', '.join(host.models)}")
        return JSONResponse(_model(name))

    @app.get("/v1/axis", response_model=None, responses=REFUSALS)
    async def axis() -> Response:
        """What is loaded: model, axis, caps, baseline, alarm, limits."""
        return JSONResponse(_loaded(host, needs_key))

    @app.get("/metrics", response_model=None, response_class=PlainTextResponse, responses=REFUSALS)
    async def metrics() -> Response:
        """For Prometheus."""
        text = host.metrics.text(host.engine.running, host.engine.queued)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/healthz", response_model=None, responses=REFUSALS)
    async def health() -> Response:
        """Whether requests are answered."""
        alive = host.engine.alive
        return JSONResponse({"status": "ok" if alive else "down"}, 200 if alive else 503)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "personatlas"}


def _loaded(host: PersonaService, needs_key: bool) -> dict[str, Any]:
    axis, model, settings = host.held.axis, host.held.model, host.settings
    row = axis.layers.index(axis.layer)
    quantiles: dict[str, list[Any]] = {"levels": list(axis.levels), "default": [], "roles": []}
    if axis.levels:
        quantiles["default"] = _finite(axis.default_quantiles[row].tolist())
        quantiles["roles"] = _finite(axis.role_quantiles[row].tolist())
    return {
        "model": {**model.describe(), "name": host.name},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "layer": axis.layer,
        "poles": list(axis.poles),
        "quantiles": quantiles,
        **host.standing.describe(),
        "caps": host.engine.plans.describe(),
        "default_cap": host.cap.name if host.cap is not None else None,
        "default_mode": settings.mode,
        "context": settings.room.length,
        "slots": settings.room.slots,
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "needs_key": needs_key,
    }


def _finite(values: list[float]) -> list[float | None]:
    return [value if value == value and abs(value) != float("inf") else None for value in values]


def _pages(app: FastAPI) -> None:
    files = {path.name: path.read_bytes() for path in sorted(STATIC.glob("*")) if path.is_file()}

    def served(name: str) -> Response:
        ending = Path(name).suffix
        kind = KINDS.get(ending) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Response(files[name], media_type=kind, headers={"cache-control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        return served("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        """A file of the page."""
        if name not in files:
            raise HTTPException(404, "there is no such file")
        return served(name)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        """The page has its own."""
        return served("icon.svg") if "icon.svg" in files else Response(status_code=204)


async def _sent(
    host: PersonaService,
    route: str,
    as_stream: bool,
    stream: Callable[[], AsyncIterator[bytes]],
    whole: Callable[[], Awaitable[dict[str, Any]]],
    request: Request,
) -> Response:
    if as_stream:
        pieces = stream()
        first = await anext(pieces)  # it submits: what is refused can still have its status
        host.metrics.requests.labels(route, "200").inc()
        return StreamingResponse(
            _counted(host, first, pieces), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )
    content = await _unless_gone(whole(), request)
    host.metrics.requests.labels(route, "200").inc()
    return JSONResponse(content)


async def _counted(host: PersonaService, first: bytes, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The stream; a client who leaves early is counted, and the generator closed, which cancels the work."""
    whole = False
    try:
        if first:
            yield first
        async for piece in stream:
            yield piece
        whole = True
    finally:
        if not whole:
            host.metrics.cancelled.inc()
        await stream.aclose()  # type: ignore[attr-defined]


async def _unless_gone(work: Awaitable[dict[str, Any]], request: Request) -> dict[str, Any]:
    """The work's result; the work is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer_errors(app: FastAPI, host: PersonaService) -> None:
    """All errors as OpenAI's error objects."""

    def reply(status: int, message: str, kind: str = "invalid_request_error", **more: Any) -> Response:
        host.metrics.requests.labels("refused", str(status)).inc()
        headers = {"retry-after": "1"} if status == 503 else None
        return JSONResponse(error_body(message, kind, **more), status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> Response:
        place, message = _mistake(error.errors())
        return reply(400, f"{place}: {message}" if place else message, param=place or None)

    @app.exception_handler(UserError)
    async def known(_request: Request, error: UserError) -> Response:
        if isinstance(error, ServerBusy):
            return reply(503, str(error), "server_error", code="overloaded")
        if isinstance(error, UnknownModel):
            return reply(404, str(error), code="model_not_found", param="model")
        if isinstance(error, ContextOverflow):
            return reply(400, str(error), code="context_length_exceeded", param="messages")
        return reply(400, str(error))

    @app.exception_handler(HTTPException)
    async def other(_request: Request, error: HTTPException) -> Response:
        return reply(error.status_code, str(error.detail))

    @app.exception_handler(ClientDisconnected)
    async def gone(_request: Request, _error: ClientDisconnected) -> Response:
        host.metrics.cancelled.inc()
        return Response(status_code=GONE)

    @app.exception_handler(RuntimeError)
    async def failed(_request: Request, error: RuntimeError) -> Response:
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return reply(500, f"the engine failed: {text}", "server_error")

    @app.exception_handler(Exception)
    async def bug(_request: Request, _error: Exception) -> Response:
        """Its traceback is in the server's log."""
        return reply(500, "an error of the server itself; its log says more", "server_error")


def _mistake(errors: Sequence[Any]) -> tuple[str, str]:
    """Where the first mistake is, and what it is. Of a union every branch complains: the one that fits best is told."""
    about = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    first = max(about, key=lambda error: (not MISFIT.fullmatch(error["type"]), len(error["loc"])))
    if first["type"] == "json_invalid":
        return "", f"the body is not valid JSON: {first.get('ctx', {}).get('error', 'malformed')}"
    if first["loc"] == ("body",) and first["type"] in ("model_attributes_type", "missing"):
        return "", "the body must be a JSON object, sent with content-type application/json"
    names = [str(part) for part in first["loc"][1:] if not BRANCH.fullmatch(str(part))]
    return ".".join(names)[:200], str(first["msg"]).removeprefix("Value error, ")


def _document(app: FastAPI) -> None:
    """The schema without FastAPI's 422, which is never sent: what is malformed is a 400 here."""
    made = app.openapi

    def schema() -> dict[str, Any]:
        told = made()
        for path in told["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return told

    app.openapi = schema  # type: ignore[method-assign]
