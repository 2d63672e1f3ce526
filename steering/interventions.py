"""What may be done to the residual stream along a direction, as plain numbers: no model and no closure is inside.

Four interventions are one step, with p = <h, v> for a unit vector v,

    h' = h + v * (clamp(p, floor, ceiling) - p + add)

    Cap         floor (and maybe a ceiling), add 0     holds the projection above the floor  (arXiv 2601.10387, section 5)
    Ablate      floor = ceiling = 0                    takes the direction out
    MeanAblate  floor = ceiling = mean                 sets the projection to a mean
    Add         no floor, no ceiling, add = amount     moves along the direction, whatever p is

so an engine needs one kernel for all of them, and what it needs is a `Step`: tensors that can travel anywhere. What is made
along an axis spares the first token of a sequence unless told otherwise: it is an attention sink, and to move it costs as
much as all the rest (LOG.md).

    cap = cap_of(axis, layers=range(18, 24), level=0.5)          # floor: the median of the default's answers
    steps_of([cap, Ablate.along(other_axis, [20])])[20]          # what happens at layer 20, in order
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personatlas.persona.axis import Axis, Cap
from personatlas.persona.errors import UserError

PHASES = ("prompt", "answer", "both")
POPULATIONS = ("default", "roles")


@dataclass(frozen=True)
class Add:
    """Move along unit vectors by `amount` (residual units) at some layers."""

    layers: tuple[int, ...]
    vectors: Float[Tensor, "C D"]
    amount: Float[Tensor, " C"]
    phase: str = "both"
    spare_first: bool = False
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.layers, self.vectors, self.amount, self.phase)

    @classmethod
    def along(
        cls,
        axis: Axis,
        layers: Iterable[int],
        amount: float,
        phase: str = "both",
        *,
        spare_first: bool = True,
    ) -> "Add":
        """The same amount along an axis at each layer."""
        chosen = tuple(layers)
        amounts = torch.full((len(chosen),), float(amount))
        return cls(chosen, _vectors(axis, chosen), amounts, phase, spare_first, axis.model)


@dataclass(frozen=True)
class MeanAblate:
    """Set the projection on unit vectors to `mean` at some layers."""

    layers: tuple[int, ...]
    vectors: Float[Tensor, "C D"]
    mean: Float[Tensor, " C"]
    phase: str = "both"
    spare_first: bool = False
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.layers, self.vectors, self.mean, self.phase)

    @classmethod
    def along(
        cls,
        axis: Axis,
        layers: Iterable[int],
        mean: Sequence[float],
        phase: str = "both",
        *,
        spare_first: bool = True,
    ) -> "MeanAblate":
        """Means by layer, along an axis."""
        chosen = tuple(layers)
        means = torch.tensor(mean, dtype=torch.float32)
        return cls(chosen, _vectors(axis, chosen), means, phase, spare_first, axis.model)


@dataclass(frozen=True)
class Ablate:
    """Take unit vectors out of the stream at some layers: the projection becomes 0."""

    layers: tuple[int, ...]
    vectors: Float[Tensor, "C D"]
    phase: str = "both"
    spare_first: bool = False
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.layers, self.vectors, torch.zeros(len(self.layers)), self.phase)

    @classmethod
    def along(
        cls, axis: Axis, layers: Iterable[int], phase: str = "both", *, spare_first: bool = True
    ) -> "Ablate":
        """An axis's own direction at each layer."""
        chosen = tuple(layers)
        return cls(chosen, _vectors(axis, chosen), phase, spare_first, axis.model)


Intervention = Cap | Add | Ablate | MeanAblate


@dataclass(frozen=True)
class Step:
    """One intervention at one layer, as numbers: h' = h + v * (clamp(p, floor, ceiling) - p + add)."""

    vector: Float[Tensor, " D"]
    floor: float
    ceiling: float
    add: float
    phase: str
    spare_first: bool = False


def cap_of(
    axis: Axis,
    layers: Iterable[int],
    level: float,
    population: str = "default",
    phase: str = "both",
    *,
    spare_first: bool = True,
) -> Cap:
    """A cap whose floor at each layer is a quantile of a population's projections, as the axis keeps them.

    `level` is in [0, 1] and must be one that the axis keeps; `population` is "default" or "roles": whose whole answers
    were projected. Raises `UserError` for a layer or level that the axis does not have.
    """
    chosen = tuple(layers)
    if population not in POPULATIONS:
        raise UserError(f"population {population!r} is not one of {', '.join(POPULATIONS)}")
    if not 0 <= level <= 1:
        raise UserError(f"level {level} is outside 0..1: it is a quantile")
    kept = [i for i, own in enumerate(axis.levels) if abs(own - level) < 1e-9]
    if not kept:
        raise UserError(
            f"level {level} is not kept in this axis ({', '.join(map(str, axis.levels)) or 'none is'})"
        )
    vectors = _vectors(axis, chosen)
    table = axis.default_quantiles if population == "default" else axis.role_quantiles
    floor = torch.stack([table[axis.layers.index(layer), kept[0]] for layer in chosen])
    if not torch.isfinite(floor).all():
        missing = [layer for layer, value in zip(chosen, floor.tolist(), strict=True) if value != value]
        raise UserError(f"the axis keeps no quantiles at layers {missing}: no rollout means were kept there")
    return Cap(
        chosen,
        vectors,
        floor,
        level=level,
        population=population,
        phase=phase,
        spare_first=spare_first,
        model=axis.model,
    )


def steps_of(interventions: Sequence[Intervention]) -> dict[int, list[Step]]:
    """What happens at each layer, in the order of the interventions."""
    found: dict[int, list[Step]] = {}
    for intervention in interventions:
        for row, layer in enumerate(intervention.layers):
            found.setdefault(layer, []).extend(_steps(intervention, row))
    return found


def correct(
    h: Float[Tensor, "B T D"],
    steps: Sequence[Step],
    prompt: Bool[Tensor, "B T"],
    answer: Bool[Tensor, "B T"],
    *,
    fresh: bool = True,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T"]]:
    """The steps in order on the tokens of their phase, and the length of each token's whole correction; fp32 inside.

    With `fresh` the sequences begin at the first column, which steps may spare. This is what steering means, written plainly: engines are compared with it.
    """
    moved = h.float()
    changed = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
    for step in steps:
        vector = step.vector.to(h.device, torch.float32)
        projection = moved @ vector  # (B, T)
        delta = projection.clamp(step.floor, step.ceiling) - projection + step.add
        there = {"prompt": prompt, "answer": answer, "both": prompt | answer}[step.phase]
        if fresh and step.spare_first:
            there = there.index_fill(1, torch.tensor([0], device=h.device), False)
        delta = torch.where(there, delta, torch.zeros_like(delta))
        changed = changed | (delta != 0)
        moved = moved + delta[..., None] * vector
    length = torch.where(changed, (moved - h.float()).norm(dim=-1), torch.zeros_like(moved[..., 0]))
    return torch.where(changed[..., None], moved.to(h.dtype), h), length


def plan_digest(plan: Sequence[Intervention]) -> str:
    """16 hex digits of all that a plan does: equal for plans that do the same."""
    sha = hashlib.sha256()
    for layer, steps in sorted(steps_of(plan).items()):
        for step in steps:
            sha.update(
                f"{layer} {step.floor!r} {step.ceiling!r} {step.add!r} {step.phase} {step.spare_first} ".encode()
            )
            sha.update(step.vector.detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def _steps(intervention: Intervention, row: int) -> list[Step]:
    """One step, or one for each phase where a cap's floors differ."""
    vector, phase, infinity = intervention.vectors[row], intervention.phase, float("inf")
    spare = intervention.spare_first
    if isinstance(intervention, Cap):
        ceiling = infinity if intervention.ceiling is None else float(intervention.ceiling[row])
        sides = (phase,) if intervention.prompt_floor is None else ("prompt", "answer")
        return [Step(vector, intervention.floor_of(row, side), ceiling, 0.0, side, spare) for side in sides]
    if isinstance(intervention, Add):
        return [Step(vector, -infinity, infinity, float(intervention.amount[row]), phase, spare)]
    mean = float(intervention.mean[row]) if isinstance(intervention, MeanAblate) else 0.0
    return [Step(vector, mean, mean, 0.0, phase, spare)]


def _vectors(axis: Axis, layers: tuple[int, ...]) -> Float[Tensor, "C D"]:
    if not layers:
        raise UserError("an intervention needs at least one layer")
    return torch.stack([axis.at(layer) for layer in layers])


def _check(layers: tuple[int, ...], vectors: Tensor, numbers: Tensor, phase: str) -> None:
    if vectors.shape[0] != len(layers) or numbers.shape != (len(layers),):
        raise ValueError(
            f"{len(layers)} layers, {vectors.shape[0]} vectors and {len(numbers)} numbers differ"
        )
    if not torch.isfinite(numbers).all():
        raise ValueError("an amount or a mean is NaN or infinite")
    lengths = vectors.double().norm(dim=1)
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4):
        raise ValueError(
            f"vectors must be finite and of length 1, got {lengths.min():.4g} to {lengths.max():.4g}"
        )
    if phase not in PHASES:
        raise ValueError(f"phase {phase!r} is not one of {', '.join(PHASES)}")
