"""Plans as tensors: what every steered layer does to every row, so that one kernel serves all rows of a
batch.

A *plan* is a sequence of interventions; each row of a batch follows one plan or none (-1). A layer's table
holds K unit vectors, and for every plan and side (prompt tokens, answer tokens, and the same for the first
token of a sequence, which a plan may spare) the K triples (floor, ceiling, add) of

    h' = h + v * (clamp(p, floor, ceiling) - p + add),     p = <h, v>,   one vector after the other

A step that a plan does not take is (-infinity, infinity, 0), which changes no bit. Nothing but numbers is
inside: an engine may keep the tables on its devices and change them between forwards without compiling
anything again. The tables of all layers lie in three tensors, since a compiled forward checks every tensor
that it uses, every time.

    tables = build_tables([[axis.cap("p50@18-23")], []])     # plan 0 caps, plan 1 does nothing
    tables.at(0)                                             # the table of layer 18, the first
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personatlas.persona.interventions import Interventions, Step, steps_by_layer

IDLE = (-float("inf"), float("inf"), 0.0)
SIDES = ("prompt", "answer")
OPENING = 2  # what is added to the side of a sequence's first token


@dataclass(frozen=True)
class Table:
    """What one layer does. K vectors, P plans; the last of the P + 1 rows is the plan of rows that are left
    alone.

    `bounds[p, s]` are the triples for prompt tokens (s = 0), answer tokens (s = 1) and a sequence's first
    token (2 and 3); `active` says whether any step of the plan acts there, which is what makes a token count
    as seen.
    """

    vectors: Float[Tensor, "K D"]
    bounds: Float[Tensor, "P1 4 K 3"]
    active: Bool[Tensor, "P1 4"]

    def to(self, device: torch.device) -> "Table":
        """The same on a device."""
        return Table(self.vectors.to(device), self.bounds.to(device), self.active.to(device))

    def copy_(self, other: "Table") -> None:
        """Takes the other one's numbers in place."""
        self.vectors.copy_(other.vectors)
        self.bounds.copy_(other.bounds)
        self.active.copy_(other.active)


@dataclass(frozen=True)
class Tables:
    """The tables of C layers, all with as many vectors as the fullest needs."""

    layers: tuple[int, ...]
    vectors: Float[Tensor, "C K D"]
    bounds: Float[Tensor, "C P1 4 K 3"]
    active: Bool[Tensor, "C P1 4"]

    def at(self, index: int) -> Table:
        """The table of one layer, on the same memory."""
        return Table(self.vectors[index], self.bounds[index], self.active[index])

    def to(self, device: torch.device) -> "Tables":
        """The same on a device."""
        return Tables(self.layers, self.vectors.to(device), self.bounds.to(device), self.active.to(device))

    def require_form(self, other: "Tables") -> None:
        """Raises `ValueError` unless the other one could replace this one."""
        if other.layers != self.layers or other.bounds.shape != self.bounds.shape:
            forms = [
                f"{tables.bounds.shape[1] - 1} plans of up to {tables.bounds.shape[3]} steps at layers "
                f"{list(tables.layers)}"
                for tables in (other, self)
            ]
            raise ValueError(
                f"other plans, layers or numbers of steps ({forms[0]}) cannot replace those that are on "
                f"({forms[1]}): leave this steering and enter a new one"
            )


def build_tables(plans: Sequence[Interventions]) -> Tables:
    """The tables of all layers that any plan touches. Plans that use the same vector at a layer share its
    row.
    """
    steps = [steps_by_layer(plan) for plan in plans]
    layers = sorted({layer for by_layer in steps for layer in by_layer})
    tables = [_build_table([by_layer.get(layer, []) for by_layer in steps]) for layer in layers]
    n_vectors = max(len(table.vectors) for table in tables)
    vectors = torch.zeros(len(layers), n_vectors, tables[0].vectors.shape[1])
    bounds = torch.tensor(IDLE).repeat(len(layers), len(plans) + 1, 2 * OPENING, n_vectors, 1)
    for index, table in enumerate(tables):
        vectors[index, : len(table.vectors)] = table.vectors
        bounds[index, :, :, : len(table.vectors)] = table.bounds
    return Tables(tuple(layers), vectors, bounds, torch.stack([table.active for table in tables]))


def _build_table(plans: list[list[Step]]) -> Table:
    vectors: list[Tensor] = []
    rows: list[list[int]] = []  # of each plan's steps among the vectors
    for steps in plans:
        used: list[int] = []
        free = dict.fromkeys(SIDES, 0)  # the first row that keeps a side's steps in order
        for step in steps:
            sides = SIDES if step.phase == "both" else (step.phase,)
            vector, first = step.vector.detach().float().cpu(), max(free[side] for side in sides)
            same = [row for row in range(first, len(vectors)) if torch.equal(vectors[row], vector)]
            if not same:
                vectors.append(vector)
            used.append(same[0] if same else len(vectors) - 1)
            free |= dict.fromkeys(sides, used[-1] + 1)
        rows.append(used)
    bounds = torch.tensor(IDLE).repeat(len(plans) + 1, 2 * OPENING, len(vectors), 1)
    active = torch.zeros(len(plans) + 1, 2 * OPENING, dtype=torch.bool)
    for plan, (steps, used) in enumerate(zip(plans, rows, strict=True)):
        for step, row in zip(steps, used, strict=True):
            acting = [side for side, name in enumerate(SIDES) if step.phase in (name, "both")]
            acting += [] if step.spare_first else [side + OPENING for side in acting]
            bounds[plan, acting, row] = torch.tensor((step.floor, step.ceiling, step.add))
            active[plan, acting] = True
    return Table(torch.stack(vectors), bounds, active)
