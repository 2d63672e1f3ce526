"""The arms of a server: which ones requests may name, and the plans of its `Steering` that apply them.

    slots = ArmSlots(axis, model, [Arm("assistant", (cap,))])
    arm = slots.resolve("assistant")     # or "p50@18-23", "add:8@21", CapByLevel(...), CapByName(...)
    slots.acquire(arm)                   # the plan of a new row; None while all spare plans are in use
    slots.release(arm)                   # when the row ends

Named arms have a plan each. Those that requests describe share `SPARE_PLANS`, whose numbers are written into
the steering tables in place, so neither hooks nor captured graphs change. Names are looked up among the
loaded arms: nothing in a request is ever a path.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.interventions import BASELINE, Cap, Intervention, Interventions
from personatlas.persona.models.load import Model
from personatlas.persona.records import JsonObject
from personatlas.steering.arm_kinds import as_arm
from personatlas.steering.arms import Arm, parse_arm, require_no_controls, summarise_arms
from personatlas.steering.hooks.steering import SlotSteering, SteeringHooks
from personatlas.steering.serve.schema import CapByLevel, CapByName

SPARE_PLANS = 4
NONE = "none"  # the name of no arm, which a model's alias can carry


class ArmSlots:
    """Arms by name, and a `Steering` with a plan for each of them and `SPARE_PLANS` more; without an axis
    there are none.
    """

    def __init__(self, axis: Axis | None, model: Model, arms: Sequence[Arm]) -> None:
        self.axis = axis
        self.named = {arm.name: arm for arm in arms}
        self._caps = {
            name: own.caps[0] for name, own in self.named.items() if len(own.interventions) == 1 and own.caps
        }
        # a plan that changes nothing, at all layers: the tables then have room for any step along the axis
        layers, vectors = ((0,), torch.eye(1, model.d_model)) if axis is None else (axis.layers, axis.vectors)
        no_floor = torch.full((len(layers),), -torch.inf)
        self._idle: list[Intervention] = [
            Cap(layers, vectors, no_floor, spare_first=True, model=model.describe())
        ]
        self._spare: list[Arm | None] = [None] * SPARE_PLANS
        self._rows: Counter[str] = Counter()  # rows by digest of their arm
        self.steering = SlotSteering(SteeringHooks(model, self._plans()))

    @property
    def rows_in_use(self) -> int:
        """Rows that follow a plan."""
        return self._rows.total()

    def resolve(self, arm: str | CapByLevel | CapByName | None) -> Arm | None:
        """The arm that a request describes, as `--arm` or by a cap's spec alone; None for the baseline.

        Raises `UserError` for one that there is not.
        """
        if arm is None or arm in (NONE, BASELINE):
            return None
        if self.axis is None:
            raise UserError("no axis is loaded, so nothing can act: `personatlas axis MODEL` makes one")
        if isinstance(arm, CapByName):
            if arm.name not in self.named:
                raise UserError(f"cap {not_one_of(arm.name, self.named)}")
            own = self.named[arm.name]
            if arm.shift == 0:
                return own
            if arm.name not in self._caps:
                raise UserError(f"{arm.name} is no cap: leave its shift out, or name one of the caps")
            cap = self.axis.shift_cap(self._caps[arm.name], arm.shift)
            return Arm(f"{arm.name}{arm.shift:+g}", (cap,))
        text = f"{arm.population}:{arm.level}@{arm.layers}" if isinstance(arm, CapByLevel) else arm
        if text in self.named:
            return self.named[text]
        named = as_arm(text)
        spec = named.removeprefix("cap:")
        if spec == named:
            parsed = parse_arm(text, self.axis)
            require_no_controls([parsed])
            return parsed
        if spec in self.named:
            return self.named[spec]
        cap = self.axis.cap(spec, self._caps)
        self.axis.require_sign(cap)
        return Arm(spec, (cap,))

    def acquire(self, arm: Arm | None) -> int | None:
        """The plan for one more row in this arm (-1 at baseline); None while no spare plan is free."""
        if arm is None:
            return -1
        digests = [own.digest for own in self.named.values()]
        digests += [own.digest if own is not None else "" for own in self._spare]
        if arm.digest in digests:
            plan = digests.index(arm.digest)
        else:
            free = [i for i, own in enumerate(self._spare) if own is None or not self._rows[own.digest]]
            if not free:
                return None
            previous, self._spare[free[0]] = self._spare[free[0]], arm
            try:
                self.steering.hooks.set(self._plans())
            except (ValueError, UserError):
                self._spare[free[0]] = previous
                raise
            plan = len(self.named) + free[0]
        self._rows[arm.digest] += 1
        return plan

    def release(self, arm: Arm | None) -> None:
        """Notes that a row in this arm has ended."""
        if arm is not None:
            self._rows[arm.digest] -= 1

    def describe(self) -> dict[str, JsonObject]:
        """The named arms as JSON; floors are those at the axis's layer."""
        if self.axis is None:
            return {}
        layer = self.axis.layer
        return {
            name: {
                **summary.to_json(),
                "floor": self.named[name].floor_at(layer),
                "prompt_floor": self.named[name].floor_at(layer, "prompt"),
            }
            for name, summary in summarise_arms(
                {name: arm.interventions[:1] for name, arm in self.named.items()}
            ).items()
        }

    def _plans(self) -> list[Interventions]:
        spare = [own.interventions if own is not None else self._idle for own in self._spare]
        return [*(own.interventions for own in self.named.values()), *spare, self._idle]
