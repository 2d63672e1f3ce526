"""A drift study from a model's name to drift.json: conversations in several domains, as the model is, capped, and capped only while
an alarm is on.

    content = study("smollm2-135m", ModelOptions(), "smollm2-135m", None, DriftOptions(seeds=4), folder)

The model as it is and the capped one come first. Of their conversations, those as the model is in the domains that hold are kept as
calm.json; the alarm of the adaptive arm is calibrated on those given, else on those beside the axis, else on these. In the last
case alarms in those very domains are counted in the scripts alone that did not set the limit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from personatlas.analysis.drift_alarm import fit_reference
from personatlas.persona.artifacts import atomic, write_json
from personatlas.persona.axis import load_axis
from personatlas.persona.caps import format_layers
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE, Interventions
from personatlas.persona.logs import append_lines
from personatlas.persona.models.load import Model
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import progress, say
from personatlas.persona.runs import RunFolder, open_run, resolve_axis, versions
from personatlas.steering.conversations.runner import RunnerConfig, Script, Transcripts, run_conversations
from personatlas.steering.drift.options import DriftOptions, chosen_talks, user_of
from personatlas.steering.drift.result import ADAPTIVE, CAPPED, Watched, result
from personatlas.steering.drift_monitor import (
    REFERENCE_FILE,
    DriftMonitor,
    ReferenceConversation,
    ReferenceConversations,
    find_reference,
    is_reference_file,
    load_monitor,
    load_reference,
    save_reference,
)
from personatlas.steering.session import SteeredModel, load_steered_model

DEFAULT_CAP = "assistant"


def study(
    model: str,
    how: ModelOptions,
    axis: str,
    cap: str | None,
    asked: DriftOptions,
    folder: Path,
    calm: Path | None = None,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """The content of drift.json, which is written into the folder with conversations.jsonl and calm.json beside turns.jsonl.

    Raises `UserError` for what cannot be, before anything is asked, and for a folder of another model, engine or sampling.
    """
    talks, stem = chosen_talks(asked), resolve_axis(axis)
    known = _watched(load_axis(stem), stem, calm, asked)
    if known is None and not any(talk.domain in asked.calm for talk in talks):
        load_monitor(load_axis(stem))  # raises where there is nothing to tell z by
    names = [cap] if cap is not None else [DEFAULT_CAP] if DEFAULT_CAP in load_axis(stem).saved_caps else []
    with open_run(folder, create=True) as run:
        user = user_of(asked, folder)
        how = replace(how, dtype=how.dtype or run.manifest.get("asked", {}).get("dtype"))
        embed = None
        if asked.embedding is not None:
            from personatlas.steering.drift.embedding import embedder

            embed = embedder(asked.embedding, "cpu")
        held = load_steered_model(model, how, axis, names, force=force)
        require_engine(run, held.model, asdict(asked))
        stage = RunnerConfig(held.model, held.chat, held.axis, asked.sampling, folder / "turns.jsonl", user)
        said, arms = _first_arms(stage, held, talks, asked.turns)
        own = _keep_calm(stage, said, asked, folder)
        watched = known or _own_alarm(held, own, asked)
        if held.caps and watched.watcher.rule is not None:
            arms[ADAPTIVE] = held.caps
            monitors = {ADAPTIVE: watched.watcher}
            with progress("turns, adaptive", asked.turns * len(talks)) as advance:
                said |= run_conversations(stage, talks, {ADAPTIVE: held.caps}, asked.turns, advance, monitors)
        content = _told(held, asked, names, watched) | result(stage, said, talks, arms, watched, asked, embed)
        _keep_conversations(folder, said, talks)
        write_json(folder / "drift.json", content)
        return content


def _watched(axis: Any, stem: Path, calm: Path | None, asked: DriftOptions) -> Watched | None:
    """The watcher that is calibrated already; None where the study's own conversations are to be used."""
    path = calm or find_reference(axis)
    if path is None:
        return None
    if calm is not None and not is_reference_file(calm):
        raise UserError(
            f"--reference {calm} is no reference.json, which an earlier `personatlas drift` has made"
        )
    watcher = load_monitor(axis, calm, asked.rule, asked.false_alarms)
    record = load_reference(path, axis)
    return Watched(watcher, str(path), _fitted_on(record))


def _fitted_on(calm: ReferenceConversations) -> frozenset[str]:
    return frozenset(one.script for one in calm.split()[0])


def require_engine(run: RunFolder, model: Model, sampled: Mapping[str, Any]) -> None:
    """`UserError` for a folder of another model, engine or sampling: its answers would be another's."""
    engine = {
        "device": model.device.type,
        "torch": versions()["torch"],
        "transformers": versions()["transformers"],
    }
    told = {"model": model.describe(), "dtype": str(model.dtype).removeprefix("torch."), "engine": engine}
    run.claim(told | {name: sampled[name] for name in ("seed", "max_new_tokens", "temperature", "top_p")})


def _first_arms(
    stage: RunnerConfig, held: SteeredModel, talks: Sequence[Script], turns: int
) -> tuple[Transcripts, dict[str, Interventions]]:
    arms: dict[str, Interventions] = {BASELINE: [], **({CAPPED: held.caps} if held.caps else {})}
    with progress("turns", turns * len(talks) * len(arms)) as advance:
        return run_conversations(stage, talks, arms, turns, advance), arms


def _keep_calm(
    stage: RunnerConfig, said: Transcripts, asked: DriftOptions, folder: Path
) -> ReferenceConversations | None:
    """Write calm.json from the domains that hold, as the model is; None where there is no such conversation."""
    places: dict[tuple[str, str], list[float]] = {}
    for (arm, name, _), one in said.turns.items():
        if arm == BASELINE and one.domain in asked.calm and one.uncapped is not None:
            places.setdefault((name, one.domain), []).append(one.uncapped)
    if not places:
        return None
    rows = tuple(ReferenceConversation(name, domain, tuple(own)) for (name, domain), own in places.items())
    model, sampling = stage.model.describe(), asdict(asked.sampling)
    made = {"by": "personatlas drift", "sampling": sampling, "seed": asked.seed, "samples": asked.seeds}
    made |= {"turns": asked.turns, "domains": list(asked.calm), "user": asked.user_model or "scripts"}
    made |= {"dtype": str(stage.model.dtype).removeprefix("torch.")}
    save_reference(folder / REFERENCE_FILE, stage.axis, model, rows, made)
    return ReferenceConversations(rows, made)


def _own_alarm(held: SteeredModel, calm: ReferenceConversations | None, asked: DriftOptions) -> Watched:
    """Calibrated on the study's own calm conversations; where they are too few, the axis's quartiles without an alarm."""
    if calm is None:
        return Watched(
            load_monitor(held.axis), f"no conversation is of the domains that hold ({', '.join(asked.calm)})"
        )
    try:
        watcher = calm.monitor(asked.rule, asked.false_alarms)
    except UserError as error:
        say(f"no alarm: {error}")
        values = [value for one in calm.conversations for value in one.projections]
        if len(set(values)) < 2:
            return Watched(load_monitor(held.axis), str(error))
        return Watched(DriftMonitor(fit_reference(values), "reference conversations"), str(error))
    return Watched(watcher, "this study's own reference conversations", _fitted_on(calm))


def _told(held: SteeredModel, asked: DriftOptions, names: Sequence[str], watched: Watched) -> dict[str, Any]:
    """Whose study this is."""
    model, axis = held.model, held.axis
    caps = [
        {"name": name, "layers": format_layers(cap.layers), "phase": cap.phase, "level": cap.level}
        for name, cap in zip(names, held.caps, strict=True)
    ]
    given = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(asked).items()}
    return {
        "model": model.describe(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "axis": {"layer": axis.layer, "poles": list(axis.poles), "of": held.axis.source},
        "cap": caps[0] if caps else None,
        "watch": watched.watcher.describe() | {"source": watched.source},
        "asked": given,
        "versions": versions(),
    }


def _keep_conversations(folder: Path, said: Transcripts, talks: Sequence[Script]) -> None:
    """Every conversation of every arm in OpenAI's form, as `personatlas trace` reads it."""
    chats: dict[tuple[str, str], list[dict[str, str]]] = {}
    known = {talk.name: talk for talk in talks}
    for (arm, name, _), one in sorted(said.turns.items(), key=lambda item: item[0][2]):
        own = chats.setdefault((arm, name), list(known[name].opening))
        own += [{"role": "user", "content": one.user}, {"role": "assistant", "content": one.text}]
    rows = [
        {"id": f"{name}/{arm}", "arm": arm, "domain": known[name].domain, "messages": messages}
        for (arm, name), messages in sorted(chats.items())
    ]
    with atomic(folder / "conversations.jsonl") as temporary:
        append_lines(temporary, rows)
