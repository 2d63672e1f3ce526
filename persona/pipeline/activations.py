"""What was recorded: sums of residual means per role and score at every layer, rollout means at chosen
layers.

A rollout's activation is the mean over its answer's tokens of each block's output. A *cell* is all rollouts
of one role with one score; cells keep count, mean and sum of squares, so that role vectors for any choice of
scores, and their sampling noise, can be had without the rollouts. C cells, N rollouts, L layers, K kept
layers, D d_model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from personatlas.persona.artifacts import load_tensors, save_tensors

KEPT_BYTES = 2 << 30  # rollout means beyond this are kept at fewer layers


@dataclass(frozen=True)
class Activations:
    """Recorded means of a run. `cells` are (role, score), score None where nobody judged; `keys` name the
    rollouts.

    `square` is the sum over a cell's rollouts of the elementwise squared distance from the cell's mean.
    """

    cells: tuple[tuple[str, int | None], ...]
    count: Int[Tensor, " C"]
    mean: Float[Tensor, "C L D"]
    square: Float[Tensor, "C L D"]
    keys: tuple[str, ...]
    scores: tuple[int | None, ...]
    layers: tuple[int, ...]
    rollout_means: Float[Tensor, "N K D"]
    model: dict[str, Any]
    content: str

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

    def save(self, stem: Path) -> None:
        """Write `stem.safetensors` and `stem.json`."""
        tensors = {name: getattr(self, name) for name in ("count", "mean", "square", "rollout_means")}
        meta = {
            "cells": [list(cell) for cell in self.cells],
            "keys": list(self.keys),
            "scores": list(self.scores),
            "layers": list(self.layers),
            "model": self.model,
            "content": self.content,
        }
        save_tensors(stem, tensors, {"kind": "activations", **meta})


def load_activations(stem: Path) -> Activations:
    """Read what `Activations.save` wrote; `UserError` when it is missing or damaged."""
    tensors, meta = load_tensors(stem, "activations")
    return Activations(
        cells=tuple((role, score) for role, score in meta["cells"]),
        keys=tuple(meta["keys"]),
        scores=tuple(meta["scores"]),
        layers=tuple(meta["layers"]),
        model=meta["model"],
        content=meta["content"],
        **tensors,
    )


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
