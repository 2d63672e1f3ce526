"""One axis beside another of the same model: another bank, another plan, or the paper repository's.

    compared(axis, fit["roles"], Path("runs/other"))     # a run folder, an axis artefact, or a packaged model's name

Cosines are by layer. Where the other is a run, the places of the roles that both have are compared too (Spearman), which
axes of different models allow as well: their roles may be ranked alike although their directions live in other spaces.
"""

from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from personaxis.persona.axis import Axis, load_axis
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
    fit = path / "fit.json"
    if path.is_dir() and fit.is_file():
        theirs = {row["role"]: row["projection"] for row in read_json(fit)["roles"]}
        both = [(row["projection"], theirs[row["role"]]) for row in roles if row["role"] in theirs]
        if len(both) >= 3:
            rank = spearmanr(*zip(*both, strict=True))
            found["roles"] = {"n": len(both), "spearman": float(rank.statistic)}
    return found
