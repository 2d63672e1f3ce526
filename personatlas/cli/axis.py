"""The commands `axis`, `run fit`, `run report` and `emergence`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from personatlas.cli.options import FIT, JUDGE, MODEL, PLAN, Json, ModelName
from personatlas.cli.output import print_json
from personatlas.persona.options import FitOptions, JudgeOptions, ModelOptions, PlanOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import default_folder, is_training_run, model_name

if TYPE_CHECKING:
    from personatlas.analysis.fit.result import FitResult


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
    """Compute the Assistant Axis of a model: rollouts, scores, activations, fit, report. Resumes.

    Parameters
    ----------
    out
        the run folder; runs/NAME unless given
    """
    from personatlas.analysis.fit.pipeline import compute_axis

    folder = out or default_folder(model)
    result = compute_axis(model, folder, load=load, plan=plan, judge=judge, fit=fit)
    if result is not None:
        _print_fit(result, folder, json)


def fit(run: Path, /, *, fit: Annotated[FitOptions, FIT] = FitOptions(), json: Json = False) -> None:
    """Fit axis and persona space to a run's activations, and write its report.

    Parameters
    ----------
    run
        a run folder with recorded activations
    """
    from personatlas.analysis.fit.pipeline import fit_run

    _print_fit(fit_run(run, fit), run, json)


def report(run: Path, /) -> None:
    """Write the report.html of a fitted run again, or that of a training run at any moment.

    Parameters
    ----------
    run
        a run folder with a fit, or a training run
    """
    if is_training_run(run):  # it may be running: its lock is not taken
        from personatlas.training.report.page import write_training_report

        say(f"report: {write_training_report(run)}")
        return
    from personatlas.analysis.fit.pipeline import report_run

    say(f"report: {report_run(run)}")


def _print_fit(result: "FitResult", folder: Path, json: bool) -> None:
    from personatlas.cli.fit_tables import print_fit

    page = folder / "report.html"
    if json:
        print_json({**result.to_json(), "report": str(page)})
    else:
        print_fit(result, page)


def emergence(
    run: Path,
    /,
    *,
    checkpoints: int = 8,
    out: Path | None = None,
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    plan: Annotated[PlanOptions, PLAN] = PlanOptions(plan="demo"),
    judge: Annotated[JudgeOptions, JUDGE] = JudgeOptions(),
    fit: Annotated[FitOptions, FIT] = FitOptions(),
    json: Json = False,
) -> None:
    """Show how the axis of a training run emerges over its checkpoints. Resumes where it stopped.

    Every checkpoint answers the same questions under the same roles; the last one is fitted first, and all
    are compared at its layer.

    Parameters
    ----------
    run
        a folder of `personatlas train base` or `train chat`, with checkpoints
    checkpoints
        how many at most, spread evenly over the logarithm of their steps
    out
        where the checkpoints' runs and the page go; runs/NAME-emergence unless given
    """
    from personatlas.analysis.emergence import compute_emergence
    from personatlas.cli.fit_tables import print_emergence

    out = out or Path("runs") / f"{model_name(run)}-emergence"
    result = compute_emergence(run, out, checkpoints=checkpoints, load=load, plan=plan, judge=judge, fit=fit)
    if json:
        print_json(result.to_json())
    else:
        print_emergence(result, out / "emergence.html")
