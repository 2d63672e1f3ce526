"""Muon for the blocks' matrices and AdamW for all else, each rank stepping its own share.

    optimizer = Optimizer(model, world)
    loss.backward()                             # gradients add up in the buffers
    norm = optimizer.step(Rates(matrix=0.02, ...))
    optimizer.state() / optimizer.load(state)   # by parameter, whole: another world size can go on with it

Muon (Jordan et al. 2024): momentum, then the nearest semi-orthogonal matrix, so that a step has one spectral norm in every
direction of the matrix. All matrices of one shape are one batch of products: 84 matrices of depth 12 are four batches.
The orthogonal matrix comes from five steps of Polar Express (Amsel et al. 2025), whose odd polynomials are the best for
singular values in [1/1000, 1]; rows (of a tall matrix; columns of a wide one) that keep getting large steps get smaller
ones, with the norm of the whole kept (NorMuon, Li et al. 2025): an orthogonal matrix evens out one side only. Decay pulls
only where the step goes that way too (Chen et al. 2025, cautious).

Parameters laid end to end in one buffer, their gradients in another, so that ranks share the work of a step.

    bucket = Bucket({"layers.0.mlp.up_proj.weight": p, ...}, unit=p.numel(), world=world)
    bucket.reduce()         # sums gradients over the ranks; each rank gets the sum of its own share
    bucket.my_values.add_(...)
    bucket.gather()         # every rank gets what the others have made

A unit is what must not be cut: a whole matrix for Muon, one number for AdamW. The buffers are filled up with zeros to as
many units as all ranks can share evenly. Optimizer state exists for a rank's own share only, as in ZeRO stage 1
(Rajbhandari et al. 2020). On one rank nothing is sent and nothing is copied.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from personatlas.persona.distributed import World
from personatlas.training.optim.schedule import Rates


class Bucket:
    """Some parameters and their gradients, which become views of two buffers."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], unit: int, world: World) -> None:
        some = next(iter(parameters.values()))
        self.parameters, self.unit, self.world = dict(parameters), unit, world
        units = sum(p.numel() for p in parameters.values()) // unit
        self.share = -(-units // world.size) * unit  # elements of one rank
        self.values = torch.zeros(self.share * world.size, dtype=some.dtype, device=some.device)
        self.gradients = torch.zeros_like(self.values)
        # one rank's share is all there is: it steps on the buffers themselves
        own = slice(world.rank * self.share, (world.rank + 1) * self.share)
        self.my_values = self.values[own]
        self.my_gradients = self.gradients if world.size == 1 else torch.zeros_like(self.my_values)
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
        if self.world.size > 1:
            import torch.distributed as dist

            self._waiting = dist.reduce_scatter_tensor(self.my_gradients, self.gradients, async_op=True)

    def gather(self) -> None:
        """Begin to give all ranks the new values; `wait` before they are used."""
        if self.world.size > 1:
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
        if self.world.size > 1:
            import torch.distributed as dist

            everywhere = torch.empty(state.shape[0] * self.world.size, *state.shape[1:], device=state.device)
            dist.all_gather_into_tensor(everywhere, state.contiguous())
        found, start = {}, 0
        for name, parameter in self.parameters.items():
            units = parameter.numel() // self.unit
            found[name] = everywhere[start : start + units]
            start += units
        return found

    def part(self, state: Mapping[str, Tensor], like: Tensor) -> None:
        """The other way: fill this rank's state from that of all parameters, whatever world it was saved in."""
        flat = torch.cat(
            [state[name].to(like.device).reshape(-1, *like.shape[1:]) for name in self.parameters]
        )
        count = like.shape[0]
        mine = flat[self.world.rank * count : (self.world.rank + 1) * count]
        like.zero_()
        like[: mine.shape[0]] = mine


# a, b, c of x <- (a + b x² + c x⁴) x, one triple a step: the published ones, rescaled to be safe in bf16 by 2%
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SLOW = 0.95  # how slowly Muon's row norms follow
FIRST = 0.8  # AdamW's first moment: short, as the embedding of a rare word changes at its few meetings
EPS = 1e-10


def polar(x: Float[Tensor, "N A B"]) -> Float[Tensor, "N A B"]:
    """The semi-orthogonal matrix nearest to each x, in x's dtype: singular values within 15% of 1, many at once."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # products of the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR:
        square = x @ x.mT
        both = torch.baddbmm(
            square, square, square, beta=b, alpha=c
        )  # b x² + c x⁴: the sum is the product's own
        x = torch.baddbmm(x, both, x, beta=a)
    return x.mT if tall else x


def muon_step(
    values: Float[Tensor, "N A B"],
    gradients: Float[Tensor, "N A B"],
    momentum: Float[Tensor, "N A B"],
    lengths: Float[Tensor, "N L"],
    rate: Tensor,
    decay: Tensor,
    inertia: Tensor,
    dtype: torch.dtype,
) -> None:
    """One step of all matrices of a shape, in place. `lengths` are the mean squares of rows (tall) or columns (wide)."""
    rows, columns = values.shape[-2:]
    along = -1 if rows >= columns else -2
    momentum.lerp_(gradients, 1 - inertia)
    step = polar(gradients.lerp(momentum, inertia).to(dtype)).to(values.dtype)  # Nesterov
    squares = step.square().mean(dim=along)  # (N, L)
    lengths.lerp_(squares, 1 - SLOW)
    scale = lengths.clamp_min(EPS).rsqrt()
    kept = squares.sum(-1, keepdim=True) / (squares * scale.square()).sum(-1, keepdim=True).clamp_min(EPS)
    step = step * (scale * kept.sqrt()).unsqueeze(along)
    # a step moves each output by as much whatever the inputs: a tall matrix has longer outputs
    rate = rate * max(1.0, rows / columns) ** 0.5
    pull = values * (step * values > 0)
    values.sub_(rate * (step + decay * pull))


def adam_step(
    values: Float[Tensor, "E"],
    gradients: Float[Tensor, "E"],
    first: Float[Tensor, "E"],
    second: Float[Tensor, "E"],
    rate: Tensor,
    slowness: Tensor,
    count: Tensor,
) -> None:
    """One step of AdamW without decay, in place; `count` is the number of this step, from 1."""
    first.lerp_(gradients, 1 - FIRST)
    second.lerp_(gradients.square(), 1 - slowness)
    unbiased = (second / (1 - slowness**count)).sqrt() + EPS
    values.sub_(rate / (1 - FIRST**count) * first / unbiased)


class Optimizer:
    """Both, over all parameters of a model, which become views of buffers. On a GPU steps are compiled and in bf16."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world, self.count = world, 0
        kinds = _kinds(dict(model.named_parameters()))
        self.matrices = [
            Bucket(group, next(iter(group.values())).numel(), world) for group in kinds.pop("matrix")
        ]
        self.others = {kind: Bucket(groups[0], 1, world) for kind, groups in kinds.items()}
        self.device = next(model.parameters()).device
        cuda = self.device.type == "cuda"
        self._dtype = torch.bfloat16 if cuda else torch.float32
        self._muon = torch.compile(muon_step, dynamic=False) if cuda else muon_step
        self._adam = torch.compile(adam_step, dynamic=False) if cuda else adam_step
        self._state: dict[str, Tensor] = {}
        for number, bucket in enumerate(self.matrices):
            rows, columns = next(iter(bucket.parameters.values())).shape
            units = bucket.share // bucket.unit
            self._state[f"momentum/{number}"] = torch.zeros(units, rows, columns, device=self.device)
            self._state[f"lengths/{number}"] = torch.zeros(units, max(rows, columns), device=self.device)
        for kind, bucket in self.others.items():
            for moment in ("first", "second"):
                self._state[f"{moment}/{kind}"] = torch.zeros(bucket.share, device=self.device)

    def buckets(self) -> Iterator[Bucket]:
        yield from self.others.values()
        yield from self.matrices

    def zero(self) -> None:
        """Forget all gradients."""
        for bucket in self.buckets():
            bucket.gradients.zero_()

    @torch.no_grad()
    def step(self, rates: Rates) -> Tensor:
        """Sum gradients over the ranks, step, share the result, and zero gradients. Returns this rank's Σ g² (a scalar).

        All sums begin at once, so that a bucket steps while the next one's gradients travel.
        """
        self.count += 1
        for bucket in self.buckets():
            bucket.reduce()
        squares = torch.zeros((), device=self.device)
        for kind, bucket in self.others.items():
            bucket.wait()
            squares += _squares(bucket.my_gradients)
            self._step_others(kind, bucket, getattr(rates, kind), rates.second)
            bucket.gather()
        for number, bucket in enumerate(self.matrices):
            bucket.wait()
            squares += _squares(bucket.my_gradients)
            self._step_matrices(number, bucket, rates)
            bucket.gather()
        for bucket in self.buckets():
            bucket.wait()
        self.zero()
        return squares

    def _step_others(self, kind: str, bucket: Bucket, rate: float, second: float) -> None:
        moments = (self._state[f"{moment}/{kind}"] for moment in ("first", "second"))
        numbers = (
            torch.tensor(float(x)) for x in (rate, second, self.count)
        )  # as tensors: nothing is compiled again
        self._adam(bucket.my_values, bucket.my_gradients, *moments, *numbers)

    def _step_matrices(self, number: int, bucket: Bucket, rates: Rates) -> None:
        momentum = self._state[f"momentum/{number}"]
        values, gradients = (x.view(momentum.shape) for x in (bucket.my_values, bucket.my_gradients))
        rate, decay, inertia = (torch.tensor(x) for x in (rates.matrix, rates.decay, rates.momentum))
        lengths = self._state[f"lengths/{number}"]
        self._muon(values, gradients, momentum, lengths, rate, decay, inertia, self._dtype)

    def state(self) -> dict[str, Tensor]:
        """Everything that is needed to go on, by parameter, on the CPU. All ranks must call it."""
        found = {"count": torch.tensor(self.count)}
        for name, bucket in self._of_state():
            kind = name.split("/")[0]
            whole = bucket.whole(self._state[name])
            found |= {f"{parameter}/{kind}": value.to("cpu", copy=True) for parameter, value in whole.items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """The other way. KeyError for a state of other parameters."""
        self.count = int(state["count"])
        for name, bucket in self._of_state():
            kind = name.split("/")[0]
            bucket.part(
                {parameter: state[f"{parameter}/{kind}"] for parameter in bucket.parameters},
                self._state[name],
            )

    def forget(self) -> None:
        """As new: all state zero."""
        self.count = 0
        for value in self._state.values():
            value.zero_()

    def _of_state(self) -> Iterator[tuple[str, Bucket]]:
        for number, bucket in enumerate(self.matrices):
            yield f"momentum/{number}", bucket
            yield f"lengths/{number}", bucket
        for kind, bucket in self.others.items():
            yield f"first/{kind}", bucket
            yield f"second/{kind}", bucket


def _squares(x: Tensor) -> Tensor:
    """Σ x² in one reading that writes nothing. A CPU adds one after another: in fp32 25 M of them would be off by 0.3%."""
    exact = torch.float64 if x.device.type == "cpu" else None
    return torch.linalg.vector_norm(x, dtype=exact).square().to(x.dtype)


def _kinds(parameters: dict[str, nn.Parameter]) -> dict[str, list[dict[str, nn.Parameter]]]:
    """Parameters by what steps them: matrices by shape, then embedding, head and gains."""
    matrices: dict[tuple[int, ...], dict[str, nn.Parameter]] = {}
    others: dict[str, dict[str, nn.Parameter]] = {"head": {}, "embedding": {}, "gain": {}}
    for name, parameter in parameters.items():
        if "_proj." in name:
            matrices.setdefault(tuple(parameter.shape), {})[name] = parameter
        elif name.startswith("lm_head."):
            others["head"][name] = parameter
        else:
            others["gain" if "norm" in name else "embedding"][name] = parameter
    return {"matrix": list(matrices.values()), **{kind: [group] for kind, group in others.items()}}
