"""The stage of a run that makes a cap: from a run folder to caps/NAME, calibration.json and calibration.html.

content = calibrated(Path("runs/smollm2-135m"), "assistant", None, [], None, SearchOptions(), ModelOptions())
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from personaxis.persona.axis import Axis, load_axis, load_space
from personaxis.persona.bank import Bank, load_bank
from personaxis.persona.chat import chat_format
from personaxis.persona.errors import KnownError
from personaxis.persona.fitted import axis_stem
from personaxis.persona.options import ModelOptions
from personaxis.persona.progress import progress, say
from personaxis.persona.rollouts import Rollout, read_rollouts, spread, without_poles
from personaxis.persona.run import open_run, versions
from personaxis.persona.sampler import Sampling
from personaxis.persona.store import write_json
from personaxis.persona.subject import Subject, load_subject
from personaxis.steering.calibrate import CHOOSE, Settings, calibrate, halves_of
from personaxis.steering.calibration_page import write_calibration_page
from personaxis.steering.caps import cap_named, caps_folder, windows_named
from personaxis.steering.floors import Projections, read_projections
from personaxis.steering.prove import require_binding
from personaxis.steering.trial import Trial
from personaxis.steering.wanted import wanted_texts

POPULATION = 400  # answers of each population whose projections are read
MIXED = 24  # answers of each on which random caps are made to fire as often
USUAL = {  # sizes of a search, quick or not
    False: {"roles": 50, "prompts": 2, "answers": 60, "steps": 120},
    True: {"roles": 20, "prompts": 1, "answers": 60, "steps": 30},
}


def calibrated(
    run: Path, name: str, axis: str | None, also: Sequence[str], bank: Path | None, search: Any, how: ModelOptions
) -> dict[str, Any]:
    """Calibrate, write the artefacts, and return the content of calibration.json with where they lie.

    `search` is a `personaxis.steering.calibrate_verbs.SearchOptions`. Raises `KnownError` for a run that lacks what is needed.
    """
    settings = _settings(search)
    with open_run(run) as folder:
        asked = folder.manifest.get("asked")
        if not asked:
            raise KnownError(f"{run} has no run.json with rollouts; make them first with `personaxis axis`")
        stem = axis_stem(axis or str(run))
        along, space = load_axis(stem), load_space(stem.with_name("space"))
        extra = {text: cap_named(text, along, stem) for text in also}
        chosen_bank = load_bank(bank)
        default, roles = _populations(read_rollouts(run), chosen_bank, run)
        subject = load_subject(
            asked["model_name"], device=how.device, dtype=how.dtype or asked["dtype"], chat_template=how.chat_template
        )
        along.require_model(subject.describe())
        config = subject.model.generation_config
        chat = chat_format(subject.tokenizer, config.eos_token_id if config is not None else None)
        halves = halves_of(chosen_bank, along, space, default, subject.name, settings)
        places = _read(subject, along, default, roles)
        require_binding(subject, [places.cap(along, [along.layer], 0.5)])
        for cap in extra.values():
            require_binding(subject, [cap])
        trial = Trial(subject, chat, halves, settings.sampling, run / "trials.jsonl")
        mixed = [*spread(default, MIXED), *spread(roles, MIXED)]
        asked_for = halves[CHOOSE].requests if settings.steps else ()
        wanted = wanted_texts(subject, chat, chosen_bank, asked_for, settings.seed) if asked_for else []
        if asked_for and not wanted:
            say("no floors by gradient: the default never calls itself an assistant when asked who it is")
        cap, content = calibrate(trial, along, places, mixed, wanted, settings, extra)
        caps_folder(run / "axis").mkdir(exist_ok=True)
        saved = caps_folder(run / "axis") / name
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
        raise KnownError(f"--levels {search.levels!r} is not numbers with commas between") from None
    for level in levels:
        if not 0 <= level <= 1:
            raise KnownError(f"--levels: {level} is outside 0..1: a level is a quantile")
    populations = tuple(part.strip() for part in search.population.split(","))
    told = {name: getattr(search, name) for name in ("roles", "prompts", "answers", "steps")}
    sizes = {name: usual if told[name] is None else told[name] for name, usual in USUAL[search.quick].items()}
    for option, least in {"roles": 4, "prompts": 1, "answers": 2, "steps": 0}.items():
        if sizes[option] < least:
            raise KnownError(f"--{option} {sizes[option]} is below {least}")
    if not 0 < search.budget < 10:
        raise KnownError(f"--budget {search.budget} is not between 0 and 10: 0.05 is 5% more loss")
    windows = windows_named([part for part in search.windows.split(",") if part.strip()])
    sampling = Sampling(search.max_new_tokens, search.temperature)
    return Settings(
        windows, levels, populations, search.budget, **sizes, seed=search.seed, sampling=sampling, quick=search.quick
    )


def _populations(rollouts: Sequence[Rollout], bank: Bank, run: Path) -> tuple[list[Rollout], list[Rollout]]:
    """The default's answers and the roles', without empty ones."""
    whole = [rollout for rollout in without_poles(rollouts) if not rollout.is_empty]
    default = [rollout for rollout in whole if rollout.role == bank.default.name]
    roles = [rollout for rollout in whole if rollout.role != bank.default.name]
    if not default or not roles:
        raise KnownError(f"{run} holds {len(default)} default and {len(roles)} role answers; both are needed")
    if len(default) < 2:
        raise KnownError(f"{run} holds one default answer only; two halves need more")
    return default, roles


def _read(subject: Subject, axis: Axis, default: list[Rollout], roles: list[Rollout]) -> Projections:
    chosen = {"default": spread(default, POPULATION), "roles": spread(roles, POPULATION)}
    with progress("projecting", sum(map(len, chosen.values()))) as advance:
        places = read_projections(subject, axis, chosen, advance)
    said = {name: len(values) for name, values in places.means.items()}
    say(f"floors from {said['default']} default and {said['roles']} role answers")
    return places
