"""Progress on stderr: a bar with the time left on a terminal, a plain line every ten seconds elsewhere.

    with progress("reading", len(texts)) as advance:             # one job
        advance(1)

    with stages([Stage("harm", 4096, "decode"), Stage("loss", 900, "read")]) as study:
        study.start("harm")
        with progress("answering", 24) as advance:               # moves the line "step 1 of 2: harm"
            advance(0.5, note="arm assistant")

The time left of a study is the work still to do, in the unit of `Stage.work`, at the speed measured for its
kind; a kind that has not come yet goes at the speed of all.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY = 10.0  # seconds between plain lines


@runtime_checkable
class Advance(Protocol):
    """Call it with how many more are done (parts of one too), how many units (tokens) they were, and what
    they belong to. What is `known` was done before, and says nothing of the speed.
    """

    def __call__(self, done: float | int, units: int = 0, *, note: str = "", known: bool = False) -> None: ...


def no_advance(done: float | int, units: int = 0, *, note: str = "", known: bool = False) -> None:
    """An `Advance` that shows nothing."""


@dataclass(frozen=True)
class Stage:
    """A part of a study: its name, its work (tokens read, or what takes as long), and the work's kind."""

    name: str
    work: float | int
    kind: str = ""


class Study:
    """How far a study of several stages is, and how long the rest takes; `show` is called with each change."""

    def __init__(self, planned: Sequence[Stage], show: Callable[["Study"], None]) -> None:
        self.planned, self.show, self.note = tuple(planned), show, ""
        self.index = -1  # of the stage that is on
        self.share = self.known = 0.0  # of it, that is done, and that took no time
        self.began = self.entered = time.monotonic()
        self.spent: dict[str, tuple[float, float]] = {}  # by kind: seconds, and the work done in them

    def start(self, name: str) -> None:
        """Begins the stage of that name; the one before it is done."""
        if self.index >= 0:
            self.share = 1.0
        self.spent = self._measured()
        self.index = [stage.name for stage in self.planned].index(name)
        self.share, self.known, self.note, self.entered = 0.0, 0.0, "", time.monotonic()
        self.show(self)

    def advance(self, share: float | int, note: str, known: bool) -> None:
        """So much more of this stage is done."""
        self.share = min(self.share + share, 1.0)
        self.known += share if known else 0.0
        self.note = note or self.note
        self.show(self)

    def _measured(self) -> dict[str, tuple[float, float]]:
        if self.index < 0:
            return {}
        stage = self.planned[self.index]
        seconds, work = self.spent.get(stage.kind, (0.0, 0.0))
        seconds += time.monotonic() - self.entered
        return self.spent | {stage.kind: (seconds, work + stage.work * max(self.share - self.known, 0.0))}

    @property
    def done(self) -> float:
        """Share of all work that is done."""
        work = [stage.work for stage in self.planned]
        own = sum(work[: self.index]) + work[self.index] * self.share if self.index >= 0 else 0.0
        return own / max(sum(work), 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds; None before anything was measured."""
        measured = {kind: own for kind, own in self._measured().items() if own[1] > 0}
        if not measured:
            return None
        rates = {kind: seconds / work for kind, (seconds, work) in measured.items()}
        seconds, work = map(sum, zip(*measured.values(), strict=True))
        ahead = self.planned[self.index :]
        shares = [1.0 - self.share] + [1.0] * (len(ahead) - 1)
        return sum(
            stage.work * share * rates.get(stage.kind, seconds / work)
            for stage, share in zip(ahead, shares, strict=True)
        )

    def describe(self) -> str:
        """The step that is on, and what it does now."""
        if self.index < 0:
            return "getting ready"
        note = f", {self.note}" if self.note else ""
        return f"step {self.index + 1} of {len(self.planned)}: {self.planned[self.index].name}{note}"


_study: ContextVar[Study | None] = ContextVar("study", default=None)


@contextmanager
def stages(planned: Sequence[Stage], *, quiet: bool = False) -> Iterator[Study]:
    """Shows one line for a study of several stages; inside, `progress` moves it and shows no own one."""
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn()]
    columns = columns if console.width >= 80 else columns[::2]  # step, share and time left stay
    columns += [TimeElapsedColumn(), TextColumn("{task.fields[left]}")]
    moves = not quiet and _can_move(console)
    with Progress(*columns, console=console) if moves else nullcontext() as bar:
        if bar is not None:
            task = bar.add_task("", total=1.0, left="")

            def show(study: Study) -> None:
                left = "" if (rest := study.seconds_left) is None else f"about {format_duration(rest)} left"
                bar.update(task, completed=study.done, description=study.describe(), left=left)
        else:
            show = (lambda study: None) if quiet else _StudyLines()

        study = Study(planned, show)
        show(study)
        token = _study.set(study)
        try:
            yield study
            if bar is not None:
                bar.update(task, completed=1.0, description="done", left="")
        finally:
            _study.reset(token)
    if bar is None and not quiet:
        say(f"done in {format_duration(time.monotonic() - study.began)}")


class _StudyLines:
    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, study: Study) -> None:
        now = time.monotonic()
        if now - self.last > EVERY:
            self.last, left = now, study.seconds_left
            rest = "" if left is None else f", about {format_duration(left)} left"
            say(f"{study.describe()}: {study.done:.0%} of all in {format_duration(now - study.began)}{rest}")


def format_duration(seconds: int | float) -> str:
    """8 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(
    what: str, total: int, unit: str = "", *, done: int = 0, quiet: bool = False
) -> Iterator[Advance]:
    """Show `total` items of `what`; `done` were there before and do not count into the rate (in `unit`s a
    second).
    """
    console = Console(stderr=True)
    if quiet or total == done:
        yield no_advance
    elif (study := _study.get()) is not None:

        def advance_study(done: float | int, units: int = 0, *, note: str = "", known: bool = False) -> None:
            study.advance(done / total, note, known)

        study.advance(done / total, "", True)
        yield advance_study
    elif _can_move(console):
        with _bar(console, unit) as bar:
            task = bar.add_task(what, total=total, completed=done, rate="")
            start, units_done = time.monotonic(), 0

            def advance(done: float | int, units: int = 0, *, note: str = "", known: bool = False) -> None:
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


def say_if_fewer(option: str, wanted: int | None, there: int, what: str = "") -> None:
    """Says that an option asks for more than there is."""
    if wanted is not None and wanted > there:
        say(f"{option} {wanted}: {what}there are {there}, and all are used")


def _can_move(console: Console) -> bool:
    """Whether a line can be written over: on a terminal that is not dumb."""
    return console.is_terminal and not console.is_dumb_terminal


def _bar(console: Console, unit: str) -> Progress:
    columns = [TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn()]
    if unit:
        columns.append(TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)


class _Lines:
    def __init__(self, what: str, total: int, unit: str, done: int) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.before, self.done, self.units = done, float(done), 0
        self.start = self.last = time.monotonic()

    def advance(self, done: float | int, units: int = 0, *, note: str = "", known: bool = False) -> None:
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
        say(f"{self.what}: {self.done:.0f}/{self.total} in {elapsed:.0f} s{rate}{left}")
