"""Comparing logits of two readings. A padded vocabulary masks tokens with minus infinity, and the difference
of two such logits is NaN: equal infinities are compared as they are, and only numbers are subtracted.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def count_changed(before: Float[Tensor, "*S"], after: Float[Tensor, "*S"]) -> int:
    """How many values are not what they were; NaN never is."""
    return int((before != after).sum())


def relative_error(found: Float[Tensor, "*S"], expected: Float[Tensor, "*S"]) -> float:
    """|found - expected| / |expected| over the finite values of `expected`, fp32.

    Infinite where another value is infinite, or one infinite in another way, in `found`; NaN where it is NaN.
    """
    found, expected = found.float(), expected.float()
    if not torch.isfinite(expected).all():
        finite = torch.isfinite(expected)
        if not torch.equal(found[~finite], expected[~finite]):
            return float("inf")
        found, expected = found[finite], expected[finite]
    return float((found - expected).norm() / expected.norm())


def bounded_log_probs(logits: Float[Tensor, "*S V"]) -> Float[Tensor, "*S V"]:
    """Log-probabilities in fp32; a token that the model never says has -9999, as JSON knows no infinity."""
    return logits.float().log_softmax(-1).clamp_min(-9999.0)
