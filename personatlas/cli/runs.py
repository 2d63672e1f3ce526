"""The commands `run rollout`, `run judge` and `run record`: steps of `axis` on a run folder."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from personatlas.cli.options import JUDGE, MODEL, PLAN, Json, ModelName, Out
from personatlas.cli.output import print_json, print_line
from personatlas.persona.errors import UserError
from personatlas.persona.options import JudgeOptions, ModelOptions, PlanOptions


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
    from personatlas.persona.runs import default_folder

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
    from personatlas.persona.pipeline.run_context import judge_run
    from personatlas.persona.roles.bank import load_bank
    from personatlas.persona.rollout import read_rollouts, without_poles
    from personatlas.persona.runs import open_run

    with open_run(run) as folder:
        roles, made_with = load_bank(bank), folder.manifest.get("asked", {})
        for title, key, digest in (
            ("bank", "bank", roles.digest),
            ("traits", "traits_bank", roles.traits_digest),
        ):
            if made_with.get(key) and made_with[key] != digest:
                used = f"{title} {made_with[key][:12]}, not {digest[:12]}"
                raise UserError(f"{run} was made with {used}; name the bank's folder with --bank")
        rollouts = read_rollouts(run)
        if not rollouts:
            raise UserError(f"{run} has no rollouts; make them first with `personatlas run rollout`")
        scored = without_poles(judge_run(folder, roles, rollouts, judge))
    names = {0: "0", 1: "1", 2: "2", 3: "3", None: "unjudged"}
    counts = {name: sum(rollout.score == score for rollout in scored) for score, name in names.items()}
    if json:
        print_json(counts)
    else:
        print_line(", ".join(f"{name}: {n}" for name, n in counts.items()))


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
    from personatlas.persona.runs import open_run

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
        recorded = [found for found in record_rollouts(folder, model, rollouts, world) if found is not None]
    if world.rank == 0:
        counts = [
            {"rollouts": int(found.count.sum()), "roles": len(found.roles), "layers": found.n_layers}
            for found in recorded
        ]
        if json:
            print_json(dict(zip(("roles", "traits"), counts, strict=False)))
        for row in [] if json else counts:
            print_line(f"{row['rollouts']} rollouts of {row['roles']} roles or poles, {row['layers']} layers")
    world.close()
