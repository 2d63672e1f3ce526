"""The projection of every token that a forward feeds, taken on its way: no forward of its own.

watching = Watching(subject, axis.layer, axis.at(axis.layer))
with watching.on(), steering.on():          # before the steering's hooks, and so before any step at the layer
    ...                                     # forwards of a decoder that tells `watching` what they are about
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personaxis.persona.sampler import Follower
from personaxis.persona.subject import Subject, residual


class Watching(Follower):
    """<h, v> at one layer, fp32: of the token that each slot was fed last, and of the texts that were read last."""

    def __init__(self, subject: Subject, layer: int, vector: Float[Tensor, " D"]) -> None:
        self.block, self.device = subject.blocks[layer], next(subject.blocks[layer].parameters()).device
        self.vector = vector.detach().to(self.device, torch.float32)
        self.latest = torch.zeros(0, device=self.device)  # (slots,)
        self.read: list[Float[Tensor, "B T"]] = []  # of each forward that reads, until they are taken
        self._reading = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """The hook is on the block inside."""
        handle = self.block.register_forward_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()

    def seat(self, slots: int) -> None:
        """There are so many slots from now on."""
        self.latest = torch.zeros(slots, device=self.device)

    def reading(self, slots: Tensor, lengths: Tensor, opening: bool = True) -> None:
        """The next forward reads prompts."""
        self._reading = True

    def stepping(self, running: Tensor, first: Tensor, opening: Tensor) -> None:
        """The next forward feeds one token to each of the first slots."""
        self._reading = False

    def state(self) -> list[Tensor]:
        """The latest projections."""
        return [self.latest]

    def taken(self) -> list[Float[Tensor, "B T"]]:
        """What was read since the last call."""
        taken, self.read = self.read, []
        return taken

    def _keep(self, _module: Any, _args: Any, output: Any) -> None:
        h = residual(output)
        # not a matrix product, whose precision is the user's choice on a GPU
        projection = (h.float() * self.vector).sum(-1)  # (B, T)
        if self._reading:
            self.read.append(projection)
        else:
            self.latest[: len(h)].copy_(projection[:, 0])
