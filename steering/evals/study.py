"""An evaluation from a model's name to eval.json: arms, answers, verdicts, statistics.

    content = evaluate("smollm2-135m", ModelOptions(), "smollm2-135m", ["assistant"], EvalOptions(), folder)

The first arm is the model as it is; then the caps, then random caps that fire as often as the first one. Every arm is a row of
the same batches (on a GPU) or answers in turn (on a CPU), with the same prompts and seeds.

Random caps beside a cap: what disturbing a model as often as the cap does would do, whatever the direction.

    for name, cap in controls(bench, suites, {"assistant": cap}, count=1):
        name                                                   # "random 1"

They are matched, layer by layer, to the first cap's fired shares on answers of the model as it is, half of them everyday ones, and
kept in the folder so that an interrupted evaluation goes on with the same ones.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from personatlas.cli.evals import data_files, task_names
from personatlas.persona.artifacts import write_json
from personatlas.persona.axis import load_space
from personatlas.persona.caps import format_layers
from personatlas.persona.distributed import World, get_world
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE, Cap, Interventions, interventions_digest, load_cap
from personatlas.persona.options import ModelOptions
from personatlas.persona.pipeline.run_context import local_device
from personatlas.persona.progress import progress
from personatlas.persona.roles.bank import Bank, load_bank
from personatlas.persona.rollout import Rollout, spread
from personatlas.persona.runs import RunFolder, open_run, versions
from personatlas.steering.evals.answers import Answers, Bench, answered, fitting
from personatlas.steering.evals.capability import measured, rollouts_of
from personatlas.steering.evals.harm.judges import HarmJudge, harm_judge, judge_all
from personatlas.steering.evals.harnesses.lm_eval import run_tasks
from personatlas.steering.evals.harnesses.lm_eval_tasks import require_lm_eval
from personatlas.steering.evals.options import ROLE_SUITES, EvalOptions, chosen, made, require_material
from personatlas.steering.evals.result import (
    RANDOM,
    finite,
    pairs,
    suite_result,
    to_judge,
    verdicts,
    warnings,
)
from personatlas.steering.evals.suites.build import Suite
from personatlas.steering.evals.suites.identity import ranked_roles
from personatlas.steering.random_caps import fired_shares, random_cap
from personatlas.steering.session import SteeredModel, load_steered_model

MATCHED = 48  # answers that random caps are matched on


def controls(
    bench: Bench, suites: Sequence[Suite], caps: Mapping[str, Cap], count: int
) -> list[tuple[str, Cap]]:
    """`count` random caps for the first of the caps; none without a cap."""
    if not caps or not count:
        return []
    cap, texts = next(iter(caps.values())), _texts(bench, suites)
    content = interventions_digest([cap]), [(text.prompt_ids, text.answer_ids) for text in texts]
    stem = f"random-{hashlib.sha256(repr(content).encode()).hexdigest()[:8]}"
    folder = bench.folder / "caps"
    if not bench.world.rank:
        folder.mkdir(exist_ok=True)
        missing = [seed for seed in range(1, count + 1) if not (folder / f"{stem}-{seed}.json").exists()]
        shares = fired_shares(bench.model, cap, texts) if missing else None
        for seed in missing:
            assert shares is not None
            random_cap(bench.model, cap, shares, texts, seed).save(folder / f"{stem}-{seed}")
    bench.world.barrier()
    return [(f"{RANDOM} {seed}", load_cap(folder / f"{stem}-{seed}")) for seed in range(1, count + 1)]


def _texts(bench: Bench, suites: Sequence[Suite]) -> list[Rollout]:
    """Answers of the model as it is to a few first turns of the first suite and the last; they are the cases' own answers."""
    texts: list[Rollout] = []
    sources = {suite.name: suite for suite in (suites[0], suites[-1])}.values()
    for suite in sources:
        cases = [replace(case, later=()) for case in spread(suite.cases, MATCHED // len(sources))]
        part = replace(suite, cases=tuple(cases))
        texts += [
            text
            for text in rollouts_of(part, answered(bench, part, {BASELINE: []}), BASELINE)
            if text.answer_ids
        ]
    return texts


@dataclass(frozen=True)
class EvalContext:
    """All that an evaluation has in its hands."""

    run: RunFolder
    bench: Bench
    bank: Bank
    held: SteeredModel
    asked: EvalOptions
    suites: tuple[Suite, ...]
    left_out: Mapping[str, int]
    caps: Mapping[str, Cap]


def evaluate(
    model: str,
    how: ModelOptions,
    axis: str,
    caps: Sequence[str],
    asked: EvalOptions,
    folder: Path,
    bank: Path | None = None,
    *,
    force: bool = False,
) -> dict[str, Any] | None:
    """The content of eval.json, which is written into the folder with every answer beside it; None on ranks but the first.

    Raises `UserError` for what cannot be, before anything is answered, and for a folder of another model, engine or dtype.
    """
    names, judge = chosen(asked), harm_judge(asked.judge, asked.judge_model, asked.rubric)
    known, world = load_bank(bank), get_world()
    require_material(asked, known)
    if asked.judge.startswith("http") and not world.rank:
        # a dead or locked endpoint is met now, not after all is answered
        list(judge.judged([("Say hello.", "Hello.")]))
    if asked.tasks:
        require_lm_eval()
        data_files(asked.data or [])
    with open_run(folder, create=True, rank=world.rank) as run:
        try:
            if world.rank:
                world.barrier()  # until the first one has said in run.json what is evaluated
            dtype = how.dtype or run.manifest.get("asked", {}).get(
                "dtype"
            )  # what it was begun with, not what is faster now
            how = replace(how, device=how.device or local_device(world), dtype=dtype)
            held = load_steered_model(model, how, axis, list(caps), force=force)
            work = _prepared(run, world, held, known, asked, names, caps)
            if not world.rank:
                world.barrier()
            return _run(work, judge)
        finally:
            world.close()


def _prepared(
    run: RunFolder,
    world: World,
    held: SteeredModel,
    bank: Bank,
    asked: EvalOptions,
    names: Sequence[str],
    caps: Sequence[str],
) -> EvalContext:
    """Suites, cut to what fits, and the folder's record of what answers."""
    model = held.model
    bench = Bench(model, held.chat, held.axis, asked.temperature, asked.top_p, run.folder, world)
    engine = {
        "device": model.device.type,
        "torch": versions()["torch"],
        "transformers": versions()["transformers"],
    }
    suites, left_out = [], {}
    roles = _roles(held, bank, asked) if ROLE_SUITES & set(names) else []
    for suite in made(asked, names, bank, roles, model.name):
        own, left_out[suite.name] = fitting(bench, suite)
        suites.append(own)
    told = {"model": model.describe(), "dtype": str(model.dtype).removeprefix("torch."), "engine": engine}
    run.claim({**told, "temperature": asked.temperature, "top_p": asked.top_p, "seed": asked.seed})
    return EvalContext(
        run, bench, bank, held, asked, tuple(suites), left_out, dict(zip(caps, held.caps, strict=True))
    )


def _roles(held: SteeredModel, bank: Bank, asked: EvalOptions) -> list[str]:
    """The lowest roles on the axis that the bank knows, of all tags that were asked for."""
    known = {role.name for role in bank.roles if set(asked.tag or ()) <= set(role.tags)}
    space = load_space(held.axis.folder / "space")
    roles = [role for role, _ in ranked_roles(held.axis, space) if role in known][: asked.roles]
    if len(roles) < 4:
        raise UserError(
            f"{len(roles)} roles to play, at least 4 are needed: fewer --tag, or an axis of more roles"
        )
    return roles


def _run(work: EvalContext, judge: HarmJudge) -> dict[str, Any] | None:
    arms: dict[str, Interventions] = {BASELINE: []}
    arms |= {
        name: [cap]
        for name, cap in [
            *work.caps.items(),
            *controls(work.bench, work.suites, work.caps, work.asked.random),
        ]
    }
    answers = {suite.name: answered(work.bench, suite, arms) for suite in work.suites}
    if work.bench.world.rank:
        return None
    harm = _judged(work, judge, answers)
    found = {suite.name: verdicts(suite, answers[suite.name], work.bank, harm) for suite in work.suites}
    names = list(arms)
    content = {
        **{name: work.run.manifest["asked"][name] for name in ("model", "dtype", "engine")},
        "axis": {"layer": work.held.axis.layer, "of": work.held.axis.source},
        "arms": names,
        "caps": {name: _cap_row(cap) for name, plan in arms.items() for cap in plan if isinstance(cap, Cap)},
        "judge": {
            "id": judge.id,
            "rubric": work.asked.rubric,
            "unjudged": sum(score is None for score in harm.values()),
        },
        "suites": {
            suite.name: suite_result(suite, answers[suite.name], found[suite.name], names, work.asked.margin)
            | {"left_out": work.left_out[suite.name]}
            for suite in work.suites
        },
        "capability": measured(
            work.bench, work.suites, answers, arms, work.asked.text, work.asked.text_bytes
        ),
        "asked": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(work.asked).items()
        },
        "versions": versions(),
    }
    if work.asked.tasks:
        content["capability"]["tasks"] = _tasks(work, arms)
    content["warnings"] = warnings(content)
    told = {suite.name: pairs(suite, answers[suite.name], found[suite.name], names) for suite in work.suites}
    content = finite(content | {"pairs": [row for rows in told.values() for row in rows]})
    write_json(work.run.folder / "eval.json", content)
    return content


def _tasks(work: EvalContext, arms: Mapping[str, Interventions]) -> dict[str, Any]:
    """Tasks of lm-eval in all arms, without their samples, which are in tasks/lm_eval.json."""
    folder = work.run.folder / "tasks"
    folder.mkdir(exist_ok=True)
    found = run_tasks(
        work.bench.model,
        work.bench.chat,
        arms,
        task_names(work.asked.tasks or ""),
        data=data_files(work.asked.data or []),
        folder=folder,
        limit=work.asked.task_limit,
        max_new_tokens=work.asked.task_tokens,
        margin=work.asked.margin,
    )
    tasks = {
        name: {key: value for key, value in task.items() if key != "samples"}
        for name, task in found["tasks"].items()
    }
    return {**found, "tasks": tasks}


def _judged(
    work: EvalContext, judge: HarmJudge, answers: Mapping[str, Answers]
) -> dict[tuple[str, str], float | None]:
    """Scores of everything that a judge must see, each pair asked once whatever arm it came from."""
    asked = list(
        dict.fromkeys(pair for suite in work.suites for pair in to_judge(suite, answers[suite.name]))
    )
    with progress("judging", len(asked), quiet=not asked) as advance:
        scores = judge_all(judge, asked, work.run.folder / "verdicts.jsonl", advance)
    return {pair: one.score for pair, one in zip(asked, scores, strict=True)}


def _cap_row(cap: Cap) -> dict[str, Any]:
    return {
        "layers": format_layers(cap.layers),
        "level": cap.level,
        "population": cap.population,
        "phase": cap.phase,
        "spare_first": cap.spare_first,
    }
