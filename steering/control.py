"""The control of every capping result: random directions whose caps fire as often as the cap does, layer by layer.

    cap.layers, cap.floor          ->   random_cap(subject, cap, texts, seed=1)

A cap that fires on half of all tokens disturbs a model, whatever its direction; only what the random one does not do is the
axis's doing. Each layer's direction is drawn alone, and its floor is the quantile of the projections there, read with the
floors of the layers before already on, at which the cap itself fires.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from personaxis.persona.axis import Cap
from personaxis.persona.rollouts import Rollout
from personaxis.persona.sampler import batch_end, batch_tokens, pad
from personaxis.persona.subject import Subject, residual
from personaxis.steering.arms import joined
from personaxis.steering.steer import Plan, Steering, steered

CPU_TOKENS, GPU_TOKENS = 2048, 65536  # most padded tokens a batch


@torch.no_grad()
def fired_by_layer(subject: Subject, cap: Cap, texts: Sequence[Rollout]) -> Float[Tensor, " C"]:
    """Share of the texts' tokens (of the cap's phase) that it changes at each of its layers."""
    tallies = []
    with steered(subject, [cap]) as held:
        for batch in _batches(subject, texts):
            held.begin()
            _describe(held, batch)
            subject.base(input_ids=_ids(subject, batch), use_cache=False)
            tallies.append(held.tally)
    whole = joined(tallies)
    return whole.fired.sum(1) / whole.seen.sum(1).clamp(min=1)


@torch.no_grad()
def random_cap(subject: Subject, cap: Cap, texts: Sequence[Rollout], seed: int) -> Cap:
    """A cap of random unit directions at the same layers and phase that fires on the same share of the texts' tokens."""
    generator = torch.Generator().manual_seed(seed)
    vectors = normalize(torch.randn(cap.vectors.shape, generator=generator), dim=1)
    wanted = fired_by_layer(subject, cap, texts)
    blank = replace(cap, vectors=vectors, ceiling=None, level=None, population="random", found={})
    floors: list[float] = []
    for row, layer in enumerate(cap.layers):
        before = [] if not row else [_part(blank, floors)]
        places = torch.cat(
            [_projected(subject, batch, before, layer, vectors[row], cap.phase) for batch in _batches(subject, texts)]
        )
        floors.append(float(places.quantile(float(wanted[row]))))
    return replace(blank, floor=torch.tensor(floors))


def _part(cap: Cap, floors: list[float]) -> Cap:
    done = len(floors)
    return replace(cap, layers=cap.layers[:done], vectors=cap.vectors[:done], floor=torch.tensor(floors))


def _projected(
    subject: Subject, batch: Sequence[Rollout], before: Plan, layer: int, vector: Tensor, phase: str
) -> Float[Tensor, " M"]:
    """Projections at a layer of all tokens that the phase takes, with the plan on."""
    kept: list[Tensor] = []
    handle = subject.blocks[layer].register_forward_hook(
        lambda _module, _args, output: kept.append(
            (residual(output).float() @ vector.to(residual(output).device)).cpu()
        )
    )
    try:
        with steered(subject, before) if before else nullcontext() as held:
            if held is not None:
                _describe(held, batch)
            subject.base(input_ids=_ids(subject, batch), use_cache=False)
    finally:
        handle.remove()
    starts, lengths = _spans(batch)
    at = torch.arange(kept[0].shape[1])
    taken = at < lengths[:, None]
    if phase != "both":
        taken &= (at >= starts[:, None]) == (phase == "answer")
    return kept[0][taken]


def _batches(subject: Subject, texts: Sequence[Rollout]) -> list[list[Rollout]]:
    ordered = sorted(texts, key=lambda text: -len(text.prompt_ids) - len(text.answer_ids))
    lengths = [len(text.prompt_ids) + len(text.answer_ids) for text in ordered]
    found, first, size = [], 0, batch_tokens(subject, CPU_TOKENS, GPU_TOKENS)
    while first < len(ordered):
        stop = batch_end(lengths, first, size)
        found.append(ordered[first:stop])
        first = stop
    return found


def _ids(subject: Subject, batch: Sequence[Rollout]) -> Tensor:
    return pad([text.prompt_ids + text.answer_ids for text in batch], subject.device)


def _spans(batch: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    starts = torch.tensor([len(text.prompt_ids) for text in batch])
    return starts, starts + torch.tensor([len(text.answer_ids) for text in batch])


def _describe(held: Steering, batch: Sequence[Rollout]) -> None:
    starts, lengths = _spans(batch)
    held.describe(lengths, starts)
