"""One training step on one process or many: micro-batches, the sum over ranks, the optimizers.

    stepper = Stepper(model, batches, plan, world, device)
    metrics = stepper.step(0)                  # launched, not awaited
    loss, norm, stops = metrics.wait()         # mean nats per counted token, √Σ g², whether to stop

On a GPU forward and backward are compiled into one graph each and run in bf16 over fp32 masters. A step's
numbers come back by an event of their own: waiting for them does not wait for the step launched after it.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.training.data.batches import BatchSource, TokenBatch
from personatlas.training.loop.distributed import all_sum, synchronize
from personatlas.training.model.gpt import GPT
from personatlas.training.optim.muon import Optimizer
from personatlas.training.plan import Plan

# cuDNN's is the fastest on Hopper; the next one takes what it does not
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


# Least and most steps that measure a CPU's speed; seconds after which only the least are made, or no more
MEASURED_STEPS, MEASURED_SECONDS, PATIENCE_SECONDS = (4, 16), 10.0, 30.0


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of a step, on their way from the device."""

    numbers: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> tuple[float, float, bool]:
        """Mean loss in nats, the gradient's norm, and whether a rank was told to stop: equal on all ranks."""
        if self.event is not None:
            self.event.synchronize()
        loss, squares, stops = self.numbers.tolist()
        return loss, squares**0.5, stops > 0


class Stepper:
    """Does steps. The model must be on `device`; its parameters become views of the optimizer's buffers.

    Raises `UserError` where the ranks cannot share a step's rows evenly.
    """

    def __init__(
        self, model: GPT, batches: BatchSource, plan: Plan, world: World, device: torch.device
    ) -> None:
        self.model, self.world, self.device = model, world, device
        self.set_plan(plan, batches)
        self.optimizer = Optimizer(model, world)
        cuda = device.type == "cuda"
        self.forward = torch.compile(model, dynamic=False) if cuda else model

    def set_plan(self, plan: Plan, batches: BatchSource) -> None:
        """Takes another plan and its rows. Compiled code stays as long as micro-batches are as large."""
        if batches.rows % self.world.size:
            raise UserError(
                f"{batches.rows} rows of a step cannot be shared evenly by {self.world.size} processes"
            )
        self.plan, self.batches = plan, batches
        self.share = batches.rows // self.world.size  # rows of one rank
        # as many at once as divide them, but no more than planned
        most = max(plan.micro_batch, 1)
        self.micro_batch = max(n for n in range(1, self.share + 1) if self.share % n == 0 and n <= most)

    @property
    def unit(self) -> int:
        """What a step's rows must be a multiple of: a compiled micro-batch stays as it is."""
        return self.world.size * (self.micro_batch if self.device.type == "cuda" else 1)

    def step(self, number: int, stops: Callable[[], bool] = lambda: False) -> StepMetrics:
        """Does step `number`, 0-based. All ranks learn what `stops` says at its end on any of them."""
        counted = self.batches.counted(number)
        total = torch.zeros((), device=self.device)
        with sdpa_kernel(ATTENTION, set_priority=True):
            for batch in self._micro_batches(number):
                loss = self.forward(batch.ids, batch.targets, None, batch.documents)
                (loss / counted).backward()
                total += loss.detach()
        squares = self.optimizer.step(self.plan.rates_at(number))
        stop = torch.full((), float(stops()), device=self.device)
        numbers = all_sum(torch.stack([total / counted, squares, stop]), self.world)
        if self.device.type != "cuda":
            return StepMetrics(numbers, None)
        on_cpu = torch.empty_like(numbers, device="cpu", pin_memory=True)
        on_cpu.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return StepMetrics(on_cpu, event)

    def set_threads(self, threads: int | None = None) -> int | None:
        """On a CPU, takes so many threads, or all or one of them, whichever steps faster now; returns the
        number.

        Where other work wants the cores, threads that wait for one another take longer than a single one: 235
        against 670 tokens a second were seen on two crowded cores. Sums depend on the number, so a run keeps
        it. Does nothing and returns None on a GPU, under torchrun and with OMP_NUM_THREADS.
        """
        if self.device.type != "cpu" or self.world.size > 1 or "OMP_NUM_THREADS" in os.environ:
            return None
        if threads is None:
            seconds = {}
            for count in {torch.get_num_threads(), 1}:
                torch.set_num_threads(count)
                self.step(0)
                seconds[count] = min(self._time_steps(1) for _ in range(2))
            threads = min(seconds, key=lambda count: seconds[count])
        torch.set_num_threads(threads)
        return threads

    def measure_speed(self) -> float:
        """Compiles, and measures tokens a second over some steps; they spoil the model and the optimizer."""
        self.step(0)
        synchronize(self.device)
        if self.device.type == "cuda":  # the first of these steps is short of work while it is launched
            seconds = [self._time_steps(10)]
        else:
            seconds, single = [], self.world.size == 1
            least, most = MEASURED_STEPS
            while len(seconds) < least or (
                len(seconds) < most and sum(seconds) < MEASURED_SECONDS and single
            ):
                seconds.append(self._time_steps(1))
                if sum(seconds) > PATIENCE_SECONDS and single:
                    break
            seconds = seconds[len(seconds) // 2 :]  # the first few are slow and uneven
        median = torch.tensor([statistics.median(seconds)], device=self.device)
        mean = (
            all_sum(median, self.world).item() / self.world.size
        )  # one number on all ranks: it decides the plan
        return self.batches.rows * self.batches.context / mean

    def _time_steps(self, steps: int) -> float:
        start = time.monotonic()
        for _ in range(steps):
            self.step(0)
        synchronize(self.device)
        return (time.monotonic() - start) / steps

    def out_of_memory(self) -> UserError:
        """The error that says what to do about it."""
        rows, context = self.micro_batch, self.plan.shape.context
        if rows > 1:
            fewer = max(n for n in range(1, rows) if self.share % n == 0)
            hint = f"give --micro-batch {fewer}; the result is the same"
        elif not self.model.checkpointing:
            hint = "give --recompute, which takes a third longer; the result is the same"
        else:
            hint = f"give a --context below {context} or a lower --depth"
        return UserError(f"out of memory with {rows} rows of {context:,} tokens at once: {hint}")

    def _micro_batches(self, number: int) -> Iterator[TokenBatch]:
        first = self.world.rank * self.share
        for start in range(first, first + self.share, self.micro_batch):
            batch = self.batches.rows_at(number, start, self.micro_batch)
            documents = None if batch.documents is None else self._to_device(batch.documents)
            yield TokenBatch(self._to_device(batch.ids), self._to_device(batch.targets), documents)

    def _to_device(self, part: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return part.pin_memory().to(self.device, non_blocking=True)
        return part.to(self.device)
