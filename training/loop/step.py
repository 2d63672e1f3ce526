"""One training step, on one process or many: micro-batches forward and backward, the sum over ranks, the optimizers.

    stepper = Stepper(model, source, plan, world, device)
    heard = stepper.step(0)         # launched, not awaited
    loss, norm, asked = heard.wait()       # mean nats per counted token over all ranks, √Σ g², whether any rank wants to stop

On a GPU forward and backward are compiled into one graph each and run in bf16 over fp32 masters. A step's numbers come
back by an event of their own: asking for them does not wait for the step that was launched after it.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.training.data.batches import Rows, Source
from personatlas.training.loop.distributed import summed, wait_for
from personatlas.training.model.gpt import GPT
from personatlas.training.optim.muon import Optimizer
from personatlas.training.plan import Plan

# cuDNN's is the fastest on Hopper; what it does not take goes on to the next
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Heard:
    """The numbers of a step, on their way."""

    numbers: Tensor
    event: Any

    def wait(self) -> tuple[float, float, bool]:
        """Mean loss in nats, the norm of the gradient, and whether a rank was asked to stop: the same on all ranks."""
        if self.event is not None:
            self.event.synchronize()
        loss, squares, asked = self.numbers.tolist()
        return loss, squares**0.5, asked > 0


class Stepper:
    """What does steps. The model must be on `device`; its parameters become views of the optimizer's buffers.

    Raises `UserError` where the ranks cannot share a step's rows evenly.
    """

    def __init__(self, model: GPT, source: Source, plan: Plan, world: World, device: torch.device) -> None:
        self.model, self.world, self.device = model, world, device
        self.replan(plan, source)
        self.optimizer = Optimizer(model, world)
        cuda = device.type == "cuda"
        self.forward = torch.compile(model, dynamic=False) if cuda else model

    def replan(self, plan: Plan, source: Source) -> None:
        """Go by another plan and its rows. What is compiled stays compiled as long as micro-batches are as large."""
        self.plan, self.source = plan, source
        self.share, self.micro_batch = shares(source.rows, plan.micro_batch, self.world.size)

    @property
    def unit(self) -> int:
        """What a step's rows must be a multiple of: where a micro-batch is compiled, it stays as it is."""
        return self.world.size * (self.micro_batch if self.device.type == "cuda" else 1)

    def step(self, number: int, stops: Callable[[], bool] = lambda: False) -> Heard:
        """Do step `number`, 0-based. What `stops` says at its end is heard by all ranks."""
        counted = self.source.counted(number)
        total = torch.zeros((), device=self.device)
        with sdpa_kernel(ATTENTION, set_priority=True):
            for rows in self._micro_batches(number):
                loss = self.forward(rows.ids, rows.targets, None, rows.documents)
                (loss / counted).backward()
                total += loss.detach()
        squares = self.optimizer.step(self.plan.rates_at(number))
        asked = torch.full((), float(stops()), device=self.device)
        return self._heard(summed(torch.stack([total / counted, squares, asked]), self.world))

    def settle(self, threads: int | None = None) -> int | None:
        """On a CPU, take as many threads as a run had before, or all or one of them, whichever steps faster now; the number.

        Where other work wants the cores, threads that wait for one another take longer than a single one: 235 against 670
        tokens a second were seen on two crowded cores. Sums depend on the number, so a run keeps it. None where it is not ours to choose: on a GPU, under torchrun, with OMP_NUM_THREADS.
        """
        if self.device.type != "cpu" or self.world.size > 1 or "OMP_NUM_THREADS" in os.environ:
            return None
        if threads is None:
            took = {}
            for count in {torch.get_num_threads(), 1}:
                torch.set_num_threads(count)
                self.step(0)
                took[count] = min(self._seconds(1) for _ in range(2))
            threads = min(took, key=lambda count: took[count])
        torch.set_num_threads(threads)
        return threads

    def speed(self) -> float:
        """Compile, and measure tokens a second over some steps; the model and the optimizer are spoiled by it."""
        self.step(0)
        wait_for(self.device)
        if self.device.type == "cuda":  # the first of these steps is short of work while it is launched
            spans = [self._seconds(10)]
        else:
            spans = self._spans()
        middle = torch.tensor([statistics.median(spans)], device=self.device)
        mean = (
            summed(middle, self.world).item() / self.world.size
        )  # one number on all ranks: it decides the plan
        return self.source.rows * self.source.context / mean

    def _spans(self) -> list[float]:
        """Seconds of some single steps: on a CPU the first few are slow and uneven. About ten seconds, or four steps."""
        spans: list[float] = []
        while len(spans) < 4 or (len(spans) < 16 and sum(spans) < 10 and self.world.size == 1):
            spans.append(self._seconds(1))
            if sum(spans) > 30 and self.world.size == 1:
                break
        return spans[len(spans) // 2 :]

    def _seconds(self, steps: int) -> float:
        start = time.monotonic()
        for _ in range(steps):
            self.step(0)
        wait_for(self.device)
        return (time.monotonic() - start) / steps

    def out_of_memory(self) -> UserError:
        """What to do about it."""
        rows, context = self.micro_batch, self.plan.shape.context
        if rows > 1:
            fewer = max(n for n in range(1, rows) if self.share % n == 0)
            hint = f"give --micro-batch {fewer}; the result is the same"
        elif not self.model.checkpointing:
            hint = "give --recompute, which takes a third longer; the result is the same"
        else:
            hint = f"give a --context below {context} or a lower --depth"
        return UserError(f"out of memory with {rows} rows of {context:,} tokens at once: {hint}")

    def _micro_batches(self, number: int) -> Iterator[Rows]:
        first = self.world.rank * self.share
        for start in range(first, first + self.share, self.micro_batch):
            rows = self.source.rows_at(number, start, self.micro_batch)
            documents = None if rows.documents is None else self._moved(rows.documents)
            yield Rows(self._moved(rows.ids), self._moved(rows.targets), documents)

    def _moved(self, part: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return part.pin_memory().to(self.device, non_blocking=True)
        return part.to(self.device)

    def _heard(self, numbers: Tensor) -> Heard:
        if self.device.type != "cuda":
            return Heard(numbers, None)
        here = torch.empty_like(numbers, device="cpu", pin_memory=True)
        here.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Heard(here, event)


def shares(rows: int, micro_batch: int, world: int) -> tuple[int, int]:
    """Rows of one rank, and how many of them at once: the largest divisor that is not above the plan's."""
    if rows % world:
        raise UserError(
            f"the {rows} rows of a step cannot be shared evenly by {world} processes; start as many as divide {rows}"
        )
    share = rows // world
    return share, max(n for n in range(1, share + 1) if share % n == 0 and n <= max(micro_batch, 1))
