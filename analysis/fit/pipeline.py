"""The fitting stage of a run: from recorded activations to axis, space, traits and fit.json, once.

content = fit_run(folder, activations, trait_activations, rollouts, "default", FitOptions())

One axis beside another of the same model: another bank, another plan, or the paper repository's.

    compared(axis, fit["roles"], Path("runs/other"))     # a run folder, an axis artefact, or a packaged model's name

Cosines are by layer. The places of the roles that both have are compared too (Spearman), which axes of different models
allow as well: their roles may be ranked alike although their directions live in other spaces.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from personatlas.analysis.fit.axis import Fit, fit_axis
from personatlas.analysis.fit.traits import fit_traits
from personatlas.persona.artifacts import digest, read_json, write_json
from personatlas.persona.axis import Axis, load_axis, load_space
from personatlas.persona.errors import UserError
from personatlas.persona.judges.base import KEEP, Dropped, kept, role_play_share
from personatlas.persona.options import FitOptions, given
from personatlas.persona.pipeline.activations import Activations
from personatlas.persona.rollout import Rollout, without_poles
from personatlas.persona.runs import resolve_axis


def other_axis(name: str | Path) -> Axis:
    """The axis of a run folder, an artefact or a packaged model. Raises `UserError` where there is none."""
    return load_axis(resolve_axis(str(name)))


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
        found["cosines"] = {
            str(layer): float(axis.at(layer).double() @ other.at(layer).double()) for layer in shared
        }
    alike = ranked_alike(
        {row["role"]: row["projection"] for row in roles}, places(resolve_axis(str(path)), other)
    )
    if alike is not None:
        found["roles"] = {
            "n": alike["n"],
            "spearman": alike["value"],
            "low": alike["low"],
            "high": alike["high"],
        }
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


def ranked_alike(
    ours: Mapping[str, float], theirs: Mapping[str, float], draws: int = 1000
) -> dict[str, Any] | None:
    """Spearman's correlation of the roles that both have, with a 95% bootstrap interval over roles; None below three, and
    where all of them lie at one place."""
    both = np.array([(ours[name], theirs[name]) for name in ours if name in theirs])
    if len(both) < 3 or (both == both[0]).all(axis=0).any():
        return None
    generator = np.random.default_rng(0)
    drawn = [both[generator.integers(len(both), size=len(both))] for _ in range(draws)]
    spread = [
        spearmanr(*one.T).statistic
        for one in drawn
        if len(np.unique(one[:, 0])) > 1 < len(np.unique(one[:, 1]))
    ]
    low, high = np.quantile(spread, (0.025, 0.975))
    return {
        "value": float(spearmanr(*both.T).statistic),
        "low": float(low),
        "high": float(high),
        "n": len(both),
    }


FIT_VERSION = 6  # raise it when fitting changes, so that stored fits are made again


def fit_run(
    folder: Path,
    activations: Activations,
    of_traits: Activations | None,
    rollouts: Sequence[Rollout],
    default: str,
    options: FitOptions,
) -> dict[str, Any]:
    """Fit and write the artefacts and fit.json, whose content is returned; read it when nothing has changed."""
    if options.replicates == 1:
        raise UserError("--replicates 1 makes no interval; give 0 for none, or as many as 100")
    asked = {"content": activations.content, "version": FIT_VERSION, **given(options)}
    if of_traits is not None:
        asked["traits"] = of_traits.content
    if options.compare is not None:
        asked["compared_with"] = digest(resolve_axis(str(options.compare)).with_suffix(".safetensors"))
    if (before := _unchanged(folder, asked)) is not None:
        return before
    of_roles = without_poles(rollouts)
    found, dropped = _fit_roles(activations, of_roles, default, options)
    found.axis.save(folder / "axis")
    found.space.save(folder / "space")
    traits, problem = _fit_traits(folder, of_traits, found.axis, options)
    comparison = (
        None if options.compare is None else compared(found.axis, found.report["roles"], options.compare)
    )
    names = ("axis", "space") if traits is None else ("axis", "space", "traits")
    scored = any(rollout.score is not None for rollout in of_roles)
    content = {
        "asked": asked,
        "artefacts": {name: digest(folder / f"{name}.safetensors") for name in names},
        **found.report,
        "default": default,
        "model": activations.model,
        "dropped": dropped.to_json(),
        "role_play": role_play_share(of_roles)._asdict() if scored else None,
        "traits": traits,
        "trait_problem": problem,
        "compared": comparison,
    }
    write_json(folder / "fit.json", content)
    return content


def _fit_traits(
    folder: Path, activations: Activations | None, axis: Axis, options: FitOptions
) -> tuple[dict[str, Any] | None, str | None]:
    """The traits' part of fit.json, or why there is none: traits that make no space must not cost a run its axis."""
    for ending in ("json", "safetensors"):
        (folder / f"traits.{ending}").unlink(missing_ok=True)  # of another axis
    if activations is None:
        return None, None
    try:
        found = fit_traits(activations, axis, replicates=options.replicates)
    except UserError as error:
        return None, str(error)
    found.space.save(folder / "traits")
    return found.report, None


def _fit_roles(
    activations: Activations, rollouts: list[Rollout], default: str, options: FitOptions
) -> tuple[Fit, Dropped]:
    keep = KEEP[options.keep]
    left, dropped = kept(rollouts, keep, default)
    found = fit_axis(
        activations,
        [rollout.key for rollout in left],
        scores=None if keep.name == "all" else keep.scores,
        default=default,
        positive=options.positive,
        layer=options.layer,
        replicates=options.replicates,
    )
    return found, dropped


def _unchanged(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The fit that is there, if it was asked for the same and its artefacts are whole."""
    if not (folder / "fit.json").exists():
        return None
    before: dict[str, Any] = read_json(folder / "fit.json")
    files = {folder / f"{name}.safetensors": value for name, value in before.get("artefacts", {}).items()}
    whole = bool(files) and all(path.exists() and digest(path) == value for path, value in files.items())
    return before if before.get("asked") == asked and whole else None
