"""The verbs of `analysis/`: axis (everything, end to end), fit and report.

`axis` reads like the paper's methods: sample answers under role prompts, judge them, record them, fit, report.
"""

import hashlib
import json as json_module
from collections import Counter
from pathlib import Path
from typing import Any

from personaxis.persona.errors import KnownError
from personaxis.persona.options import FitOptions, JudgeOptions, ModelOptions, PlanOptions
from personaxis.persona.progress import say
from personaxis.persona.verbs import Model, print_json, run_folder


def axis(
    model: Model,
    /,
    *,
    out: Path | None = None,
    how: ModelOptions = ModelOptions(),
    what: PlanOptions = PlanOptions(),
    who: JudgeOptions = JudgeOptions(),
    fitting: FitOptions = FitOptions(),
    json: bool = False,
) -> None:
    """The Assistant Axis of a checkpoint, end to end: rollouts, scores, activations, fit, report. Resumes where it stopped.

    Parameters
    ----------
    out
        the run folder; runs/NAME unless given
    json
        print the fit as JSON in place of the tables
    """
    folder = run_folder(model, out)
    found = fitted_run(model, folder, how, what, who, fitting)
    if found is not None:
        _result(found, folder / "report.html", json)


def fitted_run(
    model: str, folder: Path, how: ModelOptions, what: PlanOptions, who: JudgeOptions, fitting: FitOptions
) -> dict[str, Any] | None:
    """All steps of `axis` into a run folder: the content of its fit.json, on the first of several processes only."""
    from personaxis.analysis.stages import fit_run
    from personaxis.persona.prepare import judge_run, prepared, record_run, require_judge, sample

    require_judge(who)
    _require_keep(fitting.keep)
    with prepared(model, folder, how, what) as work:
        _require_known(work.bank.default.name, work.plan.keys, fitting, work.subject.n_layers)
        rollouts = sample(work)
        rollouts = judge_run(work.run, work.bank, rollouts, who, work.ranks)
        activations, of_traits = record_run(work, rollouts)
        if work.ranks.rank:
            return None
        of_traits = of_traits or _trait_activations(folder)
        found = fit_run(folder, activations, of_traits, rollouts, work.bank.default.name, fitting)
        _report(folder, found)
        return found


def fit(run: Path, /, *, fitting: FitOptions = FitOptions(), json: bool = False) -> None:
    """Fit axis and persona space to a run's activations, and write its report.

    Parameters
    ----------
    run
        a run folder with recorded activations
    """
    from personaxis.analysis.stages import fit_run
    from personaxis.persona.activations import load_activations
    from personaxis.persona.run import open_run

    _require_keep(fitting.keep)
    with open_run(run):
        activations = load_activations(run / "activations")
        rollouts = _recorded_rollouts(run, activations)
        found = fit_run(run, activations, _trait_activations(run), rollouts, _default_name(run), fitting)
        _result(found, _report(run, found), json)


def report(run: Path, /) -> None:
    """Write the report.html of a fitted run again, or that of a training run at any moment.

    Parameters
    ----------
    run
        a run folder with a fit, or a training run
    """
    from personaxis.analysis.stages import FIT_VERSION
    from personaxis.persona.run import open_run
    from personaxis.persona.store import read_json
    from personaxis.persona.trained import is_training_run

    if is_training_run(run):  # which may be going on: its lock is not asked for
        from personaxis.analysis.training_report import write_training_report

        say(f"report: {write_training_report(run)}")
        return
    with open_run(run):
        found = read_json(run / "fit.json")
        if found["asked"].get("version") != FIT_VERSION:
            raise KnownError(f"{run} was fitted by another version of personaxis; run `personaxis fit {run}`")
        say(f"report: {_report(run, found, again=True)}")


def _report(folder: Path, fit: dict[str, Any], *, again: bool = False) -> Path:
    from personaxis.analysis.report import write_report
    from personaxis.persona.rollouts import read_rollouts, with_scores, without_poles
    from personaxis.persona.store import read_json

    path = folder / "report.html"
    stamp = hashlib.sha256(json_module.dumps(fit, sort_keys=True).encode()).hexdigest()[:16]
    if not again and path.exists() and stamp in path.read_text(encoding="utf-8")[:4000]:
        return path
    rollouts = with_scores(without_poles(read_rollouts(folder)), _scores(folder))
    write_report(path, fit, rollouts, read_json(folder / "run.json"), stamp)
    return path


def _trait_activations(folder: Path) -> Any:
    """The traits' activations, where they were recorded."""
    from personaxis.persona.activations import load_activations

    stem = folder / "trait_activations"
    return load_activations(stem) if stem.with_suffix(".json").exists() else None


def _scores(folder: Path) -> dict[str, int | None]:
    from personaxis.persona.judge import read_scores

    return read_scores(folder / "scores.jsonl")


def _recorded_rollouts(folder: Path, activations: Any) -> Any:
    """The rollouts that were recorded, with the scores that they were recorded with."""
    from personaxis.persona.rollouts import read_rollouts, with_scores, without_poles
    from personaxis.persona.stages import content_of

    recorded = dict(zip(activations.keys, activations.scores, strict=True))
    found = without_poles(read_rollouts(folder))
    rollouts = with_scores([r for r in found if r.key in recorded or r.is_empty], recorded)
    if content_of([rollout for rollout in rollouts if not rollout.is_empty]) != activations.content:
        raise KnownError(f"{folder}: rollouts changed after they were recorded; run `personaxis record {folder}` again")
    return rollouts


def _default_name(folder: Path) -> str:
    from personaxis.persona.store import read_json

    asked = read_json(folder / "run.json").get("asked", {})
    if not asked.get("roles"):
        raise KnownError(f"{folder / 'run.json'} does not say which roles were asked for")
    return str(asked["roles"][0])


def _require_keep(name: str) -> None:
    from personaxis.persona.judge import KEEP

    if name not in KEEP:
        raise KnownError(f"--keep {name!r} is not one of {', '.join(KEEP)}")


def _require_known(default: str, keys: list[str], options: FitOptions, n_layers: int) -> None:
    """Fail before the long steps for what could only fail after them."""
    from personaxis.persona.judge import KEEP
    from personaxis.persona.traits import is_pole

    roles = Counter(key.split("/", 1)[0] for key in keys if not is_pole(key))
    keep, fewest = KEEP[options.keep], min(roles.values())
    if fewest < keep.minimum:
        raise KnownError(
            f"--keep {keep.name} needs {keep.minimum} answers a role and this plan makes {fewest}; "
            f"give more --questions, --prompts or --samples, or --keep all"
        )
    if options.positive is not None and options.positive not in {*roles, default}:
        raise KnownError(f"--positive {options.positive!r} is not among the roles of this run")
    if options.layer is not None and not 0 <= options.layer < n_layers:
        raise KnownError(f"--layer {options.layer} is not in this model (0..{n_layers - 1})")
    if options.compare is not None:
        from personaxis.analysis.compare import other_axis

        other_axis(options.compare)
    if options.replicates < 0:
        raise KnownError(f"--replicates {options.replicates} is below 0")


def _result(fit: dict[str, Any], page: Path, json: bool) -> None:
    if json:
        print_json({**fit, "report": str(page)})
        return
    from personaxis.analysis.tables import print_fit

    print_fit(fit, page)
