"""The listening side: uvicorn with limits on slow clients, and a shutdown within ten seconds.

On SIGTERM or Ctrl-C no connection is accepted any more. Answers have some seconds to end; the rest are cut
with an error that says so.
"""

import asyncio
import json
import socket
from functools import partial

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from personatlas.steering.serve.http.responses import error_object
from personatlas.steering.serve.http.security import SecurityMiddleware
from personatlas.steering.serve.service import PersonaService

ANSWER_SECONDS, CONNECTION_SECONDS = 5.0, 8  # of a shutdown: for running answers, and for connections
REQUEST_SECONDS = (
    20.0  # for a whole request, head and body, from its first byte (of the first one: the connection)
)
IDLE_SECONDS = 30  # of a connection between two requests
READER_SECONDS, READER_BYTES = (
    30.0,
    2**16,
)  # a client with unread bytes must take so many in that time, or all


class TimeoutProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose requests do not arrive, or answers are not read, in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time of the first request."""
        super().connection_made(transport)
        self._request_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._was_read = False
        self._watch_request()

    def data_received(self, data: bytes) -> None:
        """Starts or ends the time of a request."""
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        """Starts the time of a request that has begun already, and that for reading what is not read."""
        super().on_response_complete()
        self._watch_request()
        self._watch_reader()

    def pause_writing(self) -> None:
        """Starts the time for reading."""
        super().pause_writing()
        self._watch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers."""
        for timer in (self._request_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP."""
        self._refuse(b"400 Bad Request", "the request is not valid HTTP/1.1")

    def _watch_request(self) -> None:
        state = self.conn.their_state
        is_incomplete = state is h11.SEND_BODY or (
            state is h11.IDLE
            and (self.cycle is None or not self.timeout_keep_alive_task or bool(self.conn.trailing_data[0]))
        )
        if is_incomplete and self._request_timer is None:
            message = f"the request did not arrive within {REQUEST_SECONDS:g} seconds"
            refuse = partial(self._refuse, b"408 Request Timeout", message)
            self._request_timer = self.loop.call_later(REQUEST_SECONDS, refuse)
        elif not is_incomplete and self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _refuse(self, status: bytes, message: str) -> None:
        """Closes the connection, with an answer where none has begun."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            if self.cycle is not None:
                self.cycle.disconnected = True  # its application writes nothing any more
            body = json.dumps(error_object(message)).encode()
            head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % (
                status,
                len(body),
            )
            self.transport.write(head + b"connection: close\r\n\r\n" + body)
            self.transport.close()
            self._watch_reader()
        else:
            self.transport.abort()

    def _watch_reader(self, before: int | None = None) -> None:
        """Looks at what is unread, and again after some seconds; closes where a client took too little."""
        unread = self.transport.get_write_buffer_size()
        if before is None:
            if self._reader_timer is not None:
                return
        elif unread and unread > before - READER_BYTES and not self._was_read:
            self.transport.abort()
            return
        self._was_read, self._reader_timer = False, None
        if unread:
            self._reader_timer = self.loop.call_later(READER_SECONDS, self._watch_reader, unread)

    def resume_writing(self) -> None:
        """Notes that a client reads."""
        super().resume_writing()
        self._was_read = True


class UvicornServer(uvicorn.Server):
    """uvicorn's server, which gives running answers some seconds at its shutdown and then ends them."""

    def __init__(self, config: uvicorn.Config, service: PersonaService) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops listening, lets answers end, and cuts those that do not."""
        cut = asyncio.get_running_loop().call_later(ANSWER_SECONDS, self.service.abort)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()


def listen(app: SecurityMiddleware, service: PersonaService, host: str, port: int) -> None:
    """Listens until SIGTERM or Ctrl-C. Raises OSError where the address cannot be had."""
    try:
        import resource
    except ImportError:  # not there on Windows
        pass
    else:  # each connection is an open file: as many as the system allows
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    make_server(app, service, host, port).run()


def make_server(app: SecurityMiddleware, service: PersonaService, host: str, port: int) -> UvicornServer:
    """The server, not yet listening; port 0 is any that is free."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=TimeoutProtocol,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=CONNECTION_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
    )
    return UvicornServer(config, service)
