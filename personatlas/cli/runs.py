"""The verbs of `persona/`: rollout, judge, record, spans, show, import; `bank_verbs` has `roles`.

Progress goes to stderr, results to stdout, `--json` for machines.
"""

from pathlib import Path
from typing import Annotated, Any

from personatlas.cli.options import JUDGE, MODEL, PLAN, ModelName
from personatlas.cli.output import print_line
from personatlas.persona.errors import UserError
from personatlas.persona.options import JudgeOptions, ModelOptions, PlanOptions
from personatlas.persona.roles.bank import Bank


def rollout(
    model: ModelName,
    /,
    *,
    out: Path | None = None,
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    plan: Annotated[PlanOptions, PLAN] = PlanOptions(),
) -> None:
    """Sample answers under role prompts into a run folder (resumes).

    Parameters
    ----------
    out
        the run folder; runs/NAME unless given
    """
    from personatlas.persona.pipeline.run_context import open_context, sample
    from personatlas.persona.runs import default_folder

    folder = out or default_folder(model)
    with open_context(model, folder, load, plan) as work:
        made = sample(work)
        if work.world.rank == 0:
            cut = sum(r.stopped == "length" for r in made)
            print_line(
                f"{len(made)} rollouts in {folder / 'rollouts.jsonl'} ({cut} stopped at the token limit)"
            )


def judge(
    run: Path, /, *, judge: Annotated[JudgeOptions, JUDGE] = JudgeOptions(), bank: Path | None = None
) -> None:
    """Score whether a run's answers play their roles, into scores.jsonl (resumes).

    Parameters
    ----------
    run
        a run folder
    bank
        the bank that the run was made with, if not the packaged one
    """
    from personatlas.persona.pipeline.run_context import judge_run
    from personatlas.persona.roles.bank import load_bank
    from personatlas.persona.rollout import read_rollouts, without_poles
    from personatlas.persona.runs import open_run

    with open_run(run) as folder:
        chosen = load_bank(bank)
        _require_bank(folder.manifest, chosen, run)
        rollouts = read_rollouts(run)
        if not rollouts:
            raise UserError(f"{run} has no rollouts; make them first with `personatlas run rollout`")
        scored = without_poles(judge_run(folder, chosen, rollouts, judge))
        counts = {score: sum(r.score == score for r in scored) for score in (0, 1, 2, 3, None)}
        print_line(", ".join(f"{'unjudged' if score is None else score}: {n}" for score, n in counts.items()))


def record(run: Path, /, *, load: Annotated[ModelOptions, MODEL] = ModelOptions()) -> None:
    """Record a run's activations with the scores of its newest judge (resumes).

    Parameters
    ----------
    run
        a run folder
    """
    from dataclasses import replace

    from personatlas.persona.distributed import get_world
    from personatlas.persona.models.load import load_model
    from personatlas.persona.pipeline.run_context import record_rollouts, stored_scores
    from personatlas.persona.rollout import read_rollouts, with_scores
    from personatlas.persona.runs import open_run

    world = get_world()
    with open_run(run, rank=world.rank) as folder:
        asked = folder.manifest.get("asked", {})
        if "model_name" not in asked:
            raise UserError(
                f"{run} has no run.json with rollouts; make them first with `personatlas run rollout`"
            )
        load = replace(load, dtype=load.dtype or asked["dtype"])
        model = load_model(
            asked["model_name"], device=load.device, dtype=load.dtype, chat_template=load.chat_template
        )
        folder.claim({"model": model.describe(), "dtype": str(model.dtype).removeprefix("torch.")})
        rollouts = with_scores(read_rollouts(run), stored_scores(folder))
        for found in record_rollouts(folder, model, rollouts, world):
            if world.rank == 0 and found is not None:
                print_line(
                    f"{int(found.count.sum())} rollouts of {len(found.roles)} roles or poles, {found.n_layers} layers"
                )
    world.close()


def _require_bank(manifest: dict[str, Any], bank: Bank, run: Path) -> None:
    asked = manifest.get("asked", {})
    for what, name, digest in (("bank", "bank", bank.digest), ("traits", "traits_bank", bank.traits_digest)):
        if asked.get(name) and asked[name] != digest:
            raise UserError(
                f"{run} was made with {what} {asked[name][:12]}, not {digest[:12]}; name the bank's folder with --bank"
            )
