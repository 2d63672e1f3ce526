"""Append-only JSONL logs that survive a crash: a kill loses at most the line that was being written.

append_lines(folder / "rollouts.jsonl", [{"key": "pirate/0/q1/0", ...}])
rows = read_lines(folder / "rollouts.jsonl")
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from personatlas.persona.errors import UserError


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL log; a missing file is an empty log.

    A last line without its newline is one that a crash cut short: it is left out (and cut off by `append_lines`).
    Anything else that does not parse is damage and raises `UserError` with its line number.
    """
    if not path.exists():
        return []
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}:{number} is not valid JSON: {error}") from None
    return rows


def append_lines(path: Path, rows: Iterable[dict[str, Any]], *, sync: bool = True) -> None:
    """Append rows to a JSONL log, all of them or (on an error) none; a half line left by a crash is cut off first.

    `sync` waits for the disk, which only a power cut makes necessary: a killed process loses nothing that was written.
    """
    content = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    with path.open("a+b", buffering=0) as file:  # a buffer would be flushed again by truncate and by close
        end = _whole_lines_end(file)
        file.truncate(end)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)  # a full disk must not leave half a line that looks like damage
            raise


def _whole_lines_end(file: Any) -> int:
    size = int(file.seek(0, os.SEEK_END))
    step = 1 << 16
    for start in range(max(size - step, 0), -1, -step) if size else ():
        file.seek(start)
        found = file.read(step).rfind(b"\n")
        if found >= 0:
            return start + int(found) + 1
        if start == 0:
            break
    if size > step:  # a single line longer than the window
        file.seek(0)
        return int(file.read().rfind(b"\n")) + 1
    return 0
