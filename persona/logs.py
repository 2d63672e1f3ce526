"""Append-only JSONL logs that survive a crash: a kill loses at most the line that was being written.

append_lines(folder / "rollouts.jsonl", [{"key": "pirate/0/q1/0", ...}])
rows = read_lines(folder / "rollouts.jsonl")

with ResultCache(folder / "trials.jsonl", key="key") as cache:      # nothing is computed twice
    if key not in cache:
        cache.add([{"key": key, **measure()}])
    cache[key]
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from personatlas.persona.artifacts import atomic, set_aside
from personatlas.persona.errors import UserError, describe_value
from personatlas.persona.progress import say
from personatlas.persona.records import decode_object

Row = dict[str, Any]
Schema = Callable[[Row], object]  # such as a record's from_json: raises ValueError for what is no row
REMADE = "what it held is made again"
BATCH_ROWS, BATCH_SECONDS = (
    64,
    0.5,
)  # one fsync a row would hold a fast judge to a few hundred answers a second


def read_lines(path: Path, schema: Schema | None = None) -> list[Row]:
    """All whole lines of a JSONL log; a missing file is an empty log.

    A last line without its newline is one that a crash cut short: it is left out (and cut off by
    `append_lines`). Anything else that does not parse, or that the schema refuses with a `ValueError`, is
    damage and raises `UserError` with its line number.
    """
    rows = []
    for number, line in _whole_lines(path):
        try:
            rows.append(_parse_row(line, schema))
        except ValueError as error:
            raise UserError(f"{path}:{number} is damaged: {error}; delete that line, {REMADE}") from None
    return rows


def mend_log(path: Path, schema: Schema | None = None) -> list[Row]:
    """The same for a log whose rows are made again where they are missing: damaged lines are taken out.

    The log as it was is kept beside it, and stderr says how many lines were damaged.
    """
    rows, whole, problems = list[Row](), list[bytes](), list[str]()
    for number, line in _whole_lines(path):
        try:
            rows.append(_parse_row(line, schema))
            whole.append(line)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        aside = set_aside(path)
        with atomic(path) as temporary:
            temporary.write_bytes(b"".join(whole))
        say(f"{path}: {len(problems)} damaged lines left out ({problems[0]}), kept in {aside}; {REMADE}")
    return rows


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if path.exists():
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.endswith(b"\n"))


def _parse_row(line: bytes, schema: Schema | None) -> Row:
    row = decode_object(line)
    if schema is not None:
        schema(row)
    return row


def append_lines(path: Path, rows: Iterable[Row], *, sync: bool = True) -> None:
    """Append rows to a JSONL log, all of them or (on an error) none; a half line of a crash is cut off first.

    `sync` waits for the disk, which only a power cut makes necessary: a killed process loses nothing that was
    written.
    """
    content = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    with path.open("a+b", buffering=0) as file:  # a buffer would be flushed again by truncate and by close
        end = _end_of_whole_lines(file)
        file.truncate(end)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
            if sync:
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(end)  # a full disk must not leave half a line that looks like damage
            error.filename = str(path)
            raise


def _end_of_whole_lines(file: BinaryIO) -> int:
    """The offset behind the last newline, searched from the end in a window that is 64 KiB and then the file."""
    size = file.seek(0, os.SEEK_END)
    for window in (min(size, 1 << 16), size):
        file.seek(size - window)
        newline = file.read().rfind(b"\n")
        if newline >= 0:
            return size - window + newline + 1
    return 0


class ResultCache:
    """Results by key in an append-only JSONL log, so that an interrupted job goes on where it was.

    Thread-safe. The last row of a key counts.

    Parameters
    ----------
    path
        the log, which need not exist; None keeps the rows in memory only
    key
        the field that identifies a row, or several fields, whose values are then a key as a tuple
    also
        further logs to read, such as those of other processes; nothing is written to them
    schema
        raises `ValueError` for what is no row of this log, such as a record's `from_json`
    mend
        leave damaged lines of the log out, which are then made again; else they raise `UserError`
    keep
        which rows count; the others stay in the log and out of the cache
    sync
        whether `add` waits for the disk
    batched
        write 64 rows, or those of half a second, together; the context manager's exit (or `flush`) writes the
        rest
    """

    def __init__(
        self,
        path: Path | None,
        key: str | tuple[str, ...] = "id",
        *,
        also: Iterable[Path] = (),
        schema: Schema | None = None,
        mend: bool = True,
        keep: Callable[[Row], bool] | None = None,
        sync: bool = True,
        batched: bool = False,
    ) -> None:
        self.path, self._key, self._keep, self._sync, self._batched = path, key, keep, sync, batched
        self._lock, self._waiting, self._written = threading.Lock(), list[Row](), time.monotonic()
        self._rows: dict[Hashable, Row] = {}
        self.newest: Row | None = None

        def check(row: Row) -> None:
            if schema is not None:
                schema(row)
            for name in (key,) if isinstance(key, str) else key:
                if not isinstance(row.get(name), str | int):
                    raise ValueError(f"{name} is {describe_value(row.get(name))}, not a key")

        for log in dict.fromkeys((*also, *(() if path is None else (path,)))):
            for row in mend_log(log, check) if mend and log == path else read_lines(log, check):
                self._remember(row)

    def key_of(self, row: Row) -> Hashable:
        """The key that a row has."""
        return row[self._key] if isinstance(self._key, str) else tuple(row[field] for field in self._key)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows

    def __getitem__(self, key: Hashable) -> Row:
        return self._rows[key]

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Hashable) -> Row | None:
        """The row of a key, None if there is none."""
        return self._rows.get(key)

    def rows(self) -> list[Row]:
        """All rows that count, in order of first appearance of their keys."""
        return list(self._rows.values())

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows to the log, all of them or (on an error) none, and remember them."""
        rows = list(rows)
        with self._lock:
            self._waiting += rows
            late = time.monotonic() - self._written >= BATCH_SECONDS
            if not self._batched or late or len(self._waiting) >= BATCH_ROWS:
                self._write()
            for row in rows:
                self._remember(row)

    def flush(self) -> None:
        """Write what `batched` holds back."""
        with self._lock:
            self._write()

    def __enter__(self) -> "ResultCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def _write(self) -> None:
        if self._waiting and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_lines(self.path, self._waiting, sync=self._sync)
        self._waiting, self._written = [], time.monotonic()

    def _remember(self, row: Row) -> None:
        if self._keep is None or self._keep(row):
            self._rows[self.key_of(row)] = row
            self.newest = row
