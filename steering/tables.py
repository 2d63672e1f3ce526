"""Plans as tensors: what every steered layer does to every row, so that one kernel serves all rows of a batch.

A *plan* is a sequence of interventions; each row of a batch follows one plan or none (-1). A layer's table holds K unit
vectors, and for every plan, for prompt tokens and for answer tokens, the K triples (floor, ceiling, add) of

    h' = h + v * (clamp(p, floor, ceiling) - p + add),     p = <h, v>,   one vector after the other

A step that a plan does not take is (-infinity, infinity, 0), which changes no bit. Nothing but numbers is inside: an
engine may keep the tables on its devices and change them between forwards without compiling anything again.

    tables = tables_of([[cap_of(axis, range(18, 24), 0.5)], []])     # plan 0 caps, plan 1 does nothing
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personaxis.steering.interventions import Intervention, Step, steps_of

IDLE = (-float("inf"), float("inf"), 0.0)
SIDES = ("prompt", "answer")


@dataclass(frozen=True)
class Table:
    """What one layer does. K vectors, P plans; the last of the P + 1 rows is the plan of rows that are left alone.

    `bounds[p, s]` are the triples for prompt tokens (s = 0) and answer tokens (s = 1); `active` says whether any step of
    the plan is on there, which is what makes a token count as seen.
    """

    vectors: Float[Tensor, "K D"]
    bounds: Float[Tensor, "P1 2 K 3"]
    active: Bool[Tensor, "P1 2"]

    def to(self, device: torch.device) -> "Table":
        """The same on a device."""
        return Table(self.vectors.to(device), self.bounds.to(device), self.active.to(device))

    def take(self, other: "Table") -> None:
        """Become the other one in place. Raises ValueError when it has another shape."""
        if other.bounds.shape != self.bounds.shape or other.vectors.shape != self.vectors.shape:
            raise ValueError("other numbers of plans or of steps at a layer: leave this steering and enter a new one")
        for name in ("vectors", "bounds", "active"):
            getattr(self, name).copy_(getattr(other, name))


def tables_of(plans: Sequence[Sequence[Intervention]]) -> dict[int, Table]:
    """The table of every layer that any plan touches. Plans that use the same vector at a layer share its row."""
    per_plan = [steps_of(plan) for plan in plans]
    return {
        layer: _table([steps.get(layer, []) for steps in per_plan])
        for layer in sorted({layer for steps in per_plan for layer in steps})
    }


def _table(per_plan: list[list[Step]]) -> Table:
    vectors: list[Tensor] = []
    places: list[list[int]] = []
    for steps in per_plan:
        used: list[int] = []
        for step in steps:
            used.append(_place(vectors, step.vector, used[-1] + 1 if used else 0))
        places.append(used)
    bounds = torch.tensor(IDLE).repeat(len(per_plan) + 1, len(SIDES), len(vectors), 1)
    active = torch.zeros(len(per_plan) + 1, len(SIDES), dtype=torch.bool)
    for plan, (steps, used) in enumerate(zip(per_plan, places, strict=True)):
        for step, place in zip(steps, used, strict=True):
            for side, name in enumerate(SIDES):
                if step.phase in (name, "both"):
                    bounds[plan, side, place] = torch.tensor((step.floor, step.ceiling, step.add))
                    active[plan, side] = True
    return Table(torch.stack(vectors), bounds, active)


def _place(vectors: list[Tensor], vector: Tensor, first: int) -> int:
    """The row of a vector, not before `first`: a plan's steps keep their order. A vector that is not there is added."""
    vector = vector.detach().float().cpu()
    for place in range(first, len(vectors)):
        if torch.equal(vectors[place], vector):
            return place
    vectors.append(vector)
    return len(vectors) - 1
