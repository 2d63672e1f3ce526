"""Progress on stderr: a bar with rate and time left on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY = 10.0  # seconds between plain lines


@runtime_checkable
class Advance(Protocol):
    """Call it with how many more are done, and how many units (tokens) they were."""

    def __call__(self, done: int, units: int = 0) -> None: ...


@contextmanager
def progress(
    what: str, total: int, unit: str = "", *, done: int = 0, quiet: bool = False
) -> Iterator[Advance]:
    """Show `total` items of `what`; `done` were there before and do not count into the rate (in `unit`s a
    second).
    """
    console = Console(stderr=True)
    if quiet or total == done:
        yield lambda done, units=0: None
    elif console.is_terminal:
        with _bar(console, unit) as bar:
            task = bar.add_task(what, total=total, completed=done, rate="")
            start, units_done = time.monotonic(), 0

            def advance(done: int, units: int = 0) -> None:
                nonlocal units_done
                units_done += units
                rate = units_done / max(time.monotonic() - start, 1e-6)
                bar.update(task, advance=done, rate=f"{rate:,.0f} {unit}/s" if unit else "")

            yield advance
    else:
        line = _Lines(what, total, unit, done)
        yield line.advance
        line.say()


def console() -> Console:
    """Standard output, as wide as the terminal."""
    return Console(soft_wrap=False)


def say(text: str) -> None:
    """One plain line on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _bar(console: Console, unit: str) -> Progress:
    columns = [TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn()]
    if unit:
        columns.append(TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)


class _Lines:
    def __init__(self, what: str, total: int, unit: str, done: int) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.before, self.done, self.units = done, done, 0
        self.start = self.last = time.monotonic()

    def advance(self, done: int, units: int = 0) -> None:
        self.done += done
        self.units += units
        if time.monotonic() - self.last > EVERY and self.done < self.total:
            self.last = time.monotonic()
            self.say()

    def say(self) -> None:
        elapsed = max(time.monotonic() - self.start, 1e-6)
        rate = f", {self.units / elapsed:,.0f} {self.unit}/s" if self.unit else ""
        new = self.done - self.before
        left = (
            f", {elapsed / new * (self.total - self.done):.0f} s left"
            if new and self.done < self.total
            else ""
        )
        say(f"{self.what}: {self.done}/{self.total} in {elapsed:.0f} s{rate}{left}")
