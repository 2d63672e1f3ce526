"""`Axis` and `PersonaSpace`, their files, and the interventions that an axis makes along itself.

    axis[l] = mean(default)[l] - mean over roles of their mean[l],   scaled to length 1   (2601.10387, section
    3)

so a positive projection <h, v> lies toward the first pole ("assistant") and a negative one toward the second
("role-play"). A direction never travels without its layers, its sign, its poles and the model that it came
from.

    axis = load_axis(folder / "axis")
    cap, add = axis.cap("p50@18-23"), axis.add(8.0, [21])
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from personatlas.persona.artifacts import TensorRecord
from personatlas.persona.caps import CapSpec, parse_cap_spec
from personatlas.persona.errors import UserError, did_you_mean, not_one_of
from personatlas.persona.interventions import (
    Ablate,
    Add,
    Cap,
    MeanAblate,
    load_cap,
    require_model_facts,
    require_shares,
    require_unit_rows,
)
from personatlas.persona.records import (
    Count,
    Fraction,
    JsonObject,
    Layers,
    ModelFacts,
    Names,
    check_ascending,
)

POLES = ("assistant", "role-play")
POPULATIONS = ("default", "roles")
CAPS = "caps"  # the folder of saved caps beside an axis
MAX_SHIFT = 10  # interquartile ranges
ENDINGS = (".json", ".safetensors")


@dataclass(frozen=True)
class Axis(TensorRecord):
    """A direction at every layer of a model.

    `vectors` are unit rows, + toward `poles[0]`; `norms` are the lengths before scaling (projection units);
    `default_quantiles` and `role_quantiles` are projections of the rollout means at `levels`, NaN where a
    layer kept no rollout means; `layer` is the layer to use; `model` is `Model.describe()`; `stem` is the
    path it was loaded from.
    """

    vectors: Float[Tensor, "L D"]
    norms: Float[Tensor, " L"]
    layers: Layers
    layer: Count
    model: ModelFacts
    levels: Annotated[tuple[Fraction, ...], check_ascending] = ()
    default_quantiles: Float[Tensor, "L Q"] = field(default_factory=lambda: torch.empty(0, 0))
    role_quantiles: Float[Tensor, "L Q"] = field(default_factory=lambda: torch.empty(0, 0))
    poles: tuple[str, str] = POLES
    fit: dict[str, Any] = field(default_factory=dict)
    stem: Path | None = field(default=None, compare=False)

    kind: ClassVar[str] = "axis"
    nonfinite: ClassVar[tuple[str, ...]] = ("default_quantiles", "role_quantiles")
    optional: ClassVar[tuple[str, ...]] = ("stem", *nonfinite)

    def __post_init__(self) -> None:
        n_layers, _ = self.vectors.shape
        if len(self.layers) != n_layers or self.norms.shape != (n_layers,):
            raise ValueError(
                f"{n_layers} vectors, {len(self.layers)} layers and {len(self.norms)} norms do not match"
            )
        if self.layer not in self.layers:
            raise ValueError(f"the layer to use, {self.layer}, is not one of the axis ({self.layers})")
        require_unit_rows(self.vectors)
        require_model_facts(self.model, self.layers, self.vectors.shape[1])
        if not (self.norms > 0).all():
            raise ValueError("a norm is not above 0")
        for name in self.nonfinite:
            table = getattr(self, name)
            if table.shape != (n_layers if self.levels else 0, len(self.levels)):
                raise ValueError(
                    f"{name} {tuple(table.shape)} are not for {n_layers} layers and {len(self.levels)} levels"
                )
            known = table[~table.isnan().all(dim=1)] if table.numel() else table
            if not (torch.isfinite(known).all() and (known.diff(dim=1) >= 0).all()):
                raise ValueError(f"{name} are not finite, or fall with the level")

    def at(self, layer: int) -> Float[Tensor, " D"]:
        """The unit vector at a layer; `UserError` when the axis does not have it."""
        if layer not in self.layers:
            raise UserError(f"layer {layer} is not in this axis ({self.layers[0]}..{self.layers[-1]})")
        return self.vectors[self.layers.index(layer)]

    def require_model(self, model: JsonObject) -> None:
        """Raises `UserError` for a model that this axis was not fitted on: other weights, another depth or
        width.
        """
        require_origin("axis", self.model, model)

    def require_sign(self, cap: Cap) -> None:
        """Raises `UserError` for a cap whose vectors point away from the axis at a layer."""
        for layer, vector in zip(cap.layers, cap.vectors, strict=True):
            if layer in self.layers and cap.vectors.shape[1] == self.vectors.shape[1]:
                cosine = float(vector @ self.at(layer))
                if cosine < -0.5:
                    raise UserError(
                        f"this cap's vector at layer {layer} points away from {self.poles[0]} "
                        f"(cosine {cosine:.2f} with the axis): its sign is turned"
                    )

    @property
    def folder(self) -> Path:
        """The folder that the axis was loaded from, with its persona space and caps/. `UserError` where there
        is none.
        """
        if self.stem is None:
            raise UserError("this axis was not loaded from a folder: save it and load it again")
        return self.stem.parent

    @property
    def source(self) -> str:
        """The last two parts of the path that the axis was loaded from; "" where there is none."""
        return "" if self.stem is None else "/".join(self.stem.parts[-2:])

    @property
    def saved_caps(self) -> list[str]:
        """Names of the caps saved beside this axis, in caps/ of the folder that it was loaded from."""
        paths = (self.folder / CAPS).glob("*.json") if self.stem is not None else ()
        return sorted(path.stem for path in paths if path.with_suffix(".safetensors").is_file())

    def cap(self, spec: str, saved: Mapping[str, Cap] | None = None) -> Cap:
        """The cap that a spec names (see `personatlas.persona.caps`).

        Names are those of caps saved beside the axis or paths of cap files; with `saved`, the names in there
        and no path. Raises `UserError` for a name that is unknown and for a level or layer that the axis does
        not have.
        """
        names = self.saved_caps if saved is None else list(saved)
        parsed = parse_cap_spec(
            spec, lambda text: text in names or (saved is None and _cap_file(text) is not None)
        )
        if parsed.name is None:
            cap = self.quantile_cap(parsed.layers, parsed.level, parsed.population)
        elif parsed.name in names:
            cap = saved[parsed.name] if saved is not None else load_cap(self.folder / CAPS / parsed.name)
        elif saved is None and (file := _cap_file(parsed.name)) is not None:
            cap = load_cap(file)
        else:
            raise UserError(self._unknown_cap(parsed, names, files=saved is None))
        return self.shift_cap(cap, parsed.shift) if parsed.shift else cap

    def quantile_cap(
        self,
        layers: Iterable[int],
        level: float,
        population: str = "default",
        phase: str = "both",
        *,
        spare_first: bool = True,
    ) -> Cap:
        """A cap whose floor at each layer is a quantile of a population's projections, as the axis keeps
        them.

        `level` is in 0..1 and one of `levels`; `population` is "default" or "roles": whose mean projections
        of answers. Raises `UserError` for a layer or level that the axis does not have.
        """
        layers = tuple(layers)
        if population not in POPULATIONS:
            raise UserError(f"population {not_one_of(population, POPULATIONS)}")
        if not 0 <= level <= 1:
            raise UserError(f"level {level} is outside 0..1: it is a quantile")
        columns = [column for column, other in enumerate(self.levels) if abs(other - level) < 1e-9]
        if not columns:
            levels = ", ".join(map(str, self.levels)) or "none is"
            raise UserError(f"level {level} is not kept in this axis ({levels})")
        vectors = self._vectors(layers)
        table = self.default_quantiles if population == "default" else self.role_quantiles
        floor = table[[self.layers.index(layer) for layer in layers], columns[0]]
        if not torch.isfinite(floor).all():
            missing = [layer for layer, value in zip(layers, floor.tolist(), strict=True) if value != value]
            raise UserError(
                f"the axis keeps no quantiles at layers {missing}: no rollout means were kept there"
            )
        return Cap(
            layers,
            vectors,
            floor,
            level=level,
            population=population,
            phase=phase,
            spare_first=spare_first,
            model=self.model,
        )

    def shift_cap(self, cap: Cap, amount: float) -> Cap:
        """The cap with all floors moved by `amount` interquartile ranges of the default's answers at their
        layers.

        Raises `UserError` where the axis does not keep those quantiles, or a floor would lie above its
        ceiling.
        """
        if not abs(amount) <= MAX_SHIFT:
            raise UserError(
                f"a shift of {amount:g} interquartile ranges is outside -{MAX_SHIFT}..{MAX_SHIFT}"
            )
        if not {0.25, 0.75} <= set(self.levels) or not set(cap.layers) <= set(self.layers):
            raise UserError(
                "the axis does not keep the quartiles of the default's answers at this cap's layers"
            )
        rows = [self.layers.index(layer) for layer in cap.layers]
        low, high = (self.default_quantiles[rows, self.levels.index(level)] for level in (0.25, 0.75))
        step = amount * (high - low)
        if not torch.isfinite(step).all():
            raise UserError(
                "the axis keeps no quartiles of the default's answers at some of this cap's layers"
            )
        prompt = None if cap.prompt_floor is None else cap.prompt_floor + step
        # its figures are another cap's, what it was fitted on stays
        fitted = {name: value for name, value in cap.calibration.items() if name.startswith("fitted_")}
        try:
            return replace(cap, floor=cap.floor + step, prompt_floor=prompt, level=None, calibration=fitted)
        except ValueError as error:  # a floor above its ceiling
            raise UserError(f"this cap cannot be moved by {amount:g}: {error}") from None

    def add(
        self, amount: float, layers: Iterable[int], phase: str = "both", *, spare_first: bool = True
    ) -> Add:
        """Addition of `amount` (residual units) along the axis at each layer."""
        layers = tuple(layers)
        amounts = torch.full((len(layers),), float(amount))
        return Add(
            layers, self._vectors(layers), amounts, phase=phase, spare_first=spare_first, model=self.model
        )

    def ablate(self, layers: Iterable[int], phase: str = "both", *, spare_first: bool = True) -> Ablate:
        """Ablation of the axis's direction at each layer."""
        layers = tuple(layers)
        return Ablate(layers, self._vectors(layers), phase=phase, spare_first=spare_first, model=self.model)

    def mean_ablate(
        self, means: Sequence[float], layers: Iterable[int], phase: str = "both", *, spare_first: bool = True
    ) -> MeanAblate:
        """Sets the projection on the axis to a mean for each layer."""
        layers = tuple(layers)
        mean = torch.tensor(means, dtype=torch.float32)
        return MeanAblate(
            layers, self._vectors(layers), mean, phase=phase, spare_first=spare_first, model=self.model
        )

    def _vectors(self, layers: tuple[int, ...]) -> Float[Tensor, "C D"]:
        if not layers:
            raise UserError("an intervention needs at least one layer")
        return torch.stack([self.at(layer) for layer in layers])

    def _unknown_cap(self, spec: CapSpec, names: Sequence[str], *, files: bool) -> str:
        """Why a name is no cap, and what would be one for this axis."""
        name = str(spec.name)[:80]
        level, _, layers = name.partition("@")
        if layers and not level.split(":")[-1].startswith("p"):
            return f"cap {name!r}: a level is written as p50 (the median), from p0 to p100, such as p50@18-23"
        known = f"one of {', '.join(names)}" if names else "a name (there is no cap by name)"
        if files and not names:
            known = "a name (none is saved beside this axis; `personatlas calibrate RUN` makes some)"
        example = f"p50@{self.layers[len(self.layers) // 2]}"
        return (
            f"cap {name!r} is not {known}{', a cap file' if files else ''}, or LEVEL@LAYERS such as {example} or "
            f"roles:p75@20,22, each with +0.2 or so behind it for higher floors{did_you_mean(name, names)}"
        )


def _cap_file(text: str) -> Path | None:
    """The path without its ending of a cap file, None where there is none."""
    path = Path(text)
    path = path.with_suffix("") if path.suffix in ENDINGS else path
    files = [path.with_name(path.name + ending) for ending in ENDINGS] if path.name else []
    return path if any(file.is_file() for file in files) else None


def require_origin(what: str, origin: JsonObject, model: JsonObject, *, force: bool = False) -> None:
    """Refuse an artefact whose `origin` is not `model` (both `Model.describe()`); an unknown origin has to
    fit in size.

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


def load_axis(stem: Path) -> Axis:
    """Read an axis written by `Axis.save`; `UserError` when it is missing, damaged or something else."""
    return Axis.load(stem)


@dataclass(frozen=True)
class PersonaSpace(TensorRecord):
    """Principal components of the role vectors at one layer.

    A role with vector x lies at `(x - mean) @ components.T`. Components are unit rows; PC1 points to the
    default.
    """

    layer: Count
    mean: Float[Tensor, " D"]
    components: Float[Tensor, "K D"]
    variance_ratio: Float[Tensor, " K"]
    coordinates: Float[Tensor, "R K"]
    roles: Names
    model: ModelFacts

    kind: ClassVar[str] = "space"

    def __post_init__(self) -> None:
        if self.coordinates.shape != (len(self.roles), len(self.components)):
            raise ValueError(
                f"coordinates {tuple(self.coordinates.shape)} do not match {len(self.roles)} roles"
            )
        require_unit_rows(self.components)
        require_model_facts(self.model, (self.layer,), self.components.shape[1])
        require_shares(self.variance_ratio)


def load_space(stem: Path) -> PersonaSpace:
    """Read a space written by `PersonaSpace.save`."""
    return PersonaSpace.load(stem)
