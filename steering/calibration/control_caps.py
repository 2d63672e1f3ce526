"""Controls of a calibrated cap that disturb the model as much as it does, along other directions.

    axes = control_axes(axis, activations, "default", count=20, seed=0)
    caps = match_kl(measurements, axes, cap.layers, texts, target=0.05, half="choose")

A random cap that fires as often as the chosen one costs a tenth of its KL, so that it gains nothing says
little. Here the floors of every control are raised or lowered together until KL on the same benign texts is
the chosen cap's: along random directions, along the axis of shuffled role labels, and along PC2 of the roles.
Random directions whose floors are fitted by the same gradient on the same objective ask what fitting alone
can do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from personatlas.analysis.fit.geometry import components, direction, turned_toward
from personatlas.analysis.stats import Array
from personatlas.persona.axis import Axis
from personatlas.persona.interventions import Cap
from personatlas.persona.pipeline.activations import Activations
from personatlas.persona.rollout import Rollout, RolloutKey
from personatlas.steering.arms import RANDOM
from personatlas.steering.calibration.fit_floors import START, Floors
from personatlas.steering.calibration.measure import Measurements
from personatlas.steering.calibration.quantile_floors import read_projections

SHUFFLED, SECOND = "shuffled labels", "PC2"
SAME_KL, FITTED = ", same KL", ", fitted"  # how the names of such arms end
TOLERANCE = 0.05  # KL is matched within this share
SHIFTS = (-4.0, 6.0)  # spreads of a layer's projections between which the floors' shift is searched
ROUNDS = 10


def control_axes(
    axis: Axis, activations: Activations | None, default: str, count: int, seed: int
) -> dict[str, Axis]:
    """`count` random directions, and with a run's activations that keep every layer of the axis also the axis
    of role labels shuffled within questions, and PC2 of the roles' means.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = {
        f"{RANDOM} {number}": replace(
            axis, vectors=normalize(torch.randn(axis.vectors.shape, generator=generator), dim=1)
        )
        for number in range(1, count + 1)
    }
    if count and activations is not None and set(axis.layers) <= set(activations.layers):
        axes[SHUFFLED] = _of_layers(
            axis, activations, _shuffled_means(activations, default, seed), first=True
        )
        axes[SECOND] = _of_layers(axis, activations, _role_means(activations, default), first=False)
    return axes


def _of_layers(axis: Axis, activations: Activations, means: Array, *, first: bool) -> Axis:
    """The axis with, at every layer, the direction of role means (R+1, K, D), or else their second component."""
    vectors = []
    for layer in axis.layers:
        own = means[:, activations.layers.index(layer)]
        vector = direction(own) if first else turned_toward(components(own[1:])[1][1:2], direction(own))[0]
        vectors.append(torch.from_numpy(vector).float())
    return replace(axis, vectors=normalize(torch.stack(vectors), dim=1))


def _role_means(activations: Activations, default: str, order: NDArray[np.int64] | None = None) -> Array:
    """The default's and then the roles' means (R+1, K, D) of rollouts in an order, their own unless given."""
    x = activations.rollout_means.double().numpy()
    x = x if order is None else x[order]
    roles = np.array([RolloutKey.parse(key).role for key in activations.keys])
    names = [default, *(name for name in activations.roles if name != default)]
    return np.stack([x[roles == name].mean(0) for name in names])


def _shuffled_means(activations: Activations, default: str, seed: int) -> Array:
    """The same where the answers to each question are dealt anew among the roles."""
    questions = np.array([RolloutKey.parse(key).question for key in activations.keys])
    draws = np.random.default_rng(seed).random(len(questions))
    order = np.empty(len(questions), dtype=np.int64)
    order[np.argsort(questions, kind="stable")] = np.lexsort((draws, questions))
    return _role_means(activations, default, order)


def match_kl(
    measurements: Measurements,
    axes: Mapping[str, Axis],
    layers: Sequence[int],
    texts: Sequence[Rollout],
    target: float,
    half: str,
) -> dict[str, Cap]:
    """A cap along each axis whose KL on the half's benign texts is `target` within `TOLERANCE`.

    All of its floors, which begin at the quantiles `START` of the texts' projections, are shifted by the same
    number of spreads. Axes that cannot reach the target are left out.
    """
    floors = {name: _quantile_floors(measurements, axis, layers, texts) for name, axis in axes.items()}
    ends = dict.fromkeys(floors, SHIFTS)
    caps: dict[str, Cap] = {}
    for _ in range(ROUNDS):
        middle = {name: sum(ends[name]) / 2 for name in floors if name not in caps}
        arms = {name: floors[name].cap(axes[name], shift) for name, shift in middle.items()}
        for name, cost in measurements.costs({name: [cap] for name, cap in arms.items()}, half).items():
            if abs(cost.kl / target - 1) <= TOLERANCE:
                caps[name] = arms[name]
            low, high = ends[name]
            ends[name] = (middle[name], high) if cost.kl < target else (low, middle[name])
    return {name: replace(caps[name], population=name) for name in axes if name in caps}


def _quantile_floors(
    measurements: Measurements, axis: Axis, layers: Sequence[int], texts: Sequence[Rollout]
) -> Floors:
    projections = read_projections(measurements.model, axis, {"default": texts})
    columns = projections.columns(layers)
    sides = [own["default"][:, columns] for own in (projections.prompts, projections.tokens)]
    start = torch.stack([side.quantile(level, dim=0) for side, level in zip(sides, START, strict=True)])
    return Floors(tuple(layers), start, torch.stack([side.std(0) for side in sides]))
