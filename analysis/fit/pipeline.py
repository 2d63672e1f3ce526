"""The steps of an axis: sample answers under role prompts, judge them, record activations, fit, write the
report.

    fit = compute_axis("smollm2-135m", Path("runs/demo"), plan=PlanOptions(plan="demo"))
    fit.layer, fit.cos_pc1, fit.warnings

Every step resumes: what is in the run folder is not made again. `fit_run` and `report_run` repeat the last
steps on a run that was made before.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from personatlas.analysis.fit.axis import fit_axis
from personatlas.analysis.fit.comparison import compare_axes
from personatlas.analysis.fit.result import FIT_VERSION, DroppedRollouts, FitResult, RolePlay, TraitResult
from personatlas.analysis.fit.traits import fit_traits
from personatlas.analysis.stats import share_interval
from personatlas.persona.artifacts import digest, write_json
from personatlas.persona.axis import Axis, load_axis, load_space
from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.judges.base import SCORE_FILTERS, filter_by_score, read_scores
from personatlas.persona.models.load import Model
from personatlas.persona.options import FitOptions, JudgeOptions, ModelOptions, PlanOptions, option_values
from personatlas.persona.pipeline.activations import Activations, load_recorded
from personatlas.persona.pipeline.run_context import (
    judge_run,
    open_context,
    record_rollouts,
    require_judge,
    sample,
)
from personatlas.persona.pipeline.stages import content_of
from personatlas.persona.progress import say
from personatlas.persona.records import JsonObject
from personatlas.persona.roles.bank import RoleKind, role_kind
from personatlas.persona.roles.traits import load_traits
from personatlas.persona.rollout import Rollout, RolloutKey, of_kind, read_rollouts, with_scores
from personatlas.persona.runs import open_run, read_manifest, resolve_axis


def compute_axis(
    model: str | Model,
    out: Path,
    *,
    load: ModelOptions = ModelOptions(),
    plan: PlanOptions = PlanOptions(),
    judge: JudgeOptions = JudgeOptions(),
    fit: FitOptions = FitOptions(),
) -> FitResult | None:
    """Computes the Assistant Axis of a model into a run folder, and its report. Resumes where it stopped.

    Parameters
    ----------
    model
        a model's name, or a loaded one, which is used as it is
    out
        the run folder
    load
        how to load a model that is named
    plan
        which rollouts to make
    judge
        who scores whether answers play their roles
    fit
        what to fit

    Under torchrun only the first process fits; the others return None. Raises `UserError` for options that do
    not go together, before anything long begins, and for a folder that holds another run.
    """
    _require_options(fit)
    if judge.judge == "none" and fit.keep != "all":
        raise UserError(
            f"--judge none gives no scores, and --keep {fit.keep} uses scored answers alone: "
            "add --keep all, or take --judge rules"
        )
    require_judge(judge)
    with open_context(model, out, load, plan) as context:
        _require_enough_answers(context.plan.keys, fit, context.model.n_layers)
        rollouts = sample(context)
        rollouts = judge_run(context.run, context.bank, rollouts, judge, context.world)
        record_rollouts(context.run, context.model, rollouts, context.world)
        if context.world.rank:
            return None
        result = _fit_recorded(out, load_recorded(out), rollouts, context.bank.default.name, fit)
        _write_report(out, result)
        return result


def fit_run(run: Path, options: FitOptions = FitOptions()) -> FitResult:
    """Fits axis and persona space to a run's recorded activations, and writes its report.

    Raises `UserError` for a folder without recorded activations, and for rollouts that changed since.
    """
    _require_options(options)
    with open_run(run):
        of_kinds = load_recorded(run)
        activations = of_kinds["role"]
        recorded = dict(zip(activations.keys, activations.scores, strict=True))
        rollouts = of_kind(read_rollouts(run), "role")
        rollouts = with_scores([r for r in rollouts if r.key in recorded or r.is_empty], recorded)
        if content_of([rollout for rollout in rollouts if not rollout.is_empty]) != activations.content:
            raise UserError(
                f"{run}: rollouts changed after they were recorded; run `personatlas run record {run}` again"
            )
        roles = read_manifest(run).get("asked", {}).get("roles")
        if not roles:
            raise UserError(f"{run / 'run.json'} does not say which roles were asked for")
        result = _fit_recorded(run, of_kinds, rollouts, str(roles[0]), options)
        _write_report(run, result)
        return result


def report_run(run: Path) -> Path:
    """Writes the report.html of a fitted run again and returns its path. Raises `UserError` without a current
    fit."""
    with open_run(run):
        return _write_report(run, FitResult.load(run), force=True)


def _fit_recorded(
    folder: Path,
    recorded: Mapping[RoleKind, Activations],
    rollouts: Sequence[Rollout],
    default: str,
    options: FitOptions,
) -> FitResult:
    """Fits and writes the artefacts and fit.json; reads it where options and data are the same."""
    activations, traits, controls = (recorded.get(kind) for kind in ("role", "trait", "control"))
    assert activations is not None
    asked = {"content": activations.content, "version": FIT_VERSION, **option_values(options)}
    for name, beside in (("traits", traits), ("controls", controls)):
        if beside is not None:
            asked[name] = beside.content
    if options.compare is not None:
        asked["compared_with"] = digest(resolve_axis(str(options.compare)).with_suffix(".safetensors"))
    if (stored := _stored_fit(folder, asked)) is not None:
        return stored
    rollouts = of_kind(rollouts, "role")
    score_filter = SCORE_FILTERS[options.keep]
    passed, dropped = filter_by_score(rollouts, score_filter, default)
    fit = fit_axis(
        activations,
        [rollout.key for rollout in passed],
        scores=None if score_filter.name == "all" else score_filter.scores,
        default=default,
        positive=options.positive,
        layer=options.layer,
        replicates=options.replicates,
        controls=controls,
    )
    fit.axis.save(folder / "axis")
    fit.space.save(folder / "space")
    trait_result, trait_problem = _fit_traits(folder, traits, fit.axis, options)
    names = ("axis", "space") if trait_result is None else ("axis", "space", "traits")
    projections = {role.role: role.projection for role in fit.result.roles}
    role_play = None
    if judged := [rollout for rollout in rollouts if rollout.score is not None]:
        shows = np.array([rollout.score in (2, 3) for rollout in judged], dtype=float)
        clusters = [rollout.role for rollout in judged], [rollout.question for rollout in judged]
        role_play = RolePlay(float(shows.mean()), len(judged), share_interval(shows, *clusters))
    result = replace(
        fit.result,
        options=asked,
        artefacts={name: digest(folder / f"{name}.safetensors") for name in names},
        dropped=DroppedRollouts.from_json(dropped.to_json()),
        role_play=role_play,
        traits=trait_result,
        trait_problem=trait_problem,
        comparison=None if options.compare is None else compare_axes(fit.axis, projections, options.compare),
    )
    write_json(folder / "fit.json", result.to_json())
    return result


def _stored_fit(folder: Path, asked: JsonObject) -> FitResult | None:
    """The fit in the folder, if it was made with the same options and its artefacts are whole."""
    if not (folder / "fit.json").exists():
        return None
    try:
        stored = FitResult.load(folder)
        load_axis(folder / "axis")
        load_space(folder / "space")
        if stored.traits is not None:
            load_traits(folder / "traits")
    except UserError as error:
        say(f"{error.args[0].partition(';')[0]}: fitted again")
        return None
    return stored if stored.artefacts and stored.options == asked else None


def _fit_traits(
    folder: Path, activations: Activations | None, axis: Axis, options: FitOptions
) -> tuple[TraitResult | None, str | None]:
    """The trait space, or why there is none: traits that make no space must not cost a run its axis."""
    for ending in ("json", "safetensors"):
        (folder / f"traits.{ending}").unlink(missing_ok=True)  # of another axis
    if activations is None:
        return None, None
    try:
        fit = fit_traits(activations, axis, replicates=options.replicates)
    except UserError as error:
        return None, str(error)
    fit.space.save(folder / "traits")
    return fit.result, None


def _write_report(folder: Path, fit: FitResult, *, force: bool = False) -> Path:
    """Writes report.html unless it is that of this fit."""
    path = folder / "report.html"
    stamp = hashlib.sha256(json.dumps(fit.to_json(), sort_keys=True).encode()).hexdigest()[:16]
    from personatlas.analysis.fit.page import write_report  # with plotly

    if force or not path.exists() or stamp not in path.read_text(encoding="utf-8")[:4000]:
        rollouts = with_scores(of_kind(read_rollouts(folder), "role"), read_scores(folder / "scores.jsonl"))
        write_report(path, fit, rollouts, read_manifest(folder), stamp)
    return path


def _require_options(options: FitOptions) -> None:
    """Raises `UserError` for options that no run allows."""
    options.check()
    if options.compare is not None:
        load_axis(resolve_axis(str(options.compare)))


def _require_enough_answers(keys: Sequence[str], options: FitOptions, n_layers: int) -> None:
    """Raises `UserError`, before the long steps, for what could only fail after them."""
    counts = Counter(RolloutKey.parse(key).role for key in keys if role_kind(key) == "role")
    score_filter, fewest = SCORE_FILTERS[options.keep], min(counts.values())
    if fewest < score_filter.minimum:
        raise UserError(
            f"--keep {score_filter.name} needs {score_filter.minimum} answers a role and this plan makes "
            f"{fewest}; give more --questions, --prompts or --samples, or --keep all"
        )
    if options.positive is not None and options.positive not in counts:
        raise UserError(f"--positive {not_one_of(options.positive, counts)} (the roles of this run)")
    if options.layer is not None and not 0 <= options.layer < n_layers:
        raise UserError(f"--layer {options.layer} is not in this model (0..{n_layers - 1})")
