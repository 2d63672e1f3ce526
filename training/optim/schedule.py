"""Learning rates and their schedule, each a function with its reason.

    peak_rates(batch, width), adam_beta2_for(batch), momentum_at(step, steps)

What comes from elsewhere says from where. The heights are measured: at depth 12, batches of 65,536 tokens and
a horizon of 20 million on 19th-century books, held-out bits per byte were 1.524 at a third of the matrices'
rate and half of the others', 1.469 at two thirds of the matrices' and 1.462 at four thirds; twice the others'
rates changed 0.002.
"""

from dataclasses import dataclass

REFERENCE_BATCH = 2**16  # the batch, in tokens, and the width at which the rates below are measured
REFERENCE_WIDTH = 768


@dataclass(frozen=True)
class Rates:
    """Rates and constants of one optimizer step."""

    matrix: float
    embedding: float
    head: float
    norm: float
    decay: float
    "weight decay of matrices, times their rate"
    momentum: float
    adam_beta2: float


@dataclass(frozen=True)
class PeakRates:
    """The highest rates of a run: Muon's for matrices, AdamW's for all else."""

    matrix: float
    embedding: float
    head: float
    norm: float


def peak_rates(batch: int, width: int) -> PeakRates:
    """Rates for a batch in tokens. √(batch / 65,536) keeps the noise of Adam's steps the same (Malladi et al.
    2022).

    Muon's steps have one spectral norm at any width (Bernstein 2025), and input weights keep their rate over
    widths; the head's falls with the width, since a step moves a logit by about rate · width (muP, Yang et
    al. 2022).
    """
    scale = (batch / REFERENCE_BATCH) ** 0.5
    head = 0.0028 * scale * REFERENCE_WIDTH / width
    return PeakRates(matrix=0.021 * scale, embedding=0.14 * scale, head=head, norm=0.0028 * scale)


def weight_decay_for(rate: float, steps: int) -> float:
    """Muon's λ, at most 0.2: weights average over 1/(rate · λ) steps, 15% of the run (Wang & Aitchison 2024).

    The bound is for short runs: decay holds a matrix's spectral norm below 1/λ, which at 5 does not bind and
    at 1 would. Embedding, head and norm weights are not decayed.
    """
    return min(0.2, 1 / (0.15 * rate * steps))


def adam_beta2_for(batch: int) -> float:
    """AdamW's β₂: 0.95 at batches of 524,288, and at others the one with that half-life in tokens.

    Small batches train as well as large ones once the memory spans as many tokens (Marek et al. 2025).
    """
    return 0.95 ** (batch / 2**19)


def momentum_at(step: int, steps: int) -> float:
    """Muon's, from 0.85 to 0.95 over the first 300 steps or third of the run (Jordan et al. 2024)."""
    return 0.85 + 0.1 * min(1.0, step / max(1, min(300, steps // 3)))


def warmup_for(steps: int) -> int:
    """2% of the steps, 10 at least, but never more than a quarter."""
    return max(1, min(max(10, steps // 50), steps // 4))


def decay_for(steps: int) -> int:
    """The last 60% fall straight to zero: longer is better (Hägele et al. 2024; Bergsma et al. 2025)."""
    return max(1, round(0.6 * steps))
