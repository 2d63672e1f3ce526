"""Traits: ways of answering, each a direction from its negative prompts' answers to its positive ones.

    vector[t, l] = mean(answers under positive prompts)[l] - mean(answers under negative prompts)[l],   +
    toward the trait

(arXiv 2601.10387, appendix on traits.) A trait is rolled out as two poles (`Trait.poles`), roles in
everything but the fit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from personatlas.persona.artifacts import TensorRecord
from personatlas.persona.interventions import require_model_facts, require_shares, require_unit_rows
from personatlas.persona.records import Count, ModelFacts, Names


@dataclass(frozen=True)
class TraitSpace(TensorRecord):
    """Trait vectors of a model at every layer, and their principal components at one.

    `vectors` are unit rows, + toward the trait; `norms` their lengths before scaling (projection units);
    `counts` the answers behind each pole. A trait lies at `(vector * norm - mean) @ components.T` at `layer`.
    T traits, K components.
    """

    traits: Names
    vectors: Float[Tensor, "T L D"]
    norms: Float[Tensor, "T L"]
    counts: Int[Tensor, "T 2"]
    layer: Count
    mean: Float[Tensor, " D"]
    components: Float[Tensor, "K D"]
    variance_ratio: Float[Tensor, " K"]
    model: ModelFacts

    kind: ClassVar[str] = "traits"

    def __post_init__(self) -> None:
        n_traits, n_layers, _ = self.vectors.shape
        if len(self.traits) != n_traits or self.norms.shape != (n_traits, n_layers):
            raise ValueError(f"{len(self.traits)} traits do not match vectors {tuple(self.vectors.shape)}")
        require_unit_rows(self.vectors.flatten(0, 1))
        require_unit_rows(self.components)
        require_model_facts(self.model, (self.layer, n_layers - 1), self.components.shape[1])
        require_shares(self.variance_ratio)
        if self.layer >= n_layers or not (self.norms > 0).all() or not (self.counts > 0).all():
            raise ValueError("its layer is beyond the vectors, or a norm or count is not above 0")


def load_traits(stem: Path) -> TraitSpace:
    """Read what `TraitSpace.save` wrote; `UserError` when it is missing, damaged or something else."""
    return TraitSpace.load(stem)
