"""The projection of every token that a forward processes, taken at one layer without a forward of its own.

hook = ProjectionHook(model, axis.layer, axis.at(axis.layer))
with hook.on(), steering.hooks.attached():     # in this order: projections before the caps
    ...                        # forwards of a `Decoder` with `hook` among its callbacks
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from personatlas.persona.models.hooks import residual
from personatlas.persona.models.load import Model
from personatlas.persona.sampling.sampler import SamplerCallback


class ProjectionHook(SamplerCallback):
    """<h, v> at one layer, fp32.

    `latest` (slots,) is that of the token which each slot decoded last; `take` gives those of prompts.
    """

    def __init__(self, model: Model, layer: int, vector: Float[Tensor, " D"]) -> None:
        self.block = model.blocks[layer]
        self.device = next(self.block.parameters()).device
        self.vector = vector.detach().to(self.device, torch.float32)
        self.latest = torch.zeros(0, device=self.device)
        self._prompts: list[Float[Tensor, "B T"]] = []  # one tensor a prefill, until they are taken
        self._prefill = False
        self._last: Tensor | None = None  # the column of each row's newest token, where whole texts are read

    @contextmanager
    def on(self) -> Iterator[None]:
        """Registers the hook inside the context."""
        handle = self.block.register_forward_hook(self._project)
        try:
            yield
        finally:
            handle.remove()

    def resize(self, slots: int) -> None:
        self.latest = torch.zeros(slots, device=self.device)

    def before_prefill(self, slots: Tensor, lengths: Tensor, opening: bool = True) -> None:
        self._prefill = True

    def before_decode(self, running: Tensor, first: Tensor, opening: Tensor) -> None:
        self._prefill, self._last = False, None

    def before_reread(self, lengths: Tensor, starts: Tensor) -> None:
        self._prefill, self._last = False, lengths - 1

    def state(self) -> list[Tensor]:
        return [self.latest]

    def take(self) -> list[Float[Tensor, "B T"]]:
        """Returns the projections of the prompts read since the last call, one tensor a prefill."""
        taken, self._prompts = self._prompts, []
        return taken

    def _project(self, _module: nn.Module, _args: Any, output: Any) -> None:
        h = residual(output)
        # not a matrix product, whose precision on a GPU is a global setting
        projection = (h.float() * self.vector).sum(-1)  # (B, T)
        if self._prefill:
            self._prompts.append(projection)
        elif self._last is None:
            self.latest[: len(h)].copy_(projection[:, 0])
        else:
            self.latest[: len(h)].copy_(projection.gather(1, self._last.to(h.device)[:, None])[:, 0])
