"""The caps that a server can put on, and the plans of one `Steering` that hold them.

    plans = Plans(axis, stem, {"assistant": cap})
    wanted = plans.wanted("assistant")             # or "p50@18-23", {"level": "p50", "layers": "18-23"}, {"name": ..., "shift": -0.2}
    plans.place(wanted)                            # a plan number that a row can follow, None while all spare ones are taken

Named caps have a plan each. Caps that requests describe share a few spare plans, whose numbers are put into the tables in
place, so neither hooks nor captured graphs change. Names are looked up among the caps that were loaded: nothing that a request
says is ever a path.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from personatlas.persona.axis import Axis
from personatlas.persona.caps import format_layers
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, Intervention, interventions_digest
from personatlas.persona.models.load import Model
from personatlas.steering.hooks.steering import Steering

SPARES = 4
NONE = "none"  # no cap, by a name that a model's alias can carry


@dataclass(frozen=True)
class ResolvedCap:
    """A cap to put on: what it is called, its numbers, and a digest of all that it does."""

    name: str
    cap: Cap
    digest: str

    @property
    def is_even(self) -> bool:
        """Whether a token is capped alike in a prompt and in an answer."""
        return self.cap.phase == "both" and self.cap.prompt_floor is None

    def floor_at(self, layer: int) -> float | None:
        """The floor for answers at a layer, None where it has none."""
        return self.cap.floor_of(self.cap.layers.index(layer), "answer") if layer in self.cap.layers else None


class CapSlots:
    """Caps by name, and a `Steering` with a plan for each and some to spare."""

    def __init__(self, axis: Axis, model: Model, caps: Mapping[str, Cap]) -> None:
        self.axis, self.n_layers = axis, model.n_layers
        self.caps = {name: _wanted(name, cap) for name, cap in caps.items()}
        # plans that do nothing, along the axis at all of its layers: the tables then have room for any cap along it
        idle = Cap(
            axis.layers,
            axis.vectors,
            torch.full((len(axis.layers),), -torch.inf),
            spare_first=True,
            model=axis.model,
        )
        self._idle: list[Intervention] = [idle]
        self._spares: list[ResolvedCap | None] = [None] * SPARES
        self._used: Counter[str] = Counter()
        self.steering = Steering(model, self._plans())

    def wanted(self, asked: Any) -> ResolvedCap | None:
        """The cap that a request asks for; None for none. Raises `UserError` for anything that is not one."""
        if asked is None or asked == NONE:
            return None
        if isinstance(asked, str):
            return self._by_text(asked)
        if not isinstance(asked, dict):
            raise UserError('persona.cap is null, a name, {"level", "layers"} or {"name", "shift"}')
        if "name" in asked:
            return self._shifted(asked.get("name"), asked.get("shift", 0.0))
        level, layers = asked.get("level"), asked.get("layers")
        if not isinstance(level, str) or not isinstance(layers, str):
            raise UserError('persona.cap needs "level" such as "p50" and "layers" such as "18-23", both text')
        population = asked.get("population", "default")
        return self._by_text(f"{population}:{level}@{layers}")

    def place(self, wanted: ResolvedCap | None) -> int | None:
        """The plan to follow (-1: none), and one row more that follows it; None when no spare plan is free."""
        if wanted is None:
            return -1
        number = self._number(wanted)
        if number is None:
            free = [
                place for place, one in enumerate(self._spares) if one is None or not self._used[one.digest]
            ]
            if not free:
                return None
            before, self._spares[free[0]] = self._spares[free[0]], wanted
            try:
                self.steering.set(*self._plans())
            except (ValueError, UserError):
                self._spares[free[0]] = before
                raise
            number = len(self.caps) + free[0]
        self._used[wanted.digest] += 1
        return number

    def release(self, wanted: ResolvedCap | None) -> None:
        """One row less follows it."""
        if wanted is not None:
            self._used[wanted.digest] -= 1

    def describe(self) -> dict[str, dict[str, Any]]:
        """The named caps, for people and programs."""
        return {name: _described(one, self.axis.layer) for name, one in self.caps.items()}

    def _plans(self) -> list[Sequence[Intervention]]:
        spare = [[one.cap] if one is not None else self._idle for one in self._spares]
        return [*([one.cap] for one in self.caps.values()), *spare, self._idle]

    def _number(self, wanted: ResolvedCap) -> int | None:
        digests = [one.digest for one in self.caps.values()] + [
            one.digest if one else "" for one in self._spares
        ]
        return digests.index(wanted.digest) if wanted.digest in digests else None

    def _by_text(self, text: str) -> ResolvedCap:
        if text in self.caps:
            return self.caps[text]
        cap = self.axis.cap(text, {name: wanted.cap for name, wanted in self.caps.items()})
        self.axis.require_sign(cap)
        return _wanted(text, cap)

    def _shifted(self, name: Any, amount: Any) -> ResolvedCap:
        if name not in self.caps:
            raise UserError(
                f"cap {str(name)[:80]!r} is not loaded (there are: {', '.join(self.caps) or 'none'})"
            )
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not abs(amount) <= 10:
            raise UserError("persona.cap.shift is a number from -10 to 10 (interquartile ranges)")
        if amount == 0:
            return self.caps[name]
        return _wanted(f"{name}{amount:+g}", self.axis.shift_cap(self.caps[name].cap, float(amount)))


def cap_labels(axis: Axis, extra: Sequence[str]) -> dict[str, str]:
    """Labels of all caps that are saved beside an axis, and of others, and the spec of each (at start: maybe a path)."""
    texts = dict.fromkeys([*axis.saved_caps, *extra])
    return {
        text if "@" in text else Path(text).name.removesuffix(".json").removesuffix(".safetensors"): text
        for text in texts
    }


def _wanted(name: str, cap: Cap) -> ResolvedCap:
    return ResolvedCap(name, cap, interventions_digest([cap]))


def _described(one: ResolvedCap, layer: int) -> dict[str, Any]:
    cap = one.cap
    at = cap.layers.index(layer) if layer in cap.layers else None
    return {
        "layers": format_layers(cap.layers),
        "floor": None if at is None else cap.floor_of(at, "answer"),
        "prompt_floor": None if at is None else cap.floor_of(at, "prompt"),
        "level": cap.level,
        "population": cap.population,
        "phase": cap.phase,
    }
