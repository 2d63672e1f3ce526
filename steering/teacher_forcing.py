"""Texts that are read again, prompt and answer, in padded batches.

for batch in batches(model, rollouts, batch_tokens(model, 2048, 65536)):
    model.base(input_ids=batch.ids, use_cache=False)
    batch.losses(batch.log_probs(model))

Projections of texts that are read again, with interventions on: one value a token, before any step at that layer.

for batch, places in projected(model, rollouts, [cap], axis.layer, axis.at(axis.layer)):
    places[batch.real]                      # (B, T) masked: all tokens
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from personatlas.persona.interventions import Interventions
from personatlas.persona.models.hooks import residual
from personatlas.persona.models.load import Model
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.sampler import batch_end, batch_tokens, pad
from personatlas.steering.hooks.steering import steer


class Texts:
    """A padded batch of B texts: `places` are their numbers among all, answers begin at `starts` (B,) and end at `lengths`."""

    def __init__(self, model: Model, texts: Sequence[Rollout], places: Sequence[int]) -> None:
        self.texts, self.places, self.device = tuple(texts), tuple(places), model.device
        self.starts = torch.tensor([len(text.prompt_ids) for text in texts])
        self.lengths = self.starts + torch.tensor([len(text.answer_ids) for text in texts])

    @cached_property
    def ids(self) -> Int[Tensor, "B T"]:
        """Token ids on the model's device."""
        return pad([text.prompt_ids + text.answer_ids for text in self.texts], self.device)

    @property
    def real(self) -> Bool[Tensor, "B T"]:
        """Which columns hold tokens."""
        return torch.arange(int(self.lengths.max())) < self.lengths[:, None]

    @property
    def answer(self) -> Bool[Tensor, "B T"]:
        """Which columns hold tokens of answers."""
        return self.real & (torch.arange(int(self.lengths.max())) >= self.starts[:, None])

    @cached_property
    def predicted(self) -> tuple[Tensor, Tensor]:
        """Rows and columns (M,) of the answers' tokens, on the model's device."""
        rows, columns = self.answer.nonzero(as_tuple=True)
        return rows.to(self.device), columns.to(self.device)

    def log_probs(self, model: Model) -> Float[Tensor, "M V"]:
        """Log-probabilities, fp32, at the M places before the answers' tokens."""
        first, (rows, columns) = int(self.starts.min()) - 1, self.predicted
        logits = model.hf(
            input_ids=self.ids, use_cache=False, logits_to_keep=self.ids.shape[1] - first
        ).logits  # (B, T - first, V)
        return logits[rows, columns - 1 - first].float().log_softmax(-1)

    def token_losses(self, log_probs: Float[Tensor, "M V"]) -> Float[Tensor, " M"]:
        """Loss of each of the answers' tokens."""
        return -log_probs.gather(1, self.ids[self.predicted][:, None])[:, 0]

    def losses(self, log_probs: Float[Tensor, "M V"]) -> list[float]:
        """Summed loss of each text."""
        return self._by_text(self.token_losses(log_probs))

    def divergences(self, plain: Float[Tensor, "M V"], now: Float[Tensor, "M V"]) -> list[float]:
        """Summed KL(plain || now) of each text."""
        return self._by_text((plain.exp() * (plain - now)).sum(-1))

    def _by_text(self, values: Tensor) -> list[float]:
        total = torch.zeros(len(self.texts), dtype=torch.float64, device=values.device)
        found: list[float] = total.index_add_(0, self.predicted[0], values.double()).tolist()
        return found


def batches(model: Model, texts: Sequence[Rollout], tokens: int) -> Iterator[Texts]:
    """All texts, longest first, in batches of at most so many padded tokens (but at least one text)."""
    sizes = [len(text.prompt_ids) + len(text.answer_ids) for text in texts]
    order = sorted(range(len(texts)), key=sizes.__getitem__, reverse=True)
    lengths, first = [sizes[i] for i in order], 0
    while first < len(order):
        stop = batch_end(lengths, first, tokens)
        yield Texts(model, [texts[i] for i in order[first:stop]], order[first:stop])
        first = stop


CPU_TOKENS, GPU_TOKENS = 2048, 65536  # most padded tokens a batch


def read_batches(model: Model, texts: Sequence[Rollout]) -> Iterator[Texts]:
    """All texts in batches of the size that reading without logits takes."""
    return batches(model, texts, batch_tokens(model, CPU_TOKENS, GPU_TOKENS))


@torch.no_grad()
def projected(
    model: Model, texts: Sequence[Rollout], plan: Interventions, layer: int, vector: Float[Tensor, " D"]
) -> Iterator[tuple[Texts, Float[Tensor, "B T"]]]:
    """Batch after batch with <h, v> at a layer, fp32 on the CPU; padding's values mean nothing."""
    kept: list[Tensor] = []

    def keep(_module: object, _args: object, output: object) -> None:
        h = residual(output)
        kept.append((h.float() @ vector.to(h.device)).cpu())

    for batch in read_batches(model, texts):
        handle = model.blocks[layer].register_forward_hook(
            keep
        )  # before the plan's own hook, and so before its step
        try:
            with steer(model, plan) if plan else nullcontext() as held:
                if held is not None:
                    held.describe(batch.lengths, batch.starts)
                model.base(input_ids=batch.ids, use_cache=False)
        finally:
            handle.remove()
        yield batch, kept.pop()


def mean_projections(
    model: Model, texts: Sequence[Rollout], plan: Interventions, layer: int, vector: Float[Tensor, " D"]
) -> list[float]:
    """Mean over each text's answer tokens, in the texts' order; NaN for an empty answer."""
    found = [float("nan")] * len(texts)
    spoken = [place for place, text in enumerate(texts) if text.answer_ids]
    for batch, places in projected(model, [texts[place] for place in spoken], plan, layer, vector):
        answer = batch.answer
        means = (places * answer).sum(1) / answer.sum(1)
        for place, value in zip(batch.places, means.tolist(), strict=True):
            found[spoken[place]] = value
    return found
