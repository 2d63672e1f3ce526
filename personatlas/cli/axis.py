"""The commands `axis`, its steps `run rollout|judge|record|fit|report` on a run folder, and `emergence`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from personatlas.cli.options import FIT, JUDGE, MODEL, PLAN, Json, ModelName, Out
from personatlas.cli.output import print_json, print_line, print_path, print_table
from personatlas.persona.errors import UserError
from personatlas.persona.options import FitOptions, JudgeOptions, ModelOptions, PlanOptions
from personatlas.persona.runs import default_folder, is_training_run, model_name, open_run

if TYPE_CHECKING:
    from personatlas.analysis.fit.result import FitResult


def axis(
    model: ModelName,
    /,
    *,
    out: Out = None,
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


def rollout(
    model: ModelName,
    /,
    *,
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    plan: Annotated[PlanOptions, PLAN] = PlanOptions(),
    out: Out = None,
    json: Json = False,
) -> None:
    """Sample answers under role prompts into a run folder. Resumes.

    Parameters
    ----------
    out
        the run folder; runs/NAME unless given
    """
    from personatlas.persona.pipeline.run_context import open_context, sample

    folder = out or default_folder(model)
    with open_context(model, folder, load, plan) as context:
        rollouts = sample(context)
        if context.world.rank:
            return
    log, cut = folder / "rollouts.jsonl", sum(rollout.stopped == "length" for rollout in rollouts)
    if json:
        print_json({"file": str(log), "rollouts": len(rollouts), "cut": cut})
    else:
        print_line(f"{len(rollouts)} rollouts in {log} ({cut} stopped at the token limit)")


def judge(
    run: Path,
    /,
    *,
    bank: Path | None = None,
    judge: Annotated[JudgeOptions, JUDGE] = JudgeOptions(),
    json: Json = False,
) -> None:
    """Score whether a run's answers play their roles, into scores.jsonl. Resumes.

    Parameters
    ----------
    run
        a run folder
    bank
        the bank that the run was made with, if not the packaged one
    """
    from personatlas.persona.pipeline.run_context import judge_run, require_judge
    from personatlas.persona.roles.bank import load_bank
    from personatlas.persona.rollout import of_kind, read_rollouts

    if judge.judge == "none":
        raise UserError("--judge none scores nothing: give rules, local:MODEL or a URL")
    require_judge(judge)
    with open_run(run) as folder:
        roles, made_with = load_bank(bank), folder.manifest.get("asked", {})
        for title, key, digest in (
            ("bank", "bank", roles.digest),
            ("traits", "traits_bank", roles.traits_digest),
            ("controls", "controls_bank", roles.controls_digest),
        ):
            if made_with.get(key) and made_with[key] != digest:
                used = f"{title} {made_with[key][:12]}, not {digest[:12]}"
                raise UserError(f"{run} was made with {used}; name the bank's folder with --bank")
        rollouts = read_rollouts(run)
        if not rollouts:
            raise UserError(f"{run} has no rollouts; make them first with `personatlas run rollout`")
        scored = of_kind(judge_run(folder, roles, rollouts, judge), "role")
    names = {0: "0", 1: "1", 2: "2", 3: "3", None: "unjudged"}
    counts = {name: sum(rollout.score == score for rollout in scored) for score, name in names.items()}
    if json:
        print_json(counts)
    else:
        print_table(("score", "answers"), [(name, f"{n:,}") for name, n in counts.items()])


def record(
    run: Path, /, *, load: Annotated[ModelOptions, MODEL] = ModelOptions(), json: Json = False
) -> None:
    """Record a run's activations with the scores of its newest judge. Resumes.

    Parameters
    ----------
    run
        a run folder
    """
    from personatlas.persona.distributed import get_world
    from personatlas.persona.models.load import load_model
    from personatlas.persona.pipeline.run_context import record_rollouts, stored_scores
    from personatlas.persona.rollout import read_rollouts, with_scores

    world = get_world()
    with open_run(run, rank=world.rank) as folder:
        made_with = folder.manifest.get("asked", {})
        if "model_name" not in made_with:
            raise UserError(f"{run} has no run.json with rollouts; make them with `personatlas run rollout`")
        load = replace(load, dtype=load.dtype or made_with["dtype"])
        name = made_with["model_name"]
        model = load_model(name, device=load.device, dtype=load.dtype, chat_template=load.chat_template)
        folder.claim({"model": model.describe(), "dtype": str(model.dtype).removeprefix("torch.")})
        rollouts = with_scores(read_rollouts(run), stored_scores(folder))
        recorded = record_rollouts(folder, model, rollouts, world)
    if world.rank == 0:
        counts = {
            f"{kind}s": {
                "rollouts": int(found.count.sum()),
                "roles": len(found.roles),
                "layers": found.n_layers,
            }
            for kind, found in recorded.items()
        }
        if json:
            print_json(counts)
        for kind, row in {} if json else counts.items():
            names = "trait poles" if kind == "traits" else kind
            print_line(f"{row['rollouts']} rollouts of {row['roles']} {names}, {row['layers']} layers")
    world.close()


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

        print_path("report", write_training_report(run))
        return
    from personatlas.analysis.fit.pipeline import report_run

    print_path("report", report_run(run))


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
    out: Out = None,
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
