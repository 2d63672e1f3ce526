"""From recorded activations to the axis at every layer, the persona space, and their uncertainty.

    fit = fit_axis(activations, keys, scores=None, default="default")
    fit.axis.save(folder / "axis"); fit.result.cos_pc1

The layer to use is the one where the axis is both stable and the main direction of persona space: the highest
product of split-half cosine and cos(PC1, axis) among the middle layers. Neither is enough alone: in the first
layers the axis is stable because the prompts differ in words, in the last it is large because the next token
is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray

from personatlas.analysis.fit.controls import axes_by_score, place_controls
from personatlas.analysis.fit.geometry import (
    Groups,
    components,
    components_for_shares,
    cosine,
    direction,
    first_component,
    turned_toward,
)
from personatlas.analysis.fit.result import AnswerProjections, FitResult, LayerFit, RoleProjection
from personatlas.analysis.fit.uncertainty import (
    learning_curve,
    pc1_agreement,
    pole_gap,
    pole_null,
    role_intervals,
    shuffled_null,
    split_half,
    split_questions,
    split_roles,
)
from personatlas.analysis.stats import Array
from personatlas.persona.axis import POLES, Axis, PersonaSpace
from personatlas.persona.errors import UserError
from personatlas.persona.pipeline.activations import Activations
from personatlas.persona.rollout import RolloutKey

LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
# replicates x rollouts x features x layers: below it, starting processes costs more than it saves
PARALLEL_FROM = 3e10
MIDDLE = (0.3, 0.9)  # the part of the depth in which the layer to use is searched
MIN_ROLES = 3  # besides the positive pole


@dataclass(frozen=True)
class AxisFit:
    """A fitted axis and persona space, and the numbers about them."""

    axis: Axis
    space: PersonaSpace
    result: FitResult


@dataclass(frozen=True)
class _Data:
    """The rollouts of a fit: their rows in the activations, their groups by role and question, the
    questions, and the group means (R+1, L, D).
    """

    activations: Activations
    rows: list[int]
    groups: Groups
    questions: tuple[str, ...]
    means: Array

    def rollout_means(self, layer: int) -> Array | None:
        """Rollout means (N, D) at a layer, None where it kept none."""
        if layer not in self.activations.layers:
            return None
        index = self.activations.layers.index(layer)
        return self.activations.rollout_means[self.rows, index].double().numpy()


def fit_axis(
    activations: Activations,
    keys: Sequence[str],
    *,
    scores: frozenset[int | None] | None,
    default: str,
    positive: str | None = None,
    layer: int | None = None,
    replicates: int = 100,
    seed: int = 0,
    controls: Activations | None = None,
) -> AxisFit:
    """Fits the axis at every layer and the persona space at the layer to use.

    `keys` are the rollouts to fit and `scores` the judge's scores that these have (None: all); the `default`
    role is never filtered by score. `positive` is the role at the positive pole, the default unless given;
    every other role is on the other side. `layer` (0-based) replaces the automatic choice. `replicates` is
    the number of bootstrap draws, random splits and shuffles, 0 for none, and `seed` their seed. `controls`
    are placed on the axis.

    Raises `UserError` when a pole has no rollouts, fewer than three roles are left, or the layer does not
    exist.
    """
    positive = positive or default
    data = _select(activations, keys, positive, scores, default)
    layers = _fit_layers(data, replicates, seed)
    layer, reason = _choose_layer(layers, layer, activations.n_layers)
    axis = _axis(data, layer, positive, default)
    space = _space(data, layer)
    vector, x = axis.vectors[layer].double().numpy(), data.rollout_means(layer)
    curve, null, gap = None, None, None
    if x is not None and replicates:
        curve = learning_curve(x, data.groups, np.random.default_rng([seed, 8]))
        null = pole_null(x, data.groups, np.random.default_rng([seed, 7]), replicates)
        gap = pole_gap(x @ vector, data.groups)
    result = FitResult(
        layers=tuple(layers),
        layer=layer,
        layer_reason=reason,
        poles=axis.poles,
        positive=positive,
        roles=_role_projections(data, x, vector, space),
        variance_ratio=tuple(space.variance_ratio.tolist()[:50]),
        components_for=components_for_shares(space.variance_ratio.double().numpy()),
        projections=_answer_projections(data, x, vector),
        n_rollouts=len(data.rows),
        curve=curve,
        pole_null=null,
        gap=gap,
        controls=()
        if controls is None or x is None
        else place_controls(controls, layer, vector, x @ vector, data.groups, data.questions),
        by_score=axes_by_score(activations, layer, positive, vector),
        default=default,
        model=activations.model,
    )
    return AxisFit(axis, space, result)


def _select(
    activations: Activations,
    keys: Sequence[str],
    positive: str,
    scores: frozenset[int | None] | None,
    default: str,
) -> _Data:
    """The rollouts of a fit, grouped by role; group means come from the sums, which every layer has."""
    selected = set(keys)
    rows = [row for row, key in enumerate(activations.keys) if key in selected]
    parts = [RolloutKey.parse(activations.keys[row]) for row in rows]
    roles = [part.role for part in parts]
    if positive not in roles:
        raise UserError(f"role {positive!r} has no kept rollout, so it cannot be a pole")
    names = (positive, *(role for role in dict.fromkeys(roles) if role != positive))
    if len(names) <= MIN_ROLES:
        raise UserError(
            f"only {len(names) - 1} other roles are left: a persona space needs at least {MIN_ROLES}"
        )
    role_index = {name: index for index, name in enumerate(names)}
    questions = tuple(sorted({part.question for part in parts}))
    question_index = {name: index for index, name in enumerate(questions)}
    groups = Groups(
        np.array([role_index[role] for role in roles]),
        names,
        np.array([question_index[part.question] for part in parts]),
    )
    means = []
    for name, count in zip(names, np.bincount(groups.index), strict=True):
        mean, n = activations.role_mean(name, None if name == default else scores)
        if n != count:
            raise UserError(
                f"role {name!r}: the sums hold {n} rollouts, {count} were selected; record the run again"
            )
        means.append(mean)
    return _Data(activations, rows, groups, questions, torch.stack(means).numpy())


def _fit_layers(data: _Data, replicates: int, seed: int) -> list[LayerFit]:
    """The fit at every layer. They are independent: a large fit computes them on all cores."""
    activations = data.activations
    recorded = {
        layer: activations.rollout_means[data.rows, index] for index, layer in enumerate(activations.layers)
    }
    work = replicates * len(data.rows) * data.means.shape[2] * len(recorded)
    return list(
        Parallel(n_jobs=-1 if work > PARALLEL_FROM else 1)(
            delayed(_fit_layer)(
                layer, None if x is None else x.numpy(), data.groups, data.means[:, layer], replicates, seed
            )
            for layer in range(activations.n_layers)
            for x in [recorded.get(layer)]
        )
    )


def _fit_layer(
    layer: int, rollouts: NDArray[np.float32] | None, groups: Groups, means: Array, replicates: int, seed: int
) -> LayerFit:
    """The fit at one layer from group means (R+1, D) and, where the layer kept them, rollout means (N, D)."""
    axis = direction(means)
    pc1, variance = first_component(means)
    row = LayerFit(
        layer=layer,
        norm=float(np.linalg.norm(axis)),
        cos_pc1=cosine(pc1, axis),
        angle_pc1=float(np.degrees(np.arccos(np.clip(cosine(pc1, axis), -1, 1)))),
        variance_pc1=variance,
    )
    if rollouts is None or not replicates:
        return row
    x = rollouts.astype(np.float64)
    generators = [np.random.default_rng([seed, purpose]) for purpose in range(5)]
    agreement = pc1_agreement(x, groups, generators[0], replicates)
    return replace(
        row,
        cos_pc1_by_questions=agreement.by_questions,
        cos_pc1_by_roles=agreement.by_roles,
        angle_resampled=agreement.angle_resampled,
        axis_share=agreement.axis_share,
        swapped=agreement.swapped,
        split_half=split_half(x, groups, generators[1], replicates),
        split_roles=split_roles(x, groups, generators[2], replicates),
        split_questions=split_questions(x, groups, generators[4], replicates),
        null=shuffled_null(x, groups, generators[3], replicates),
    )


def _choose_layer(layers: list[LayerFit], requested: int | None, n_layers: int) -> tuple[int, str]:
    """The layer to use, and why."""
    if requested is not None:
        if not 0 <= requested < n_layers:
            raise UserError(f"layer {requested} is not in this model (0..{n_layers - 1})")
        return requested, "asked for"
    low, high = (round(share * (n_layers - 1)) for share in MIDDLE)
    products = [
        (row.cos_pc1 * row.split_half.value, row, row.split_half.value)
        for row in layers[low : high + 1]
        if row.split_half is not None
    ]
    if not products:  # no rollout means in the middle
        best = max(layers[low : high + 1], key=lambda row: row.cos_pc1)
        return best.layer, f"highest cos(PC1, axis), {best.cos_pc1:.2f}, among layers {low}..{high}"
    _, best, half = max(products, key=lambda product: product[0])
    reason = (
        f"highest product of cos(PC1, axis) {best.cos_pc1:.2f} and split-half cosine "
        f"{half:.2f} among layers {low}..{high}"
    )
    return best.layer, reason


def _axis(data: _Data, layer: int, positive: str, default: str) -> Axis:
    activations, is_pole = data.activations, data.groups.index == 0
    contrast = data.means[0] - data.means[1:].mean(0)  # (L, D)
    norms = np.linalg.norm(contrast, axis=1)
    if not (norms > 0).all():
        raise UserError("the poles coincide at some layer: nothing separates them")
    vectors = contrast / norms[:, None]
    quantiles = np.full((2, activations.n_layers, len(LEVELS)), np.nan)
    for recorded in activations.layers:
        x = data.rollout_means(recorded)
        assert x is not None
        projections = x @ vectors[recorded]
        for side, members in enumerate((is_pole, ~is_pole)):
            quantiles[side, recorded] = np.quantile(projections[members], LEVELS)
    return Axis(
        vectors=torch.from_numpy(vectors).float(),
        norms=torch.from_numpy(norms).float(),
        layers=tuple(range(activations.n_layers)),
        layer=layer,
        model=activations.model,
        levels=LEVELS,
        default_quantiles=torch.from_numpy(quantiles[0]).float(),
        role_quantiles=torch.from_numpy(quantiles[1]).float(),
        poles=POLES if positive == default else (positive, "others"),
        fit={
            "content": activations.content,
            "positive": positive,
            "n_rollouts": len(data.rows),
            "n_roles": data.groups.n_roles,
        },
    )


def _space(data: _Data, layer: int) -> PersonaSpace:
    """The space at a layer. The positive pole has coordinates in it (first row) but was not fitted."""
    means = data.means[:, layer]
    centre, vectors, ratio = components(means[1:])
    vectors = turned_toward(vectors, means[0] - centre)
    coordinates = (means - centre) @ vectors.T
    return PersonaSpace(
        layer=layer,
        mean=torch.from_numpy(centre).float(),
        components=torch.from_numpy(vectors).float(),
        variance_ratio=torch.from_numpy(ratio).float(),
        coordinates=torch.from_numpy(coordinates).float(),
        roles=data.groups.names,
        model=data.activations.model,
    )


def _role_projections(
    data: _Data, x: Array | None, vector: Array, space: PersonaSpace
) -> tuple[RoleProjection, ...]:
    """The roles by projection, lowest first, with intervals where rollout means x (N, D) were kept."""
    groups, intervals = data.groups, None
    if x is not None:
        intervals = role_intervals(x @ vector, groups)
    counts, means = np.bincount(groups.index), data.means[:, space.layer]
    rows = [
        RoleProjection(
            role=name,
            projection=float(means[index] @ vector),
            n=int(counts[index]),
            coordinates=tuple(space.coordinates[index, :3].tolist()),
            positive=index == 0,
            low=None if intervals is None else intervals[index].low,
            high=None if intervals is None else intervals[index].high,
        )
        for index, name in enumerate(groups.names)
    ]
    return tuple(sorted(rows, key=lambda row: row.projection))


def _answer_projections(data: _Data, x: Array | None, vector: Array) -> AnswerProjections:
    """Projections of single rollouts; empty where none were kept."""
    if x is None:
        return AnswerProjections()
    projections, is_pole = x @ vector, data.groups.index == 0
    keys = np.array([data.activations.keys[row] for row in data.rows], dtype=object)
    return AnswerProjections(
        tuple(projections[is_pole].tolist()),
        tuple(projections[~is_pole].tolist()),
        {"positive": tuple(keys[is_pole]), "others": tuple(keys[~is_pole])},
    )
