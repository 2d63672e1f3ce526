"""The nouns of persona space: `Axis`, `PersonaSpace` and the `Cap` that will act along an axis, with their files.

    axis[l] = mean(default)[l] - mean over roles of their mean[l],   scaled to length 1   (arXiv 2601.10387, section 3)

so a positive projection <h, v> lies toward the first pole ("assistant") and a negative one toward the second
("role-play"). A direction never travels without its layers, its sign, its poles and the model that it came from.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personatlas.persona.artifacts import load_tensors, save_tensors
from personatlas.persona.errors import UserError

POLES = ("assistant", "role-play")


@dataclass(frozen=True)
class Axis:
    """A direction at every layer of a model.

    `vectors` are unit rows, + toward `poles[0]`; `norms` are the lengths before scaling (projection units);
    `quantiles` are projections of the rollout means of the default and of the roles at `levels`, NaN where a layer
    kept no rollout means; `layer` is the layer to use; `model` is `Model.describe()`.
    """

    vectors: Float[Tensor, "L D"]
    norms: Float[Tensor, " L"]
    layers: tuple[int, ...]
    layer: int
    model: dict[str, Any]
    levels: tuple[float, ...] = ()
    default_quantiles: Float[Tensor, "L Q"] = field(default_factory=lambda: torch.empty(0, 0))
    role_quantiles: Float[Tensor, "L Q"] = field(default_factory=lambda: torch.empty(0, 0))
    poles: tuple[str, str] = POLES
    fit: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n_layers, _ = self.vectors.shape
        if len(self.layers) != n_layers or self.norms.shape != (n_layers,):
            raise ValueError(
                f"{n_layers} vectors, {len(self.layers)} layers and {len(self.norms)} norms do not match"
            )
        if self.layer not in self.layers:
            raise ValueError(f"the layer to use, {self.layer}, is not one of the axis ({self.layers})")
        _require_unit_rows(self.vectors)

    def at(self, layer: int) -> Float[Tensor, " D"]:
        """The unit vector at a layer; `UserError` when the axis does not have it."""
        if layer not in self.layers:
            raise UserError(f"layer {layer} is not in this axis ({self.layers[0]}..{self.layers[-1]})")
        return self.vectors[self.layers.index(layer)]

    def require_model(self, model: dict[str, Any]) -> None:
        """Refuse a model that this axis was not fitted on: other weights, another depth or another width."""
        require_origin("axis", self.model, model)

    def save(self, stem: Path) -> None:
        """Write `stem.safetensors` and `stem.json`."""
        tensors = {"vectors": self.vectors, "norms": self.norms}
        if self.levels:
            tensors |= {"default_quantiles": self.default_quantiles, "role_quantiles": self.role_quantiles}
        meta = {
            "layers": list(self.layers),
            "layer": self.layer,
            "model": self.model,
            "levels": list(self.levels),
        }
        save_tensors(stem, tensors, {"kind": "axis", **meta, "poles": list(self.poles), "fit": self.fit})


def require_origin(what: str, origin: dict[str, Any], model: dict[str, Any], *, force: bool = False) -> None:
    """Refuse an artefact whose `origin` is not `model` (both `Model.describe()`); an unknown origin has to fit in size.

    `force` lets pass the one thing that may be meant: weights of the same depth and width in another format.
    """
    said = f"this {what} came from {origin.get('id')} ({origin.get('weights')}), not from {model['id']} ({model['weights']})"
    for name in ("d_model", "n_layers"):
        if origin.get(name) is not None and origin[name] != model[name]:
            raise UserError(f"{said}: {name} {origin[name]} against {model[name]}; fit an axis on this model")
    if origin.get("fingerprint") in (None, model["fingerprint"]):
        return
    if origin.get("weights") == model["weights"]:
        said += f": fingerprint {origin['fingerprint']} against {model['fingerprint']}"
        raise UserError(f"{said}; fit an axis on this model")
    if not force:
        raise UserError(
            f"{said}: the same model in two weight formats has two axes; fit one on this one, or --force it across formats"
        )


def _require_unit_rows(vectors: Tensor) -> None:
    lengths = vectors.double().norm(dim=1)  # NaN or infinite where a row holds either
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4):
        raise ValueError(
            f"vectors must be finite and of length 1, got {lengths.min():.4g} to {lengths.max():.4g}"
        )


def load_axis(stem: Path) -> Axis:
    """Read an axis written by `Axis.save`; `UserError` when it is missing, damaged or something else."""
    tensors, meta = load_tensors(stem, "axis")
    quantiles = {name: tensors[name] for name in ("default_quantiles", "role_quantiles") if name in tensors}
    return Axis(
        vectors=tensors["vectors"],
        norms=tensors["norms"],
        layers=tuple(meta["layers"]),
        layer=meta["layer"],
        model=meta["model"],
        levels=tuple(meta["levels"]),
        poles=(meta["poles"][0], meta["poles"][1]),
        fit=meta["fit"],
        **quantiles,
    )


@dataclass(frozen=True)
class PersonaSpace:
    """Principal components of the role vectors at one layer.

    A role with vector x lies at `(x - mean) @ components.T`. Components are unit rows; PC1 points to the default.
    """

    layer: int
    mean: Float[Tensor, " D"]
    components: Float[Tensor, "K D"]
    variance_ratio: Float[Tensor, " K"]
    coordinates: Float[Tensor, "R K"]
    roles: tuple[str, ...]
    model: dict[str, Any]

    def __post_init__(self) -> None:
        if self.coordinates.shape != (len(self.roles), len(self.components)):
            raise ValueError(
                f"coordinates {tuple(self.coordinates.shape)} do not match {len(self.roles)} roles"
            )

    def save(self, stem: Path) -> None:
        """Write `stem.safetensors` and `stem.json`."""
        tensors = {
            "mean": self.mean,
            "components": self.components,
            "variance_ratio": self.variance_ratio,
            "coordinates": self.coordinates,
        }
        save_tensors(
            stem,
            tensors,
            {"kind": "space", "layer": self.layer, "roles": list(self.roles), "model": self.model},
        )


def load_space(stem: Path) -> PersonaSpace:
    """Read a space written by `PersonaSpace.save`."""
    tensors, meta = load_tensors(stem, "space")
    return PersonaSpace(layer=meta["layer"], roles=tuple(meta["roles"]), model=meta["model"], **tensors)


@dataclass(frozen=True)
class Cap:
    """A floor (and maybe a ceiling) on the projection at some layers: h + v * clamp(floor - <h,v>, min=0).

    `vectors` are unit rows toward the first pole. `level` and `population` say where the floor came from: the quantile (the
    middle one where each layer has its own), and whose projections it was taken from. `phase` is the part of a conversation
    that is capped; with `prompt_floor` the tokens of prompts have floors of their own. `spare_first` leaves the first token of
    a sequence alone: it is an attention sink, whose residual is another matter than any other token's. `found` is what a
    calibration says of this cap.
    """

    layers: tuple[int, ...]
    vectors: Float[Tensor, "C D"]
    floor: Float[Tensor, " C"]
    ceiling: Float[Tensor, " C"] | None = None
    prompt_floor: Float[Tensor, " C"] | None = None
    level: float | None = None
    population: str = "unknown"
    phase: str = "both"
    spare_first: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vectors.shape[0] != len(self.layers) or self.floor.shape != (len(self.layers),):
            raise ValueError(
                f"{len(self.layers)} layers, {self.vectors.shape[0]} vectors and {len(self.floor)} floors differ"
            )
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"a layer is named twice ({', '.join(map(str, self.layers))})")
        floors = [self.floor] if self.prompt_floor is None else [self.floor, self.prompt_floor]
        if not all((floor < float("inf")).all() for floor in floors):
            raise ValueError("a floor is NaN or +infinity")
        _require_unit_rows(self.vectors)  # the kernel lifts by |v|^2, so another length is another floor
        if any(floor.shape != self.floor.shape for floor in floors):
            raise ValueError("a prompt's floor is needed at every layer")
        for floor in floors:
            ceiling = floor if self.ceiling is None else self.ceiling
            if ceiling.shape != floor.shape or not (floor <= ceiling).all():
                raise ValueError("a ceiling is needed at every layer, and none may be NaN or below its floor")
        if self.phase not in ("prompt", "answer", "both"):
            raise ValueError(f"phase {self.phase!r} is not one of prompt, answer, both")
        if self.prompt_floor is not None and self.phase != "both":
            raise ValueError(
                f"floors for prompts of their own are for a cap of both phases, this one is for {self.phase}"
            )

    def floor_of(self, row: int, side: str) -> float:
        """The floor of a row's layer for tokens of the "prompt" or of the "answer"."""
        floors = self.floor if self.prompt_floor is None or side == "answer" else self.prompt_floor
        return float(floors[row])

    def save(self, stem: Path) -> None:
        """Write `stem.safetensors` and `stem.json`."""
        tensors = {"vectors": self.vectors, "floor": self.floor}
        for name in ("ceiling", "prompt_floor"):
            if (own := getattr(self, name)) is not None:
                tensors[name] = own
        names = ("level", "population", "phase", "spare_first", "model", "found")
        meta = {name: getattr(self, name) for name in names}
        save_tensors(stem, tensors, {"kind": "cap", "layers": list(self.layers), **meta})


def load_cap(stem: Path) -> Cap:
    """Read a cap written by `Cap.save`; `UserError` when it is missing, damaged, or holds what no cap can."""
    tensors, meta = load_tensors(stem, "cap")
    try:
        fields = {name: meta[name] for name in ("level", "population", "phase", "model")}
        fields["spare_first"] = bool(meta.get("spare_first", False))
        layers = tuple(int(layer) for layer in meta["layers"])
        vectors, floor = tensors["vectors"], tensors["floor"]
        found = meta.get("found", {})
        return Cap(
            layers, vectors, floor, tensors.get("ceiling"), tensors.get("prompt_floor"), **fields, found=found
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{stem}.json is no cap that could be used: {_said(error)}") from None


def _said(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def apply_cap(h: Float[Tensor, "*B D"], cap: Cap, row: int) -> Float[Tensor, "*B D"]:
    """The kernel, plainly: h + v * clamp(floor - <h,v>, min=0) for the cap's `row`, in fp32, back in h's dtype.

    All tokens are taken for an answer's. A token above the floor is returned bitwise as it was. It is the reference that engines are compared with.
    """
    vector = cap.vectors[row].to(h.device, torch.float32)
    projection = h.float() @ vector
    correction = (cap.floor[row].to(h.device) - projection).clamp(min=0)
    if cap.ceiling is not None:
        correction = correction + (cap.ceiling[row].to(h.device) - projection).clamp(max=0)
    moved = (h.float() + correction[..., None] * vector).to(h.dtype)
    return torch.where((correction != 0)[..., None], moved, h)
