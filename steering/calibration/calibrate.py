"""Calibrating a cap: from a run folder to the strongest cap within a loss budget, and an honest report of it.

    result = calibrate(Path("runs/smollm2-135m"), options=CalibrationOptions(budget=0.05))
    result.cap, result.saved, result.report["chosen"].assistant

Roles and benign questions are dealt into two halves. The cap is chosen on one, among windows of layers at
levels of a population (`grid_search`) and floors fitted by gradient (`fit_floors`); what it gains and costs
is measured on the other, beside the baseline, random directions that fire as often, and plain addition of the
axis. (arXiv 2601.10387, section 5, sweeps windows and percentiles likewise.) The run folder gets caps/NAME,
calibration.json and calibration.html.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from personatlas.persona.artifacts import write_json
from personatlas.persona.axis import CAPS, Axis, PersonaSpace, load_axis, load_space
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE, Cap, Interventions
from personatlas.persona.models.load import Model
from personatlas.persona.options import ModelOptions
from personatlas.persona.pipeline.activations import ACTIVATIONS, load_activations
from personatlas.persona.progress import progress, say, say_if_fewer
from personatlas.persona.roles.bank import Bank, load_bank
from personatlas.persona.rollout import Rollout, of_kind, read_rollouts, spread_evenly
from personatlas.persona.runs import open_run, resolve_axis, versions
from personatlas.steering.arms import RANDOM, is_control_name
from personatlas.steering.calibration.control_caps import FITTED, SAME_KL, control_axes, match_kl
from personatlas.steering.calibration.fit_floors import DescentOptions, Floors, target_texts
from personatlas.steering.calibration.grid_search import Candidate, GridSearch, Trial, default_windows
from personatlas.steering.calibration.measure import Half, Measurements
from personatlas.steering.calibration.options import SIZES, CalibrationOptions, SearchSettings
from personatlas.steering.calibration.page import write_calibration_page
from personatlas.steering.calibration.quantile_floors import Projections, read_projections
from personatlas.steering.calibration.result import (
    CHOSEN,
    ArmRow,
    CalibrationResult,
    CandidateRow,
    ExampleRow,
    FittedOn,
    FloorRow,
    IdentityRow,
)
from personatlas.steering.hooks.binding_check import require_binding
from personatlas.steering.identity import (
    FITTED_QUESTIONS,
    HELD_OUT_QUESTIONS,
    identity_requests,
    lowest_roles,
    require_prompts,
)
from personatlas.steering.random_caps import random_arms
from personatlas.steering.session import Arms, SteeredModel, load_steered_model

CHOOSE, REPORT = "choose", "report"  # the halves
N_RANDOM = 3  # random controls unless asked for
RESERVED = rf"{CHOSEN}|add \d+"  # names of the report's own arms
ADDED = (4.0, 8.0, 16.0)  # strengths of plain addition, residual units
FITTED_DEPTH = 0.2, 0.93  # the part of the depth that gets floors by gradient, unless windows are given
SHIFTS = (-0.4, -0.2, 0.0, 0.2, 0.4)  # of fitted floors, in spreads
RARELY_FIRED = 0.15  # a cap that fires on less than this share has hardly been tried
POPULATION_SIZE = 400  # answers of each population whose projections are read
MATCHED_ANSWERS = 24  # of each population, on which random caps are made to fire as often
Item = TypeVar("Item")


def calibrate(
    run: Path,
    *,
    model: Model | None = None,
    name: str = "assistant",
    axis: str | None = None,
    arms: Arms = (),
    bank: Path | None = None,
    options: CalibrationOptions = CalibrationOptions(),
    load: ModelOptions = ModelOptions(),
) -> CalibrationResult:
    """Finds the strongest cap within a loss budget, saves it as RUN/caps/NAME, and reports it on other roles.
    Resumes.

    `model` is the run's own where it is loaded already, else it is loaded with the options `load`. `axis` is
    another axis of the model; `arms` are reported beside the chosen cap, with as many random controls as a
    text random:N says (3 unless given). Raises `UserError` for a run that lacks what is needed, and for
    options that cannot be.
    """
    settings = options.parse()
    with open_run(run) as folder:
        plan = folder.manifest.get("asked")
        if not plan or "model_name" not in plan:
            raise UserError(f"{run} has no run.json with rollouts; make them first with `personatlas axis`")
        loaded_axis = load_axis(resolve_axis(axis or str(run)))
        space = load_space(loaded_axis.folder / "space")
        require_prompts(loaded_bank := load_bank(bank), options.prompts)
        default, roles = _populations(read_rollouts(run), loaded_bank, run)
        if model is None:
            model, load = plan["model_name"], replace(load, dtype=load.dtype or plan.get("dtype"))
        steered = load_steered_model(model, loaded_axis, arms, load, controls=True, reserved=RESERVED)
        model = folder.as_recorded(steered.model)
        halves = deal_halves(loaded_bank, loaded_axis, space, default, model.name, settings)
        populations = {
            "default": _spread_default(default, POPULATION_SIZE),
            "roles": _spread_roles(roles, POPULATION_SIZE),
        }
        with progress("projecting", sum(map(len, populations.values()))) as advance:
            projections = read_projections(model, loaded_axis, populations, advance)
        say("floors from {} default and {} role answers".format(*map(len, projections.means.values())))
        require_binding(model, [projections.cap(loaded_axis, [loaded_axis.layer], 0.5)])
        measurements = Measurements(model, halves, settings.sampling, run / "trials.jsonl")
        target: list[Rollout] = []
        if settings.steps and halves[CHOOSE].requests:
            target = target_texts(model, loaded_bank, halves[CHOOSE].requests, settings.seed)
            if not target:
                say("no floors by gradient: the default never calls itself an assistant when asked who it is")
        search, cap, best = search_cap(measurements, loaded_axis, projections, target, settings)
        matched = [*_spread_default(default, MATCHED_ANSWERS), *_spread_roles(roles, MATCHED_ANSWERS)]
        controls = _control_arms(measurements, steered, cap, best, matched, target, settings)
        report, reported = _report(measurements, steered, cap, controls)
        baseline = measurements.identity({BASELINE: []}, CHOOSE)[BASELINE]
        result = CalibrationResult(
            cap=best.candidate.name,
            why=_why(best, search, baseline.shares["assistant"], settings.budget),
            budget=settings.budget,
            before={CHOOSE: IdentityRow.of(baseline)},
            tried=tuple(map(_candidate_row, search.trials.values())),
            report=report,
            floors=_floor_rows(cap, best.candidate, projections),
            warnings=tuple(_warnings(report, settings.budget)),
            halves={half: _sizes(material) for half, material in halves.items()},
            examples=_examples(measurements, reported),
            model=model.describe(),
            name=name,
            saved=f"{run / CAPS / name}.safetensors",
            page=str(run / "calibration.html"),
            versions=versions(),
        )
        fitted = FittedOn(
            frozenset(request.parts.role for request in halves[CHOOSE].requests),
            frozenset(text.question for text in halves[CHOOSE].texts),
        )
        _save(run, replace(cap, calibration=fitted.to_json()), best, result)
    return result


def _save(run: Path, cap: Cap, best: Trial, result: CalibrationResult) -> None:
    """Writes RUN/caps/NAME, with what was measured of it beside what it was fitted on, calibration.json and the page."""
    levels = None if best.candidate.fitted else [best.candidate.level] * len(cap.layers)
    before, after = result.report[BASELINE], result.report[CHOSEN]
    measured = {
        "name": result.cap,
        "levels": levels,
        "budget": result.budget,
        "assistant": [before.assistant, after.assistant],
        "assistant_interval": after.interval,
        "more_loss": after.more_loss,
        "more_loss_interval": after.more_loss_interval,
        "kl": after.kl,
        "fired": after.fired,
    }
    saved = run / CAPS / result.name
    saved.parent.mkdir(exist_ok=True)
    replace(cap, calibration=measured | cap.calibration).save(saved)
    write_json(run / "calibration.json", result.to_json())
    write_calibration_page(run / "calibration.html", result)


def _spread_default(answers: Sequence[Rollout], count: int) -> list[Rollout]:
    """Of the default's answers, every question before any twice."""
    return spread_evenly(answers, count, lambda answer: answer.question)


def _spread_roles(answers: Sequence[Rollout], count: int) -> list[Rollout]:
    """Of the roles' answers, every role before any twice."""
    return spread_evenly(answers, count, lambda answer: answer.role)


def _populations(rollouts: Sequence[Rollout], bank: Bank, run: Path) -> tuple[list[Rollout], list[Rollout]]:
    """The default's answers and the roles', without empty ones."""
    answers = [rollout for rollout in of_kind(rollouts, "role") if not rollout.is_empty]
    default = [rollout for rollout in answers if rollout.role == bank.default.name]
    roles = [rollout for rollout in answers if rollout.role != bank.default.name]
    if not default or not roles:
        raise UserError(f"{run} holds {len(default)} default and {len(roles)} role answers; both are needed")
    if len(default) < 2:
        raise UserError(f"{run} holds one default answer only; two halves need more")
    return default, roles


def deal_halves(
    bank: Bank,
    axis: Axis,
    space: PersonaSpace,
    benign: Sequence[Rollout],
    model_name: str,
    settings: SearchSettings,
) -> dict[str, Half]:
    """The two halves: every other one of the lowest roles, each half with identity questions of its own, and
    every other question of the benign answers.
    """
    roles = lowest_roles(axis, space, bank, settings.roles)
    for name, there in (("roles", len(roles)), ("answers", len(benign))):
        if (wanted := getattr(settings, name)) != SIZES[settings.quick][name]:
            say_if_fewer(f"--{name}", wanted, there)
    answers = _spread_default(sorted(benign, key=lambda text: text.key), settings.answers)
    requests = [
        identity_requests(bank, own, settings.prompts, model_name, settings.seed, questions)
        for own, questions in zip(
            split_groups(roles, str), (FITTED_QUESTIONS, HELD_OUT_QUESTIONS), strict=True
        )
    ]
    by_question = split_groups(answers, lambda text: text.question)
    if not all(by_question):
        raise UserError(
            "the run's default answers are to one question only; two halves need at least two questions"
        )
    return {
        half: Half(tuple(own_requests), tuple(texts))
        for half, own_requests, texts in zip((CHOOSE, REPORT), requests, by_question, strict=True)
    }


def split_groups(items: Sequence[Item], group: Callable[[Item], str]) -> tuple[list[Item], list[Item]]:
    """Two halves in which every group lies whole: every other group of those in order of first appearance."""
    first = set(list(dict.fromkeys(map(group, items)))[::2])
    return [item for item in items if group(item) in first], [
        item for item in items if group(item) not in first
    ]


def search_cap(
    measurements: Measurements,
    axis: Axis,
    projections: Projections,
    target: Sequence[Rollout],
    settings: SearchSettings,
) -> tuple[GridSearch, Cap, Trial]:
    """The search, the cap that it found and what that did on the choosing half. No floors are fitted without
    `target`.
    """
    windows = _windows(settings, axis, measurements.model.n_layers)
    floors: Floors | None = None

    def make(candidate: Candidate) -> Cap:
        if candidate.fitted and floors is not None:
            return floors.cap(axis, candidate.level)
        return projections.cap(axis, candidate.layers, candidate.level, candidate.population)

    search = GridSearch(measurements, make, CHOOSE, settings.budget)
    grid = [
        Candidate(first, last, level, population)
        for population in settings.populations
        for first, last in windows
        for level in sorted(set(settings.levels))
    ]
    best = search.search(grid)
    if settings.steps and target:
        span = [round(part * (measurements.model.n_layers - 1)) for part in FITTED_DEPTH]
        first = min((window[0] for window in settings.windows), default=span[0])
        last = max((window[1] for window in settings.windows), default=span[1])
        layers = tuple(layer for layer in axis.layers if first <= layer <= last)
        descent = DescentOptions(settings.budget, settings.steps, seed=settings.seed)
        floors = measurements.floors(axis, layers, projections, target, descent, CHOOSE)
        best_of_grid = best.candidate
        fitted = [Candidate(layers[0], layers[-1], shift, fitted=True) for shift in SHIFTS]
        best = search.search(fitted)
        for candidate in () if settings.quick else (best_of_grid, fitted[0]):
            search.try_levels(candidate)
    return search, make(best.candidate), best


def _windows(settings: SearchSettings, axis: Axis, n_layers: int) -> list[tuple[int, int]]:
    windows = list(settings.windows) or [
        window
        for window in default_windows(n_layers, settings.quick)
        if all(layer in axis.layers for layer in range(window[0], window[1] + 1))
    ]
    for first, last in windows:
        if not 0 <= first <= last < n_layers:
            raise UserError(f"window {first}-{last} is outside the model (layers 0..{n_layers - 1})")
        for layer in range(first, last + 1):
            axis.at(layer)
    if not windows:
        raise UserError("the axis has too few layers for the usual windows; give --windows FIRST-LAST")
    return windows


def _control_arms(
    measurements: Measurements,
    steered: SteeredModel,
    cap: Cap,
    best: Trial,
    matched: Sequence[Rollout],
    target: Sequence[Rollout],
    settings: SearchSettings,
) -> dict[str, Interventions]:
    """Random caps that fire as often as the cap on `matched`, caps along other directions whose KL is the
    cap's, and, where its floors were fitted, random directions with floors fitted in the same way.
    """
    count = N_RANDOM if steered.n_random is None else steered.n_random
    arms = random_arms(steered.model, cap, matched, count)
    stem, texts, layers = (
        measurements.log.with_name(ACTIVATIONS["role"]),
        measurements.halves[CHOOSE].texts,
        cap.layers,
    )
    recorded = load_activations(stem) if stem.with_suffix(".json").exists() else None
    axes = control_axes(steered.axis, recorded, matched[0].role, count, settings.seed)
    caps = match_kl(measurements, axes, layers, texts, best.cost.kl, CHOOSE) if best.cost.kl > 0 else {}
    if missed := [name for name in axes if name not in caps]:
        say(f"no cap along {', '.join(missed)} reaches the chosen cap's KL: left out")
    arms |= {name + SAME_KL: [own] for name, own in caps.items()}
    if best.candidate.fitted and not settings.quick:
        descent = DescentOptions(settings.budget, settings.steps, seed=settings.seed)
        for name in [name for name in axes if name.startswith(RANDOM)][:N_RANDOM]:
            own = read_projections(measurements.model, axes[name], {"default": texts})
            floors = measurements.floors(axes[name], layers, own, target, descent, CHOOSE)
            arms[name + FITTED] = [floors.cap(axes[name])]
    return arms


def _report(
    measurements: Measurements, steered: SteeredModel, cap: Cap, controls: Mapping[str, Interventions]
) -> tuple[dict[str, ArmRow], dict[str, Interventions]]:
    """What every arm gains and costs on the reporting half, and the arms."""
    axis = steered.axis
    arms: dict[str, Interventions] = {BASELINE: [], CHOSEN: [cap], **controls}
    arms |= {f"add {amount:g}": [axis.add(amount, [axis.layer])] for amount in ADDED} | steered.steered_arms
    gains = measurements.identity(arms, REPORT)
    costs = measurements.costs({name: arm for name, arm in arms.items() if arm}, REPORT)
    baseline_loss = next(iter(costs.values())).baseline_loss
    report = {}
    for name, gain in gains.items():
        change = gain.change(gains[BASELINE])
        row = {
            **vars(IdentityRow.of(gain)),
            "change": change.value,
            "change_interval": (change.low, change.high),
        }
        if name not in costs:
            report[name] = ArmRow(**row, more_loss=0.0, loss=baseline_loss, kl=0.0)
            continue
        cost = costs[name]
        report[name] = ArmRow(
            **row,
            more_loss=cost.more,
            loss=cost.loss,
            kl=cost.kl,
            more_loss_interval=cost.more_interval,
            benign_fired=float(cost.fired.mean()),
            benign_moved=float(cost.moved.mean()),
        )
    return report, arms


def _candidate_row(trial: Trial) -> CandidateRow:
    candidate, cost = trial.candidate, trial.cost
    return CandidateRow(
        name=candidate.name,
        first=candidate.first,
        last=candidate.last,
        population=candidate.population,
        phase="both",
        more_loss=cost.more,
        kl=cost.kl,
        benign_fired=float(cost.fired.mean()),
        shift=candidate.level if candidate.fitted else None,
        levels=None if candidate.fitted else (candidate.level,) * len(candidate.layers),
        **({} if trial.gain is None else asdict(IdentityRow.of(trial.gain))),
    )


def _why(best: Trial, search: GridSearch, baseline_share: float, budget: float) -> str:
    n = sum(trial.gain is not None for trial in search.trials.values())
    return (
        f"of {len(search.trials)} caps read on benign text and {n} tried under role prompts, "
        f"{best.candidate.name} made most answers call themselves an assistant ({best.share:.0%}, "
        f"baseline {baseline_share:.0%}) among those that cost at most {budget:.1%} more loss "
        f"({best.cost.more:.1%}), all on the choosing half"
    )


def _floor_rows(cap: Cap, candidate: Candidate, projections: Projections) -> tuple[FloorRow, ...]:
    """Each layer's floor and the shares of tokens below it, by side where the sides differ."""
    sides = ("answer",) if cap.prompt_floor is None else ("prompt", "answer")
    below = {
        side: {name: projections.below(cap, name, side).tolist() for name in projections.tokens}
        for side in sides
    }
    rows = []
    for row, layer in enumerate(cap.layers):
        floors = {
            side: {"floor": cap.floor_of(row, side)} | {name: shares[row] for name, shares in own.items()}
            for side, own in below.items()
        }
        level = None if candidate.fitted else candidate.level
        rows.append(FloorRow(layer, floors["answer"], floors.get("prompt"), level))
    return tuple(rows)


def _warnings(report: Mapping[str, ArmRow], budget: float) -> list[str]:
    chosen, warnings = report[CHOSEN], []
    no_gain = chosen.change_interval[0] <= 0
    if chosen.fired == 0:
        warnings.append(
            "the cap never fired: every token stayed above its floor, so nothing of this is the cap's doing"
        )
    elif no_gain and chosen.fired < RARELY_FIRED:
        warnings.append(
            f"the cap fired on {chosen.fired:.0%} of tokens only: it may have done nothing for want of trying"
        )
    if no_gain:
        warnings.append("on the reporting half the gain cannot be told from none (its 95% interval holds 0)")
    if chosen.more_loss > budget:
        warnings.append(
            f"on the reporting half it costs {chosen.more_loss:.1%} more loss, over the budget of "
            f"{budget:.1%} that it kept on the choosing half; a smaller --budget leaves room for that"
        )
    randoms = [row.change for name, row in report.items() if is_control_name(name)]
    if randoms and max(randoms) >= chosen.change:
        warnings.append("a random direction gained as much: this is no effect of the axis")
    return warnings


def _sizes(half: Half) -> dict[str, int]:
    roles = len({request.key.split("/", 1)[0] for request in half.requests})
    return {"roles": roles, "answers": len(half.requests), "texts": len(half.texts)}


def _examples(measurements: Measurements, arms: Mapping[str, Interventions]) -> tuple[ExampleRow, ...]:
    """Answers of the reporting half without and under the chosen cap: one a role, the questions in turn, not
    selected.
    """
    baseline, capped = (measurements.answers(arms[name], REPORT) for name in (BASELINE, CHOSEN))
    examples, questions = dict[str, ExampleRow](), list(HELD_OUT_QUESTIONS)
    for index, request in enumerate(measurements.halves[REPORT].requests):
        role, prompt, question, _ = request.parts
        turn = questions[len(examples) % len(questions)]
        if prompt == 0 and role not in examples and question == turn:
            text = request.messages[-1]["content"]
            examples[role] = ExampleRow(role, text, baseline[index], capped[index])
    return tuple(examples.values())
