"""The control of every capping result: random directions whose caps fire as often as the cap does, layer by
layer.

    random_arms(model, cap, texts, count=3)      # {"random 1": [cap], "random 2": ...}

A cap that fires on half of all tokens disturbs a model, whatever its direction; only what the random one does
not do is the axis's doing. Each layer's direction is drawn alone, and its floor is the quantile of the
projections there, read with the floors of the layers before already on, at which the cap itself fires; of
prompts and of answers apart where the cap has a floor for each.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, Interventions, interventions_digest, load_cap
from personatlas.persona.models.load import Model
from personatlas.persona.rollout import Rollout
from personatlas.steering.arms import RANDOM
from personatlas.steering.teacher_forcing import project_batches, reading_batches


def random_arms(
    model: Model, cap: Cap, texts: Sequence[Rollout], count: int, folder: Path | None = None
) -> dict[str, Interventions]:
    """Arms "random 1", "random 2", ... of random caps that fire as often on the texts as the cap does.

    They are kept in `folder`, if one is given, so that an interrupted study goes on with the same ones.
    Raises `UserError` without texts.
    """
    if count and not texts:
        raise UserError(
            "random controls are matched on answers of the baseline, and all are empty: choose another --seed"
        )
    if folder is None:
        shares = fired_shares(model, cap, texts) if count else torch.empty(0)
        return {
            f"{RANDOM} {seed}": [random_cap(model, cap, shares, texts, seed)] for seed in range(1, count + 1)
        }
    content = interventions_digest([cap]), [(text.prompt_ids, text.answer_ids) for text in texts]
    name = f"{RANDOM}-{hashlib.sha256(repr(content).encode()).hexdigest()[:8]}"
    files = {seed: folder / f"{name}-{seed}" for seed in range(1, count + 1)}
    missing = [seed for seed, file in files.items() if not file.with_suffix(".json").exists()]
    if missing:
        folder.mkdir(exist_ok=True)
        shares = fired_shares(model, cap, texts)
        for seed in missing:
            random_cap(model, cap, shares, texts, seed).save(files[seed])
    return {f"{RANDOM} {seed}": [load_cap(file)] for seed, file in files.items()}


@torch.no_grad()
def fired_shares(model: Model, cap: Cap, texts: Sequence[Rollout]) -> Float[Tensor, "C S"]:
    """Share of the texts' tokens that the cap changes at each layer, for each side that has floors of its
    own.
    """
    sides, shares = _side_masks(model, cap, texts), []
    for row, layer in enumerate(cap.layers):
        values = _projections(model, texts, [_first_layers(cap, row)] if row else [], layer, cap.vectors[row])
        below = {side: values[mask] < cap.floor_of(row, side) for side, mask in sides.items()}
        shares.append([float(own.float().mean()) for own in below.values()])
    return torch.tensor(shares)


@torch.no_grad()
def random_cap(
    model: Model, cap: Cap, shares: Float[Tensor, "C S"], texts: Sequence[Rollout], seed: int
) -> Cap:
    """A cap of random unit directions at the same layers and phases that fires on such shares of the texts'
    tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = normalize(torch.randn(cap.vectors.shape, generator=generator), dim=1)
    blank = replace(cap, vectors=vectors, ceiling=None, level=None, population="random", calibration={})
    sides = _side_masks(model, cap, texts)
    floors: dict[str, list[float]] = {side: [] for side in sides}
    for row, layer in enumerate(cap.layers):
        before = [_with_floors(_first_layers(blank, row), floors)] if row else []
        values = _projections(model, texts, before, layer, vectors[row])
        for (side, mask), share in zip(sides.items(), shares[row].tolist(), strict=True):
            floors[side].append(float(values[mask].quantile(share)))
    return _with_floors(blank, floors)


def _side_masks(model: Model, cap: Cap, texts: Sequence[Rollout]) -> dict[str, Bool[Tensor, " M"]]:
    """The phases for which the cap has floors of their own, and which of all tokens they act on."""
    answers, acting = [], []
    for batch in reading_batches(model, texts):
        mask = torch.ones_like(batch.real)
        mask[:, 0] = not cap.spare_first
        answers.append(batch.answer[batch.real])
        acting.append(mask[batch.real])
    answer, every = torch.cat(answers), torch.cat(acting)
    masks = {"prompt": ~answer & every, "answer": answer & every, "both": every}
    sides = (cap.phase,) if cap.prompt_floor is None else ("prompt", "answer")
    return {side: masks[side] for side in sides}


def _with_floors(cap: Cap, floors: Mapping[str, Sequence[float]]) -> Cap:
    *prompt, answer = (torch.tensor(own) for own in floors.values())
    return replace(cap, floor=answer, prompt_floor=prompt[0] if prompt else None)


def _first_layers(cap: Cap, n: int) -> Cap:
    prompt_floor = None if cap.prompt_floor is None else cap.prompt_floor[:n]
    ceiling = None if cap.ceiling is None else cap.ceiling[:n]
    layers, vectors, floor = cap.layers[:n], cap.vectors[:n], cap.floor[:n]
    return replace(
        cap, layers=layers, vectors=vectors, floor=floor, prompt_floor=prompt_floor, ceiling=ceiling
    )


def _projections(
    model: Model, texts: Sequence[Rollout], interventions: Interventions, layer: int, vector: Tensor
) -> Float[Tensor, " M"]:
    """Projections of all tokens at a layer, batch after batch, with the interventions on."""
    batches = project_batches(model, texts, interventions, layer, vector)
    return torch.cat([values[batch.real] for batch, values in batches])
