"""The loop: steps from the newest checkpoint to the last one, heard as they finish, with pauses to evaluate and to save.

    Loop(folder, stepper, tokenizer, initialise, evaluate, record).run()

The same loop trains a base model and tunes a chat model; what differs is the source of rows and what is evaluated. A run
that was stopped, or killed at any moment, goes on from its newest checkpoint with the very numbers it would have had
(bit for bit on a CPU), since a step's rows and rates are functions of its number.
"""

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from personatlas.persona.errors import UserError
from personatlas.training.loop.checkpoints import (
    lasting,
    load_state,
    load_weights,
    newest,
    prune,
    save_checkpoint,
)
from personatlas.training.loop.distributed import wait_for
from personatlas.training.loop.run_log import Record
from personatlas.training.loop.step import Heard, Stepper
from personatlas.training.plan import Plan
from personatlas.training.plan import utilisation as share_of_peak

T = TypeVar("T")
EVERY = 600.0  # seconds between checkpoints that are not for keeps
SPAN = 20  # steps whose mean speed is told
EVALUATIONS = 10  # over a run, the last one not counted


@dataclass
class Clock:
    """Seconds of training: pauses are not in it."""

    seconds: float = 0.0
    since: float | None = None

    def start(self) -> None:
        self.since = time.monotonic()

    def read(self) -> float:
        return self.seconds + (time.monotonic() - self.since if self.since is not None else 0.0)

    def pause(self) -> None:
        self.seconds, self.since = self.read(), None


@dataclass
class Loop:
    """A run about to go on. `evaluate(step)` gives a row to write; it and `initialise` run on all ranks."""

    folder: Path
    stepper: Stepper
    tokenizer: Path
    initialise: Callable[[], None]
    evaluate: Callable[[int], dict[str, Any]]
    record: Record
    facts: dict[str, Any] = field(default_factory=dict)
    "what state.json says of the run"
    keep_all: bool = True
    "whether checkpoints at powers of two are for keeps"
    evaluations: int = EVALUATIONS
    clock: Clock = field(default_factory=Clock)
    _saved: float = 0.0
    _heard: deque[float] = field(default_factory=lambda: deque(maxlen=SPAN))
    _asked_to_stop: bool = False
    "this process was"
    _stops: bool = False
    "some process was, and all have heard of it at the same step"

    @property
    def plan(self) -> Plan:
        return self.stepper.plan

    def run(self) -> int:
        """Go on to the last step; returns the step that it went on from. Raises `UserError` on a loss that is no number."""
        self._saved = time.monotonic()
        start = self._begin()
        waiting: tuple[int, Heard] | None = None
        with self._stoppable():
            self.clock.start()
            for number in range(start, self.plan.steps):
                heard = self._step(number)
                if waiting is not None:
                    self._hear(*waiting)
                waiting = number + 1, heard
                if heard.event is None:  # on a CPU it is there already
                    self._hear(*waiting)
                    waiting = None
                if self._pauses_at(number + 1):
                    if waiting is not None:
                        self._hear(*waiting)
                    waiting = None
                    self._pause(number + 1)
        return start

    def _begin(self) -> int:
        """Fill model and optimizer: fresh, or as the newest checkpoint has them."""
        found, world = newest(self.folder), self.stepper.world
        self.stepper.optimizer.forget()
        self.stepper.optimizer.zero()
        if (
            world.rank == 0
        ):  # what a kill left behind: halves of checkpoints, and rows from before the first one
            prune(self.folder, self.plan.steps, self.keep_all)
            self.record.cut(-1 if found is None else found.step)
        if found is None:
            self.initialise()
            self._pause(0)
            return 0
        state, facts = load_state(found)
        load_weights(found, self.stepper.model)
        self.stepper.optimizer.load(state)
        self.clock.seconds = facts["seconds"]
        before = facts["world"]
        text = f"going on from step {found.step:,} of {self.plan.steps:,}"
        if before != world.size:
            text += (
                f"; {before} processes made it, {world.size} go on: the optimizer's state is shared out anew"
            )
        self.record.write({"kind": "event", "step": found.step, "what": "resumed", "text": text})
        return found.step

    def _within_memory(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except torch.OutOfMemoryError:
            raise self.stepper.out_of_memory() from None

    def _step(self, number: int) -> Heard:
        return self._within_memory(lambda: self.stepper.step(number, lambda: self._asked_to_stop))

    def _hear(self, step: int, heard: Heard) -> None:
        loss, norm, asked = heard.wait()
        self._stops |= asked
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._broken(step, loss, norm)
        seconds = self.clock.read()
        self._heard.append(seconds)
        batch = self.stepper.source.rows * self.stepper.source.context
        spans = len(self._heard) - 1
        speed = spans * batch / max(seconds - self._heard[0], 1e-9) if spans else None
        self.record.write(
            {
                "kind": "step",
                "step": step,
                "tokens": step * batch,
                "loss": loss,
                "rate": self.plan.rate_at(step - 1),
                "gradient_norm": norm,
                "seconds": seconds,
                "tokens_a_second": speed,
                "utilisation": self.utilisation(speed),
            }
        )

    def utilisation(self, speed: float | None) -> float | None:
        if speed is None or self.stepper.device.type != "cuda":
            return None
        return share_of_peak(speed, self.plan.shape, self.plan.chip, self.stepper.world.size)

    def _broken(self, step: int, loss: float, norm: float) -> UserError:
        last = newest(self.folder)
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        good = f"the last good checkpoint is {last.path}" if last else "there is no checkpoint yet"
        self.record.write(
            {"kind": "event", "step": step, "what": "stopped", "text": f"{what} at step {step}"}
        )
        return UserError(f"{what} at step {step}: stopped; {good}. Start a new run with a lower --rate-scale")

    def _pauses_at(self, step: int) -> bool:
        if self._stops or step == self.plan.steps or (self.keep_all and lasting(step, self.plan.steps)):
            return True
        return self._evaluates_at(step) or self._due(step)

    def _due(self, step: int) -> bool:
        """Whether it is time for a checkpoint. Several processes must agree, and have a clock each: they count steps."""
        if self.stepper.world.size > 1:
            return step > 0 and step % steps_in(self.plan, EVERY) == 0
        return time.monotonic() - self._saved > EVERY

    def _evaluates_at(self, step: int) -> bool:
        return step == self.plan.steps or step % max(1, self.plan.steps // self.evaluations) == 0

    def _pause(self, step: int) -> None:
        wait_for(self.stepper.device)
        self.clock.pause()
        if self._evaluates_at(step):
            self.record.write(self._within_memory(lambda: self.evaluate(step)))
            self.record.sample(self.stepper.model, step)
        wanted = (self.keep_all and lasting(step, self.plan.steps)) or step == self.plan.steps
        if wanted or self._stops or self._due(step):
            self._save(step)
        if self._stops and step < self.plan.steps:
            raise KeyboardInterrupt
        self.clock.start()

    def _save(self, step: int) -> None:
        state = self.stepper.optimizer.state()  # all ranks take part
        world = self.stepper.world
        if world.rank == 0:
            facts = {**self.facts, "seconds": self.clock.read(), "world": world.size}
            save_checkpoint(self.folder, step, self.stepper.model, state, self.tokenizer, facts)
            prune(self.folder, self.plan.steps, self.keep_all)
        world.barrier()
        self._saved = time.monotonic()

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Ctrl-C and a request to end finish a step, save, and stop; a second one stops at once, but not under torchrun,
        which passes on what the terminal has sent already."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_: Any) -> None:
            if self._asked_to_stop and self.stepper.world.size == 1:
                raise KeyboardInterrupt
            self._asked_to_stop = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def steps_in(plan: Plan, seconds: float) -> int:
    """How many steps some seconds hold by the plan's own speed, one at least."""
    return max(1, round(seconds * plan.tokens_a_second / plan.batch))
