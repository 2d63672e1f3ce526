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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, Interventions, interventions_digest, load_cap
from personatlas.persona.models.hooks import BlockOutput, residual, run_to
from personatlas.persona.models.load import Model
from personatlas.persona.progress import Advance, no_advance, progress
from personatlas.persona.rollout import Rollout
from personatlas.steering.arms import RANDOM
from personatlas.steering.hooks.steering import steer
from personatlas.steering.teacher_forcing import project_layers, reading_batches


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
    seeds = range(1, count + 1)
    files = dict[int, Path]()
    if folder is not None:
        content = interventions_digest([cap]), [(text.prompt_ids, text.answer_ids) for text in texts]
        name = f"{RANDOM}-{hashlib.sha256(repr(content).encode()).hexdigest()[:8]}"
        files = {seed: folder / f"{name}-{seed}" for seed in seeds}
    caps = {seed: load_cap(file) for seed, file in files.items() if file.with_suffix(".json").exists()}
    missing = [seed for seed in seeds if seed not in caps]
    if missing:
        with progress("matching random controls", len(texts) * (1 + len(missing))) as advance:
            shares = fired_shares(model, cap, texts, advance)
            for seed in missing:
                caps[seed] = random_cap(model, cap, shares, texts, seed, advance)
                if folder is not None:
                    folder.mkdir(exist_ok=True)
                    caps[seed].save(files[seed])
    return {f"{RANDOM} {seed}": [caps[seed]] for seed in seeds}


def fired_shares(
    model: Model, cap: Cap, texts: Sequence[Rollout], advance: Advance = no_advance
) -> Float[Tensor, "C S"]:
    """Share of the texts' tokens that the cap changes at each layer, for each side that has floors of its
    own.
    """
    sides, vectors = _side_masks(model, cap, texts), dict(zip(cap.layers, cap.vectors, strict=True))
    read: dict[int, list[Tensor]] = {layer: [] for layer in cap.layers}
    for batch, projections in project_layers(model, texts, [cap], vectors):
        for layer, values in projections.items():
            read[layer].append(values[batch.real])
        advance(len(batch.texts))
    shares = []
    for row, values in enumerate(map(torch.cat, read.values())):
        below = {side: values[mask] < cap.floor_of(row, side) for side, mask in sides.items()}
        shares.append([float(own.float().mean()) for own in below.values()])
    return torch.tensor(shares)


@torch.no_grad()
def random_cap(
    model: Model,
    cap: Cap,
    shares: Float[Tensor, "C S"],
    texts: Sequence[Rollout],
    seed: int,
    advance: Advance = no_advance,
) -> Cap:
    """A cap of random unit directions at the same layers and phases that fires on such shares of the texts'
    tokens.

    A floor is known when all texts have come to its layer: they wait there for one another, so each is read
    once.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = normalize(torch.randn(cap.vectors.shape, generator=generator), dim=1)
    blank = replace(cap, vectors=vectors, ceiling=None, level=None, population="random", calibration={})
    sides, batches = _side_masks(model, cap, texts), list(reading_batches(model, texts))
    floors = {side: [0.0] * len(cap.layers) for side in sides}
    outputs: list[BlockOutput | None] = [None] * len(batches)
    last: int | None = None  # the row of the layer before
    for row in sorted(range(len(cap.layers)), key=cap.layers.__getitem__):
        layer, values = cap.layers[row], []
        known = [] if last is None else [_with_floors(blank, floors, slice(last, last + 1))]
        resume = None if last is None else cap.layers[last]
        for number, batch in enumerate(batches):
            with steer(model, known) if known else nullcontext() as steering:
                if steering is not None:
                    steering.describe(batch.lengths, batch.starts)
                output = run_to(model, batch.ids, layer, resume=resume, output=outputs[number])
            outputs[number], h = output, residual(output)
            values.append((h.float() @ vectors[row].to(h.device)).cpu()[batch.real])
            advance(len(batch.texts) / len(cap.layers))
        for (side, mask), share in zip(sides.items(), shares[row].tolist(), strict=True):
            floors[side][row] = float(torch.cat(values)[mask].quantile(share))
        last = row
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


def _with_floors(cap: Cap, floors: Mapping[str, Sequence[float]], rows: slice = slice(None)) -> Cap:
    """The cap at some of its layers, with floors by side."""
    *prompt, answer = (torch.tensor(own[rows]) for own in floors.values())
    prompt_floor = prompt[0] if prompt else None
    layers, vectors = cap.layers[rows], cap.vectors[rows]
    return replace(cap, layers=layers, vectors=vectors, floor=answer, prompt_floor=prompt_floor)
