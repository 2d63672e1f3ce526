"""Plans as tensors: what every steered layer does to every row, so that one kernel serves all rows of a batch.

A *plan* is a sequence of interventions; each row of a batch follows one plan or none (-1). A layer's table holds K unit
vectors, and for every plan and side (prompt tokens, answer tokens, and the same for the first token of a sequence, which a
plan may spare) the K triples (floor, ceiling, add) of

    h' = h + v * (clamp(p, floor, ceiling) - p + add),     p = <h, v>,   one vector after the other

A step that a plan does not take is (-infinity, infinity, 0), which changes no bit. Nothing but numbers is inside: an
engine may keep the tables on its devices and change them between forwards without compiling anything again. The tables of
all layers lie in three tensors, since a compiled forward checks every tensor that it uses, every time.

    tables = tables_of([[axis.quantile_cap(range(18, 24), 0.5)], []])     # plan 0 caps, plan 1 does nothing
    tables.at(0)                                                     # the table of layer 18, the first
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personatlas.persona.interventions import Intervention, Step, steps_by_layer

IDLE = (-float("inf"), float("inf"), 0.0)
SIDES = ("prompt", "answer")
OPENING = 2  # what is added to the side of a sequence's first token


@dataclass(frozen=True)
class Table:
    """What one layer does. K vectors, P plans; the last of the P + 1 rows is the plan of rows that are left alone.

    `bounds[p, s]` are the triples for prompt tokens (s = 0), answer tokens (s = 1) and a sequence's first token (2 and 3);
    `active` says whether any step of the plan is on there, which is what makes a token count as seen.
    """

    vectors: Float[Tensor, "K D"]
    bounds: Float[Tensor, "P1 4 K 3"]
    active: Bool[Tensor, "P1 4"]

    def to(self, device: torch.device) -> "Table":
        """The same on a device."""
        return Table(self.vectors.to(device), self.bounds.to(device), self.active.to(device))

    def take(self, other: "Table") -> None:
        """Become the other one in place."""
        for name in ("vectors", "bounds", "active"):
            getattr(self, name).copy_(getattr(other, name))


@dataclass(frozen=True)
class Tables:
    """The tables of C layers, all with as many vectors as the fullest needs."""

    layers: tuple[int, ...]
    vectors: Float[Tensor, "C K D"]
    bounds: Float[Tensor, "C P1 4 K 3"]
    active: Bool[Tensor, "C P1 4"]

    def at(self, place: int) -> Table:
        """The table of one layer, on the same memory."""
        return Table(self.vectors[place], self.bounds[place], self.active[place])

    def to(self, device: torch.device) -> "Tables":
        """The same on a device."""
        return Tables(self.layers, self.vectors.to(device), self.bounds.to(device), self.active.to(device))

    def require_form(self, other: "Tables") -> None:
        """ValueError unless the other one could take this one's place."""
        if other.layers != self.layers or other.bounds.shape != self.bounds.shape:
            raise ValueError(
                f"other plans, layers or numbers of steps ({_form(other)}) cannot replace those that are on "
                f"({_form(self)}): leave this steering and enter a new one"
            )


def _form(tables: Tables) -> str:
    _, plans, _, steps, _ = tables.bounds.shape
    return f"{plans - 1} plans of up to {steps} steps at layers {list(tables.layers)}"


def tables_of(plans: Sequence[Sequence[Intervention]]) -> Tables:
    """The tables of all layers that any plan touches. Plans that use the same vector at a layer share its row."""
    per_plan = [steps_by_layer(plan) for plan in plans]
    layers = sorted({layer for steps in per_plan for layer in steps})
    own = [_table([steps.get(layer, []) for steps in per_plan]) for layer in layers]
    most = max(len(table.vectors) for table in own)
    vectors = torch.zeros(len(layers), most, own[0].vectors.shape[1])
    bounds = torch.tensor(IDLE).repeat(len(layers), len(plans) + 1, 2 * OPENING, most, 1)
    for place, table in enumerate(own):
        vectors[place, : len(table.vectors)] = table.vectors
        bounds[place, :, :, : len(table.vectors)] = table.bounds
    return Tables(tuple(layers), vectors, bounds, torch.stack([table.active for table in own]))


def _table(per_plan: list[list[Step]]) -> Table:
    vectors: list[Tensor] = []
    places: list[list[int]] = []
    for steps in per_plan:
        used: list[int] = []
        free = dict.fromkeys(SIDES, 0)  # the first place that keeps a side's steps in order
        for step in steps:
            sides = SIDES if step.phase == "both" else (step.phase,)
            used.append(_place(vectors, step.vector, max(free[side] for side in sides)))
            free |= dict.fromkeys(sides, used[-1] + 1)
        places.append(used)
    bounds = torch.tensor(IDLE).repeat(len(per_plan) + 1, 2 * OPENING, len(vectors), 1)
    active = torch.zeros(len(per_plan) + 1, 2 * OPENING, dtype=torch.bool)
    for plan, (steps, used) in enumerate(zip(per_plan, places, strict=True)):
        for step, place in zip(steps, used, strict=True):
            own = [side for side, name in enumerate(SIDES) if step.phase in (name, "both")]
            own += [] if step.spare_first else [side + OPENING for side in own]
            bounds[plan, own, place] = torch.tensor((step.floor, step.ceiling, step.add))
            active[plan, own] = True
    return Table(torch.stack(vectors), bounds, active)


def _place(vectors: list[Tensor], vector: Tensor, first: int) -> int:
    """The row of a vector, not before `first`. A vector that is not there is added."""
    vector = vector.detach().float().cpu()
    for place in range(first, len(vectors)):
        if torch.equal(vectors[place], vector):
            return place
    vectors.append(vector)
    return len(vectors) - 1
