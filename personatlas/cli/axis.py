"""The verbs of `analysis/`: axis (everything, end to end), fit and report.

`axis` reads like the paper's methods: sample answers under role prompts, judge them, record them, fit, report.

The verb `emergence`: the axis of a training run's checkpoints, one after another, and a page that shows it emerge.
"""

import hashlib
import json as json_module
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from personatlas.cli.options import FIT, JUDGE, MODEL, PLAN, Json, ModelName
from personatlas.cli.output import print_json
from personatlas.persona.errors import UserError
from personatlas.persona.options import FitOptions, JudgeOptions, ModelOptions, PlanOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import default_folder


def axis(
    model: ModelName,
    /,
    *,
    out: Path | None = None,
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    plan: Annotated[PlanOptions, PLAN] = PlanOptions(),
    judge: Annotated[JudgeOptions, JUDGE] = JudgeOptions(),
    fit: Annotated[FitOptions, FIT] = FitOptions(),
    json: Json = False,
) -> None:
    """The Assistant Axis of a checkpoint, end to end: rollouts, scores, activations, fit, report. Resumes where it stopped.

    Parameters
    ----------
    out
        the run folder; runs/NAME unless given
    """
    folder = out or default_folder(model)
    found = fitted_run(model, folder, load, plan, judge, fit)
    if found is not None:
        _result(found, folder / "report.html", json)


def fitted_run(
    model: str, folder: Path, load: ModelOptions, plan: PlanOptions, judge: JudgeOptions, fit: FitOptions
) -> dict[str, Any] | None:
    """All steps of `axis` into a run folder: the content of its fit.json, on the first of several processes only."""
    from personatlas.analysis.fit.pipeline import fit_run
    from personatlas.persona.pipeline.run_context import (
        judge_run,
        open_context,
        record_run,
        require_judge,
        sample,
    )

    require_judge(judge)
    _require_keep(fit.keep)
    with open_context(model, folder, load, plan) as work:
        _require_known(work.bank.default.name, work.plan.keys, fit, work.model.n_layers)
        rollouts = sample(work)
        rollouts = judge_run(work.run, work.bank, rollouts, judge, work.world)
        activations, of_traits = record_run(work, rollouts)
        if work.world.rank:
            return None
        of_traits = of_traits or _trait_activations(folder)
        found = fit_run(folder, activations, of_traits, rollouts, work.bank.default.name, fit)
        _report(folder, found)
        return found


def fit(run: Path, /, *, fit: Annotated[FitOptions, FIT] = FitOptions(), json: Json = False) -> None:
    """Fit axis and persona space to a run's activations, and write its report.

    Parameters
    ----------
    run
        a run folder with recorded activations
    """
    from personatlas.analysis.fit.pipeline import fit_run
    from personatlas.persona.pipeline.activations import load_activations
    from personatlas.persona.runs import open_run

    _require_keep(fit.keep)
    with open_run(run):
        activations = load_activations(run / "activations")
        rollouts = _recorded_rollouts(run, activations)
        found = fit_run(run, activations, _trait_activations(run), rollouts, _default_name(run), fit)
        _result(found, _report(run, found), json)


def report(run: Path, /) -> None:
    """Write the report.html of a fitted run again, or that of a training run at any moment.

    Parameters
    ----------
    run
        a run folder with a fit, or a training run
    """
    from personatlas.analysis.fit.pipeline import FIT_VERSION
    from personatlas.persona.artifacts import read_json
    from personatlas.persona.runs import is_training_run, open_run

    if is_training_run(run):  # which may be going on: its lock is not asked for
        from personatlas.training.report.page import write_training_report

        say(f"report: {write_training_report(run)}")
        return
    with open_run(run):
        found = read_json(run / "fit.json")
        if found["asked"].get("version") != FIT_VERSION:
            raise UserError(
                f"{run} was fitted by another version of personatlas; run `personatlas run fit {run}`"
            )
        say(f"report: {_report(run, found, again=True)}")


def _report(folder: Path, fit: dict[str, Any], *, again: bool = False) -> Path:
    from personatlas.analysis.fit.page import write_report
    from personatlas.persona.artifacts import read_json
    from personatlas.persona.rollout import read_rollouts, with_scores, without_poles

    path = folder / "report.html"
    stamp = hashlib.sha256(json_module.dumps(fit, sort_keys=True).encode()).hexdigest()[:16]
    if not again and path.exists() and stamp in path.read_text(encoding="utf-8")[:4000]:
        return path
    rollouts = with_scores(without_poles(read_rollouts(folder)), _scores(folder))
    write_report(path, fit, rollouts, read_json(folder / "run.json"), stamp)
    return path


def _trait_activations(folder: Path) -> Any:
    """The traits' activations, where they were recorded."""
    from personatlas.persona.pipeline.activations import load_activations

    stem = folder / "trait_activations"
    return load_activations(stem) if stem.with_suffix(".json").exists() else None


def _scores(folder: Path) -> dict[str, int | None]:
    from personatlas.persona.judges.base import read_scores

    return read_scores(folder / "scores.jsonl")


def _recorded_rollouts(folder: Path, activations: Any) -> Any:
    """The rollouts that were recorded, with the scores that they were recorded with."""
    from personatlas.persona.pipeline.stages import content_of
    from personatlas.persona.rollout import read_rollouts, with_scores, without_poles

    recorded = dict(zip(activations.keys, activations.scores, strict=True))
    found = without_poles(read_rollouts(folder))
    rollouts = with_scores([r for r in found if r.key in recorded or r.is_empty], recorded)
    if content_of([rollout for rollout in rollouts if not rollout.is_empty]) != activations.content:
        raise UserError(
            f"{folder}: rollouts changed after they were recorded; run `personatlas run record {folder}` again"
        )
    return rollouts


def _default_name(folder: Path) -> str:
    from personatlas.persona.artifacts import read_json

    asked = read_json(folder / "run.json").get("asked", {})
    if not asked.get("roles"):
        raise UserError(f"{folder / 'run.json'} does not say which roles were asked for")
    return str(asked["roles"][0])


def _require_keep(name: str) -> None:
    from personatlas.persona.judges.base import KEEP

    if name not in KEEP:
        raise UserError(f"--keep {name!r} is not one of {', '.join(KEEP)}")


def _require_known(default: str, keys: list[str], options: FitOptions, n_layers: int) -> None:
    """Fail before the long steps for what could only fail after them."""
    from personatlas.persona.judges.base import KEEP
    from personatlas.persona.roles.traits import is_pole

    roles = Counter(key.split("/", 1)[0] for key in keys if not is_pole(key))
    keep, fewest = KEEP[options.keep], min(roles.values())
    if fewest < keep.minimum:
        raise UserError(
            f"--keep {keep.name} needs {keep.minimum} answers a role and this plan makes {fewest}; "
            f"give more --questions, --prompts or --samples, or --keep all"
        )
    if options.positive is not None and options.positive not in {*roles, default}:
        raise UserError(f"--positive {options.positive!r} is not among the roles of this run")
    if options.layer is not None and not 0 <= options.layer < n_layers:
        raise UserError(f"--layer {options.layer} is not in this model (0..{n_layers - 1})")
    if options.compare is not None:
        from personatlas.analysis.fit.pipeline import other_axis

        other_axis(options.compare)
    if options.replicates < 0:
        raise UserError(f"--replicates {options.replicates} is below 0")


def _result(fit: dict[str, Any], page: Path, json: bool) -> None:
    if json:
        print_json({**fit, "report": str(page)})
        return
    from personatlas.analysis.fit.tables import print_fit

    print_fit(fit, page)


MOST = 8  # checkpoints, unless told


def emergence(
    run: Path,
    /,
    *,
    checkpoints: int = MOST,
    out: Path | None = None,
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    plan: Annotated[PlanOptions, PLAN] = PlanOptions(plan="demo"),
    judge: Annotated[JudgeOptions, JUDGE] = JudgeOptions(),
    fit: Annotated[FitOptions, FIT] = FitOptions(),
    json: Json = False,
) -> None:
    """Watch the axis of a training run emerge over its checkpoints. Resumes where it stopped.

    Every checkpoint is asked the same questions under the same roles; the last one comes first, and all are compared at its layer.

    Parameters
    ----------
    run
        a folder of `personatlas train base` or `train chat`, with checkpoints
    checkpoints
        how many at most, spread evenly over the logarithm of their steps
    out
        where the checkpoints' runs and the page go; runs/NAME-emergence unless given
    """
    from personatlas.analysis.emergence import emergence as emerging
    from personatlas.analysis.emergence_page import write_emergence_page
    from personatlas.persona.artifacts import write_json
    from personatlas.persona.runs import model_name

    folders = chosen(run, checkpoints)
    out = out or Path("runs") / f"{model_name(run)}-emergence"
    found = {
        "kind": "emergence",
        "run": str(run),
        "folders": {str(s): path.name for s, path in folders.items()},
    }
    found |= emerging(_fits(folders, out, load, plan, judge, fit))
    write_json(out / "emergence.json", found)
    write_emergence_page(out / "emergence.html", model_name(run), found)
    if json:
        print_json(found)
    else:
        _say(found, out / "emergence.html")


def _fits(
    folders: dict[int, Path],
    out: Path,
    load: ModelOptions,
    plan: PlanOptions,
    judge: JudgeOptions,
    options: FitOptions,
) -> dict[int, tuple[dict[str, Any], Any]]:
    """The fit and the axis of every checkpoint, each in a run folder of its own; the last one comes first and says which layer."""
    from personatlas.persona.axis import load_axis
    from personatlas.persona.distributed import get_world

    if get_world().size > 1:
        raise UserError("emergence works with one process: start it without torchrun")
    fits: dict[int, Any] = {}
    for step in sorted(folders, reverse=True):
        own = out / folders[step].name
        say(f"step {step:,}: {own}")
        fit = fitted_run(str(folders[step]), own, load, plan, judge, options)
        assert fit is not None  # of several processes only the first has one
        fits[step] = fit, load_axis(own / "axis")
        options = replace(options, layer=fit["layer"])
    return fits


def chosen(run: Path, most: int) -> dict[int, Path]:
    """Checkpoints by step, at most so many. Raises `UserError` for what is no training run and for fewer than two."""
    from personatlas.persona.runs import checkpoint_folders, is_training_run
    from personatlas.training.report.page import spread

    if most < 2:
        raise UserError(f"--checkpoints {most}: at least 2 are needed to see a change")
    if not is_training_run(run):
        raise UserError(f"{run} is not the folder of a training run (`personatlas train base`, `train chat`)")
    folders = checkpoint_folders(run)
    if len(folders) < 2:
        raise UserError(
            f"{run} has {len(folders) or 'no'} checkpoint{'s'[: len(folders) != 1]}: train with --keep log to watch the axis emerge"
        )
    steps = [min(folders), max(folders)] if most == 2 else spread(list(folders), most)
    return {step: folders[step] for step in steps}


def _say(found: dict[str, Any], page: Path) -> None:
    from personatlas.analysis.fit.tables import interval, number
    from personatlas.persona.progress import console

    names = ["step", "cos(PC1, axis)", "shuffled", "split-half", "|axis|", "shuffled"]
    names += [found["positive"], "ranks as at the end"]
    table = Table(
        *names,
        title=f"Layer {found['layer']} (intervals 95%)",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for row in found["checkpoints"]:
        place = row["pole"]
        table.add_row(
            f"{row['step']:,}",
            interval(row["cos_pc1"]),
            number(row["cos_pc1_shuffled"]),
            interval(row["split_half"]),
            f"{row['length']:.3g}",
            "-" if row["length_shuffled"] is None else f"{row['length_shuffled']:.3g}",
            f"{place['z']:+.1f}, {place['place']} of {place['of']}",
            interval(row["ranked_alike"]),
        )
    console().print(table)
    say(f"page: {page}")
