"""Muon for the blocks' matrices and AdamW for all else, each rank stepping its own share.

    optimizer = Optimizer(model, world)
    loss.backward()                             # gradients add up in the buffers
    squares = optimizer.step(Rates(matrix=0.02, ...))
    optimizer.state() / optimizer.load(state)   # by parameter, whole: another world size can resume from it

Muon (Jordan et al. 2024): momentum, then the nearest semi-orthogonal matrix, so that a step has one spectral
norm in every direction. All matrices of one shape are one batch of products. The orthogonal matrix comes from
five steps of Polar Express (Amsel et al. 2025), whose odd polynomials are the best for singular values in
[1/1000, 1]. Rows of a tall matrix (columns of a wide one) that keep getting large steps get smaller ones,
with the norm of the whole kept (NorMuon, Li et al. 2025). Decay pulls only where the step goes that way too
(cautious, Chen et al. 2025). Parameters and gradients are laid end to end in flat buffers, and optimizer
state exists for a rank's own share only, as in ZeRO stage 1 (Rajbhandari et al. 2020).
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from personatlas.persona.distributed import World
from personatlas.training.optim.schedule import Rates

# a, b, c of x <- (a + b x² + c x⁴) x, a triple a step: the published ones, rescaled by 2% to be safe in bf16
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NORM_BETA = 0.95  # of the mean squares by which Muon's rows are scaled
ADAM_BETA1 = 0.8  # short, as the embedding of a rare word changes at its few occurrences
EPS = 1e-10


class FlatBuffer:
    """Parameters and their gradients, which become views of two buffers.

    `unit` is what must not be cut: the elements of a whole matrix for Muon, 1 for AdamW. The buffers are
    filled up with zeros to as many units as all ranks can share evenly. On one rank nothing is sent and
    nothing is copied.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], unit: int, world: World) -> None:
        some = next(iter(parameters.values()))
        self.parameters, self.unit, self.world = dict(parameters), unit, world
        units = sum(p.numel() for p in parameters.values()) // unit
        self.share = -(-units // world.size) * unit  # elements of one rank
        self.values = torch.zeros(self.share * world.size, dtype=some.dtype, device=some.device)
        self.gradients = torch.zeros_like(self.values)
        self.my_values = self.values[world.rank * self.share : (world.rank + 1) * self.share]
        # one rank's share is all there is: it steps on the buffers themselves
        self.my_gradients = self.gradients if world.size == 1 else torch.zeros_like(self.my_values)
        self._pending: dist.Work | None = None
        start = 0
        for parameter in self.parameters.values():
            part = slice(start, start + parameter.numel())
            self.values[part] = parameter.detach().flatten()
            parameter.data = self.values[part].view(parameter.shape)
            parameter.grad = self.gradients[part].view(parameter.shape)
            start += parameter.numel()

    def reduce(self) -> None:
        """Starts to sum this rank's share of the gradients over the ranks; `wait` before they are used."""
        if self.world.size > 1:
            self._pending = dist.reduce_scatter_tensor(self.my_gradients, self.gradients, async_op=True)

    def gather(self) -> None:
        """Starts to give all ranks the new values; `wait` before they are used."""
        if self.world.size > 1:
            self._pending = dist.all_gather_into_tensor(self.values, self.my_values.clone(), async_op=True)

    def wait(self) -> None:
        """Waits for what was started last."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def gather_state(self, state: Tensor) -> dict[str, Tensor]:
        """This rank's units (n, ...) as those of all ranks, by parameter. All ranks must call it."""
        everywhere = state
        if self.world.size > 1:
            everywhere = torch.empty(state.shape[0] * self.world.size, *state.shape[1:], device=state.device)
            dist.all_gather_into_tensor(everywhere, state.contiguous())
        by_parameter, start = {}, 0
        for name, parameter in self.parameters.items():
            units = parameter.numel() // self.unit
            by_parameter[name] = everywhere[start : start + units]
            start += units
        return by_parameter

    def scatter_state(self, by_parameter: Mapping[str, Tensor], state: Tensor) -> None:
        """Fills this rank's state from that of all parameters, whatever world size it was saved with."""
        parts = (by_parameter[name].to(state.device) for name in self.parameters)
        flat = torch.cat([part.reshape(-1, *state.shape[1:]) for part in parts])
        count = state.shape[0]
        own = flat[self.world.rank * count : (self.world.rank + 1) * count]
        state.zero_()
        state[: own.shape[0]] = own


def polar(x: Float[Tensor, "N A B"]) -> Float[Tensor, "N A B"]:
    """The semi-orthogonal matrix nearest to each x, in x's dtype: singular values within 15% of 1."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # products of the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR:
        square = x @ x.mT
        both = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b x² + c x⁴
        x = torch.baddbmm(x, both, x, beta=a)
    return x.mT if tall else x


def muon_step(
    values: Float[Tensor, "N A B"],
    gradients: Float[Tensor, "N A B"],
    momentum: Float[Tensor, "N A B"],
    mean_squares: Float[Tensor, "N L"],
    rate: Tensor,
    decay: Tensor,
    beta: Tensor,
    dtype: torch.dtype,
) -> None:
    """One step of all matrices of a shape, in place. `mean_squares` are of rows (tall) or columns (wide)."""
    rows, columns = values.shape[-2:]
    along = -1 if rows >= columns else -2
    momentum.lerp_(gradients, 1 - beta)
    step = polar(gradients.lerp(momentum, beta).to(dtype)).to(values.dtype)  # Nesterov
    squares = step.square().mean(dim=along)  # (N, L)
    mean_squares.lerp_(squares, 1 - NORM_BETA)
    scale = mean_squares.clamp_min(EPS).rsqrt()
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
    beta2: Tensor,
    count: Tensor,
) -> None:
    """One step of AdamW without decay, in place; `count` is the number of this step, from 1."""
    first.lerp_(gradients, 1 - ADAM_BETA1)
    second.lerp_(gradients.square(), 1 - beta2)
    unbiased = (second / (1 - beta2**count)).sqrt() + EPS
    values.sub_(rate / (1 - ADAM_BETA1**count) * first / unbiased)


class Optimizer:
    """Muon and AdamW over all parameters of a model. On a GPU their steps are compiled and in bf16."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world, self.count = world, 0
        matrices: dict[tuple[int, ...], dict[str, nn.Parameter]] = {}
        others: dict[str, dict[str, nn.Parameter]] = {"head": {}, "embedding": {}, "norm": {}}
        for name, parameter in model.named_parameters():
            if "_proj." in name:
                matrices.setdefault(tuple(parameter.shape), {})[name] = parameter
            elif name.startswith("lm_head."):
                others["head"][name] = parameter
            else:
                others["norm" if "norm" in name else "embedding"][name] = parameter
        self.matrices = [
            FlatBuffer(group, next(iter(group.values())).numel(), world) for group in matrices.values()
        ]
        self.others = {kind: FlatBuffer(group, 1, world) for kind, group in others.items()}
        self.device = next(model.parameters()).device
        cuda = self.device.type == "cuda"
        self._dtype = torch.bfloat16 if cuda else torch.float32
        self._muon = torch.compile(muon_step, dynamic=False) if cuda else muon_step
        self._adam = torch.compile(adam_step, dynamic=False) if cuda else adam_step
        # named as in checkpoints, where mean squares are "lengths"
        self._state: dict[str, tuple[FlatBuffer, Tensor]] = {}
        for number, buffer in enumerate(self.matrices):
            rows, columns = next(iter(buffer.parameters.values())).shape
            units = buffer.share // buffer.unit
            momentum = torch.zeros(units, rows, columns, device=self.device)
            mean_squares = torch.zeros(units, max(rows, columns), device=self.device)
            self._state[f"momentum/{number}"] = buffer, momentum
            self._state[f"lengths/{number}"] = buffer, mean_squares
        for kind, buffer in self.others.items():
            for moment in ("first", "second"):
                self._state[f"{moment}/{kind}"] = buffer, torch.zeros(buffer.share, device=self.device)

    def buffers(self) -> Iterator[FlatBuffer]:
        """All flat buffers, in the order in which they step."""
        yield from self.others.values()
        yield from self.matrices

    def zero(self) -> None:
        """Sets all gradients to zero."""
        for buffer in self.buffers():
            buffer.gradients.zero_()

    @torch.no_grad()
    def step(self, rates: Rates) -> Tensor:
        """Sums gradients over the ranks, steps, shares the result and zeroes gradients. Returns this rank's Σ
        g².

        All sums start at once, so that a buffer steps while the next one's gradients travel.
        """
        self.count += 1
        for buffer in self.buffers():
            buffer.reduce()
        squares = torch.zeros((), device=self.device)
        for kind, buffer in self.others.items():
            buffer.wait()
            squares += _sum_of_squares(buffer.my_gradients)
            moments = (self._state[f"{moment}/{kind}"][1] for moment in ("first", "second"))
            # as tensors: nothing is compiled again
            numbers = (torch.tensor(float(x)) for x in (getattr(rates, kind), rates.adam_beta2, self.count))
            self._adam(buffer.my_values, buffer.my_gradients, *moments, *numbers)
            buffer.gather()
        for number, buffer in enumerate(self.matrices):
            buffer.wait()
            squares += _sum_of_squares(buffer.my_gradients)
            momentum, mean_squares = (self._state[f"{name}/{number}"][1] for name in ("momentum", "lengths"))
            values, gradients = (x.view(momentum.shape) for x in (buffer.my_values, buffer.my_gradients))
            rate, decay, beta = (torch.tensor(x) for x in (rates.matrix, rates.decay, rates.momentum))
            self._muon(values, gradients, momentum, mean_squares, rate, decay, beta, self._dtype)
            buffer.gather()
        for buffer in self.buffers():
            buffer.wait()
        self.zero()
        return squares

    def state(self) -> dict[str, Tensor]:
        """All state by PARAMETER/KIND, on the CPU. All ranks must call it."""
        by_parameter = {"count": torch.tensor(self.count)}
        for name, (buffer, value) in self._state.items():
            kind = name.split("/")[0]
            for parameter, whole in buffer.gather_state(value).items():
                by_parameter[f"{parameter}/{kind}"] = whole.to("cpu", copy=True)
        return by_parameter

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave. KeyError for a state of other parameters, ValueError for no state."""
        self.count = int(state["count"])
        odd = next((name for name, value in state.items() if not torch.isfinite(value).all()), None)
        if odd is not None or self.count < 0:
            raise ValueError(f"{odd} is not finite" if odd else f"{self.count} steps")
        for name, (buffer, value) in self._state.items():
            kind = name.split("/")[0]
            buffer.scatter_state({key: state[f"{key}/{kind}"] for key in buffer.parameters}, value)

    def reset(self) -> None:
        """Sets all state to zero, as that of a new optimizer."""
        self.count = 0
        for _, value in self._state.values():
            value.zero_()


def _sum_of_squares(x: Tensor) -> Tensor:
    """Σ x² in one reading. A CPU adds one after another: in fp32 25 M of them would be off by 0.3%."""
    exact = torch.float64 if x.device.type == "cpu" else None
    return torch.linalg.vector_norm(x, dtype=exact).square().to(x.dtype)
