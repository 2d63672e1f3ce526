"""Calibrating a cap: floors from the run's own answers, the window and level that buy most, and an honest report of it.

    cap, content = calibrate(trial, axis, places, mixed, wanted, Settings(), {})

Roles and benign questions are dealt into two halves. The cap is chosen on one, among windows of layers at levels of a
population (`personatlas.steering.calibration.grid_search`) and floors fitted by gradient (`personatlas.steering.calibration.fit_floors`); what it buys and costs
is measured on the other, beside the model as it is, random directions that fire as often, and plain addition of
the axis. (arXiv 2601.10387, section 5, sweeps windows and percentiles likewise.)

The stage of a run that makes a cap: from a run folder to caps/NAME, calibration.json and calibration.html.

content = calibrated(Path("runs/smollm2-135m"), "assistant", None, [], None, SearchOptions(), ModelOptions())
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from personatlas.persona.artifacts import write_json
from personatlas.persona.axis import CAPS, Axis, PersonaSpace, load_axis, load_space
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE, Cap, Interventions
from personatlas.persona.models.chat_template import chat_format
from personatlas.persona.models.load import Model, load_model
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import progress, say
from personatlas.persona.roles.bank import Bank, load_bank
from personatlas.persona.rollout import Rollout, read_rollouts, spread, without_poles
from personatlas.persona.runs import open_run, resolve_axis, versions
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.calibration.fit_floors import Descent, Floors, wanted_texts
from personatlas.steering.calibration.grid_search import Candidate, Sweep, Tried, windows_of
from personatlas.steering.calibration.measure import Half, Trial, halved
from personatlas.steering.calibration.page import write_calibration_page
from personatlas.steering.calibration.quantile_floors import Projections, read_projections
from personatlas.steering.hooks.binding_check import require_binding
from personatlas.steering.identity import IdentityShares, identity_requests, lowest_roles
from personatlas.steering.random_caps import fired_shares, random_cap

CHOOSE, REPORT = "choose", "report"
RANDOM_SEEDS = (1, 2, 3)
ADDED = (4.0, 8.0, 16.0)  # strengths of plain addition, residual units
FITTED = 0.2, 0.93  # the part of the depth that gets floors by gradient, unless windows are given
SHIFTS = (-0.4, -0.2, 0.0, 0.2, 0.4)  # of fitted floors, in spreads
LITTLE_FIRED = 0.15  # a cap that fires on less than this share has hardly been tried


@dataclass(frozen=True)
class Settings:
    """What to search and measure. Empty windows: those of `windows_of`."""

    windows: tuple[tuple[int, int], ...] = ()
    levels: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    populations: tuple[str, ...] = ("default",)
    budget: float = 0.05
    roles: int = 50
    prompts: int = 2
    answers: int = 60
    seed: int = 0
    steps: int = 120
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=48))
    quick: bool = False


def halves_of(
    bank: Bank,
    axis: Axis,
    space: PersonaSpace,
    benign: Sequence[Rollout],
    model_name: str,
    settings: Settings,
) -> dict[str, Half]:
    """The two halves: every other one of the lowest roles, and every other question of the benign answers."""
    roles = lowest_roles(axis, space, bank, settings.roles)
    requests = identity_requests(bank, roles, settings.prompts, model_name, settings.seed)
    chosen = spread(sorted(benign, key=lambda text: text.key), settings.answers)
    by_role = halved(requests, lambda request: request.key.split("/", 1)[0])
    by_question = halved(chosen, lambda text: text.question)
    if not all(by_question):
        raise UserError(
            "the run's default answers are to one question only; two halves need at least two questions"
        )
    return {
        half: Half(tuple(own), tuple(texts))
        for half, own, texts in zip((CHOOSE, REPORT), by_role, by_question, strict=True)
    }


def calibrate(
    trial: Trial,
    axis: Axis,
    places: Projections,
    mixed: Sequence[Rollout],
    wanted: Sequence[Rollout],
    settings: Settings,
    also: Mapping[str, Cap],
) -> tuple[Cap, dict[str, Any]]:
    """The chosen cap with its record (`found`), and the content of calibration.json.

    `mixed` are answers of the default and of roles, on which the random caps are made to fire as often; `wanted` what fitted
    floors are to make likely (none are fitted without it). `also` are caps to report beside the chosen one.
    """
    sweep, cap, best = _chosen(trial, axis, places, wanted, settings)
    before = trial.gains({BASELINE: []}, CHOOSE)[BASELINE]
    reported, arms = _report(trial, axis, cap, mixed, also)
    content = {
        "cap": best.candidate.name,
        "why": _why(best, sweep, before, settings.budget),
        "budget": settings.budget,
        "before": {"choose": _gained(before)},
        "tried": [_line(one) for one in sweep.tried.values()],
        "report": reported,
        "floors": _floors(cap, best.candidate, places),
        "warnings": _warnings(reported, settings.budget),
        "halves": {name: _sizes(half) for name, half in trial.halves.items()},
        "examples": _examples(trial, arms),
        "model": trial.model.describe(),
    }
    chosen = reported["chosen"]
    found = {
        "name": best.candidate.name,
        "levels": None if best.candidate.fitted else list(best.candidate.levels),
        "budget": settings.budget,
        "assistant": [reported[BASELINE]["assistant"], chosen["assistant"]],
        "more_loss": chosen["more_loss"],
        "fired": chosen["fired"],
    }
    return replace(cap, calibration=found), content


def _windows(settings: Settings, axis: Axis, n_layers: int) -> list[tuple[int, int]]:
    windows = list(settings.windows) or [
        window
        for window in windows_of(n_layers, settings.quick)
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


def _chosen(
    trial: Trial, axis: Axis, places: Projections, wanted: Sequence[Rollout], settings: Settings
) -> tuple[Sweep, Cap, Tried]:
    """The search, the cap that it found and what that did on the choosing half."""
    windows = _windows(settings, axis, trial.model.n_layers)
    floors: Floors | None = None

    def make(candidate: Candidate) -> Cap:
        if candidate.fitted and floors is not None:
            return floors.cap(axis, candidate.level)
        return places.cap(axis, candidate.layers, candidate.levels, candidate.population, candidate.phase)

    sweep = Sweep(trial, make, CHOOSE, settings.budget)
    best = sweep.run(windows, settings.levels, settings.populations, neighbours=not settings.quick)
    if settings.steps and wanted:
        layers = _fitted_layers(settings, axis, trial.model.n_layers)
        how = Descent(settings.budget, settings.steps, seed=settings.seed)
        floors = trial.floors(axis, layers, places, wanted, how, CHOOSE)
        grid, shapes = best, [Candidate(layers[0], layers[-1], shift, fitted=True) for shift in SHIFTS]
        best = sweep.more(shapes)
        for one in () if settings.quick else (grid.candidate, shapes[0]):
            sweep.trace(one)
    return sweep, make(best.candidate), best


def _fitted_layers(settings: Settings, axis: Axis, n_layers: int) -> tuple[int, ...]:
    """Layers that get a floor of their own: those of the windows that were given, or most of the depth."""
    share = tuple(round(part * (n_layers - 1)) for part in FITTED)
    first = min((window[0] for window in settings.windows), default=share[0])
    last = max((window[1] for window in settings.windows), default=share[1])
    return tuple(layer for layer in axis.layers if first <= layer <= last)


def _report(
    trial: Trial, axis: Axis, cap: Cap, mixed: Sequence[Rollout], also: Mapping[str, Cap]
) -> tuple[dict[str, Any], dict[str, Interventions]]:
    """What every arm gains and costs on the reporting half, and the arms."""
    shares = fired_shares(trial.model, cap, mixed)
    arms: dict[str, Interventions] = {BASELINE: [], "chosen": [cap]}
    arms |= {f"random {seed}": [random_cap(trial.model, cap, shares, mixed, seed)] for seed in RANDOM_SEEDS}
    arms |= {f"add {amount:g}": [axis.add(amount, (axis.layer,))] for amount in ADDED}
    arms |= {name: [one] for name, one in also.items()}
    gains = trial.gains(arms, REPORT)
    costs = trial.costs({name: plan for name, plan in arms.items() if plan}, REPORT)
    found: dict[str, Any] = {}
    for name, gain in gains.items():
        change = gain.difference(gains[BASELINE])
        found[name] = _gained(gain) | {"change": change[0], "change_interval": list(change[1:])}
        if name in costs:
            cost = costs[name]
            found[name] |= {
                "more_loss": cost.more,
                "more_loss_interval": list(cost.more_interval),
                "loss": cost.loss,
                "kl": cost.kl,
                "benign_fired": float(cost.fired.mean()),
                "benign_moved": float(cost.moved.mean()),
            }
        else:
            loss = next(iter(costs.values()))
            found[name] |= {"more_loss": 0.0, "loss": float(loss.before.sum() / loss.tokens.sum()), "kl": 0.0}
    return found, arms


def _gained(gain: IdentityShares) -> dict[str, Any]:
    return {
        "assistant": gain.shares["assistant"],
        "interval": list(gain.interval()),
        "shares": gain.shares,
        "n": gain.n,
        "fired": gain.fired,
        "distinct": gain.distinct,
    }


def _line(one: Tried) -> dict[str, Any]:
    own = one.candidate
    shape = {"first": own.first, "last": own.last, "population": own.population}
    shape |= {"shift": own.level} if own.fitted else {"levels": list(own.levels)}
    line = {"name": own.name, **shape, "phase": own.phase, "more_loss": one.cost.more, "kl": one.cost.kl}
    line["benign_fired"] = float(one.cost.fired.mean())
    return line | ({} if one.gain is None else _gained(one.gain))


def _why(best: Tried, sweep: Sweep, before: IdentityShares, budget: float) -> str:
    n = sum(one.gain is not None for one in sweep.tried.values())
    return (
        f"of {len(sweep.tried)} caps read on benign text and {n} tried under role prompts, {best.candidate.name} made most "
        f"answers call themselves an assistant ({best.share:.0%}, as it is {before.shares['assistant']:.0%}) among those that "
        f"cost at most {budget:.1%} more loss ({best.cost.more:.1%}), all on the choosing half"
    )


def _floors(cap: Cap, candidate: Candidate, places: Projections) -> list[dict[str, Any]]:
    """Each layer's floor and the shares of tokens below it, by side where the sides differ."""
    found: list[dict[str, Any]] = [{"layer": layer} for layer in cap.layers]
    for side in ("answer",) if cap.prompt_floor is None else ("prompt", "answer"):
        below = {name: places.below(cap, name, side).tolist() for name in places.tokens}
        for row, one in enumerate(found):
            one[side] = {"floor": cap.floor_of(row, side)} | {
                name: shares[row] for name, shares in below.items()
            }
    for row, one in enumerate(found) if not candidate.fitted else ():
        one["level"] = candidate.levels[row]
    return found


def _warnings(reported: Mapping[str, Any], budget: float) -> list[str]:
    chosen = reported["chosen"]
    found = []
    nothing = chosen["change_interval"][0] <= 0
    if chosen["fired"] == 0:
        found.append(
            "the cap never fired: every token stayed above its floor, so nothing of this is the cap's doing"
        )
    elif nothing and chosen["fired"] < LITTLE_FIRED:
        found.append(
            f"the cap fired on {chosen['fired']:.0%} of tokens only: that it did nothing may be for want of trying"
        )
    if nothing:
        found.append("on the reporting half the gain cannot be told from none (its 95% interval holds 0)")
    if chosen["more_loss"] > budget:
        found.append(
            f"on the reporting half it costs {chosen['more_loss']:.1%} more loss, over the budget of {budget:.1%} that it kept on "
            "the choosing half; a smaller --budget leaves room for that"
        )
    randoms = [row["change"] for name, row in reported.items() if name.startswith("random ")]
    if randoms and max(randoms) >= chosen["change"]:
        found.append("a random direction gained as much: this is no effect of the axis")
    return found


def _sizes(half: Half) -> dict[str, int]:
    roles = len({request.key.split("/", 1)[0] for request in half.requests})
    return {"roles": roles, "answers": len(half.requests), "texts": len(half.texts)}


def _examples(trial: Trial, arms: Mapping[str, Interventions]) -> list[dict[str, str]]:
    """Answers of the reporting half as they are and under the chosen cap: one a role, the questions in turn, not chosen."""
    requests = trial.halves[REPORT].requests
    plain, capped = trial.texts([], REPORT), trial.texts(arms["chosen"], REPORT)
    found: dict[str, dict[str, str]] = {}
    for place, request in enumerate(requests):
        role, number, question, _ = request.key.split("/")
        if number == "0" and role not in found and question == f"identity{len(found) % 5}":
            said = {"role": role, "question": request.messages[-1]["content"]}
            found[role] = said | {BASELINE: plain[place], "capped": capped[place]}
    return list(found.values())


POPULATION = 400  # answers of each population whose projections are read
MIXED = 24  # answers of each on which random caps are made to fire as often
USUAL = {  # sizes of a search, quick or not
    False: {"roles": 50, "prompts": 2, "answers": 60, "steps": 120},
    True: {"roles": 20, "prompts": 1, "answers": 60, "steps": 30},
}


def calibrated(
    run: Path,
    name: str,
    axis: str | None,
    also: Sequence[str],
    bank: Path | None,
    search: Any,
    how: ModelOptions,
) -> dict[str, Any]:
    """Calibrate, write the artefacts, and return the content of calibration.json with where they lie.

    `search` is a `personatlas.cli.calibrate.SearchOptions`. Raises `UserError` for a run that lacks what is needed.
    """
    settings = _settings(search)
    with open_run(run) as folder:
        asked = folder.manifest.get("asked")
        if not asked:
            raise UserError(f"{run} has no run.json with rollouts; make them first with `personatlas axis`")
        stem = resolve_axis(axis or str(run))
        along, space = load_axis(stem), load_space(stem.with_name("space"))
        extra = {text: along.cap(text) for text in also}
        chosen_bank = load_bank(bank)
        default, roles = _populations(read_rollouts(run), chosen_bank, run)
        model = load_model(
            asked["model_name"],
            device=how.device,
            dtype=how.dtype or asked["dtype"],
            chat_template=how.chat_template,
        )
        along.require_model(model.describe())
        config = model.hf.generation_config
        chat = chat_format(model.tokenizer, config.eos_token_id if config is not None else None)
        halves = halves_of(chosen_bank, along, space, default, model.name, settings)
        places = _read(model, along, default, roles)
        require_binding(model, [places.cap(along, [along.layer], 0.5)])
        for cap in extra.values():
            require_binding(model, [cap])
        trial = Trial(model, chat, halves, settings.sampling, run / "trials.jsonl")
        mixed = [*spread(default, MIXED), *spread(roles, MIXED)]
        asked_for = halves[CHOOSE].requests if settings.steps else ()
        wanted = wanted_texts(model, chat, chosen_bank, asked_for, settings.seed) if asked_for else []
        if asked_for and not wanted:
            say("no floors by gradient: the default never calls itself an assistant when asked who it is")
        cap, content = calibrate(trial, along, places, mixed, wanted, settings, extra)
        (run / CAPS).mkdir(exist_ok=True)
        saved = run / CAPS / name
        cap.save(saved)
        content |= {"name": name, "saved": f"{saved}.safetensors", "page": str(run / "calibration.html")}
        content["versions"] = versions()
        write_json(run / "calibration.json", content)
        write_calibration_page(run / "calibration.html", content)
    return content


def _settings(search: Any) -> Settings:
    try:
        levels = tuple(float(part) for part in search.levels.split(","))
    except ValueError:
        raise UserError(f"--levels {search.levels!r} is not numbers with commas between") from None
    for level in levels:
        if not 0 <= level <= 1:
            raise UserError(f"--levels: {level} is outside 0..1: a level is a quantile")
    populations = tuple(part.strip() for part in search.population.split(","))
    told = {name: getattr(search, name) for name in ("roles", "prompts", "answers", "steps")}
    sizes = {name: usual if told[name] is None else told[name] for name, usual in USUAL[search.quick].items()}
    for option, least in {"roles": 4, "prompts": 1, "answers": 2, "steps": 0}.items():
        if sizes[option] < least:
            raise UserError(f"--{option} {sizes[option]} is below {least}")
    if not 0 < search.budget < 10:
        raise UserError(f"--budget {search.budget} is not between 0 and 10: 0.05 is 5% more loss")
    windows = tuple(_window(part) for part in search.windows.split(",") if part.strip())
    sampling = Sampling(search.max_new_tokens, search.temperature)
    return Settings(
        windows,
        levels,
        populations,
        search.budget,
        **sizes,
        seed=search.seed,
        sampling=sampling,
        quick=search.quick,
    )


def _window(text: str) -> tuple[int, int]:
    """A window in words: "18-23" is (18, 23)."""
    match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", text)
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"--windows {text!r} is not FIRST-LAST, such as 18-23")
    return int(match[1]), int(match[2])


def _populations(rollouts: Sequence[Rollout], bank: Bank, run: Path) -> tuple[list[Rollout], list[Rollout]]:
    """The default's answers and the roles', without empty ones."""
    whole = [rollout for rollout in without_poles(rollouts) if not rollout.is_empty]
    default = [rollout for rollout in whole if rollout.role == bank.default.name]
    roles = [rollout for rollout in whole if rollout.role != bank.default.name]
    if not default or not roles:
        raise UserError(f"{run} holds {len(default)} default and {len(roles)} role answers; both are needed")
    if len(default) < 2:
        raise UserError(f"{run} holds one default answer only; two halves need more")
    return default, roles


def _read(model: Model, axis: Axis, default: list[Rollout], roles: list[Rollout]) -> Projections:
    chosen = {"default": spread(default, POPULATION), "roles": spread(roles, POPULATION)}
    with progress("projecting", sum(map(len, chosen.values()))) as advance:
        places = read_projections(model, axis, chosen, advance)
    said = {name: len(values) for name, values in places.means.items()}
    say(f"floors from {said['default']} default and {said['roles']} role answers")
    return places
