"""An evaluation from a model's name to eval.json: arms, answers, verdicts, statistics.

    content = evaluate("smollm2-135m", ModelOptions(), "smollm2-135m", ["assistant"], EvalOptions(), folder)

The first arm is the model as it is; then the caps, then random caps that fire as often as the first one. Every arm is a row of
the same batches (on a GPU) or answers in turn (on a CPU), with the same prompts and seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from personaxis.persona.axis import Cap, load_space
from personaxis.persona.bank import Bank, load_bank
from personaxis.persona.errors import KnownError
from personaxis.persona.options import ModelOptions
from personaxis.persona.prepare import own_device, ranks
from personaxis.persona.progress import progress
from personaxis.persona.ranks import Ranks
from personaxis.persona.run import Run, open_run, versions
from personaxis.persona.store import write_json
from personaxis.steering.arms import AS_IT_IS
from personaxis.steering.caps import layers_in_words
from personaxis.steering.evals.answers import Answers, Bench, answered, fitting
from personaxis.steering.evals.asked import ROLE_SUITES, EvalOptions, chosen, made, require_material
from personaxis.steering.evals.capability import measured
from personaxis.steering.evals.controls import controls
from personaxis.steering.evals.harm import HarmJudge, harm_judge, judge_all
from personaxis.steering.evals.lm_eval_run import run_tasks
from personaxis.steering.evals.lm_eval_tasks import require_lm_eval
from personaxis.steering.evals.lm_eval_verb import data_files, task_names
from personaxis.steering.evals.result import finite, pairs, suite_result, warnings
from personaxis.steering.evals.suites import Suite
from personaxis.steering.evals.verdicts import to_judge, verdicts
from personaxis.steering.steer import Plan
from personaxis.steering.susceptibility import ranked_roles
from personaxis.steering.verbs import Loaded, loaded


@dataclass(frozen=True)
class Work:
    """All that an evaluation has in its hands."""

    run: Run
    bench: Bench
    bank: Bank
    held: Loaded
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

    Raises `KnownError` for what cannot be, before anything is answered, and for a folder of another model, engine or dtype.
    """
    names, judge = chosen(asked), harm_judge(asked.judge, asked.judge_model, asked.rubric)
    known, place = load_bank(bank), ranks()
    require_material(asked, known)
    if asked.judge.startswith("http") and not place.rank:
        # a dead or locked endpoint is met now, not after all is answered
        list(judge.judged([("Say hello.", "Hello.")]))
    if asked.tasks:
        require_lm_eval()
        data_files(asked.data or [])
    with open_run(folder, create=True, rank=place.rank) as run:
        try:
            if place.rank:
                place.barrier()  # until the first one has said in run.json what is evaluated
            dtype = how.dtype or run.manifest.get("asked", {}).get(
                "dtype"
            )  # what it was begun with, not what is faster now
            how = replace(how, device=how.device or own_device(place), dtype=dtype)
            held = loaded(model, how, axis, list(caps), force=force)
            work = _prepared(run, place, held, known, asked, names, caps)
            if not place.rank:
                place.barrier()
            return _run(work, judge)
        finally:
            place.close()


def _prepared(
    run: Run, place: Ranks, held: Loaded, bank: Bank, asked: EvalOptions, names: Sequence[str], caps: Sequence[str]
) -> Work:
    """Suites, cut to what fits, and the folder's record of what answers."""
    subject = held.subject
    bench = Bench(subject, held.chat, held.axis, asked.temperature, asked.top_p, run.folder, place)
    engine = {"device": subject.device.type, "torch": versions()["torch"], "transformers": versions()["transformers"]}
    suites, left_out = [], {}
    roles = _roles(held, bank, asked) if ROLE_SUITES & set(names) else []
    for suite in made(asked, names, bank, roles, subject.name):
        own, left_out[suite.name] = fitting(bench, suite)
        suites.append(own)
    told = {"model": subject.describe(), "dtype": str(subject.dtype).removeprefix("torch."), "engine": engine}
    run.ask({**told, "temperature": asked.temperature, "top_p": asked.top_p, "seed": asked.seed})
    return Work(run, bench, bank, held, asked, tuple(suites), left_out, dict(zip(caps, held.caps, strict=True)))


def _roles(held: Loaded, bank: Bank, asked: EvalOptions) -> list[str]:
    """The lowest roles on the axis that the bank knows, of all tags that were asked for."""
    known = {role.name for role in bank.roles if set(asked.tag or ()) <= set(role.tags)}
    space = load_space(held.stem.with_name("space"))
    roles = [role for role, _ in ranked_roles(held.axis, space) if role in known][: asked.roles]
    if len(roles) < 4:
        raise KnownError(f"{len(roles)} roles to play, at least 4 are needed: fewer --tag, or an axis of more roles")
    return roles


def _run(work: Work, judge: HarmJudge) -> dict[str, Any] | None:
    arms: dict[str, Plan] = {AS_IT_IS: []}
    arms |= {
        name: [cap]
        for name, cap in [*work.caps.items(), *controls(work.bench, work.suites, work.caps, work.asked.random)]
    }
    answers = {suite.name: answered(work.bench, suite, arms) for suite in work.suites}
    if work.bench.ranks.rank:
        return None
    harm = _judged(work, judge, answers)
    found = {suite.name: verdicts(suite, answers[suite.name], work.bank, harm) for suite in work.suites}
    names = list(arms)
    content = {
        **{name: work.run.manifest["asked"][name] for name in ("model", "dtype", "engine")},
        "axis": {"layer": work.held.axis.layer, "of": "/".join(work.held.stem.parts[-2:])},
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
        "capability": measured(work.bench, work.suites, answers, arms, work.asked.text, work.asked.text_bytes),
        "asked": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(work.asked).items()},
        "versions": versions(),
    }
    if work.asked.tasks:
        content["capability"]["tasks"] = _tasks(work, arms)
    content["warnings"] = warnings(content)
    told = {suite.name: pairs(suite, answers[suite.name], found[suite.name], names) for suite in work.suites}
    content = finite(content | {"pairs": [row for rows in told.values() for row in rows]})
    write_json(work.run.folder / "eval.json", content)
    return content


def _tasks(work: Work, arms: Mapping[str, Plan]) -> dict[str, Any]:
    """Tasks of lm-eval in all arms, without their samples, which are in tasks/lm_eval.json."""
    folder = work.run.folder / "tasks"
    folder.mkdir(exist_ok=True)
    found = run_tasks(
        work.bench.subject,
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
        name: {key: value for key, value in task.items() if key != "samples"} for name, task in found["tasks"].items()
    }
    return {**found, "tasks": tasks}


def _judged(work: Work, judge: HarmJudge, answers: Mapping[str, Answers]) -> dict[tuple[str, str], float | None]:
    """Scores of everything that a judge must see, each pair asked once whatever arm it came from."""
    asked = list(dict.fromkeys(pair for suite in work.suites for pair in to_judge(suite, answers[suite.name])))
    with progress("judging", len(asked), quiet=not asked) as advance:
        scores = judge_all(judge, asked, work.run.folder / "verdicts.jsonl", advance)
    return {pair: one.score for pair, one in zip(asked, scores, strict=True)}


def _cap_row(cap: Cap) -> dict[str, Any]:
    return {
        "layers": layers_in_words(cap.layers),
        "level": cap.level,
        "population": cap.population,
        "phase": cap.phase,
        "spare_first": cap.spare_first,
    }
