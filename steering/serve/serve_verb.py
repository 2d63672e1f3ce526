"""The verb `serve`: an OpenAI-compatible server that watches every conversation along the axis, and holds it if asked."""

import os
import socket

from rich.text import Text

from personaxis.persona.errors import KnownError
from personaxis.persona.options import ModelOptions
from personaxis.persona.progress import say
from personaxis.persona.verbs import Model, axis_of, console
from personaxis.steering.serve.ready import HoldOptions, RoomOptions, make_host

KEY = "PERSONAXIS_API_KEY"
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

    The key that clients must give is read from PERSONAXIS_API_KEY; without one only this machine is served.

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m; the one that `personaxis axis MODEL` made or that comes with it unless given
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
    from personaxis.steering.serve.app import make_app
    from personaxis.steering.serve.server import serve as listen

    out, settings = console(), served.settings
    address = f"[{host}]" if ":" in host else host
    out.print(Text(f"http://{address}:{port}", style="bold"), Text("the page; /v1 for OpenAI's clients", style="dim"))
    alarm = served.standing.watcher.rule
    told = f"{served.name}, layer {served.held.axis.layer}"
    told += f"; cap {settings.cap or 'none'} ({settings.mode})" if settings.cap else "; no cap unless asked for"
    told += "" if alarm is not None else "; no alarm is calibrated (`personaxis drift` makes a calm.json)"
    say(f"{told}; {settings.room.slots} conversations of {settings.room.length} tokens at once; Ctrl-C ends it")
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
        raise KnownError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from None
