"""One axis beside another: from another bank or plan, another model, or the paper's repository.

    compare_axes(axis, {"pirate": -3.2}, Path("runs/other"))    # a run, an axis artefact, or a packaged model

Cosines are by layer, between axes of one width and depth. The projections of the roles that both have are
compared by rank (Spearman) and as z-scores, between any two axes: two models may rank their roles alike
although their spaces differ.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import norm, spearmanr

from personatlas.analysis.fit.result import AxisComparison, RoleCorrelation
from personatlas.analysis.stats import TAILS, Interval
from personatlas.persona.artifacts import read_record
from personatlas.persona.axis import Axis, load_axis, load_space
from personatlas.persona.records import JsonRecord, Number
from personatlas.persona.runs import resolve_axis


@dataclass(frozen=True)
class _RoleRow(JsonRecord):
    role: str
    projection: Number


@dataclass(frozen=True)
class _Roles(JsonRecord):
    """The roles of fit.json, which earlier versions have too."""

    roles: tuple[_RoleRow, ...]


def compare_axes(axis: Axis, projections: Mapping[str, float], path: Path) -> AxisComparison:
    """Returns an axis and its roles' projections beside the axis at `path`. Raises `UserError` where there is
    none."""
    stem = resolve_axis(str(path))
    other = load_axis(stem)
    same_size = all(axis.model.get(name) == other.model.get(name) for name in ("n_layers", "d_model"))
    cosines = None
    if same_size:
        layers = [layer for layer in axis.layers if layer in other.layers]
        cosines = {str(layer): float(axis.at(layer).double() @ other.at(layer).double()) for layer in layers}
    fingerprints = {axis.model.get("fingerprint"), other.model.get("fingerprint")} - {None}
    theirs = _projections_of(stem, other)
    ranks = rank_correlation(projections, theirs)
    shared = {name: (place, theirs[name]) for name, place in projections.items() if name in theirs}
    return AxisComparison(
        path=str(path),
        model=other.model.get("id"),
        poles=other.poles,
        same_model=same_size and len(fingerprints) <= 1,
        cosines=cosines,
        roles=None if ranks is None else RoleCorrelation(**vars(ranks)),
        projections=None if ranks is None else shared,
    )


def _projections_of(stem: Path, axis: Axis) -> dict[str, float]:
    """The roles' projections on an axis from the fit beside it, else from the persona space, else none."""
    if (fit := stem.with_name("fit.json")).is_file():
        return {row.role: row.projection for row in read_record(fit, _Roles).roles}
    if not stem.with_name("space.json").is_file():
        return {}
    space = load_space(stem.with_name("space"))
    means = space.mean.double() + space.coordinates.double() @ space.components.double()  # (R, D)
    return dict(zip(space.roles, (means @ axis.at(space.layer).double()).tolist(), strict=True))


def rank_correlation(first: Mapping[str, float], second: Mapping[str, float]) -> Interval | None:
    """Returns Spearman's correlation over the n roles that both have, with its interval.

    On the Fisher scale with the variance (1 + r² / 2) / (n - 3) of Bonett and Wright (2000). None for fewer
    than three roles, and where all projections of either are equal.
    """
    pairs = np.array([(first[name], second[name]) for name in first if name in second])
    if len(pairs) < 3 or (pairs == pairs[0]).all(axis=0).any():
        return None
    r, n = float(spearmanr(*pairs.T).statistic), len(pairs)
    if n == 3 or abs(r) == 1:
        return Interval(r, None, None, n)
    reach = norm.ppf(TAILS[1]) * math.sqrt((1 + r * r / 2) / (n - 3))
    return Interval(r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach), n)
