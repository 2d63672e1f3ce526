"""Traits: ways of answering, each a direction from its negative prompts' answers to its positive ones.

    vector[t, l] = mean(answers under positive prompts)[l] - mean(answers under negative prompts)[l],   + toward the trait

(arXiv 2601.10387, appendix on traits.) A trait is rolled out as two poles (`Trait.poles`), roles in
everything but the fit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from personatlas.persona.artifacts import load_tensors, save_tensors


@dataclass(frozen=True)
class TraitSpace:
    """Trait vectors of a model at every layer, and their principal components at one.

    `vectors` are unit rows, + toward the trait; `norms` their lengths before scaling (projection units);
    `counts` the answers behind each pole. A trait lies at `(vector * norm - mean) @ components.T` at `layer`.
    T traits, K components.
    """

    traits: tuple[str, ...]
    vectors: Float[Tensor, "T L D"]
    norms: Float[Tensor, "T L"]
    counts: Int[Tensor, "T 2"]
    layer: int
    mean: Float[Tensor, " D"]
    components: Float[Tensor, "K D"]
    variance_ratio: Float[Tensor, " K"]
    model: dict[str, Any]

    def __post_init__(self) -> None:
        lengths = self.vectors.double().norm(dim=-1)
        if len(self.traits) != len(self.vectors) or self.norms.shape != self.vectors.shape[:2]:
            raise ValueError(f"{len(self.traits)} traits do not match vectors {tuple(self.vectors.shape)}")
        if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4):
            raise ValueError(
                f"vectors must be finite and of length 1, got {lengths.min():.4g} to {lengths.max():.4g}"
            )

    def save(self, stem: Path) -> None:
        """Write `stem.safetensors` and `stem.json`."""
        names = ("vectors", "norms", "counts", "mean", "components", "variance_ratio")
        tensors = {name: getattr(self, name) for name in names}
        save_tensors(
            stem,
            tensors,
            {"kind": "traits", "traits": list(self.traits), "layer": self.layer, "model": self.model},
        )


def load_traits(stem: Path) -> TraitSpace:
    """Read what `TraitSpace.save` wrote; `UserError` when it is missing, damaged or something else."""
    tensors, meta = load_tensors(stem, "traits")
    return TraitSpace(traits=tuple(meta["traits"]), layer=meta["layer"], model=meta["model"], **tensors)
