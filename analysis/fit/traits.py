"""Trait vectors, trait space, and each trait's cosine with the axis.

    fit = fit_traits(activations, axis)
    fit.space.save(folder / "traits"); fit.result.traits[0].cosine

A trait's vector is the mean of the answers at its positive pole less that at its negative pole. Its position
is the cosine with the axis at the axis's layer: +1 is the axis itself, 0 unrelated. Noise lengthens a mean of
few questions, so its own norm makes the cosine too small: with the differences d_q of the poles' answers to
each question that both answer, |v|² is estimated by the mean of d_q · d_r over pairs of different questions,
which noise does not enter; where that is within two standard errors of 0 the cosine stays as it is, without
an interval. The interval is a jackknife over questions on the Fisher scale. The null is the length along the
axis over the norm when a trait's answers are assigned to its poles at random. PC1 of trait space points along
the axis (arXiv 2601.10387, appendix on traits).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import t

from personatlas.analysis.fit.geometry import components, components_for_shares, cosine, turned_toward
from personatlas.analysis.fit.result import TraitProjection, TraitResult
from personatlas.analysis.stats import TAILS, Array, Interval
from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.pipeline.activations import Activations
from personatlas.persona.roles.bank import NEGATIVE, POSITIVE
from personatlas.persona.roles.traits import TraitSpace
from personatlas.persona.rollout import RolloutKey

MIN_TRAITS = 3


@dataclass(frozen=True)
class TraitFit:
    """A fitted trait space, and the numbers about it."""

    space: TraitSpace
    result: TraitResult


def fit_traits(activations: Activations, axis: Axis, *, replicates: int = 100, seed: int = 0) -> TraitFit:
    """Fits all recorded traits at every layer and their space at the axis's layer.

    Where answers were judged, only those count that show their own pole. A trait without an answer at either
    pole is left out and named. Raises `UserError` when two poles coincide, or when fewer than three traits
    are left.
    """
    scores = frozenset({1}) if any(score is not None for score in activations.scores) else None
    names, vectors, counts = _trait_vectors(activations, scores)  # vectors (T, L, D)
    norms = np.linalg.norm(vectors, axis=2)
    if not (norms > 0).all():
        coinciding = names[int(np.argmin(norms.min(1)))]
        raise UserError(f"the poles of trait {coinciding!r} coincide: nothing separates them")
    layer, unit = axis.layer, axis.at(axis.layer).double().numpy()
    at_layer = vectors[:, layer]
    centre, directions, ratio = components(at_layer)
    directions = turned_toward(directions, unit)
    coordinates = (at_layer - centre) @ directions[:3].T
    rows = [
        TraitProjection(
            trait=name,
            cosine=cosine(vector, unit),
            along=float(vector @ unit),
            norm=float(np.linalg.norm(vector)),
            n=count,
            coordinates=tuple(position),
        )
        for name, vector, count, position in zip(names, at_layer, counts, coordinates.tolist(), strict=True)
    ]
    chance = None
    if layer in activations.layers and replicates:
        x = activations.rollout_means[:, activations.layers.index(layer)].double().numpy()
        counted = [scores is None or score in scores for score in activations.scores]
        keys = [
            RolloutKey.parse(key) if use else None for key, use in zip(activations.keys, counted, strict=True)
        ]
        rows, chance = _with_intervals(rows, x, keys, unit, replicates, seed)
    space = TraitSpace(
        traits=tuple(names),
        vectors=torch.from_numpy(vectors / norms[:, :, None]).float(),
        norms=torch.from_numpy(norms).float(),
        counts=torch.tensor(counts),
        layer=layer,
        mean=torch.from_numpy(centre).float(),
        components=torch.from_numpy(directions).float(),
        variance_ratio=torch.from_numpy(ratio).float(),
        model=activations.model,
    )
    score_counts = Counter(activations.scores)
    result = TraitResult(
        layer=layer,
        traits=tuple(sorted(rows, key=lambda row: row.cosine)),
        chance=chance,
        cos_pc1_axis=cosine(directions[0], unit),
        variance_ratio=tuple(ratio[:50].tolist()),
        components_for=components_for_shares(ratio),
        n_rollouts=sum(map(sum, counts)),
        judged=scores is not None,
        other_side=score_counts[0],
        unjudged=score_counts[None] if scores is not None else 0,
        left_out=tuple(sorted({role[1:] for role in activations.roles} - set(names))),
    )
    return TraitFit(space, result)


def _trait_vectors(
    activations: Activations, scores: frozenset[int] | None
) -> tuple[list[str], Array, list[tuple[int, int]]]:
    """Traits with answers at both poles: names, positive minus negative means (T, L, D), counts."""
    names, vectors, counts = [], [], []
    for name in dict.fromkeys(role[1:] for role in activations.roles):
        (positive, n), (negative, m) = (
            activations.role_mean(sign + name, scores) for sign in (POSITIVE, NEGATIVE)
        )
        if n and m:
            names.append(name)
            vectors.append((positive - negative).numpy())
            counts.append((n, m))
    if len(names) < MIN_TRAITS:
        raise UserError(
            f"only {len(names)} traits have answers at both poles; a trait space needs {MIN_TRAITS}"
        )
    return names, np.stack(vectors), counts


def _with_intervals(
    rows: list[TraitProjection], x: Array, keys: Sequence[RolloutKey | None], unit: Array, n: int, seed: int
) -> tuple[list[TraitProjection], float]:
    """The rows with corrected cosines and intervals from rollout means x (N, D), whose keys are None where an
    answer does not count.

    Also the 95th percentile of the cosines' size over all traits when answers are assigned to the poles at
    random, n times.
    """
    with_intervals, shuffled = [], []
    pole = np.array(["" if key is None else key.role for key in keys])
    question = np.array(["" if key is None else key.question for key in keys])
    for number, row in enumerate(rows):
        sides = [pole == sign + row.trait for sign in (POSITIVE, NEGATIVE)]
        common = sorted(set(question[sides[0]]) & set(question[sides[1]]))
        differences = np.array(
            [np.subtract(*(x[side & (question == own)].mean(0) for side in sides)) for own in common]
        )
        if (corrected := _corrected_cosine(differences, unit)) is not None:
            row = replace(row, cosine=corrected.value, low=corrected.low, high=corrected.high)
        with_intervals.append(row)
        positive, negative = (x[side] @ unit for side in sides)
        both, count = np.concatenate([positive, negative]), len(positive)
        generator = np.random.default_rng([seed, 11, number])
        assigned = generator.permuted(np.tile(both, (n, 1)), axis=1)
        shuffled.append((assigned[:, :count].mean(1) - assigned[:, count:].mean(1)) / row.norm)
    return with_intervals, min(float(np.quantile(np.abs(np.concatenate(shuffled)), 0.95)), 1.0)


def _jackknife_error(values: Array) -> float:
    """The standard error of an estimate from its values without one of n questions each (n,)."""
    return float(np.sqrt((len(values) - 1) / len(values) * np.square(values - values.mean()).sum()))


def _corrected_cosine(differences: Array, unit: Array) -> Interval | None:
    """The cosine of a mean difference (Q, D) with the axis without the noise in its norm, with its interval.

    None where questions are too few, or where the norm without noise is within two standard errors of 0.
    """
    n = len(differences)
    if n < 3:
        return None
    along, products = differences @ unit, differences @ differences.T

    kept = [np.arange(n) != left_out for left_out in (-1, *range(n))]  # all questions, then all but one
    parts = [products[np.ix_(own, own)] for own in kept]
    squared = np.array([(own.sum() - np.trace(own)) / (len(own) * (len(own) - 1)) for own in parts])
    if squared[0] <= 2 * _jackknife_error(squared[1:]) or (squared <= 0).any():
        return None
    cosines = np.array([along[own].mean() for own in kept]) / np.sqrt(squared)
    value, *others = np.arctanh(np.clip(cosines, -0.999, 0.999))
    error = _jackknife_error(np.array(others))
    reach = float(t.ppf(TAILS[1], n - 1)) * error
    low, high = np.tanh([value - reach, value + reach]).tolist()
    return Interval(float(np.tanh(value)), low, high, n)
