"""Interventions on the residual stream along a direction, as plain tensors and numbers: no model and no
closure.

Each of them is a sequence of steps of one form, with p = <h, v> for a unit vector v in fp32:

    h' = h + v * (clamp(p, floor, ceiling) - p + add)

    Cap         floor (and maybe a ceiling), add 0     holds the projection above the floor (2601.10387,
    section 5) Ablate      floor = ceiling = 0                    takes the direction out MeanAblate  floor =
    ceiling = mean                 sets the projection to a mean Add         no floor, no ceiling, add =
    amount     moves along the direction, whatever p is

so an engine implements one step, and a new intervention is one class here. `apply_steps` is the reference
with which engines are compared. An axis makes interventions along itself (`axis.cap("p50@18-23")`,
`axis.add(8.0, [21])`); those spare the first token of a sequence, an attention sink.

    cap = Cap((20,), v[None], torch.tensor([1.5]))
    steps_by_layer([cap, Ablate((20,), w[None])])[20]           # the steps at layer 20, in order
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personatlas.persona.artifacts import TensorRecord
from personatlas.persona.records import Count, Fraction, JsonObject, ModelFacts

BASELINE = "baseline"  # the name of the arm without interventions
PHASES = ("prompt", "answer", "both")
INFINITY = float("inf")


@dataclass(frozen=True)
class Step:
    """One step at one layer: h' = h + v * (clamp(p, floor, ceiling) - p + add) on the tokens of a phase."""

    vector: Float[Tensor, " D"]
    floor: float
    ceiling: float
    add: float
    phase: str
    spare_first: bool = False


def require_model_facts(model: JsonObject, layers: Sequence[int], width: int) -> None:
    """Raises `ValueError` for layers or a width of vectors that the model they are said to come from does not have."""
    depth, wanted = model.get("n_layers"), model.get("d_model")
    if wanted is not None and wanted != width:
        raise ValueError(f"vectors of width {width} are not of a model of width {wanted}")
    if any(layer < 0 or (depth is not None and layer >= depth) for layer in layers):
        raise ValueError(f"layers {layers} are not all in the model's, 0..{depth - 1 if depth else ''}")


def require_shares(ratio: Float[Tensor, " K"]) -> None:
    """Raises `ValueError` unless these are shares of a variance, the largest first."""
    if not (ratio >= 0).all() or float(ratio.sum()) > 1 + 1e-4 or not (ratio.diff() <= 1e-6).all():
        raise ValueError("variance_ratio are not shares of a whole, the largest first")


@dataclass(frozen=True)
class Intervention:
    """Something done along unit vectors (C, D) at C layers.

    `phase` is the part of a conversation that it acts on: "prompt", "answer" or "both". `spare_first` leaves
    the first token of a sequence alone. `model` is `Model.describe()` of the model it belongs to, empty where
    that is unknown.
    """

    layers: tuple[Count, ...]
    vectors: Float[Tensor, "C D"]
    phase: str = field(default="both", kw_only=True)
    spare_first: bool = field(default=False, kw_only=True)
    model: ModelFacts = field(default_factory=dict, kw_only=True)

    def steps(self, row: int) -> list[Step]:
        """The steps at layer number `row` of this intervention, in order."""
        raise NotImplementedError

    def _check(self, numbers: Tensor) -> None:
        if self.vectors.shape[0] != len(self.layers) or numbers.shape != (len(self.layers),):
            raise ValueError(
                f"{len(self.layers)} layers, {self.vectors.shape[0]} vectors and {len(numbers)} numbers differ"
            )
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"a layer is named twice ({', '.join(map(str, self.layers))})")
        require_unit_rows(self.vectors)  # the step lifts by |v|^2, so another length is another floor
        require_model_facts(self.model, self.layers, self.vectors.shape[1])
        check_phase(self.phase)

    def _step(
        self, row: int, floor: float, ceiling: float, add: float = 0.0, phase: str | None = None
    ) -> Step:
        return Step(self.vectors[row], floor, ceiling, add, phase or self.phase, self.spare_first)


Interventions = Sequence[Intervention]


def check_phase(phase: str) -> None:
    """Raises `ValueError` for what is no part of a conversation."""
    if phase not in PHASES:
        raise ValueError(f"phase {phase!r} is not one of {', '.join(PHASES)}")


def require_unit_rows(vectors: Float[Tensor, "C D"]) -> None:
    """Raises `ValueError` unless every row is finite and of length 1."""
    lengths = vectors.double().norm(dim=1)  # NaN or infinite where a row holds either
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4):
        raise ValueError(
            f"vectors must be finite and of length 1, got {lengths.min():.4g} to {lengths.max():.4g}"
        )


@dataclass(frozen=True)
class Cap(Intervention, TensorRecord):
    """A floor (and maybe a ceiling) on the projection: h + v * clamp(floor - <h, v>, min=0).

    `prompt_floor` holds floors for the tokens of prompts, where they differ from those of answers. `level`
    and `population` say where the floors came from: the quantile (the middle one where each layer has its
    own), and whose projections it was taken from. `calibration` is what a calibration measured of this cap.
    """

    floor: Float[Tensor, " C"]
    ceiling: Float[Tensor, " C"] | None = None
    prompt_floor: Float[Tensor, " C"] | None = None
    level: Fraction | None = field(default=None, kw_only=True)
    population: str = field(default="unknown", kw_only=True)
    calibration: dict[str, Any] = field(default_factory=dict, kw_only=True)

    kind: ClassVar[str] = "cap"
    json_names: ClassVar[Mapping[str, str]] = {"calibration": "found"}
    optional: ClassVar[tuple[str, ...]] = ("ceiling", "prompt_floor", "spare_first", "calibration")
    nonfinite: ClassVar[tuple[str, ...]] = ("floor", "ceiling", "prompt_floor")  # a layer's may be open

    def __post_init__(self) -> None:
        self._check(self.floor)
        floors = [self.floor] if self.prompt_floor is None else [self.floor, self.prompt_floor]
        if not all((floor < INFINITY).all() for floor in floors):
            raise ValueError("a floor is NaN or +infinity")
        if any(floor.shape != self.floor.shape for floor in floors):
            raise ValueError("a prompt's floor is needed at every layer")
        for floor in floors:
            ceiling = floor if self.ceiling is None else self.ceiling
            if ceiling.shape != floor.shape or not (floor <= ceiling).all():
                raise ValueError("a ceiling is needed at every layer, and none may be NaN or below its floor")
        if self.prompt_floor is not None and self.phase != "both":
            raise ValueError(f"floors for prompts need phase both, not {self.phase}")

    def floor_of(self, row: int, side: str) -> float:
        """The floor at layer number `row` for tokens of the "prompt" or of the "answer"."""
        floors = self.floor if self.prompt_floor is None or side == "answer" else self.prompt_floor
        return float(floors[row])

    def steps(self, row: int) -> list[Step]:
        """One step, or one for each side where their floors differ."""
        ceiling = INFINITY if self.ceiling is None else float(self.ceiling[row])
        sides = (self.phase,) if self.prompt_floor is None else ("prompt", "answer")
        return [self._step(row, self.floor_of(row, side), ceiling, phase=side) for side in sides]


def load_cap(stem: Path) -> Cap:
    """Reads a cap written by `Cap.save`. Raises `UserError` when it is missing, damaged, or holds what no cap
    can.
    """
    return Cap.load(stem)


@dataclass(frozen=True)
class Add(Intervention):
    """Moves along the vectors by `amount` (residual units)."""

    amount: Float[Tensor, " C"]

    def __post_init__(self) -> None:
        _require_finite(self.amount)
        self._check(self.amount)

    def steps(self, row: int) -> list[Step]:
        """One step without floor and ceiling."""
        return [self._step(row, -INFINITY, INFINITY, float(self.amount[row]))]


@dataclass(frozen=True)
class MeanAblate(Intervention):
    """Sets the projection on the vectors to `mean`."""

    mean: Float[Tensor, " C"]

    def __post_init__(self) -> None:
        _require_finite(self.mean)
        self._check(self.mean)

    def steps(self, row: int) -> list[Step]:
        """One step with the mean as floor and ceiling."""
        return [self._step(row, float(self.mean[row]), float(self.mean[row]))]


@dataclass(frozen=True)
class Ablate(Intervention):
    """Takes the vectors out of the stream: the projection becomes 0."""

    def __post_init__(self) -> None:
        self._check(torch.zeros(len(self.layers)))

    def steps(self, row: int) -> list[Step]:
        """One step with 0 as floor and ceiling."""
        return [self._step(row, 0.0, 0.0)]


def _require_finite(numbers: Tensor) -> None:
    if not torch.isfinite(numbers).all():
        raise ValueError("an amount or a mean is NaN or infinite")


def steps_by_layer(interventions: Interventions) -> dict[int, list[Step]]:
    """The steps at each layer, in the order of the interventions."""
    steps: dict[int, list[Step]] = {}
    for intervention in interventions:
        for row, layer in enumerate(intervention.layers):
            steps.setdefault(layer, []).extend(intervention.steps(row))
    return steps


def interventions_digest(interventions: Interventions) -> str:
    """16 hex digits of all that the interventions do: equal for those that do the same."""
    sha = hashlib.sha256()
    for layer, steps in sorted(steps_by_layer(interventions).items()):
        for step in steps:
            sha.update(
                f"{layer} {step.floor!r} {step.ceiling!r} {step.add!r} {step.phase} {step.spare_first} ".encode()
            )
            sha.update(step.vector.detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def apply_steps(
    h: Float[Tensor, "B T D"],
    steps: Sequence[Step],
    prompt: Bool[Tensor, "B T"],
    answer: Bool[Tensor, "B T"],
    *,
    fresh: bool = True,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T"]]:
    """The reference: the steps in order on the tokens of their phase, fp32 inside, back in h's dtype.

    `prompt` and `answer` say whose each token is; those of neither are left alone. With `fresh` the sequences
    begin at the first column, which steps may spare. Returns h after the steps, bitwise unchanged where
    nothing was corrected, and the length of each token's whole correction.
    """
    moved = h.float()
    changed = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
    for step in steps:
        vector = step.vector.to(h.device, torch.float32)
        projection = moved @ vector  # (B, T)
        delta = projection.clamp(step.floor, step.ceiling) - projection + step.add
        acting = {"prompt": prompt, "answer": answer, "both": prompt | answer}[step.phase]
        if fresh and step.spare_first:
            acting = acting.index_fill(1, torch.tensor([0], device=h.device), False)
        delta = torch.where(acting, delta, torch.zeros_like(delta))
        changed = changed | (delta != 0)
        moved = moved + delta[..., None] * vector
    length = torch.where(changed, (moved - h.float()).norm(dim=-1), torch.zeros_like(moved[..., 0]))
    return torch.where(changed[..., None], moved.to(h.dtype), h), length
