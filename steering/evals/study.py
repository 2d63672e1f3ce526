"""An evaluation from a model's name to eval.json: arms, answers, scores, statistics.

    result = evaluate("smollm2-135m", "smollm2-135m", ["cap:assistant"], ["susceptibility"], Path("out"))
    result.suites["susceptibility"].outcomes["assistant"].arms["assistant"].share

The first arm is the baseline; then the caps, then random caps that fire as often as the first one. Every arm
is a row of the same batches (on a GPU) or answers in turn (on a CPU), with the same prompts and seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from personatlas.persona.artifacts import write_json
from personatlas.persona.axis import CAPS, Axis, load_space
from personatlas.persona.distributed import get_world
from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.interventions import BASELINE, Cap, Interventions
from personatlas.persona.models.load import Model
from personatlas.persona.options import ModelOptions
from personatlas.persona.pipeline.run_context import local_device
from personatlas.persona.progress import Stage, Study, progress, say, say_if_fewer, stages
from personatlas.persona.records import JsonObject, json_object
from personatlas.persona.roles.bank import Bank, load_bank
from personatlas.persona.rollout import Rollout, spread
from personatlas.persona.runs import RunFolder, open_run, versions
from personatlas.steering.arms import summarise_arms
from personatlas.steering.calibration.result import FittedOn, fitted_on
from personatlas.steering.evals.answers import Answers, Bench, answer_rollout, answer_suite, fit_to_context
from personatlas.steering.evals.capability import (
    BENIGN_LOSS,
    OWN_LOSS,
    TEXT_LOSS,
    Capability,
    measure_capability,
    read_head,
)
from personatlas.steering.evals.harm.judges import HarmJudge, harm_judge, judge_harm
from personatlas.steering.evals.harnesses.lm_eval_result import (
    parse_task_data,
    parse_task_names,
    require_lm_eval,
)
from personatlas.steering.evals.options import EvalOptions, LmEvalOptions
from personatlas.steering.evals.result import (
    CaseResult,
    EvalResult,
    JudgeSummary,
    SuiteResult,
    case_results,
    eval_warnings,
    score_answers,
    suite_result,
)
from personatlas.steering.evals.suites import Suite, SuiteInputs, select_suites
from personatlas.steering.identity import lowest_roles, require_prompts
from personatlas.steering.random_caps import random_arms
from personatlas.steering.session import Arms, load_steered_model

MATCHED = 48  # answers that random caps are matched on
CONTROL_ANSWERS, CONTROLS = "answers to match controls on", "random controls"  # stages, beside the suites
JUDGING = "judging"
PROMPT, WRITTEN, LOGITS = 64, 7.0, 2.0  # tokens of a prompt; a token's time, written or with its logits


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
        interventions by name, or texts as `--arm` takes them; the baseline is added, and as many random
        controls as a text random:N or `options.random` says
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

    Returns the result on the first rank, None on others. Raises `UserError` for what cannot be, before
    anything is answered, and for a folder of another model, engine or dtype.
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
            steered = load_steered_model(model, axis, arms, load, controls=True, force=force)
            steered = replace(steered, model=run.date(steered.model))
            cap, plans = steered.control_cap, steered.arms
            if steered.n_random is not None:
                options = replace(options, random=steered.n_random)
            bench = Bench(steered.model, steered.chat, steered.axis, run.folder, world)
            fitted = fitted_on(own for plan in plans.values() for own in plan if isinstance(own, Cap))
            prepared = _prepare(run, bench, options, selected, roles, fitted)
            named = None if suites is None else ",".join(suite.name for suite in selected)
            asked = {"suite": named, **asdict(options)}
            own_suites = [suite for suite, _ in prepared]
            n_random = options.random if cap is not None else 0
            planned = plan_stages(own_suites, len(plans), n_random, options, judge)
            with stages(planned, quiet=world.rank > 0) as study:
                if cap is not None and n_random:
                    plans |= _random_arms(bench, own_suites, cap, n_random, study)
                if not world.rank:
                    world.barrier()
                measured = _measure(run, bench, options, own_suites, plans, judge, study)
            if measured is None:
                return None
            return _result(run, bench, options, prepared, plans, judge, json_object(asked), measured)
        finally:
            world.close()


def _check(
    suites: Sequence[str | Suite] | None, options: EvalOptions, bank: Bank
) -> tuple[list[Suite], HarmJudge]:
    """The suites and the judge, after all that can be checked before a model is loaded."""
    options.check()
    selected = select_suites(suites, options)
    judge = harm_judge(options.judge, options.judge_model, options.rubric, max_tokens=options.judge_tokens)
    tags = {tag for role in bank.roles for tag in role.tags}
    unknown = sorted(set(options.tag or ()) - tags)
    if unknown:
        raise UserError(f"--tag {not_one_of(unknown[0], sorted(tags))}")
    require_prompts(bank, options.prompts)
    if options.text is not None:
        read_head(options.text, options.text_bytes)
    if options.judge.startswith("http") and not get_world().rank:
        # a dead endpoint is met now, not after all is answered
        for _, verdict in judge.harm_verdicts([("Say hello.", "Hello.")]):
            if verdict.problem is not None and verdict.problem not in ("unparsable", "refused"):
                raise UserError(
                    f"the judge {judge.id} gives no score: {verdict.problem}: {verdict.reply[:160]}"
                )
    if options.tasks:
        require_lm_eval()
        parse_task_data(options.data or [])
    return selected, judge


def _prepare(
    run: RunFolder,
    bench: Bench,
    options: EvalOptions,
    selected: Sequence[Suite],
    bank: Bank,
    fitted: FittedOn,
) -> list[tuple[Suite, int]]:
    """Suites with the cases that fit, and how many of each did not; records in the folder what answers.

    What the caps were fitted on is not asked.
    """
    model, roles = bench.model, list[str]()
    if any(suite.needs_roles for suite in selected):
        space = load_space(bench.axis.folder / "space")
        tags = options.tag or ()
        roles = lowest_roles(bench.axis, space, bank, options.roles, tags, fitted.roles)
    name = run.as_recorded(model).name
    rest = tuple(question for question in bank.questions if question.id not in fitted.questions)
    if not rest:
        raise UserError("the caps were fitted on all questions of this bank: give another with --bank")
    if (fitted.roles or fitted.questions) and not bench.world.rank:
        say(
            f"left out: {len(fitted.roles)} roles and {len(fitted.questions)} questions that a cap was fitted on"
        )
    inputs = SuiteInputs(options, replace(bank, questions=rest), tuple(roles), name)
    prepared = [fit_to_context(bench, suite) for whole in selected for suite in whole.prepare(inputs)]
    if not bench.world.rank:
        sizes = [("roles", len(roles))] if roles else []
        sizes += [("answers" if own.name == "benign" else "pairs", len(own.cases)) for own, _ in prepared]
        for option, n in sizes:
            if getattr(EvalOptions, option) != (wanted := getattr(options, option)):
                say_if_fewer("--limit" if option == "pairs" else f"--{option}", wanted, n)
    known, sampling = versions(), {name: getattr(options, name) for name in ("temperature", "top_p", "seed")}
    engine = {"device": model.device.type, **{name: known[name] for name in ("torch", "transformers")}}
    dtype = str(model.dtype).removeprefix("torch.")
    asked = {"model": model.describe(), "name": name, "dtype": dtype, "engine": engine, **sampling}
    run.claim(asked | bench.chat.describe_date())
    return prepared


def _random_arms(
    bench: Bench, suites: Sequence[Suite], cap: Cap, count: int, study: Study
) -> dict[str, Interventions]:
    """Arms of random caps, controls for what disturbing a model as often as the cap does would do in any
    direction.

    They are matched, layer by layer, to that cap's fired shares on answers of the baseline to first turns of
    the first and the last suite.
    """
    study.start(CONTROL_ANSWERS)
    texts: list[Rollout] = []
    sources = {suite.name: suite for suite in (suites[0], suites[-1])}.values()
    for suite in sources:
        cases = spread(suite.cases, MATCHED // len(sources))
        part = replace(suite, cases=tuple(replace(case, later=()) for case in cases))
        answers = answer_suite(bench, part, {BASELINE: []})
        rollouts = [answer_rollout(answers[BASELINE, case.key, 0]) for case in cases]
        texts += [rollout for rollout in rollouts if rollout.answer_ids]
    if bench.world.rank:
        bench.world.barrier()  # until the first rank has saved them
    study.start(CONTROLS)
    arms = random_arms(bench.model, cap, texts, count, bench.folder / CAPS)
    if not bench.world.rank:
        bench.world.barrier()
    return arms


@dataclass(frozen=True)
class Measured:
    """Answers by suite, the judges' scores by judge and (request, answer), and what the arms cost."""

    answers: dict[str, Answers]
    judges: dict[str, HarmJudge]
    scored: dict[str, dict[tuple[str, str], float | None]]
    capability: Capability


def plan_stages(
    suites: Sequence[Suite], n_arms: int, n_random: int, options: EvalOptions, judge: HarmJudge
) -> list[Stage]:
    """The stages of an evaluation with their work, in tokens that are read: one written takes as long as
    `WRITTEN`.
    """
    planned, n_acting = list[Stage](), n_arms - 1 + n_random
    if n_random:
        sources = list({suite.name: suite for suite in (suites[0], suites[-1])}.values())
        counts = [(suite, min(len(suite.cases), MATCHED // len(sources))) for suite in sources]
        written = sum(n * (PROMPT + WRITTEN * suite.max_new_tokens) for suite, n in counts)
        read = sum(n * (PROMPT + suite.max_new_tokens) for suite, n in counts)
        planned.append(Stage(CONTROL_ANSWERS, written, "writing"))
        planned.append(Stage(CONTROLS, read * (1 + n_random), "reading"))
    for suite in suites:
        history = (suite.turns - 1) / 2 * (PROMPT + suite.max_new_tokens)
        n_turns = sum(1 + len(case.later) for case in suite.cases)
        work = n_turns * (1 + n_acting) * (PROMPT + history + WRITTEN * suite.max_new_tokens)
        planned.append(Stage(suite.name, work, "writing"))
    if n_judged := sum(len(suite.cases) for suite in suites if suite.judge(judge) is not None):
        of_rules = judge.id.startswith("rules")
        planned.append(Stage(JUDGING, n_judged * (1 + n_acting) * (0.0 if of_rules else 512.0), "judging"))
    for suite in suites:
        if suite.name == "benign":
            work = LOGITS * len(suite.cases) * (1 + n_acting) * (PROMPT + suite.max_new_tokens)
            planned += [Stage(name, work, "losses") for name in (BENIGN_LOSS, OWN_LOSS)]
    if options.text is not None:
        planned.append(Stage(TEXT_LOSS, LOGITS * options.text_bytes / 4 * (1 + n_acting), "losses"))
    return planned


def _measure(
    run: RunFolder,
    bench: Bench,
    options: EvalOptions,
    suites: Sequence[Suite],
    arms: Mapping[str, Interventions],
    judge: HarmJudge,
    study: Study,
) -> Measured | None:
    """Answers, judges, and measures costs; on other ranks than the first only answers."""
    answers = dict[str, Answers]()
    for suite in suites:
        study.start(suite.name)
        answers[suite.name] = answer_suite(bench, suite, arms)
    if bench.world.rank:
        return None
    judges = {suite.name: own for suite in suites if (own := suite.judge(judge)) is not None}
    scored: dict[str, dict[tuple[str, str], float | None]] = {}
    for own in {own.id: own for own in judges.values()}.values():
        pairs: list[tuple[str, str]] = []  # of all arms, in an order that says nothing of them
        for suite in suites:
            if suite.name in judges and judges[suite.name].id == own.id:
                requests, said = {case.key: case.judged_request for case in suite.cases}, answers[suite.name]
                pairs += sorted({(requests[key], answer.text) for (_, key, _), answer in said.items()})
        pairs = list(dict.fromkeys(pairs))
        study.start(JUDGING)
        with progress("judging", len(pairs)) as advance:
            verdicts = judge_harm(own, pairs, run.folder / "verdicts.jsonl", advance)
        scored[own.id] = {pair: verdict.score for pair, verdict in zip(pairs, verdicts, strict=True)}
    capability = measure_capability(bench, suites, answers, arms, options, study)
    return Measured(answers, judges, scored, capability)


def _result(
    run: RunFolder,
    bench: Bench,
    options: EvalOptions,
    prepared: Sequence[tuple[Suite, int]],
    arms: Mapping[str, Interventions],
    judge: HarmJudge,
    asked: JsonObject,
    measured: Measured,
) -> EvalResult:
    """Counts, runs the tasks of lm-eval, and writes eval.json."""
    judges, scored = measured.judges, measured.scored
    results, cases = dict[str, SuiteResult](), list[CaseResult]()
    for suite, left_out in prepared:
        said = measured.answers[suite.name]
        scores = score_answers(suite, said, scored[judges[suite.name].id] if suite.name in judges else {})
        results[suite.name] = suite_result(suite, said, scores, list(arms), options.margin, left_out)
        cases += case_results(suite, said, scores, list(arms))
    tasks = None
    if options.tasks:  # their samples stay in tasks/lm_eval.json
        from personatlas.steering.evals.harnesses.lm_eval_run import compare_tasks

        names = parse_task_names(options.tasks)
        task_options = LmEvalOptions(
            data=options.data,
            limit=options.task_limit,
            max_new_tokens=options.task_tokens,
            margin=options.margin,
        )
        whole = compare_tasks(bench.model, arms, names, run.folder / "tasks", task_options)
        tasks = replace(whole, tasks={name: replace(own, samples=None) for name, own in whole.tasks.items()})
    unjudged = sum(score is None for score in scored.get(judge.id, {}).values())
    summary = JudgeSummary(judge.id, options.rubric, unjudged)
    result = EvalResult(
        **{name: run.manifest["asked"][name] for name in ("model", "dtype", "engine")},
        axis={"layer": bench.axis.layer, "of": bench.axis.source},
        arms=tuple(arms),
        interventions=summarise_arms(arms),
        judge=summary,
        suites=results,
        capability=replace(measured.capability, tasks=tasks),
        asked=asked,
        versions=versions(),
        pairs=tuple(cases),
        warnings=tuple(eval_warnings(results, summary)),
    )
    write_json(run.folder / "eval.json", result.to_json())
    return result
