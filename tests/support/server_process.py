"""`personatlas serve` as a process of its own."""

import os
import socket
import subprocess
import sys
import time

import httpx

START = "from personatlas.cli.app import main; main()"


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """A server that is starting; `wait` until it answers. It is killed when the context is left."""

    def __init__(self, folder, *options, start=START, **environment):
        port = free_port()
        command = [sys.executable, "-c", start, "serve", str(folder / "tiny"), "--axis", str(folder / "run")]
        command += ["--port", str(port), "--device", "cpu", "--dtype", "float32", *options]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def wait(self):
        """Returns the process and its URL once it answers."""
        deadline = time.monotonic() + 120
        while True:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline, "the server did not start"
            try:
                if httpx.get(f"{self.url}/healthz").status_code == 200:
                    return self.process, self.url
            except httpx.TransportError:
                time.sleep(0.05)
