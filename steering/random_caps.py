"""The control of every capping result: random directions whose caps fire as often as the cap does, layer by layer.

    shares = fired_shares(model, cap, texts)
    random_cap(model, cap, shares, texts, seed=1)

A cap that fires on half of all tokens disturbs a model, whatever its direction; only what the random one does not do is the
axis's doing. Each layer's direction is drawn alone, and its floor is the quantile of the projections there, read with the
floors of the layers before already on, at which the cap itself fires; of prompts and of answers apart where the cap has a
floor for each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from personatlas.persona.interventions import Cap, Interventions
from personatlas.persona.models.load import Model
from personatlas.persona.rollout import Rollout
from personatlas.steering.teacher_forcing import projected, read_batches


@torch.no_grad()
def fired_shares(model: Model, cap: Cap, texts: Sequence[Rollout]) -> Float[Tensor, "C S"]:
    """Share of the texts' tokens that the cap changes at each of its layers, for each side that has floors of its own."""
    sides = _sides(model, cap, texts)
    below = []
    for row, layer in enumerate(cap.layers):
        places = _projections(model, texts, [_part(cap, row)] if row else [], layer, cap.vectors[row])
        below.append(
            [float((places[taken] < cap.floor_of(row, side)).float().mean()) for side, taken in sides.items()]
        )
    return torch.tensor(below)


@torch.no_grad()
def random_cap(
    model: Model, cap: Cap, shares: Float[Tensor, "C S"], texts: Sequence[Rollout], seed: int
) -> Cap:
    """A cap of random unit directions at the same layers and phases that fires on such shares of the texts' tokens."""
    generator = torch.Generator().manual_seed(seed)
    vectors = normalize(torch.randn(cap.vectors.shape, generator=generator), dim=1)
    blank = replace(cap, vectors=vectors, ceiling=None, level=None, population="random", calibration={})
    sides = _sides(model, cap, texts)
    floors: dict[str, list[float]] = {side: [] for side in sides}
    for row, layer in enumerate(cap.layers):
        before = [_with(_part(blank, row), floors)] if row else []
        places = _projections(model, texts, before, layer, vectors[row])
        for (side, taken), share in zip(sides.items(), shares[row].tolist(), strict=True):
            floors[side].append(float(places[taken].quantile(share)))
    return _with(blank, floors)


def _sides(model: Model, cap: Cap, texts: Sequence[Rollout]) -> dict[str, Bool[Tensor, " M"]]:
    """The phases for which the cap has floors of their own, and which of all tokens they take."""
    told, kept = [], []
    for batch in read_batches(model, texts):
        real, taken = batch.real, torch.ones_like(batch.real)
        taken[:, 0] = not cap.spare_first
        told.append(batch.answer[real])
        kept.append(taken[real])
    answer, every = torch.cat(told), torch.cat(kept)
    masks = {"prompt": ~answer & every, "answer": answer & every, "both": every}
    return {
        side: masks[side] for side in ((cap.phase,) if cap.prompt_floor is None else ("prompt", "answer"))
    }


def _with(cap: Cap, floors: Mapping[str, Sequence[float]]) -> Cap:
    """The cap with floors by side."""
    *prompt, answer = (torch.tensor(own) for own in floors.values())
    return replace(cap, floor=answer, prompt_floor=prompt[0] if prompt else None)


def _part(cap: Cap, rows: int) -> Cap:
    """Its first layers only."""
    own: dict[str, Any] = {
        name: None if getattr(cap, name) is None else getattr(cap, name)[:rows]
        for name in ("layers", "vectors", "floor", "prompt_floor", "ceiling")
    }
    return replace(cap, **own)


def _projections(
    model: Model, texts: Sequence[Rollout], before: Interventions, layer: int, vector: Tensor
) -> Float[Tensor, " M"]:
    """Projections of all tokens at a layer, batch after batch, with the plan on."""
    return torch.cat([places[batch.real] for batch, places in projected(model, texts, before, layer, vector)])
