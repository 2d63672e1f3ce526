"""What an intervention costs on text that needs none: the model's own answers as the default, read again with it on.

    costs = benign_costs(model, rollouts, {"capped": [cap]})
    costs["capped"].more        # loss per token, relative to the model as it is: 0.05 is 5% more

Loss is the mean negative log-likelihood of the answers' tokens (nats), KL is KL(as it is || steered) of the next token's
distribution at the same places. Both are teacher-forced, so no sampling noise is in them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from personatlas.analysis.stats import bootstrap_sums, percentile_interval
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Interventions
from personatlas.persona.models.load import Model
from personatlas.persona.rollout import Rollout
from personatlas.steering.hooks.account import SteeringTally
from personatlas.steering.hooks.steering import steer
from personatlas.steering.teacher_forcing import batches

CPU_TOKENS, GPU_TOKENS = 1024, 8192  # padded tokens a batch: logits over the whole vocabulary are large
SAMPLES = 2000  # of a bootstrap


@dataclass(frozen=True)
class Cost:
    """Sums over each text's answer tokens (N,): tokens, loss as it is and steered, KL; and by steered layer (C,) the share of
    tokens that were changed and the mean size of the change (residual units, 0 for a token left alone)."""

    tokens: np.ndarray
    before: np.ndarray
    after: np.ndarray
    kl_sums: np.ndarray
    fired: np.ndarray
    moved: np.ndarray

    @property
    def loss(self) -> float:
        """Loss per token, steered."""
        return float(self.after.sum() / self.tokens.sum())

    @property
    def more(self) -> float:
        """Loss per token more than as it is, relative."""
        return float(self.after.sum() / self.before.sum() - 1)

    @property
    def kl(self) -> float:
        """KL per token, nats."""
        return float(self.kl_sums.sum() / self.tokens.sum())

    @property
    def more_interval(self) -> tuple[float, float]:
        """95% interval of `more`: bootstrap over texts."""
        after, before = bootstrap_sums(self.after, self.before, samples=SAMPLES)
        return percentile_interval(after / before - 1)

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Cost":
        """What `to_json` wrote."""
        return cls(**{field.name: np.array(row[field.name], dtype=float) for field in fields(cls)})


@torch.no_grad()
def benign_costs(
    model: Model,
    texts: Sequence[Rollout],
    arms: Mapping[str, Interventions],
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Cost]:
    """Read all texts as the model is and in every arm (each with an intervention); sums are in the texts' order, and `advance` counts
    readings of texts.

    Raises `UserError` when there are no texts.
    """
    if not texts:
        raise UserError("there are no benign answers to measure a cost on")
    tokens = GPU_TOKENS if model.device.type == "cuda" else CPU_TOKENS
    before: list[float] = []
    sums: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    tallies: dict[str, list[SteeringTally]] = {name: [] for name in arms}
    counts: list[int] = []
    places: list[int] = []
    for batch in batches(model, texts, tokens):
        places += batch.places
        counts += [len(text.answer_ids) for text in batch.texts]
        plain = batch.log_probs(model)
        before += batch.losses(plain)
        for name, plan in arms.items():
            with steer(model, plan) as held:
                held.describe(batch.lengths, batch.starts)
                now = batch.log_probs(model)
                tallies[name].append(held.tally)
            sums[name] += zip(batch.losses(now), batch.divergences(plain, now), strict=True)
            advance(len(batch.texts))
    costs, order = {}, np.argsort(places)  # batches come longest first
    for name, pairs in sums.items():
        whole, (after, kl_sums) = SteeringTally.concatenate(tallies[name]), np.array(pairs)[order].T
        seen = whole.seen.sum(1).clamp(min=1)
        shares = (whole.fired.sum(1) / seen).numpy(), (whole.total.sum(1) / seen).numpy()
        costs[name] = Cost(
            np.array(counts, dtype=float)[order], np.array(before)[order], after, kl_sums, *shares
        )
    return costs
