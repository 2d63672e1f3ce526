"""Trait vectors, trait space, and where each trait lies along the axis.

    found = fit_traits(activations, axis)
    found.space.save(folder / "traits")

A trait's place is the cosine between its vector and the axis at the axis's layer: +1 would be the axis itself, 0 has
nothing to do with it. Its interval is a bootstrap over both poles' answers of the vector's length along the axis, over the
vector's own length: resampling makes every vector longer by noise, and cosines of resampled vectors are all too small.
What chance gives is the same ratio when a trait's answers are dealt to its poles at random. PC1 of trait space points along the axis (arXiv 2601.10387, appendix on traits).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from personatlas.analysis.fit.geometry import Array, components, components_for, cosine, pointing
from personatlas.analysis.fit.uncertainty import interval
from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.pipeline.activations import Activations
from personatlas.persona.roles.traits import NEGATIVE, POSITIVE, TraitSpace

FEWEST = 3  # traits that a space needs


@dataclass(frozen=True)
class TraitFit:
    """The artefact, and `report`: plain numbers for tables and plots (the part "traits" of fit.json)."""

    space: TraitSpace
    report: dict[str, Any]


def fit_traits(activations: Activations, axis: Axis, *, replicates: int = 100, seed: int = 0) -> TraitFit:
    """Vectors of all recorded traits at every layer, their space at the axis's layer, and their places along the axis.

    Where answers were judged, only those count that show their own side. A trait without an answer at either pole is left
    out and named. Raises `UserError` when two poles coincide, or when fewer than three traits are left.
    """
    scores = frozenset({1}) if any(score is not None for score in activations.scores) else None
    names, vectors, counts = _contrasts(activations, scores)  # vectors (T, L, D)
    norms = np.linalg.norm(vectors, axis=2)
    if not (norms > 0).all():
        raise UserError(
            f"the poles of trait {names[int(np.argmin(norms.min(1)))]!r} coincide: nothing separates them"
        )
    layer, unit = axis.layer, axis.at(axis.layer).double().numpy()
    at_layer = vectors[:, layer]
    centre, found, ratio = components(at_layer)
    found = pointing(found, unit)
    rows, chance = _rows(activations, scores, names, at_layer, axis, replicates, seed)
    coordinates = (at_layer - centre) @ found[:3].T
    for row, count, place in zip(rows, counts, coordinates.tolist(), strict=True):
        row |= {"n": list(count), "coordinates": place}
    space = TraitSpace(
        traits=tuple(names),
        vectors=torch.from_numpy(vectors / norms[:, :, None]).float(),
        norms=torch.from_numpy(norms).float(),
        counts=torch.tensor(counts),
        layer=layer,
        mean=torch.from_numpy(centre).float(),
        components=torch.from_numpy(found).float(),
        variance_ratio=torch.from_numpy(ratio).float(),
        model=activations.model,
    )
    score_counts = Counter(activations.scores)
    report = {
        "layer": layer,
        "traits": sorted(rows, key=lambda row: float(row["cosine"])),
        "chance": chance,
        "cos_pc1_axis": cosine(found[0], unit),
        "variance_ratio": ratio[:50].tolist(),
        "components_for": {str(share): components_for(ratio, share) for share in (0.5, 0.7, 0.9)},
        "n_rollouts": sum(map(sum, counts)),
        "judged": scores is not None,
        "other_side": score_counts[0],
        "unjudged": score_counts[None] if scores is not None else 0,
        "left_out": sorted({role[1:] for role in activations.roles} - set(names)),
    }
    return TraitFit(space, report)


def _contrasts(
    activations: Activations, scores: frozenset[int] | None
) -> tuple[list[str], Array, list[tuple[int, int]]]:
    """Traits with answers at both poles: names, positive minus negative means (T, L, D), and numbers of answers."""
    names, vectors, counts = [], [], []
    for name in dict.fromkeys(role[1:] for role in activations.roles):
        (positive, n), (negative, m) = (
            activations.role_mean(sign + name, scores) for sign in (POSITIVE, NEGATIVE)
        )
        if n and m:
            names.append(name)
            vectors.append((positive - negative).numpy())
            counts.append((n, m))
    if len(names) < FEWEST:
        raise UserError(f"only {len(names)} traits have answers at both poles; a trait space needs {FEWEST}")
    return names, np.stack(vectors), counts


def _rows(
    activations: Activations,
    scores: frozenset[int] | None,
    names: list[str],
    vectors: Array,
    axis: Axis,
    replicates: int,
    seed: int,
) -> tuple[list[dict[str, Any]], float | None]:
    """Each trait's cosine with the axis and its length along it; intervals and chance where rollout means were kept.

    Chance is the 95th percentile of its size over all traits when answers are dealt to the poles at random.
    """
    layer, unit = axis.layer, axis.at(axis.layer).double().numpy()
    rows: list[dict[str, Any]] = [
        {
            "trait": name,
            "cosine": cosine(vector, unit),
            "along": float(vector @ unit),
            "norm": float(np.linalg.norm(vector)),
        }
        for name, vector in zip(names, vectors, strict=True)
    ]
    if layer not in activations.layers or not replicates:
        return rows, None
    x = activations.rollout_means[:, activations.layers.index(layer)].double().numpy()
    counted = [scores is None or score in scores for score in activations.scores]
    owner = np.array(
        [key.split("/", 1)[0] if own else "" for key, own in zip(activations.keys, counted, strict=True)]
    )
    shuffled = []
    for number, row in enumerate(rows):
        sides = [x[owner == sign + row["trait"]] for sign in (POSITIVE, NEGATIVE)]
        drawn, dealt = _resampled(
            [side @ unit for side in sides], np.random.default_rng([seed, 11, number]), replicates
        )
        drawn, dealt = drawn / row["norm"], dealt / row["norm"]
        found = interval(row["cosine"], drawn)
        row |= {"low": max(found.low, -1.0), "high": min(found.high, 1.0)}  # a cosine is no more than 1
        shuffled.append(dealt)
    return rows, min(float(np.quantile(np.abs(np.concatenate(shuffled)), 0.95)), 1.0)


def _resampled(sides: list[Array], generator: np.random.Generator, replicates: int) -> tuple[Array, Array]:
    """Differences (replicates,) between the poles' mean projections: resampled, and with answers dealt at random."""
    positive, negative = (
        side[generator.integers(len(side), size=(replicates, len(side)))].mean(1) for side in sides
    )
    both, n = np.concatenate(sides), len(sides[0])
    dealt = generator.permuted(np.tile(both, (replicates, 1)), axis=1)
    return positive - negative, dealt[:, :n].mean(1) - dealt[:, n:].mean(1)
