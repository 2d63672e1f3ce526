"""Projections of texts that are read again, with interventions on: one value a token, before any step at that layer.

for batch, places in projected(subject, rollouts, [cap], axis.layer, axis.at(axis.layer)):
    places[batch.real]                      # (B, T) masked: all tokens
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from personaxis.persona.rollouts import Rollout
from personaxis.persona.sampler import batch_tokens
from personaxis.persona.subject import Subject, residual
from personaxis.steering.steer import Plan, steered
from personaxis.steering.texts import Texts, batches

CPU_TOKENS, GPU_TOKENS = 2048, 65536  # most padded tokens a batch


def read_batches(subject: Subject, texts: Sequence[Rollout]) -> Iterator[Texts]:
    """All texts in batches of the size that reading without logits takes."""
    return batches(subject, texts, batch_tokens(subject, CPU_TOKENS, GPU_TOKENS))


@torch.no_grad()
def projected(
    subject: Subject, texts: Sequence[Rollout], plan: Plan, layer: int, vector: Float[Tensor, " D"]
) -> Iterator[tuple[Texts, Float[Tensor, "B T"]]]:
    """Batch after batch with <h, v> at a layer, fp32 on the CPU; padding's values mean nothing."""
    kept: list[Tensor] = []

    def keep(_module: object, _args: object, output: object) -> None:
        h = residual(output)
        kept.append((h.float() @ vector.to(h.device)).cpu())

    for batch in read_batches(subject, texts):
        handle = subject.blocks[layer].register_forward_hook(keep)  # before the plan's own hook, and so before its step
        try:
            with steered(subject, plan) if plan else nullcontext() as held:
                if held is not None:
                    held.describe(batch.lengths, batch.starts)
                subject.base(input_ids=batch.ids, use_cache=False)
        finally:
            handle.remove()
        yield batch, kept.pop()


def mean_projections(
    subject: Subject, texts: Sequence[Rollout], plan: Plan, layer: int, vector: Float[Tensor, " D"]
) -> list[float]:
    """Mean over each text's answer tokens, in the texts' order; NaN for an empty answer."""
    found = [float("nan")] * len(texts)
    spoken = [place for place, text in enumerate(texts) if text.answer_ids]
    for batch, places in projected(subject, [texts[place] for place in spoken], plan, layer, vector):
        answer = batch.answer
        means = (places * answer).sum(1) / answer.sum(1)
        for place, value in zip(batch.places, means.tolist(), strict=True):
            found[spoken[place]] = value
    return found
