"""Fitting: from recorded activations to the axis, the persona space, and how sure they are.

    fit = fit_axis(activations, kept)             # everything that a report says
    fit.axis.save(folder / "axis")

The layer to use is the one where the axis is both stable and the main direction of persona space: the highest product of
split-half cosine and cos(PC1, axis) among the middle layers. Both alone mislead: in the first layers the axis is stable
because the prompts differ in words, in the last it is large because the next token is.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray

from personatlas.analysis.fit.geometry import (
    Array,
    Groups,
    components,
    components_for,
    cosine,
    direction,
    first_component,
    pointing,
)
from personatlas.analysis.fit.uncertainty import (
    agreement,
    learning_curve,
    role_intervals,
    shuffled,
    split_half,
    split_questions,
    split_roles,
)
from personatlas.persona.axis import POLES, Axis, PersonaSpace
from personatlas.persona.errors import UserError
from personatlas.persona.pipeline.activations import Activations

LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
PARALLEL_FROM = (
    3e10  # replicates x rollouts x features x layers: below it, starting processes costs more than it gives
)
MIDDLE = (0.3, 0.9)  # the part of the depth in which the layer to use is looked for


@dataclass(frozen=True)
class Fit:
    """What fitting found: the artefacts and `report`, plain numbers for tables and plots (written as fit.json)."""

    axis: Axis
    space: PersonaSpace
    report: dict[str, Any]


def fit_axis(
    activations: Activations,
    kept: Sequence[str],
    *,
    scores: frozenset[int | None] | None,
    default: str,
    positive: str | None = None,
    layer: int | None = None,
    replicates: int = 100,
    seed: int = 0,
) -> Fit:
    """Fit the axis at every layer and the space at the layer to use.

    `kept` are the keys of the rollouts that count and `scores` the scores that they have (for the sums). `positive`
    names the first pole, the default role unless given; every other role is on the other side. `layer` overrides the
    choice. Raises `UserError` when a pole has no rollouts or a layer does not exist.
    """
    positive = positive or default
    rows, groups = _groups(activations, kept, positive)
    means = _all_layer_means(activations, groups, scores, default)  # (R+1, L, D)
    layers = _lines(activations, rows, groups, means, replicates, seed)
    chosen, why = _choose(layers, layer, activations.n_layers)
    axis = _axis(activations, rows, groups, means, chosen, positive, default)
    space = _space(activations, groups, means, chosen)
    x = _rollout_means(activations, rows, chosen)
    report = {
        "layers": layers,
        "layer": chosen,
        "why": why,
        "poles": list(axis.poles),
        "positive": positive,
        "roles": _roles(x, groups, means[:, chosen], axis, space, chosen, seed),
        "variance_ratio": space.variance_ratio.tolist()[:50],
        "components_for": {
            str(share): components_for(space.variance_ratio.double().numpy(), share)
            for share in (0.5, 0.7, 0.9)
        },
        "projections": _projections(activations, rows, x, groups, axis, chosen),
        "n_rollouts": len(rows),
        "curve": None
        if x is None or not replicates
        else learning_curve(x, groups, np.random.default_rng([seed, 8])).to_json(),
    }
    return Fit(axis, space, report)


def _groups(activations: Activations, kept: Sequence[str], positive: str) -> tuple[list[int], Groups]:
    wanted = set(kept)
    rows = [i for i, key in enumerate(activations.keys) if key in wanted]
    roles = [activations.keys[i].split("/", 1)[0] for i in rows]
    if positive not in roles:
        raise UserError(f"role {positive!r} has no kept rollout, so it cannot be a pole")
    names = (positive, *(role for role in dict.fromkeys(roles) if role != positive))
    if len(names) < 4:
        raise UserError(f"only {len(names) - 1} other roles are left: a persona space needs at least 3")
    place = {name: i for i, name in enumerate(names)}
    asked = [activations.keys[i].split("/")[2] for i in rows]
    number = {question: i for i, question in enumerate(sorted(set(asked)))}
    questions = np.array([number[question] for question in asked])
    return rows, Groups(np.array([place[role] for role in roles]), names, questions)


def _all_layer_means(
    activations: Activations, groups: Groups, scores: frozenset[int | None] | None, default: str
) -> Array:
    """Group means (R+1, L, D) from the sums, at every layer. The default is never filtered by score."""
    found = [activations.role_mean(name, None if name == default else scores) for name in groups.names]
    counted = np.bincount(groups.index)
    for name, (_, n), expected in zip(groups.names, found, counted, strict=True):
        if n != expected:
            raise UserError(
                f"role {name!r}: the sums hold {n} rollouts, the kept ones are {expected}; record again"
            )
    return torch.stack([mean for mean, _ in found]).numpy()


def _rollout_means(activations: Activations, rows: list[int], layer: int) -> Array | None:
    if layer not in activations.layers:
        return None
    return activations.rollout_means[rows, activations.layers.index(layer)].double().numpy()


def _lines(
    activations: Activations, rows: list[int], groups: Groups, means: Array, replicates: int, seed: int
) -> list[dict[str, Any]]:
    """The table, line by line: layers know nothing of each other, so a large fit takes them on all cores."""
    kept = {layer: activations.rollout_means[rows, place] for place, layer in enumerate(activations.layers)}
    work = replicates * len(rows) * means.shape[2] * len(kept)
    return list(
        Parallel(n_jobs=-1 if work > PARALLEL_FROM else 1)(
            delayed(_layer)(
                layer, None if x is None else x.numpy(), groups, means[:, layer], replicates, seed
            )
            for layer in range(activations.n_layers)
            for x in [kept.get(layer)]
        )
    )


def _layer(
    layer: int, rollouts: NDArray[np.float32] | None, groups: Groups, means: Array, replicates: int, seed: int
) -> dict[str, Any]:
    """One line of the table. What needs rollout means (N, D) is missing at layers that kept none."""
    axis = direction(means)
    pc1, variance = first_component(means)
    line: dict[str, Any] = {
        "layer": layer,
        "norm": float(np.linalg.norm(axis)),
        "cos_pc1": cosine(pc1, axis),
        "angle_pc1": float(np.degrees(np.arccos(np.clip(cosine(pc1, axis), -1, 1)))),
        "variance_pc1": variance,
    }
    x = None if rollouts is None else rollouts.astype(np.float64)
    if x is not None and replicates:
        generators = [np.random.default_rng([seed, purpose]) for purpose in range(5)]
        found = agreement(x, groups, generators[0], replicates)
        line["cos_pc1_by_questions"] = found.by_questions.to_json()
        line["cos_pc1_by_roles"] = found.by_roles.to_json()
        line["wobble"] = found.angle_to_estimate
        if (half := split_half(x, groups, generators[1], replicates)) is not None:
            line["split_half"] = half.to_json()
        line["split_roles"] = split_roles(x, groups, generators[2], replicates).to_json()
        if (apart := split_questions(x, groups, generators[4], replicates)) is not None:
            line["split_questions"] = apart.to_json()
        line["null"] = asdict(shuffled(x, groups, generators[3], replicates))
    return line


def _choose(layers: list[dict[str, Any]], asked: int | None, n_layers: int) -> tuple[int, str]:
    if asked is not None:
        if not 0 <= asked < n_layers:
            raise UserError(f"layer {asked} is not in this model (0..{n_layers - 1})")
        return asked, "asked for"
    low, high = (round(share * (n_layers - 1)) for share in MIDDLE)
    middle = [line for line in layers if low <= line["layer"] <= high and "split_half" in line]
    if not middle:  # no rollout means in the middle: agreement alone decides
        best = max(layers[low : high + 1], key=lambda line: line["cos_pc1"])
        return best["layer"], f"highest cos(PC1, axis), {best['cos_pc1']:.2f}, among layers {low}..{high}"
    best = max(middle, key=lambda line: line["cos_pc1"] * line["split_half"]["value"])
    why = (
        f"highest product of cos(PC1, axis) {best['cos_pc1']:.2f} and split-half cosine "
        f"{best['split_half']['value']:.2f} among layers {low}..{high}"
    )
    return best["layer"], why


def _axis(
    activations: Activations,
    rows: list[int],
    groups: Groups,
    means: Array,
    layer: int,
    positive: str,
    default: str,
) -> Axis:
    contrast = means[0] - means[1:].mean(0)  # (L, D)
    norms = np.linalg.norm(contrast, axis=1)
    if not (norms > 0).all():
        raise UserError("the poles coincide at some layer: nothing separates them")
    vectors = contrast / norms[:, None]
    quantiles = np.full((2, activations.n_layers, len(LEVELS)), np.nan)
    for l in activations.layers:
        x = _rollout_means(activations, rows, l)
        assert x is not None
        projections = x @ vectors[l]
        for side, member in enumerate((groups.index == 0, groups.index > 0)):
            quantiles[side, l] = np.quantile(projections[member], LEVELS)
    poles = POLES if positive == default else (positive, "others")
    return Axis(
        vectors=torch.from_numpy(vectors).float(),
        norms=torch.from_numpy(norms).float(),
        layers=tuple(range(activations.n_layers)),
        layer=layer,
        model=activations.model,
        levels=LEVELS,
        default_quantiles=torch.from_numpy(quantiles[0]).float(),
        role_quantiles=torch.from_numpy(quantiles[1]).float(),
        poles=poles,
        fit={
            "content": activations.content,
            "positive": positive,
            "n_rollouts": len(rows),
            "n_roles": groups.n_roles,
        },
    )


def _space(activations: Activations, groups: Groups, means: Array, layer: int) -> PersonaSpace:
    """The space at the chosen layer. The positive pole is placed in it (first row) but was not fitted."""
    centre, vectors, ratio = components(means[1:, layer])
    vectors = pointing(vectors, means[0, layer] - centre)
    coordinates = (means[:, layer] - centre) @ vectors.T
    return PersonaSpace(
        layer=layer,
        mean=torch.from_numpy(centre).float(),
        components=torch.from_numpy(vectors).float(),
        variance_ratio=torch.from_numpy(ratio).float(),
        coordinates=torch.from_numpy(coordinates).float(),
        roles=groups.names,
        model=activations.model,
    )


def _roles(
    x: Array | None, groups: Groups, means: Array, axis: Axis, space: PersonaSpace, layer: int, seed: int
) -> list[dict[str, Any]]:
    """Every role's place along the axis, lowest first, with an interval over its rollouts where they were kept."""
    vector = axis.vectors[layer].double().numpy()
    intervals = None if x is None else role_intervals(x @ vector, groups, np.random.default_rng([seed, 9]))
    counts = np.bincount(groups.index)
    rows = []
    for i, name in enumerate(groups.names):
        row = {
            "role": name,
            "projection": float(means[i] @ vector),
            "n": int(counts[i]),
            "coordinates": space.coordinates[i, :3].tolist(),
            "positive": i == 0,
        }
        if intervals:
            row |= {"low": intervals[i].low, "high": intervals[i].high}
        rows.append(row)
    return sorted(rows, key=lambda row: float(row["projection"]))


def _projections(
    activations: Activations, rows: list[int], x: Array | None, groups: Groups, axis: Axis, layer: int
) -> dict[str, Any]:
    """Projections of single rollouts at the chosen layer, for histograms; empty where none were kept."""
    if x is None:
        return {"positive": [], "others": []}
    projections = x @ axis.vectors[layer].double().numpy()
    first = groups.index == 0
    keys = [activations.keys[row] for row in rows]
    return {
        "positive": projections[first].tolist(),
        "others": projections[~first].tolist(),
        "keys": {
            "positive": [key for key, own in zip(keys, first, strict=True) if own],
            "others": [key for key, own in zip(keys, first, strict=True) if not own],
        },
    }
