"""The caps of a server: which ones requests may name, and the plans of its `Steering` that apply them.

    slots = CapSlots(axis, model, {"assistant": cap})
    cap = slots.resolve("assistant")     # or "p50@18-23", "assistant-0.2", CapByLevel(...), CapByName(...)
    slots.acquire(cap)                   # the plan of a new row; None while all spare plans are in use
    slots.release(cap)                   # when the row ends

Named caps have a plan each. Caps that requests describe share `SPARE_PLANS`, whose numbers are written into
the steering tables in place, so neither hooks nor captured graphs change. Names are looked up among the
loaded caps: nothing in a request is ever a path.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from personatlas.persona.axis import Axis
from personatlas.persona.caps import format_layers
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, Intervention, interventions_digest
from personatlas.persona.models.load import Model
from personatlas.persona.records import JsonObject
from personatlas.steering.hooks.steering import SlotSteering, SteeringHooks
from personatlas.steering.serve.schema import CapByLevel, CapByName

SPARE_PLANS = 4
NONE = "none"  # the name of no cap, which a model's alias can carry


@dataclass(frozen=True)
class ResolvedCap:
    """A cap with the name that answers report and a digest of all that it does."""

    name: str
    cap: Cap
    digest: str

    @property
    def is_uniform(self) -> bool:
        """Whether a token is capped alike in a prompt and in an answer."""
        return self.cap.phase == "both" and self.cap.prompt_floor is None

    def floor_at(self, layer: int) -> float | None:
        """The floor for answers at a layer, None where the cap does not act there."""
        return self.cap.floor_of(self.cap.layers.index(layer), "answer") if layer in self.cap.layers else None


class CapSlots:
    """Caps by name, and a `Steering` with a plan for each of them and `SPARE_PLANS` more."""

    def __init__(self, axis: Axis, model: Model, caps: Mapping[str, Cap]) -> None:
        self.axis = axis
        self.named = {name: _resolved(name, cap) for name, cap in caps.items()}
        # a plan that changes nothing, at all layers: the tables then have room for any cap along the axis
        no_floor = torch.full((len(axis.layers),), -torch.inf)
        self._idle: list[Intervention] = [
            Cap(axis.layers, axis.vectors, no_floor, spare_first=True, model=axis.model)
        ]
        self._spare: list[ResolvedCap | None] = [None] * SPARE_PLANS
        self._rows: Counter[str] = Counter()  # rows by digest of their cap
        self.steering = SlotSteering(SteeringHooks(model, self._plans()))

    @property
    def rows_in_use(self) -> int:
        """Rows that follow a plan."""
        return self._rows.total()

    def resolve(self, cap: str | CapByLevel | CapByName | None) -> ResolvedCap | None:
        """The cap that a request describes, None for none. Raises `UserError` for a cap that there is not."""
        if cap is None or cap == NONE:
            return None
        if isinstance(cap, CapByName):
            if cap.name not in self.named:
                known = ", ".join(self.named) or "none is loaded"
                raise UserError(f"cap {cap.name[:80]!r} is not one of {known}")
            own = self.named[cap.name]
            if cap.shift == 0:
                return own
            return _resolved(f"{cap.name}{cap.shift:+g}", self.axis.shift_cap(own.cap, cap.shift))
        if isinstance(cap, CapByLevel):
            return self._parsed(f"{cap.population}:{cap.level}@{cap.layers}")
        return self._parsed(cap)

    def acquire(self, cap: ResolvedCap | None) -> int | None:
        """The plan for one more row with this cap (-1 without a cap); None while no spare plan is free."""
        if cap is None:
            return -1
        digests = [own.digest for own in self.named.values()]
        digests += [own.digest if own is not None else "" for own in self._spare]
        if cap.digest in digests:
            plan = digests.index(cap.digest)
        else:
            free = [i for i, own in enumerate(self._spare) if own is None or not self._rows[own.digest]]
            if not free:
                return None
            previous, self._spare[free[0]] = self._spare[free[0]], cap
            try:
                self.steering.hooks.set(self._plans())
            except (ValueError, UserError):
                self._spare[free[0]] = previous
                raise
            plan = len(self.named) + free[0]
        self._rows[cap.digest] += 1
        return plan

    def release(self, cap: ResolvedCap | None) -> None:
        """Notes that a row with this cap has ended."""
        if cap is not None:
            self._rows[cap.digest] -= 1

    def describe(self) -> dict[str, JsonObject]:
        """The named caps as JSON; floors are those at the axis's layer."""
        described: dict[str, JsonObject] = {}
        for name, own in self.named.items():
            cap, layer = own.cap, self.axis.layer
            prompt_floor = cap.floor_of(cap.layers.index(layer), "prompt") if layer in cap.layers else None
            described[name] = {
                "layers": format_layers(cap.layers),
                "floor": own.floor_at(layer),
                "prompt_floor": prompt_floor,
                "level": cap.level,
                "population": cap.population,
                "phase": cap.phase,
            }
        return described

    def _plans(self) -> list[Sequence[Intervention]]:
        spare = [[own.cap] if own is not None else self._idle for own in self._spare]
        return [*([own.cap] for own in self.named.values()), *spare, self._idle]

    def _parsed(self, spec: str) -> ResolvedCap:
        if spec in self.named:
            return self.named[spec]
        cap = self.axis.cap(spec, {name: own.cap for name, own in self.named.items()})
        self.axis.require_sign(cap)
        return _resolved(spec, cap)


def cap_labels(axis: Axis, extra: Sequence[str]) -> dict[str, str]:
    """The spec of each cap to load, by name: those saved beside the axis, and others by file or level."""
    specs = dict.fromkeys([*axis.saved_caps, *extra])
    return {
        spec if "@" in spec else Path(spec).name.removesuffix(".json").removesuffix(".safetensors"): spec
        for spec in specs
    }


def _resolved(name: str, cap: Cap) -> ResolvedCap:
    return ResolvedCap(name, cap, interventions_digest([cap]))
