"""Chat templates are rendered by a process of their own, which cannot take more than its time, memory and
length.

    render_template(source, {"messages": messages, "add_generation_prompt": True}, now=datetime.now())

One process serves all threads and templates. It is started with the first template and again after one that
it had to be ended for.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from threading import Lock

from personatlas.persona.errors import UserError

SECONDS = 2  # of processor time; a template takes a tenth of a millisecond
MEMORY = 1 << 30  # bytes above what the process has at its start
CHARACTERS = 1 << 20  # above eight times the messages' own


class TemplateRefusal(UserError):
    """The template refuses these messages, or cannot be run."""


class TemplateLimit(UserError):
    """The template takes more time, memory or characters than any conversation needs."""


class TemplateProcess:
    """The process, one request at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._child: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)
        os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: bytes) -> Mapping[str, str]:
        """The reply to one line. Raises `TemplateLimit` where the process ended instead."""
        with self._lock:
            if self._child is not None and self._child.poll() is not None:
                self.stop()  # it was ended while it waited
            child = self._child = self._child or self._start()
            assert child.stdin is not None
            assert child.stdout is not None
            reply = b""
            try:
                child.stdin.write(request)
                child.stdin.flush()
                reply = child.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                if not reply:  # also where Ctrl-C came between question and answer
                    code = self.stop()
        if reply:
            return json.loads(reply)
        if code == -signal.SIGPROF:
            raise TemplateLimit(f"the chat template runs longer than {SECONDS} s; pass --chat-template FILE")
        raise TemplateLimit(f"the chat template ended its process ({code}); pass --chat-template FILE")

    def stop(self) -> int | None:
        """Ends the process, if there is one, and returns its exit status."""
        child, self._child = self._child, None
        if child is None:
            return None
        with child:
            if child.stdin is not None:
                child.stdin.close()
            try:
                return child.wait(1)
            except subprocess.TimeoutExpired:
                child.kill()
                return child.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        worker = Path(__file__).with_name("template_worker.py")
        limits = map(str, (SECONDS, MEMORY, CHARACTERS))
        path = os.pathsep.join(filter(None, sys.path))  # whatever this process finds Jinja by
        return subprocess.Popen(
            [sys.executable, "-P", str(worker), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )

    def _forget(self) -> None:
        """In a forked process: the pipes are the parent's."""
        self._lock, self._child = Lock(), None


_PROCESS = TemplateProcess()


def render_template(source: str, variables: Mapping[str, object], now: datetime) -> str:
    """What a template writes; `strftime_now` gives `now`.

    Raises `TemplateRefusal` with the template's own reason, and `TemplateLimit`.
    """
    request = {"source": source, "variables": dict(variables), "now": now.isoformat()}
    reply = _PROCESS.ask(json.dumps(request).encode() + b"\n")
    if "limit" in reply:
        raise TemplateLimit(f"the chat template {reply['limit']}; pass --chat-template FILE")
    if "error" in reply:
        raise TemplateRefusal(reply["error"])
    return reply["text"]
