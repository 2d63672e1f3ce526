"""Texts that are read again, prompt and answer, in padded batches.

    for batch in text_batches(model, rollouts, batch_tokens(model, 2048, 65536)):
        batch.losses(batch.log_probs(model))

Projections of such texts with interventions on, one value a token, before any step at that layer:

    for batch, projections in project_batches(model, rollouts, [cap], axis.layer, axis.at(axis.layer)):
        projections[batch.real]                      # (B, T) masked: all tokens
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from personatlas.persona.interventions import Interventions
from personatlas.persona.models.hooks import capture
from personatlas.persona.models.load import Model
from personatlas.persona.pipeline.record import require_known_ids
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.sampler import batch_end, batch_tokens, pad
from personatlas.steering.hooks.steering import steer

CPU_TOKENS, GPU_TOKENS = 2048, 65536  # most padded tokens of a batch that is read without logits
CPU_LOGIT_TOKENS, GPU_LOGIT_TOKENS = 1024, 8192  # with logits, which over the whole vocabulary are large


class TextBatch:
    """A padded batch of B texts: `indices` are their numbers among all, answers are at `starts` to `lengths`
    (B,).
    """

    def __init__(self, model: Model, texts: Sequence[Rollout], indices: Sequence[int]) -> None:
        self.texts, self.indices, self.device = tuple(texts), tuple(indices), model.device
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
        """Log-probabilities, fp32, at the M positions before the answers' tokens."""
        first, (rows, columns) = int(self.starts.min()) - 1, self.predicted
        keep = self.ids.shape[1] - first
        logits = model.hf(
            input_ids=self.ids, use_cache=False, logits_to_keep=keep
        ).logits  # (B, T - first, V)
        return logits[rows, columns - 1 - first].float().log_softmax(-1)

    def token_losses(self, log_probs: Float[Tensor, "M V"]) -> Float[Tensor, " M"]:
        """Loss of each of the answers' tokens."""
        return -log_probs.gather(1, self.ids[self.predicted][:, None])[:, 0]

    def losses(self, log_probs: Float[Tensor, "M V"]) -> list[float]:
        """Summed loss of each text."""
        return self._sum_by_text(self.token_losses(log_probs))

    def divergences(self, plain: Float[Tensor, "M V"], steered: Float[Tensor, "M V"]) -> list[float]:
        """Summed KL(plain || steered) of each text; a token of probability 0 adds nothing."""
        ratio = (plain - steered).masked_fill(plain == -torch.inf, 0.0)
        return self._sum_by_text((plain.exp() * ratio).sum(-1))

    def _sum_by_text(self, values: Tensor) -> list[float]:
        total = torch.zeros(len(self.texts), dtype=torch.float64, device=values.device)
        sums: list[float] = total.index_add_(0, self.predicted[0], values.double()).tolist()
        return sums


def text_batches(model: Model, texts: Sequence[Rollout], tokens: int) -> Iterator[TextBatch]:
    """All texts, longest first, in batches of at most `tokens` padded tokens (but at least one text)."""
    require_known_ids(model, texts)
    sizes = [len(text.prompt_ids) + len(text.answer_ids) for text in texts]
    order = sorted(range(len(texts)), key=sizes.__getitem__, reverse=True)
    lengths, first = [sizes[i] for i in order], 0
    while first < len(order):
        stop = batch_end(lengths, first, tokens)
        yield TextBatch(model, [texts[i] for i in order[first:stop]], order[first:stop])
        first = stop


def reading_batches(model: Model, texts: Sequence[Rollout]) -> Iterator[TextBatch]:
    """All texts in batches of the size that reading without logits takes."""
    return text_batches(model, texts, batch_tokens(model, CPU_TOKENS, GPU_TOKENS))


@torch.no_grad()
def project_layers(
    model: Model,
    texts: Sequence[Rollout],
    interventions: Interventions,
    vectors: Mapping[int, Float[Tensor, " D"]],
) -> Iterator[tuple[TextBatch, dict[int, Float[Tensor, "B T"]]]]:
    """Batch after batch with <h, v> at each layer of `vectors`, fp32 on the CPU; those of padding mean
    nothing.
    """

    def to_projection(layer: int, h: Tensor) -> Tensor:
        return (h.float() @ vectors[layer].to(h.device)).cpu()

    for batch in reading_batches(model, texts):
        with (
            # before the steering's hooks, and so its step
            capture(model, vectors, to_projection) as captured,
            steer(model, interventions) if interventions else nullcontext() as steering,
        ):
            if steering is not None:
                steering.describe(batch.lengths, batch.starts)
            model.base(input_ids=batch.ids, use_cache=False)
        yield batch, captured


def project_batches(
    model: Model,
    texts: Sequence[Rollout],
    interventions: Interventions,
    layer: int,
    vector: Float[Tensor, " D"],
) -> Iterator[tuple[TextBatch, Float[Tensor, "B T"]]]:
    """The same at one layer."""
    for batch, projections in project_layers(model, texts, interventions, {layer: vector}):
        yield batch, projections[layer]


def mean_projections(
    model: Model,
    texts: Sequence[Rollout],
    interventions: Interventions,
    layer: int,
    vector: Float[Tensor, " D"],
) -> list[float]:
    """Mean over each text's answer tokens, in the texts' order; NaN for an empty answer."""
    means = [float("nan")] * len(texts)
    answered = [index for index, text in enumerate(texts) if text.answer_ids]
    part = [texts[index] for index in answered]
    for batch, projections in project_batches(model, part, interventions, layer, vector):
        answer = batch.answer
        values = (projections * answer).sum(1) / answer.sum(1)
        for index, value in zip(batch.indices, values.tolist(), strict=True):
            means[answered[index]] = value
    return means
