"""The fitting stage of a run: from recorded activations to axis, space, traits and fit.json, once.

content = fit_run(folder, activations, trait_activations, rollouts, "default", FitOptions())
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from personaxis.analysis.compare import compared
from personaxis.analysis.fit import Fit, fit_axis
from personaxis.analysis.traits import fit_traits
from personaxis.persona.activations import Activations
from personaxis.persona.axis import Axis
from personaxis.persona.errors import KnownError
from personaxis.persona.fitted import axis_stem
from personaxis.persona.judge import KEEP, Dropped, kept, role_play_share
from personaxis.persona.options import FitOptions, given
from personaxis.persona.rollouts import Rollout, without_poles
from personaxis.persona.store import digest, read_json, write_json

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
        raise KnownError("--replicates 1 makes no interval; give 0 for none, or as many as 100")
    asked = {"content": activations.content, "version": FIT_VERSION, **given(options)}
    if of_traits is not None:
        asked["traits"] = of_traits.content
    if options.compare is not None:
        asked["compared_with"] = digest(axis_stem(str(options.compare)).with_suffix(".safetensors"))
    if (before := _unchanged(folder, asked)) is not None:
        return before
    of_roles = without_poles(rollouts)
    found, dropped = _fit_roles(activations, of_roles, default, options)
    found.axis.save(folder / "axis")
    found.space.save(folder / "space")
    traits, problem = _fit_traits(folder, of_traits, found.axis, options)
    comparison = None if options.compare is None else compared(found.axis, found.report["roles"], options.compare)
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
    except KnownError as error:
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
