"""The real server around the tiny model, in a thread of the tests' own process."""

import shutil
import threading
import time
from contextlib import contextmanager

from test_drift_monitor import reference_conversations

from personatlas.persona.axis import load_axis
from personatlas.persona.options import ModelOptions
from personatlas.steering.drift_monitor import save_reference
from personatlas.steering.serve.http.app import make_app
from personatlas.steering.serve.http.uvicorn_server import make_server
from personatlas.steering.serve.options import CapacityOptions, ServeOptions
from personatlas.steering.serve.startup import make_service

HOW = ModelOptions(device="cpu", dtype="float32")
ROOM = CapacityOptions(slots=8, context=256, prefix_mib=16)


def axis_folder(tiny_run, folder, *, reference=False):
    """A copy of the tiny run's axis with two caps beside it, `held` and `firm`; with reference conversations where asked for."""
    shutil.copytree(tiny_run / "run", folder, dirs_exist_ok=True)
    axis = load_axis(folder / "axis")
    (folder / "caps").mkdir(exist_ok=True)
    axis.quantile_cap((0, 1, 2), 0.75).save(folder / "caps" / "held")
    axis.quantile_cap((1,), 0.9).save(folder / "caps" / "firm")
    if reference:
        save_reference(folder / "reference.json", axis, axis.model, reference_conversations(axis), {})
    return folder


def tiny_service(tiny_run, folder, room=ROOM, how=HOW, **hold):
    """A service, its engine not yet started."""
    options = ServeOptions(**{"max_new_tokens": 12, **hold})
    return make_service(str(tiny_run / "tiny"), str(folder), options, room, load=how)


class Served:
    """A server that listens."""

    def __init__(self, service, port):
        self.service, self.url = service, f"http://127.0.0.1:{port}"
        self.v1 = f"{self.url}/v1"


@contextmanager
def served(service, key=None, origins=()):
    """The server in a thread; it ends, and its engine with it, on the way out."""
    server = make_server(make_app(service, key, origins), service, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the server ended"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield Served(service, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
