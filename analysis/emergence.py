"""How an axis emerges while a model is trained: the fits of its checkpoints beside one another, at one layer.

    found = emergence({0: (fit, axis), 512: (fit, axis), 3112: (fit, axis)})
    found["checkpoints"][-1]["pole"]             # {"z": 1.8, "place": 2, "of": 105}

Projections of different weights have different scales, so a role's place is its z among the roles of its checkpoint: its
projection minus their mean, over their standard deviation, the positive pole left out of both. Everything is at one layer: the
one that the last checkpoint's fit is about.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from personatlas.analysis.fit.pipeline import ranked_alike
from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError

SHOWN = 6  # roles at either end of the last checkpoint whose way is drawn


def emergence(fits: Mapping[int, tuple[dict[str, Any], Axis]]) -> dict[str, Any]:
    """Plain numbers by checkpoint, and every role's z in each. Raises `UserError` for fits of fewer than two checkpoints, at
    different layers, or of different roles."""
    steps = sorted(fits)
    if len(steps) < 2:
        raise UserError("an axis emerges over checkpoints: at least 2 are needed")
    layer, positive = fits[steps[-1]][0]["layer"], fits[steps[-1]][0]["positive"]
    places = {step: {row["role"]: row["projection"] for row in fits[step][0]["roles"]} for step in steps}
    for step in steps:
        if fits[step][0]["layer"] != layer:
            raise UserError(
                f"the fit of step {step} is about layer {fits[step][0]['layer']}, the last one about {layer}"
            )
    shared = set.intersection(*(set(own) for own in places.values())) - {positive}
    if len(shared) < 3:
        raise UserError(f"the checkpoints have {len(shared)} roles in common: at least 3 are needed")
    z = {step: _standardised(own, shared, positive) for step, own in places.items()}
    last = fits[steps[-1]][1].at(layer).double()
    rows = [
        {
            "step": step,
            **_of_fit(fits[step][0], layer),
            "pole": _place(z[step], positive),
            "ranked_alike": ranked_alike(_without(z[step], positive), _without(z[steps[-1]], positive)),
            "cosine": float(fits[step][1].at(layer).double() @ last),
        }
        for step in steps
    ]
    return {"layer": layer, "positive": positive, "checkpoints": rows, "roles": _courses(z, steps)}


def _of_fit(fit: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """What a fit says of itself at the layer."""
    row = next(one for one in fit["layers"] if one["layer"] == layer)
    null = row.get("null") or {}
    cosine = row.get("cos_pc1_by_roles") or {"value": row["cos_pc1"], "low": None, "high": None}
    return {
        "cos_pc1": {name: cosine[name] for name in ("value", "low", "high")},
        "cos_pc1_shuffled": null.get("cos_pc1"),
        "split_half": row.get("split_half"),
        "length": row["norm"],
        "length_shuffled": null.get("norm"),
        "p": null.get("p_norm"),
        "role_play": (fit.get("role_play") or {}).get("share"),
    }


def _standardised(places: Mapping[str, float], shared: set[str], positive: str) -> dict[str, float]:
    values = np.array([places[name] for name in sorted(shared)])
    spread = float(values.std()) or 1.0
    return {name: (places[name] - float(values.mean())) / spread for name in (*sorted(shared), positive)}


def _without(z: Mapping[str, float], positive: str) -> dict[str, float]:
    return {name: value for name, value in z.items() if name != positive}


def _place(z: Mapping[str, float], positive: str) -> dict[str, Any]:
    above = sum(value > z[positive] for name, value in z.items() if name != positive)
    return {"z": z[positive], "place": 1 + above, "of": len(z)}


def _courses(z: Mapping[int, Mapping[str, float]], steps: Sequence[int]) -> dict[str, list[float]]:
    """Every role's z over the steps, in the order of the last one."""
    return {
        name: [z[step][name] for step in steps]
        for name in sorted(z[steps[-1]], key=lambda one: z[steps[-1]][one])
    }


def ends(
    courses: Mapping[str, Sequence[float]], positive: str, count: int = SHOWN
) -> tuple[list[str], list[str]]:
    """The lowest and the highest roles at the last checkpoint, without the positive pole."""
    names = sorted((name for name in courses if name != positive), key=lambda name: courses[name][-1])
    count = min(count, len(names) // 2)
    return names[:count], names[len(names) - count :]


def settled(rows: Sequence[Mapping[str, Any]], least: float = 0.8) -> int | None:
    """The first step from which on roles are ranked as at the end, to a correlation of `least`; the last one does not count."""
    found = None
    for row in reversed(rows[:-1]):
        alike = row["ranked_alike"]
        if alike is None or not math.isfinite(alike["value"]) or alike["value"] < least:
            break
        found = int(row["step"])
    return found
