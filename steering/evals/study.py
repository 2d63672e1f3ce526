"""An evaluation from a model's name to eval.json: arms, answers, scores, statistics.

    result = evaluate("smollm2-135m", "smollm2-135m", ["assistant"], ["susceptibility", "benign"], Path("runs/eval"))
    result.suites["susceptibility"].outcomes["assistant"].arms["assistant"].share

The first arm is the baseline; then the caps, then random caps that fire as often as the first one. Every arm is a row of
the same batches (on a GPU) or answers in turn (on a CPU), with the same prompts and seeds.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from personatlas.persona.artifacts import write_json
from personatlas.persona.axis import Axis, load_space
from personatlas.persona.caps import format_layers
from personatlas.persona.distributed import get_world
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE, Cap, Interventions, interventions_digest, load_cap
from personatlas.persona.models.load import Model
from personatlas.persona.options import ModelOptions
from personatlas.persona.pipeline.run_context import local_device
from personatlas.persona.progress import progress
from personatlas.persona.roles.bank import Bank, load_bank
from personatlas.persona.rollout import Rollout, spread
from personatlas.persona.runs import RunFolder, open_run, versions
from personatlas.steering.evals.answers import Answers, Bench, answer_rollout, answer_suite, fit_to_context
from personatlas.steering.evals.arms import Arms, load_arms
from personatlas.steering.evals.capability import measure_capability, read_text
from personatlas.steering.evals.harm.judges import HarmJudge, harm_judge, judge_harm
from personatlas.steering.evals.harnesses.lm_eval_result import (
    LmEvalResult,
    parse_task_data,
    parse_task_names,
    require_lm_eval,
)
from personatlas.steering.evals.options import EvalOptions, LmEvalOptions
from personatlas.steering.evals.result import (
    RANDOM,
    CapSummary,
    EvalResult,
    JudgeSummary,
    case_results,
    eval_warnings,
    score_answers,
    suite_result,
)
from personatlas.steering.evals.suites import Suite, SuiteInputs, select_suites
from personatlas.steering.identity import lowest_roles
from personatlas.steering.random_caps import fired_shares, random_cap

MATCHED = 48  # answers that random caps are matched on


@dataclass(frozen=True)
class EvalContext:
    """All that an evaluation works with: the open folder, what answers, the suites with their cases, how many cases of each
    were left out, and the arms."""

    run: RunFolder
    bench: Bench
    options: EvalOptions
    suites: tuple[Suite, ...]
    left_out: Mapping[str, int]
    arms: Mapping[str, Interventions]


def evaluate(
    model: str | Model,
    axis: str | Axis,
    arms: Arms,
    suites: Sequence[str | Suite] | None,
    out: Path,
    *,
    options: EvalOptions = EvalOptions(),
    load: ModelOptions = ModelOptions(),
    bank: Path | None = None,
    force: bool = False,
) -> EvalResult | None:
    """Evaluates a model as it is and with interventions, on the same prompts with the same seeds. Resumes.

    Parameters
    ----------
    model, axis
        names, or loaded objects: an axis is a run folder, an axis file or a packaged axis
    arms
        interventions by name, or texts such as "p50@18-23"; the baseline and random controls are added
    suites
        names or `Suite` objects; those whose file is in the options, and those that need none, unless given
    out
        the folder; eval.json and all answers are written there
    load
        how to load the model
    bank
        the folder of a bank with the axis's roles; the packaged one unless given
    force
        use an axis of the same model in another weight format

    Returns the result on the first rank, None on others. Raises `UserError` for what cannot be, before anything is
    answered, and for a folder of another model, engine or dtype.
    """
    world, roles = get_world(), load_bank(bank)
    selected, judge = _check(suites, options, roles)
    with open_run(out, create=True, rank=world.rank) as run:
        try:
            if world.rank:
                world.barrier()  # until the first rank has recorded in run.json what is evaluated
            # the dtype that it was begun with, not the one that is faster now
            dtype = load.dtype or run.manifest.get("asked", {}).get("dtype")
            load = replace(load, device=load.device or local_device(world), dtype=dtype)
            steered, plans = load_arms(model, axis, arms, load=load, force=force)
            bench = Bench(steered.model, steered.chat, steered.axis, run.folder, world)
            context = _open_context(run, bench, options, selected, roles, plans)
            if not world.rank:
                world.barrier()
            named = None if suites is None else ",".join(suite.name for suite in selected)
            return _run(context, judge, {"suite": named, **asdict(options)})
        finally:
            world.close()


def _check(
    suites: Sequence[str | Suite] | None, options: EvalOptions, bank: Bank
) -> tuple[list[Suite], HarmJudge]:
    """The suites and the judge, after all that can be checked before a model is loaded."""
    options.check()
    selected = select_suites(suites, options)
    judge = harm_judge(options.judge, options.judge_model, options.rubric)
    tags = {tag for role in bank.roles for tag in role.tags}
    unknown = sorted(set(options.tag or ()) - tags)
    if unknown:
        raise UserError(f"--tag {unknown[0]!r} is not one of {', '.join(sorted(tags))}")
    if options.text is not None:
        read_text(options.text, options.text_bytes)
    if options.judge.startswith("http") and not get_world().rank:
        list(
            judge.harm_verdicts([("Say hello.", "Hello.")])
        )  # a dead endpoint is met now, not after all is answered
    if options.tasks:
        require_lm_eval()
        parse_task_data(options.data or [])
    return selected, judge


def _open_context(
    run: RunFolder,
    bench: Bench,
    options: EvalOptions,
    selected: Sequence[Suite],
    bank: Bank,
    arms: Mapping[str, Interventions],
) -> EvalContext:
    """Suites with their cases, cut to what fits, and the folder's record of what answers."""
    model, roles = bench.model, list[str]()
    if any(suite.needs_roles for suite in selected):
        space = load_space(bench.axis.folder / "space")
        roles = lowest_roles(bench.axis, space, bank, options.roles, options.tag or ())
    inputs = SuiteInputs(options, bank, tuple(roles), model.name)
    fitted = [fit_to_context(bench, suite) for whole in selected for suite in whole.prepare(inputs)]
    known = versions()
    engine = {"device": model.device.type, **{name: known[name] for name in ("torch", "transformers")}}
    run.claim(
        {
            "model": model.describe(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "engine": engine,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed,
        }
    )
    suites = tuple(suite for suite, _ in fitted)
    left_out = {suite.name: count for suite, count in fitted}
    arms = {**arms, **_random_arms(bench, suites, arms, options.random)}
    return EvalContext(run, bench, options, suites, left_out, arms)


def _random_arms(
    bench: Bench, suites: Sequence[Suite], arms: Mapping[str, Interventions], count: int
) -> dict[str, Interventions]:
    """Arms of random caps, controls for what disturbing a model as often as the first cap does would do in any direction.

    They are matched, layer by layer, to that cap's fired shares on answers of the baseline to first turns of the first and
    the last suite, and kept in the folder, so that an interrupted evaluation goes on with the same ones.
    """
    caps = [own for plan in arms.values() for own in plan if isinstance(own, Cap)]
    if not caps or not count:
        return {}
    texts: list[Rollout] = []
    sources = {suite.name: suite for suite in (suites[0], suites[-1])}.values()
    for suite in sources:
        cases = spread(suite.cases, MATCHED // len(sources))
        part = replace(suite, cases=tuple(replace(case, later=()) for case in cases))
        answers = answer_suite(bench, part, {BASELINE: []})
        rollouts = [answer_rollout(answers[BASELINE, case.key, 0]) for case in cases]
        texts += [rollout for rollout in rollouts if rollout.answer_ids]
    content = interventions_digest(caps[:1]), [(text.prompt_ids, text.answer_ids) for text in texts]
    stem = bench.folder / "caps" / f"random-{hashlib.sha256(repr(content).encode()).hexdigest()[:8]}"
    files = {seed: stem.with_name(f"{stem.name}-{seed}") for seed in range(1, count + 1)}
    if not bench.world.rank:
        stem.parent.mkdir(exist_ok=True)
        missing = [seed for seed, file in files.items() if not file.with_suffix(".json").exists()]
        if missing:
            shares = fired_shares(bench.model, caps[0], texts)
            for seed in missing:
                random_cap(bench.model, caps[0], shares, texts, seed).save(files[seed])
    bench.world.barrier()
    return {f"{RANDOM} {seed}": [load_cap(file)] for seed, file in files.items()}


def _run(context: EvalContext, judge: HarmJudge, asked: Mapping[str, object]) -> EvalResult | None:
    """Answers, judges, measures, and writes eval.json; `asked` are the options for its record."""
    bench, options, suites, arms = context.bench, context.options, context.suites, context.arms
    answers = {suite.name: answer_suite(bench, suite, arms) for suite in suites}
    if bench.world.rank:
        return None
    harm = _judge(context, judge, answers)
    scores = {suite.name: score_answers(suite, answers[suite.name], harm) for suite in suites}
    results, names = {}, list(arms)
    for suite in suites:
        parts = answers[suite.name], scores[suite.name], names
        results[suite.name] = suite_result(suite, *parts, options.margin, context.left_out[suite.name])
    summary = JudgeSummary(judge.id, options.rubric, sum(score is None for score in harm.values()))
    tasks = _run_tasks(context) if options.tasks else None
    facts = context.run.manifest["asked"]
    result = EvalResult(
        **{name: facts[name] for name in ("model", "dtype", "engine")},
        axis={"layer": bench.axis.layer, "of": bench.axis.source},
        arms=tuple(names),
        caps={
            name: CapSummary(format_layers(cap.layers), cap.level, cap.population, cap.phase, cap.spare_first)
            for name, plan in arms.items()
            for cap in plan
            if isinstance(cap, Cap)
        },
        judge=summary,
        suites=results,
        capability=measure_capability(bench, suites, answers, arms, options.text, options.text_bytes, tasks),
        asked={name: str(value) if isinstance(value, Path) else value for name, value in asked.items()},
        versions=versions(),
        pairs=tuple(
            row
            for suite in suites
            for row in case_results(suite, answers[suite.name], scores[suite.name], names)
        ),
        warnings=tuple(eval_warnings(results, summary, BASELINE)),
    )
    write_json(context.run.folder / "eval.json", result.to_json())
    return result


def _run_tasks(context: EvalContext) -> LmEvalResult:
    """Tasks of lm-eval in all arms, without their samples, which are in tasks/lm_eval.json."""
    from personatlas.steering.evals.harnesses.lm_eval_run import compare_tasks

    options = context.options
    task_options = LmEvalOptions(
        data=options.data, limit=options.task_limit, max_new_tokens=options.task_tokens, margin=options.margin
    )
    names, out = parse_task_names(options.tasks or ""), context.run.folder / "tasks"
    result = compare_tasks(context.bench.model, context.arms, names, out, task_options)
    return replace(result, tasks={name: replace(task, samples=None) for name, task in result.tasks.items()})


def _judge(
    context: EvalContext, judge: HarmJudge, answers: Mapping[str, Answers]
) -> dict[tuple[str, str], float | None]:
    """Scores of everything that a judge must see, each pair asked once whatever arm it came from, in an order that says
    nothing of arms."""
    pairs: list[tuple[str, str]] = []
    for suite in context.suites:
        if suite.needs_judge:
            requests = {case.key: case.judged_request for case in suite.cases}
            pairs += sorted({(requests[key], own.text) for (_, key, _), own in answers[suite.name].items()})
    pairs = list(dict.fromkeys(pairs))
    with progress("judging", len(pairs), quiet=not pairs) as advance:
        verdicts = judge_harm(judge, pairs, context.run.folder / "verdicts.jsonl", advance)
    return {pair: verdict.score for pair, verdict in zip(pairs, verdicts, strict=True)}
