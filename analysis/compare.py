"""One axis beside another of the same model: another bank, another plan, or the paper repository's.

    compared(axis, fit["roles"], Path("runs/other"))     # a run folder, an axis artefact, or a packaged model's name

Cosines are by layer. The places of the roles that both have are compared too (Spearman), which axes of different models
allow as well: their roles may be ranked alike although their directions live in other spaces.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from personaxis.persona.axis import Axis, load_axis, load_space
from personaxis.persona.fitted import axis_stem
from personaxis.persona.store import read_json


def other_axis(name: str | Path) -> Axis:
    """The axis of a run folder, an artefact or a packaged model. Raises `KnownError` where there is none."""
    return load_axis(axis_stem(str(name)))


def compared(axis: Axis, roles: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """Plain numbers: the cosine at each layer that both have, None for another width or depth, and the roles' rank correlation."""
    other = other_axis(path)
    same = all(axis.model.get(name) == other.model.get(name) for name in ("n_layers", "d_model"))
    found: dict[str, Any] = {
        "path": str(path),
        "model": other.model.get("id"),
        "poles": list(other.poles),
        "cosines": None,
    }
    known = {axis.model.get("fingerprint"), other.model.get("fingerprint")} - {None}
    found["same_model"] = same and len(known) <= 1
    if same:
        shared = [layer for layer in axis.layers if layer in other.layers]
        found["cosines"] = {str(layer): float(axis.at(layer).double() @ other.at(layer).double()) for layer in shared}
    alike = ranked_alike({row["role"]: row["projection"] for row in roles}, places(axis_stem(str(path)), other))
    if alike is not None:
        found["roles"] = {"n": alike["n"], "spearman": alike["value"], "low": alike["low"], "high": alike["high"]}
    return found


def places(stem: Path, axis: Axis) -> dict[str, float]:
    """Where each role lies along an axis: by the fit beside it, else by the persona space beside it, else nowhere."""
    if (fit := stem.with_name("fit.json")).is_file():
        return {row["role"]: row["projection"] for row in read_json(fit)["roles"]}
    if not stem.with_name("space.json").is_file():
        return {}
    space = load_space(stem.with_name("space"))
    means = space.mean.double() + space.coordinates.double() @ space.components.double()  # (R, D)
    return dict(zip(space.roles, (means @ axis.at(space.layer).double()).tolist(), strict=True))


def ranked_alike(ours: Mapping[str, float], theirs: Mapping[str, float], draws: int = 1000) -> dict[str, Any] | None:
    """Spearman's correlation of the roles that both have, with a 95% bootstrap interval over roles; None below three, and
    where all of them lie at one place."""
    both = np.array([(ours[name], theirs[name]) for name in ours if name in theirs])
    if len(both) < 3 or (both == both[0]).all(axis=0).any():
        return None
    generator = np.random.default_rng(0)
    drawn = [both[generator.integers(len(both), size=len(both))] for _ in range(draws)]
    spread = [spearmanr(*one.T).statistic for one in drawn if len(np.unique(one[:, 0])) > 1 < len(np.unique(one[:, 1]))]
    low, high = np.quantile(spread, (0.025, 0.975))
    return {"value": float(spearmanr(*both.T).statistic), "low": float(low), "high": float(high), "n": len(both)}
