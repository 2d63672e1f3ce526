"""The arithmetic of persona space, in fp64 numpy: role vectors, the axis, principal components.

    axis = mean(positive) - mean over the other roles of their means,   every role weighing the same

toward the positive pole, the default unless another role is named. PCA is taken of the other roles' means, centred,
unscaled (arXiv 2601.10387, section 3). N rollouts, R other roles, D d_model.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import eigsh
from sklearn.decomposition import PCA

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Groups:
    """Which rollout belongs to which role: `index` (N,) is 0 for the positive pole and 1..R for the other roles.

    `question` (N,) numbers the question that each answers, from 0; without it every rollout counts as its own.
    """

    index: NDArray[np.int64]
    names: tuple[str, ...]
    question: NDArray[np.int64] | None = None

    @property
    def n_roles(self) -> int:
        """Roles other than the positive pole."""
        return len(self.names) - 1

    def only(self, taken: NDArray[np.bool_]) -> "Groups":
        """The same groups with those rollouts alone."""
        return Groups(self.index[taken], self.names, None if self.question is None else self.question[taken])

    def means(self, x: Array, weight: Array | None = None) -> tuple[Array, Array]:
        """Weighted mean of each group (R+1, D) of x (N, D), and the groups' total weights (R+1,); 0/0 gives NaN rows."""
        sums, total = self.sums(x, weight)
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums / total[:, None], total

    def sums(self, x: Array, weight: Array | None = None) -> tuple[Array, Array]:
        """Weighted sum of each group (R+1, D), and the groups' total weights (R+1,).

        A sparse product: 20,000 rollouts of 340 roles take 10 ms, and the bootstrap asks for it thousands of times.
        """
        weight = np.ones(len(x)) if weight is None else weight
        total = np.bincount(self.index, weight, minlength=len(self.names)).astype(np.float64)
        members = csr_array((weight, (self.index, np.arange(len(x)))), shape=(len(self.names), len(x)))
        return members @ x, total


def direction(means: Array, role_weight: Array | None = None) -> Array:
    """The contrast (D,): row 0 of `means` minus the (weighted) mean of rows 1.., not scaled to length 1."""
    weight = np.ones(len(means) - 1) if role_weight is None else role_weight
    return means[0] - (weight @ means[1:]) / weight.sum()


def first_component(means: Array, role_weight: Array | None = None) -> tuple[Array, float]:
    """PC1 (D,) of rows 1.. of `means`, unit, pointing to row 0, and its share of variance.

    Worked out in the R x R Gram matrix: R is far below D, and the bootstrap asks for it thousands of times.
    """
    weight = np.ones(len(means) - 1) if role_weight is None else role_weight
    centre = (weight @ means[1:]) / weight.sum()
    rows = (means[1:] - centre) * np.sqrt(weight)[:, None]
    gram = rows @ rows.T
    component = rows.T @ _leading_eigenvector(gram)
    length = float(np.linalg.norm(component))
    component /= length
    if component @ (means[0] - centre) < 0:
        component = -component
    return component, float(np.sum((rows @ component) ** 2) / np.trace(gram))


def _leading_eigenvector(matrix: Array) -> Array:
    """Of a positive matrix (R, R). Lanczos: all 340 eigenvectors took ten times as long, and one is asked for."""
    if len(matrix) < 32:
        return np.linalg.eigh(matrix)[1][:, -1]
    start = matrix[:, int(np.argmax(np.diag(matrix)))]
    return eigsh(matrix, k=1, v0=start, which="LA", tol=1e-10)[1][:, 0]


def components(rows: Array) -> tuple[Array, Array, Array]:
    """PCA by scikit-learn of rows (R, D): centre (D,), unit components (K, D) of no particular sign, variance ratio (K,)."""
    pca = PCA(svd_solver="full").fit(rows)
    found = int((pca.explained_variance_ratio_ > 1e-12).sum())
    return pca.mean_, pca.components_[:found], pca.explained_variance_ratio_[:found]


def pointing(vectors: Array, toward: Array) -> Array:
    """The vectors (K, D), turned so that none points away from `toward` (D,)."""
    return vectors * np.where(vectors @ toward < 0, -1.0, 1.0)[:, None]


def cosine(a: Array, b: Array) -> float:
    """Cosine of the angle between two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def components_for(ratio: Array, share: float) -> int:
    """How many components hold that share of the variance."""
    return int(np.searchsorted(np.cumsum(ratio), share - 1e-12) + 1)
