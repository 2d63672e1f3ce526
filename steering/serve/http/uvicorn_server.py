"""The listening side: uvicorn with limits on silent connections, and a shutdown within ten seconds.

On SIGTERM or Ctrl-C no connection is accepted any more. Answers have some seconds to end; the rest are cut
with an error that says so.
"""

import asyncio
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from personatlas.steering.serve.http.security import SecurityMiddleware
from personatlas.steering.serve.service import PersonaService

ANSWER_SECONDS, CONNECTION_SECONDS = 5.0, 8  # of a shutdown: for running answers, and for connections
REQUEST_SECONDS = 20.0  # for the first whole request of a connection


class TimeoutProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection without a whole request head after some seconds."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the timer of a new connection."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(REQUEST_SECONDS, self._close_silent)

    def _close_silent(self) -> None:
        if self.cycle is None and self.transport is not None:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timer."""
        self._timer.cancel()
        super().connection_lost(exc)


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
        timeout_keep_alive=30,
        timeout_graceful_shutdown=CONNECTION_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
    )
    return UvicornServer(config, service)
