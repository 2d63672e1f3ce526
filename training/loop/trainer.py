"""The training loop: steps from the newest checkpoint to the last step, with pauses to evaluate and to save.

    Trainer(folder, stepper, tokenizer, initialise, evaluate, log).run()

The same loop pretrains and tunes; what differs is the source of rows and what is evaluated. A run that was
stopped, or killed at any moment, resumes from its newest checkpoint with the numbers that it would have had
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
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from personatlas.persona.errors import UserError
from personatlas.persona.records import JsonObject, json_object
from personatlas.training.loop.checkpoints import (
    is_permanent,
    load_state,
    load_weights,
    newest_resumable,
    prune_checkpoints,
    save_checkpoint,
)
from personatlas.training.loop.distributed import synchronize
from personatlas.training.loop.run_log import RunLog
from personatlas.training.loop.step import StepMetrics, Stepper
from personatlas.training.plan import Plan
from personatlas.training.plan import utilisation as model_flops_utilisation

T = TypeVar("T")
SAVE_EVERY = 600.0  # seconds between checkpoints that are not permanent
SPEED_STEPS = 20  # whose mean speed is logged
EVALUATIONS = 10  # over a run, the last one not counted


@dataclass
class Trainer:
    """A run to start or resume. All ranks call `initialise` and `evaluate(step)`, whose row is logged."""

    folder: Path
    stepper: Stepper
    tokenizer: Path
    initialise: Callable[[], None]
    evaluate: Callable[[int], JsonObject]
    log: RunLog
    facts: JsonObject = field(default_factory=dict)
    "what state.json says of the run"
    keep_permanent: bool = True
    "whether checkpoints at powers of two are kept"
    _seconds: float = 0.0
    "of training up to the last pause"
    _running_since: float | None = None
    _saved_at: float = 0.0
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=SPEED_STEPS))
    _stop_requested: bool = False
    "of this process"
    _stops: bool = False
    "some process was told to stop, and all know of it at the same step"

    @property
    def plan(self) -> Plan:
        """The stepper's plan."""
        return self.stepper.plan

    @property
    def seconds(self) -> float:
        """Seconds of training, without pauses."""
        running = 0.0 if self._running_since is None else time.monotonic() - self._running_since
        return self._seconds + running

    def run(self) -> None:
        """Goes on to the last step. Raises `UserError` for a loss that is not finite or too little memory."""
        self._saved_at = time.monotonic()
        start = self._prepare()
        waiting: tuple[int, StepMetrics] | None = None
        with self._interruptible():
            self._running_since = time.monotonic()
            for number in range(start, self.plan.steps):
                step = partial(self.stepper.step, number, lambda: self._stop_requested)
                metrics = self._within_memory(step)
                if waiting is not None:
                    self._log_step(*waiting)
                waiting = number + 1, metrics
                if metrics.event is None:  # on a CPU it is there already
                    self._log_step(*waiting)
                    waiting = None
                if self._pauses_at(number + 1):
                    if waiting is not None:
                        self._log_step(*waiting)
                    waiting = None
                    self._pause(number + 1)

    def _prepare(self) -> int:
        """Fills model and optimizer, fresh or from the newest checkpoint; returns the step to go on from."""
        checkpoint, world = newest_resumable(self.folder), self.stepper.world
        self.stepper.optimizer.reset()
        self.stepper.optimizer.zero()
        if world.rank == 0:  # what a kill left: halves of checkpoints, and rows from before the first one
            prune_checkpoints(self.folder, self.plan.steps, self.keep_permanent)
            self.log.cut_after(-1 if checkpoint is None else checkpoint.step)
        if checkpoint is None:
            self.initialise()
            self._pause(0)
            return 0
        state, facts = load_state(checkpoint)
        wanted = json_object(self.facts)
        is_own = all(getattr(facts, name) == wanted.get(name) for name in ("tokenizer", "asked"))
        if not is_own or checkpoint.step > self.plan.steps:
            raise UserError(f"{checkpoint.path} is of a run with other settings than this one; remove it")
        load_weights(checkpoint, self.stepper.model)
        try:
            self.stepper.optimizer.load(state)
        except (KeyError, ValueError, OverflowError, RuntimeError) as error:
            raise UserError(
                f"{checkpoint.path} holds the state of another optimizer ({error}); remove it"
            ) from None
        self._seconds = facts.seconds
        text = f"going on from step {checkpoint.step:,} of {self.plan.steps:,}"
        if (before := facts.world) != world.size:
            text += f"; {before} processes made it, {world.size} go on: optimizer state is shared out anew"
        self.log.write({"kind": "event", "step": checkpoint.step, "what": "resumed", "text": text})
        return checkpoint.step

    def _within_memory(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except torch.OutOfMemoryError:
            raise self.stepper.out_of_memory() from None

    def _log_step(self, step: int, metrics: StepMetrics) -> None:
        loss, norm, stops = metrics.wait()
        self._stops |= stops
        if not math.isfinite(loss) or not math.isfinite(norm):
            last = newest_resumable(self.folder)
            fault = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            fault = f"{fault} at step {step}"
            good = f"the last good checkpoint is {last.path}" if last else "there is no checkpoint yet"
            self.log.write({"kind": "event", "step": step, "what": "stopped", "text": fault})
            raise UserError(f"{fault}: stopped; {good}. Start a new run with a lower --rate-scale")
        seconds = self.seconds
        self._times.append(seconds)
        batch = self.stepper.batches.rows * self.stepper.batches.context
        steps = len(self._times) - 1
        speed = steps * batch / max(seconds - self._times[0], 1e-9) if steps else None
        self.log.write(
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
        """Model-FLOPs utilisation of a speed in tokens a second; None on a CPU."""
        if speed is None or self.stepper.device.type != "cuda":
            return None
        return model_flops_utilisation(speed, self.plan.shape, self.plan.chip, self.stepper.world.size)

    def _keeps(self, step: int) -> bool:
        return step == self.plan.steps or (self.keep_permanent and is_permanent(step, self.plan.steps))

    def _pauses_at(self, step: int) -> bool:
        return self._stops or self._keeps(step) or self._evaluates_at(step) or self._is_save_due(step)

    def _is_save_due(self, step: int) -> bool:
        """Several processes must agree, and have a clock each: they count steps."""
        if self.stepper.world.size > 1:
            return step > 0 and step % steps_in(self.plan, SAVE_EVERY) == 0
        return time.monotonic() - self._saved_at > SAVE_EVERY

    def _evaluates_at(self, step: int) -> bool:
        return step == self.plan.steps or step % max(1, self.plan.steps // EVALUATIONS) == 0

    def _pause(self, step: int) -> None:
        synchronize(self.stepper.device)
        self._seconds, self._running_since = self.seconds, None
        if self._evaluates_at(step):
            self.log.write(self._within_memory(lambda: self.evaluate(step)))
            self.log.sample(self.stepper.model, step)
        if self._keeps(step) or self._stops or self._is_save_due(step):
            state, world = self.stepper.optimizer.state(), self.stepper.world  # all ranks take part
            if world.rank == 0:
                facts = {**self.facts, "seconds": self._seconds, "world": world.size}
                save_checkpoint(self.folder, step, self.stepper.model, state, self.tokenizer, facts)
                prune_checkpoints(self.folder, self.plan.steps, self.keep_permanent)
            world.barrier()
            self._saved_at = time.monotonic()
        if self._stops and step < self.plan.steps:
            raise KeyboardInterrupt
        self._running_since = time.monotonic()

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish a step, save, and stop; a second one stops at once.

        Not under torchrun, which passes on what the terminal has sent already.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request_stop(*_: object) -> None:
            if self._stop_requested and self.stepper.world.size == 1:
                raise KeyboardInterrupt
            self._stop_requested = True

        before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def steps_in(plan: Plan, seconds: float) -> int:
    """How many steps some seconds hold by the plan's own speed, one at least."""
    return max(1, round(seconds * plan.tokens_a_second / plan.batch))
