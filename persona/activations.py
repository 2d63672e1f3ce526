"""What was recorded: sums of residual means per role and score at every layer, rollout means at chosen layers.

A rollout's activation is the mean over its answer's tokens of each block's output. A *cell* is all rollouts of one role
with one score; cells keep count, mean and sum of squares, so that role vectors for any choice of scores, and their
sampling noise, can be had without the rollouts. C cells, N rollouts, L layers, K kept layers, D d_model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from personaxis.persona.store import load_tensors, save_tensors

KEPT_BYTES = 512 << 20  # rollout means beyond this are kept at fewer layers


@dataclass(frozen=True)
class Activations:
    """Recorded means of a run. `cells` are (role, score), score None where nobody judged; `keys` name the rollouts.

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
        """Mean (L, D) in fp64 over a role's rollouts with those scores (None: all), and how many they are (maybe 0)."""
        wanted = None if scores is None else set(scores)
        rows = [i for i, (name, score) in enumerate(self.cells) if name == role and (wanted is None or score in wanted)]
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
    """Read what `Activations.save` wrote; `KnownError` when it is missing or damaged."""
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


class Cells:
    """Running sums in fp64, cell by cell; what they give does not depend on how rollouts were batched."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int | None], tuple[int, Tensor, Tensor]] = {}

    def add(self, role: str, score: int | None, mean: Float[Tensor, "L D"]) -> None:
        """Add one rollout's mean."""
        value = mean.double()
        n, total, square = self._sums.get((role, score), (0, torch.zeros_like(value), torch.zeros_like(value)))
        # Welford's update: the square is about the running mean, so no large numbers cancel
        n += 1
        delta = value - total
        total = total + delta / n
        self._sums[role, score] = (n, total, square + delta * (value - total))

    def tensors(self) -> tuple[list[tuple[str, int | None]], Tensor, Tensor, Tensor]:
        """Cells in order of arrival, with count (C,), mean and square (C, L, D) in fp32."""
        cells = list(self._sums)
        count = torch.tensor([self._sums[cell][0] for cell in cells])
        mean = torch.stack([self._sums[cell][1] for cell in cells]).float()
        square = torch.stack([self._sums[cell][2] for cell in cells]).float()
        return cells, count, mean, square


def join(parts: Sequence[Activations]) -> Activations:
    """Activations of disjoint sets of roles put together in order; every part must come from one model and one choice of layers."""
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
    """Layers whose rollout means are kept: all of them if they fit into `budget` bytes, else an even spread that does."""
    fit = budget // max(n_rollouts * d_model * 4, 1)
    if fit >= n_layers:
        return tuple(range(n_layers))
    fit = max(fit, 1)
    return tuple(sorted({round((i + 0.5) * n_layers / fit - 0.5) for i in range(fit)}))
