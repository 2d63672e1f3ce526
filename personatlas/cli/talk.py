"""The verb `chat`: talk to a model in the terminal, with a line under every answer that says where it stands.

The verb `serve`: an OpenAI-compatible server that watches every conversation along the axis, and holds it if asked.
"""

import asyncio
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.text import Text

from personatlas.cli.runs import Model, axis_of, console
from personatlas.persona.errors import KnownError
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import say
from personatlas.steering.serve.startup import HoldOptions, RoomOptions, make_host

ROOM = RoomOptions(slots=2, prefix_mib=256)  # one answer at a time, two when they are compared


def chat(
    model: Model,
    /,
    *,
    axis: str | None = None,
    system: str = "",
    message: Annotated[tuple[str, ...], Parameter(negative=(), allow_leading_hyphen=True)] = (),
    load: Path | None = None,
    seed: int | None = None,
    context: int | None = None,
    force: bool = False,
    hold: HoldOptions = HoldOptions(),
    how: ModelOptions = ModelOptions(),
) -> None:
    """Talk to a model in the terminal; after every answer a line says where it lies on the axis and what the cap did.

    Where the input is no terminal, every line of it is a message or a command, and the program ends with it.

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m; the one that `personatlas axis MODEL` made or that comes with it unless given
    system
        a system prompt; none unless given
    message
        ask this and leave; may be given several times, and may be a command such as /trace
    load
        go on with a stored conversation
    seed
        for the same answers again; another one each time unless given
    context
        most tokens of the conversation; what the model and the memory hold, unless given
    force
        use an axis of the same model in another weight format
    """
    if system and load is not None:
        raise KnownError("give --system or --load: a stored conversation has its own system prompt")
    from personatlas.steering.serve.terminal.chat_file import load_told
    from personatlas.steering.serve.terminal.session import Told

    told = load_told(load) if load is not None else Told(system)
    host = make_host(model, how, axis_of(model, axis), hold, replace(ROOM, context=context), force=force)
    failed = _talked(host, told, message, seed)
    if failed:
        raise KnownError(f"{failed} of the lines could not be done (see above)")


def _talked(host: Any, told: Any, lines: tuple[str, ...], seed: int | None) -> int:
    """Talk until there is nothing more to say; how many lines could not be done where nobody sat there to see it."""
    from personatlas.steering.serve.terminal.repl import Terminal

    with asyncio.Runner() as runner:
        runner.run(host.open())
        terminal = Terminal(runner, host, seed, live=not lines and sys.stdin.isatty())
        try:
            terminal.run(told, lines)
        finally:
            host.close()
    return 0 if terminal.live else terminal.failed


KEY = "PERSONATLAS_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Model,
    /,
    *,
    axis: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8377,
    force: bool = False,
    hold: HoldOptions = HoldOptions(),
    room: RoomOptions = RoomOptions(),
    how: ModelOptions = ModelOptions(),
) -> None:
    """Serve a model to OpenAI's clients and on a page of its own, with every conversation's persona measured.

    The key that clients must give is read from PERSONATLAS_API_KEY; without one only this machine is served.

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m; the one that `personatlas axis MODEL` made or that comes with it unless given
    host
        the address to listen on; another than this machine's own needs a key
    port
        the port to listen on
    force
        use an axis of the same model in another weight format
    """
    key = _key(host)
    _require_free(host, port)
    served = make_host(model, how, axis_of(model, axis), hold, room, force=force)
    from personatlas.steering.serve.http.app import make_app
    from personatlas.steering.serve.http.uvicorn_server import serve as listen

    out, settings = console(), served.settings
    address = f"[{host}]" if ":" in host else host
    out.print(
        Text(f"http://{address}:{port}", style="bold"),
        Text("the page; /v1 for OpenAI's clients", style="dim"),
    )
    alarm = served.standing.watcher.rule
    told = f"{served.name}, layer {served.held.axis.layer}"
    told += (
        f"; cap {settings.cap or 'none'} ({settings.mode})" if settings.cap else "; no cap unless asked for"
    )
    told += "" if alarm is not None else "; no alarm is calibrated (`personatlas drift` makes a calm.json)"
    say(
        f"{told}; {settings.room.slots} conversations of {settings.room.length} tokens at once; Ctrl-C ends it"
    )
    listen(make_app(served, key), served, host, port)


def _key(host: str) -> str | None:
    key = os.environ.get(KEY)
    if key is not None and (not key.isascii() or not key.isprintable() or len(key.strip()) < 8):
        raise KnownError(f"{KEY} must be at least 8 printable ASCII characters")
    if key is None and host not in LOCAL:
        raise KnownError(
            f"--host {host} can be reached from other machines: set {KEY} to a key that clients must give, or leave --host out"
        )
    return key.strip() if key is not None else None


def _require_free(host: str, port: int) -> None:
    """The address can be had, before a model is loaded for it."""
    if not 0 < port < 65536:
        raise KnownError(f"--port {port} is outside 1..65535")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise KnownError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from None
