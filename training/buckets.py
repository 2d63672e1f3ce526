"""Parameters laid end to end in one buffer, their gradients in another, so that ranks share the work of a step.

    bucket = Bucket({"layers.0.mlp.up_proj.weight": p, ...}, unit=p.numel(), ranks=ranks)
    bucket.reduce()         # sums gradients over the ranks; each rank gets the sum of its own share
    bucket.my_values.add_(...)
    bucket.gather()         # every rank gets what the others have made

A unit is what must not be cut: a whole matrix for Muon, one number for AdamW. The buffers are filled up with zeros to as
many units as all ranks can share evenly. Optimizer state exists for a rank's own share only, as in ZeRO stage 1
(Rajbhandari et al. 2020). On one rank nothing is sent and nothing is copied.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from personaxis.persona.ranks import Ranks


class Bucket:
    """Some parameters and their gradients, which become views of two buffers."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], unit: int, ranks: Ranks) -> None:
        some = next(iter(parameters.values()))
        self.parameters, self.unit, self.ranks = dict(parameters), unit, ranks
        units = sum(p.numel() for p in parameters.values()) // unit
        self.share = -(-units // ranks.world) * unit  # elements of one rank
        self.values = torch.zeros(self.share * ranks.world, dtype=some.dtype, device=some.device)
        self.gradients = torch.zeros_like(self.values)
        # one rank's share is all there is: it steps on the buffers themselves
        own = slice(ranks.rank * self.share, (ranks.rank + 1) * self.share)
        self.my_values = self.values[own]
        self.my_gradients = self.gradients if ranks.world == 1 else torch.zeros_like(self.my_values)
        self._waiting: Any = None
        self._lay()

    def _lay(self) -> None:
        start = 0
        for parameter in self.parameters.values():
            part = slice(start, start + parameter.numel())
            self.values[part] = parameter.detach().flatten()
            parameter.data = self.values[part].view(parameter.shape)
            parameter.grad = self.gradients[part].view(parameter.shape)
            start += parameter.numel()

    def reduce(self) -> None:
        """Begin to sum this rank's share of the gradients over the ranks; `wait` before they are used."""
        if self.ranks.world > 1:
            import torch.distributed as dist

            self._waiting = dist.reduce_scatter_tensor(self.my_gradients, self.gradients, async_op=True)

    def gather(self) -> None:
        """Begin to give all ranks the new values; `wait` before they are used."""
        if self.ranks.world > 1:
            import torch.distributed as dist

            self._waiting = dist.all_gather_into_tensor(self.values, self.my_values.clone(), async_op=True)

    def wait(self) -> None:
        """For what was begun last."""
        if self._waiting is not None:
            self._waiting.wait()
            self._waiting = None

    def whole(self, state: Tensor) -> dict[str, Tensor]:
        """A state of this rank's units (n, ...) as one of all ranks, by parameter; on every rank, since all take part."""
        everywhere = state
        if self.ranks.world > 1:
            import torch.distributed as dist

            everywhere = torch.empty(state.shape[0] * self.ranks.world, *state.shape[1:], device=state.device)
            dist.all_gather_into_tensor(everywhere, state.contiguous())
        found, start = {}, 0
        for name, parameter in self.parameters.items():
            units = parameter.numel() // self.unit
            found[name] = everywhere[start : start + units]
            start += units
        return found

    def part(self, state: Mapping[str, Tensor], like: Tensor) -> None:
        """The other way: fill this rank's state from that of all parameters, whatever world it was saved in."""
        flat = torch.cat([state[name].to(like.device).reshape(-1, *like.shape[1:]) for name in self.parameters])
        count = like.shape[0]
        mine = flat[self.ranks.rank * count : (self.ranks.rank + 1) * count]
        like.zero_()
        like[: mine.shape[0]] = mine
