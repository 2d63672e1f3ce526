"""What was recorded: sums of residual means per role and score at every layer, rollout means at chosen
layers.

A rollout's activation is the mean over its answer's tokens of each block's output. A *cell* is all rollouts
of one role with one score; cells keep count, mean and sum of squares, so that role vectors for any choice of
scores, and their sampling noise, can be had without the rollouts. C cells, N rollouts, L layers, K kept
layers, D d_model.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from personatlas.persona.artifacts import TensorRecord
from personatlas.persona.interventions import require_model_facts
from personatlas.persona.records import Bounds, Layers, ModelFacts, Names, check_distinct
from personatlas.persona.roles.bank import RoleKind
from personatlas.persona.rollout import RolloutKey

Score = Annotated[int, Bounds(0, 3)]
ACTIVATIONS: dict[RoleKind, str] = {  # a run's artefacts
    "role": "activations",
    "trait": "trait_activations",
    "control": "control_activations",
}
KEPT_BYTES = 2 << 30  # rollout means beyond this are kept at fewer layers


@dataclass(frozen=True)
class Activations(TensorRecord):
    """Recorded means of a run. `cells` are (role, score), score None where nobody judged; `keys` name the
    rollouts.

    `square` is the sum over a cell's rollouts of the elementwise squared distance from the cell's mean.
    """

    cells: Annotated[tuple[tuple[str, Score | None], ...], check_distinct]
    count: Int[Tensor, " C"]
    mean: Float[Tensor, "C L D"]
    square: Float[Tensor, "C L D"]
    keys: Names
    scores: tuple[Score | None, ...]
    layers: Layers
    rollout_means: Float[Tensor, "N K D"]
    model: ModelFacts
    content: str

    kind: ClassVar[str] = "activations"

    def __post_init__(self) -> None:
        try:
            roles = [RolloutKey.parse(key).role for key in self.keys]
            found = Counter(zip(roles, self.scores, strict=True))
        except ValueError as error:
            raise ValueError(f"its rollouts: {error}") from None
        counts = self.count.tolist()
        if found != dict(zip(self.cells, counts, strict=False)) or len(counts) != len(self.cells):
            raise ValueError("its cells are not those of its rollouts")
        if self.rollout_means.shape[:2] != (len(self.keys), len(self.layers)):
            raise ValueError(
                f"{len(self.keys)} rollouts at {len(self.layers)} layers do not match their means"
            )
        require_model_facts(self.model, (*self.layers, self.n_layers - 1), self.mean.shape[2])
        if not (self.square >= 0).all():
            raise ValueError("a sum of squares is below 0")

    @property
    def roles(self) -> tuple[str, ...]:
        """Role names in order of first appearance."""
        return tuple(dict.fromkeys(role for role, _ in self.cells))

    @property
    def n_layers(self) -> int:
        """Number of layers of the sums."""
        return self.mean.shape[1]

    def role_mean(self, role: str, scores: Iterable[int | None] | None = None) -> tuple[Tensor, int]:
        """Mean (L, D) in fp64 over a role's rollouts with those scores (None: all), and how many they are
        (maybe 0).
        """
        wanted = None if scores is None else set(scores)
        rows = [
            i
            for i, (name, score) in enumerate(self.cells)
            if name == role and (wanted is None or score in wanted)
        ]
        total = self.mean.new_zeros(self.mean.shape[1:], dtype=torch.float64)
        n = 0
        for row in rows:
            total += self.count[row].double() * self.mean[row].double()
            n += int(self.count[row])
        return total / max(n, 1), n


def load_recorded(run: Path) -> dict[RoleKind, Activations]:
    """What is recorded in a run folder: of roles, which must be there, of traits and of controls."""
    there = {
        kind: run / name
        for kind, name in ACTIVATIONS.items()
        if kind == "role" or (run / f"{name}.json").exists()
    }
    return {kind: load_activations(stem) for kind, stem in there.items()}


def load_activations(stem: Path) -> Activations:
    """Read what `Activations.save` wrote; `UserError` when it is missing or damaged."""
    return Activations.load(stem)


def cell_sums(
    cells: Sequence[tuple[str, int | None]], means: Float[Tensor, "N L D"]
) -> tuple[
    tuple[tuple[str, int | None], ...], Int[Tensor, " C"], Float[Tensor, "C L D"], Float[Tensor, "C L D"]
]:
    """Distinct cells in order of arrival, with count, mean and square of the rollouts in each, added up in
    fp64.

    `cells` names the cell of each rollout. The square is about the cell's own mean, so no large numbers
    cancel.
    """
    members: dict[tuple[str, int | None], list[int]] = {}
    for row, cell in enumerate(cells):
        members.setdefault(cell, []).append(row)
    count = torch.tensor([len(rows) for rows in members.values()])
    mean, square = (
        means.new_empty(len(members), *means.shape[1:]),
        means.new_empty(len(members), *means.shape[1:]),
    )
    for place, rows in enumerate(members.values()):
        own = means[rows].double()
        centre = own.mean(0)
        mean[place], square[place] = centre, ((own - centre) ** 2).sum(0)
    return tuple(members), count, mean, square


def join_activations(parts: Sequence[Activations]) -> Activations:
    """Activations of disjoint sets of roles put together in order; every part must come from one model and
    one choice of layers.
    """
    first = parts[0]
    cells = tuple(cell for part in parts for cell in part.cells)
    if len(set(cells)) != len(cells):
        raise ValueError("parts share a cell: they must be split by role")
    return Activations(
        cells=cells,
        count=torch.cat([part.count for part in parts]),
        mean=torch.cat([part.mean for part in parts]),
        square=torch.cat([part.square for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
        scores=tuple(score for part in parts for score in part.scores),
        layers=first.layers,
        rollout_means=torch.cat([part.rollout_means for part in parts]),
        model=first.model,
        content=first.content,
    )


def kept_layers(n_layers: int, d_model: int, n_rollouts: int, budget: int = KEPT_BYTES) -> tuple[int, ...]:
    """Layers whose rollout means are kept: all of them if they fit into `budget` bytes, else an even spread
    that does.
    """
    fit = budget // max(n_rollouts * d_model * 4, 1)
    if fit >= n_layers:
        return tuple(range(n_layers))
    fit = max(fit, 1)
    return tuple(sorted({round((i + 0.5) * n_layers / fit - 0.5) for i in range(fit)}))
