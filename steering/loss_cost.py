"""What an intervention costs on text that needs none: the model's own answers as the default, read again with
it on.

    costs = benign_costs(model, rollouts, {"capped": [cap]})
    costs["capped"].more        # loss per token, relative to the baseline: 0.05 is 5% more

Loss is the mean negative log-likelihood of the answers' tokens (nats), KL is KL(baseline || steered) of the
next token's distribution at the same positions. Both are teacher-forced, so no sampling noise is in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from personatlas.analysis.stats import ratio_interval
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Interventions
from personatlas.persona.models.load import Model
from personatlas.persona.progress import Advance, no_advance
from personatlas.persona.records import Fraction, NonNegative, Number, read_field
from personatlas.persona.rollout import Rollout
from personatlas.steering.hooks.account import SteeringTally
from personatlas.steering.hooks.steering import steer
from personatlas.steering.teacher_forcing import CPU_LOGIT_TOKENS, GPU_LOGIT_TOKENS, text_batches


@dataclass(frozen=True)
class Cost:
    """Sums over each text's answer tokens (N,): `tokens`, loss `before` (the baseline's) and `after`, and KL.

    By steered layer (C,): the share of tokens that were changed (`fired`), and the mean length of the change
    (`moved`, residual units, 0 for a token left alone).
    """

    tokens: np.ndarray
    before: np.ndarray
    after: np.ndarray
    kl_sums: np.ndarray
    fired: np.ndarray
    moved: np.ndarray

    def __post_init__(self) -> None:
        texts, layers = (self.tokens, self.before, self.after, self.kl_sums), (self.fired, self.moved)
        if len({len(part) for part in texts}) > 1 or len({len(part) for part in layers}) > 1:
            raise ValueError("its sums are not of the same texts, or not of the same layers")
        if not self.tokens.sum() > 0 or not self.before.sum() > 0:
            raise ValueError("its texts have no tokens, or no loss")

    @property
    def loss(self) -> float:
        """Loss per token, steered."""
        return float(self.after.sum() / self.tokens.sum())

    @property
    def baseline_loss(self) -> float:
        """Loss per token of the baseline."""
        return float(self.before.sum() / self.tokens.sum())

    @property
    def more(self) -> float:
        """Loss per token more than the baseline's, relative to it."""
        return float(self.after.sum() / self.before.sum() - 1)

    @property
    def kl(self) -> float:
        """KL per token, nats."""
        return float(self.kl_sums.sum() / self.tokens.sum())

    @property
    def more_interval(self) -> tuple[float, float]:
        """95% interval of `more` over texts; both bounds are `more` for a single one."""
        ratio = ratio_interval(self.after, self.before)
        return (ratio.low or ratio.value) - 1, (ratio.high or ratio.value) - 1

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Cost":
        """What `to_json` wrote. Raises `FieldError` for anything else."""
        sums = {name: read_field(row, name, tuple[Number, ...]) for name in ("before", "after", "kl_sums")}
        sums |= {name: read_field(row, name, tuple[NonNegative, ...]) for name in ("tokens", "moved")}
        sums["fired"] = read_field(row, "fired", tuple[Fraction, ...])
        return cls(**{name: np.array(values, dtype=float) for name, values in sums.items()})


@torch.no_grad()
def benign_costs(
    model: Model, texts: Sequence[Rollout], arms: Mapping[str, Interventions], advance: Advance = no_advance
) -> dict[str, Cost]:
    """Reads all texts as the baseline and in every arm, each of which has an intervention.

    Sums are in the texts' order; `advance` counts readings of texts. Raises `UserError` when there are no
    texts.
    """
    if not texts:
        raise UserError("there are no benign answers to measure a cost on")
    tokens = GPU_LOGIT_TOKENS if model.device.type == "cuda" else CPU_LOGIT_TOKENS
    before: list[float] = []
    sums: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    tallies: dict[str, list[SteeringTally]] = {name: [] for name in arms}
    counts: list[int] = []
    indices: list[int] = []
    for batch in text_batches(model, texts, tokens):
        indices += batch.indices
        counts += [len(text.answer_ids) for text in batch.texts]
        plain = batch.log_probs(model)
        before += batch.losses(plain)
        for name, interventions in arms.items():
            with steer(model, interventions) as steering:
                steering.describe(batch.lengths, batch.starts)
                steered = batch.log_probs(model)
                tallies[name].append(steering.tally)
            sums[name] += zip(batch.losses(steered), batch.divergences(plain, steered), strict=True)
            advance(len(batch.texts))
    costs, order = {}, np.argsort(indices)  # batches come longest first
    for name, pairs in sums.items():
        tally, (after, kl_sums) = SteeringTally.concatenate(tallies[name]), np.array(pairs)[order].T
        seen = tally.seen.sum(1).clamp(min=1)
        fired, moved = (tally.fired.sum(1) / seen).numpy(), (tally.total.sum(1) / seen).numpy()
        n_tokens = np.array(counts, dtype=float)[order]
        costs[name] = Cost(n_tokens, np.array(before)[order], after, kl_sums, fired, moved)
    return costs
