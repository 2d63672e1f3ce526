"""Where a training run stands, on stderr: one line that moves on a terminal, a plain line every ten seconds elsewhere.

with Line(plan.steps) as line:
    line.show(row)            # every row that goes into metrics.jsonl

step 1,200/5,000: loss 3.412, held out 1.312 bits per byte, 544,000 tokens/s, 49.1% of the peak, 24 min left
"""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from personaxis.persona.progress import EVERY, say

SMOOTHING = 0.9  # of the loss that is shown: one step's is noise


class Line:
    """Shows rows of metrics.jsonl. `steps` is the step at which the run ends."""

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        self.steps, self.quiet = steps, quiet
        self._loss = _Smoothed()
        self._first: Mapping[str, Any] | None = None
        self._row: Mapping[str, Any] | None = None
        self._held_out = ""
        self._said = -EVERY
        self._told = 0
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal and not quiet:
            bar = [BarColumn(24)] if console.width >= 110 else []
            self._bar = Progress(*bar, TextColumn("{task.description}"), console=console)
            self._task = self._bar.add_task("", total=steps)

    def show(self, row: Mapping[str, Any]) -> None:
        """Take up a row. Events are said at once; numbers when it is time."""
        if row["kind"] == "event":
            self._say(f"step {row['step']:,}: {row.get('text') or row['what']}")
        elif row["kind"] == "held-out":
            self._held_out = _held_out(row)
            if self._bar is None:
                self._say(f"step {row['step']:,}: {self._held_out}")
        else:
            self._first = self._first or row
            self._row = row
            self._loss.add(row.get("loss"))
            self._move()

    def told(self, *, short: bool = False) -> str:
        """Everything about the last step; short enough for a terminal of 80 characters."""
        row = self._row or {}
        left, speed, share = self.seconds_left(), row.get("tokens_a_second"), row.get("utilisation")
        parts = [
            f"step {row.get('step', 0):,}/{self.steps:,}",
            "" if self._loss.value is None else f"loss {self._loss.value:.3f}",
            self._held_out.removeprefix("held out ").replace("bits per byte", "bits/byte") if short else self._held_out,
            "" if speed is None else f"{speed / 1000:,.1f}k tok/s" if short else f"{speed:,.0f} tokens/s",
            "" if share is None else f"{share:.0%}" if short else f"{share:.1%} of the peak",
            "" if left is None else f"{in_words(left)} left",
        ]
        return (" · " if short else ", ").join(part for part in parts if part)

    def seconds_left(self) -> float | None:
        """Training time to the last step at the pace since this process began; None before the second step and at the end."""
        first, row = self._first, self._row
        if first is None or row is None or row["step"] <= first["step"] or row["step"] >= self.steps:
            return None
        pace = (row["seconds"] - first["seconds"]) / (row["step"] - first["step"])
        return float(pace * (self.steps - row["step"]))

    def _move(self) -> None:
        assert self._row is not None
        step = self._row["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self.told(short=True))
        elif time.monotonic() - self._said >= EVERY or step == self.steps:
            self._said = time.monotonic()
            self._say_step()

    def _say_step(self) -> None:
        assert self._row is not None
        self._told = self._row["step"]
        self._say(self.told())

    def _say(self, text: str) -> None:
        if not self.quiet:
            say(text)

    def __enter__(self) -> "Line":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._row is not None and self._row["step"] != self._told:
            self._say_step()


class _Smoothed:
    """An exponential mean that is unbiased from the first value on."""

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0

    def add(self, value: float | None) -> None:
        if value is not None:
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * value
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)

    @property
    def value(self) -> float | None:
        return self._sum / self._weight if self._weight else None


def _held_out(row: Mapping[str, Any]) -> str:
    if row.get("bits_per_byte") is not None:
        return f"held out {row['bits_per_byte']:.4f} bits per byte"
    return f"held out loss {row['loss']:.4f}"


def in_words(seconds: float) -> str:
    """8 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
