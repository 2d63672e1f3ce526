"""The arithmetic of persona space, in fp64 numpy: role means, the axis, principal components.

    axis = mean(positive pole) - mean over the other roles of their means

so every role weighs the same. The axis points toward the positive pole, the default role unless another is
named. PCA is of the other roles' means, centred, not scaled (arXiv 2601.10387, section 3). N rollouts, R
other roles, D = d_model.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import eigsh
from sklearn.decomposition import PCA

from personatlas.analysis.stats import Array


@dataclass(frozen=True)
class Groups:
    """Which rollout belongs to which role: `index` (N,) is 0 for the positive pole and 1..R for the other
    roles.

    `question` (N,) numbers the question that each answers, from 0; without it every rollout counts as its
    own.
    """

    index: NDArray[np.int64]
    names: tuple[str, ...]
    question: NDArray[np.int64] | None = None

    @property
    def n_roles(self) -> int:
        """Roles other than the positive pole."""
        return len(self.names) - 1

    @property
    def n_questions(self) -> int:
        """Questions; 0 where they are not known."""
        return 0 if self.question is None else int(self.question.max()) + 1

    def only(self, selected: NDArray[np.bool_]) -> "Groups":
        """Returns the groups of the selected rollouts (N,) alone."""
        question = None if self.question is None else self.question[selected]
        return Groups(self.index[selected], self.names, question)

    def means(self, x: Array, weight: Array | None = None) -> tuple[Array, Array]:
        """Returns each group's weighted mean (R+1, D) of x (N, D) and total weight (R+1,); 0/0 gives NaN
        rows."""
        sums, totals = self.sums(x, weight)
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums / totals[:, None], totals

    def sums(self, x: Array, weight: Array | None = None) -> tuple[Array, Array]:
        """Returns each group's weighted sum (R+1, D) of x (N, D) and total weight (R+1,).

        A sparse product: 20,000 rollouts of 340 roles take 10 ms, and the bootstrap computes thousands of
        them.
        """
        weight = np.ones(len(x)) if weight is None else weight
        totals = np.bincount(self.index, weight, minlength=len(self.names)).astype(np.float64)
        members = csr_array((weight, (self.index, np.arange(len(x)))), shape=(len(self.names), len(x)))
        return members @ x, totals


def direction(means: Array, role_weight: Array | None = None) -> Array:
    """Returns the axis (D,), not scaled: row 0 of `means` (R+1, D) minus the (weighted) mean of the other
    rows."""
    weight = np.ones(len(means) - 1) if role_weight is None else role_weight
    return means[0] - (weight @ means[1:]) / weight.sum()


def first_component(means: Array, role_weight: Array | None = None) -> tuple[Array, float]:
    """Returns PC1 (D,) of rows 1.. of `means`, unit, turned toward row 0, and its share of the variance.

    From the R x R Gram matrix: R is far below D, and the bootstrap computes thousands of them.
    """
    weight = np.ones(len(means) - 1) if role_weight is None else role_weight
    centre = (weight @ means[1:]) / weight.sum()
    rows = (means[1:] - centre) * np.sqrt(weight)[:, None]
    gram = rows @ rows.T
    if len(gram) < 32:
        leading = np.linalg.eigh(gram)[1][:, -1]
    else:  # Lanczos: all 340 eigenvectors took ten times as long, and one is needed
        start = gram[:, int(np.argmax(np.diag(gram)))]
        leading = eigsh(gram, k=1, v0=start, which="LA", tol=1e-10)[1][:, 0]
    component = rows.T @ leading
    length = float(np.linalg.norm(component))
    component /= length
    if component @ (means[0] - centre) < 0:
        component = -component
    return component, float(np.sum((rows @ component) ** 2) / np.trace(gram))


def components(rows: Array) -> tuple[Array, Array, Array]:
    """Returns the PCA of rows (R, D): centre (D,), unit components (K, D) of arbitrary sign, variance ratio
    (K,)."""
    pca = PCA(svd_solver="full").fit(rows)
    rank = int((pca.explained_variance_ratio_ > 1e-12).sum())
    return pca.mean_, pca.components_[:rank], pca.explained_variance_ratio_[:rank]


def turned_toward(vectors: Array, target: Array) -> Array:
    """Returns the vectors (K, D) with the sign that makes none point away from `target` (D,)."""
    return vectors * np.where(vectors @ target < 0, -1.0, 1.0)[:, None]


def cosine(a: Array, b: Array) -> float:
    """Returns the cosine of the angle between two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def components_for_shares(ratio: Array) -> dict[str, int]:
    """Returns how many components hold 50, 70 and 90% of the variance, by "0.5", "0.7" and "0.9"."""
    return {str(share): components_for(ratio, share) for share in (0.5, 0.7, 0.9)}


def components_for(ratio: Array, share: float) -> int:
    """Returns how many components hold that share of the variance."""
    return int(np.searchsorted(np.cumsum(ratio), share - 1e-12) + 1)
