"""The listening side: uvicorn with limits on those who connect and say nothing, and an end that comes within ten seconds.

On SIGTERM or Ctrl-C no connection is taken any more; answers have some seconds to end, then they are cut with an error that says so.
"""

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from personatlas.steering.serve.service import PersonaService

FINISH, CUT = 5.0, 8  # seconds: answers may end by themselves; connections are closed
PATIENCE = 20.0  # seconds that a connection may wait before its first whole request


class TimeoutProtocol(H11Protocol):
    """HTTP/1.1 for clients who speak: a connection without a whole request head is closed after some seconds."""

    def connection_made(self, transport: Any) -> None:
        """Somebody connects."""
        super().connection_made(transport)
        self._waited = self.loop.call_later(PATIENCE, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None and self.transport is not None:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._waited.cancel()
        super().connection_lost(exc)


class UvicornServer(uvicorn.Server):
    """uvicorn's server, which on its way out gives answers some seconds and then ends them."""

    def __init__(self, config: uvicorn.Config, host: PersonaService) -> None:
        super().__init__(config)
        self.host = host

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop listening, let answers end, cut those that do not."""
        cut = asyncio.get_running_loop().call_later(FINISH, self.host.end)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()


def serve(app: Any, host: PersonaService, address: str, port: int) -> None:
    """Listen until told to stop. Raises OSError where the address cannot be had."""
    _raise_file_limit()
    server_of(app, host, address, port).run()


def server_of(app: Any, host: PersonaService, address: str, port: int) -> UvicornServer:
    """The server, not yet listening; port 0 is any that is free."""
    config = uvicorn.Config(
        app,
        host=address,
        port=port,
        http=TimeoutProtocol,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=CUT,
        h11_max_incomplete_event_size=64 * 1024,
    )
    return UvicornServer(config, host)


def _raise_file_limit() -> None:
    """As many connections as the system allows: each is an open file."""
    try:
        import resource
    except ImportError:  # not there on Windows
        return
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
