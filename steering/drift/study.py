"""Runs a drift study: conversations in several domains at baseline, in every arm, and in every arm that acts
only while an alarm is on.

    result = run_drift_study("smollm2-135m", "smollm2-135m", folder, options=DriftOptions(seeds=4))
    result.slopes["therapy"]["baseline"].value

The baseline and the arms that always act run first. Baseline conversations of the reference domains are
saved as reference.json. The alarm of the adaptive arms is calibrated on the reference.json given, else on the
one beside the axis, else on this one; in the last case alarms in those very domains are counted only in the
scripts that did not set the limit.

With `DriftOptions.scripts` the users' messages of stored conversations are sent again, whatever is answered
now. Their stored answers, read in one forward over the whole conversation, are an arm of their own in
`result.stored`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from personatlas.analysis.drift_alarm import fit_reference
from personatlas.persona.artifacts import atomic, write_json
from personatlas.persona.axis import CAPS, Axis, load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Conversation, Exclusions, Message
from personatlas.persona.interventions import BASELINE, Interventions
from personatlas.persona.logs import append_lines
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import Stage, Study, progress, say, stages
from personatlas.persona.records import JsonObject
from personatlas.persona.rollout import Rollout, spread
from personatlas.persona.runs import open_run, resolve_axis, versions
from personatlas.steering.arm_kinds import with_default
from personatlas.steering.arms import DEFAULT_CAP, summarise_arms
from personatlas.steering.conversations.runner import (
    RunnerConfig,
    Script,
    Transcripts,
    messages_before,
    run_conversations,
)
from personatlas.steering.drift.embedding import load_embedding
from personatlas.steering.drift.options import DriftOptions
from personatlas.steering.drift.result import (
    ADAPTIVE,
    STORED,
    DriftResult,
    StoredAnswers,
    StoredConversation,
    StudyData,
    StudyMonitor,
    summarise,
)
from personatlas.steering.drift_monitor import (
    REFERENCE_FILE,
    DriftMonitor,
    ReferenceConversation,
    ReferenceConversations,
    find_reference,
    is_reference_file,
    load_monitor,
    save_reference,
)
from personatlas.steering.random_caps import random_arms
from personatlas.steering.session import Arms, SteeredModel, load_steered_model
from personatlas.steering.traces import trace_conversations

RESERVED = rf"{STORED}|.*{ADAPTIVE}"  # names of the study's own arms
MATCHED = 48  # answers that random controls are matched on
CONTROL_ANSWERS, CONTROLS = "answers to match controls on", "random controls"  # the stages of a study
ARM_TURNS, ADAPTIVE_TURNS = "conversations", "conversations of adaptive arms"


def run_drift_study(
    model: str,
    axis: str,
    out: Path,
    *,
    arms: Arms = (),
    options: DriftOptions = DriftOptions(),
    reference: Path | None = None,
    load: ModelOptions = ModelOptions(),
    force: bool = False,
) -> DriftResult:
    """Runs a drift study, or resumes it.

    Parameters
    ----------
    model, load
        the model's name and how to load it
    axis
        a run folder, an axis file or the name of a packaged axis
    out
        the folder; drift.json, turns.jsonl, conversations.jsonl and reference.json are written there
    arms
        interventions by name, or texts as `--arm` takes them; unless given the cap assistant, where it is
        saved beside the axis. Each has an adaptive arm beside it, but for random controls (random:3)
    reference
        a reference.json on which the alarm is calibrated
    force
        use an axis of the same model in another weight format

    Raises `UserError` for what cannot be, before anything is answered, and for a folder of another model,
    engine or sampling."""
    conversations, loaded_axis = options.select_conversations(), load_axis(resolve_axis(axis))
    scripts = options.scripts_of(conversations)
    options = replace(options, turns=options.turns or max(len(script.users) for script in scripts))
    monitor = _saved_monitor(loaded_axis, reference, options)
    if monitor is None and not any(script.domain in options.references for script in scripts):
        load_monitor(loaded_axis)  # raises where there is nothing to measure z against
    if not isinstance(arms, Mapping):
        is_saved = DEFAULT_CAP in loaded_axis.saved_caps
        arms = with_default(arms, lambda: f"cap:{DEFAULT_CAP}" if is_saved else None)
    with open_run(out, create=True) as run:
        user, embed = options.make_user(out), None
        if options.embedding is not None:
            embed = load_embedding(options.embedding, "cpu")
        load = replace(load, dtype=load.dtype or run.manifest.get("asked", {}).get("dtype"))
        steered = load_steered_model(
            model, loaded_axis, arms, load, controls=True, reserved=RESERVED, force=force
        )
        steered = replace(steered, model=run.date(steered.model))
        _ = steered.control_cap  # before anything is answered
        record = _record(steered, options)
        engine = {
            "device": record["device"],
            **{name: versions()[name] for name in ("torch", "transformers")},
        }
        sampled = {"seed": options.seed, **asdict(options.sampling)}
        # answers of another model, engine or sampling would be mixed in
        asked = {"model": record["model"], "dtype": record["dtype"], "engine": engine}
        run.claim(asked | sampled | steered.chat.describe_date())
        log = out / "turns.jsonl"
        config = RunnerConfig(steered.model, steered.chat, steered.axis, options.sampling, log, user)
        data = _run_arms(config, scripts, steered, monitor, options)
        record["watch"] = data.monitor.monitor.describe() | {"source": data.monitor.source}
        record["interventions"] = summarise_arms(data.arms)
        result = summarise(data, record, _stored_answers(data, conversations), embed)
        _save_conversations(out, data.transcripts, scripts)
        write_json(out / "drift.json", result.to_json())
        return result


def _run_arms(
    config: RunnerConfig,
    scripts: Sequence[Script],
    steered: SteeredModel,
    monitor: StudyMonitor | None,
    options: DriftOptions,
) -> StudyData:
    """Baseline and arms; then, with an alarm of an earlier study or calibrated on this one, adaptive arms."""
    turns = options.turns or 0
    n_turns = sum(min(len(script.users), turns) for script in scripts)
    n_arms, n_random = len(steered.arms), (steered.n_random or 0) if steered.control_cap else 0
    named = (ARM_TURNS, n_arms + n_random), (ADAPTIVE_TURNS, n_arms - 1)
    planned = [Stage(name, n * n_turns, "turns") for name, n in named if n]
    if n_random:  # read once for the cap and once a control: a tenth of an answer's time, each
        n_matched = min(len(scripts), MATCHED)
        controls = (
            Stage(CONTROL_ANSWERS, n_matched, "turns"),
            Stage(CONTROLS, n_matched * (1 + n_random) / 10),
        )
        planned = [*controls, *planned]
    with stages(planned) as study:
        return _run_stages(config, scripts, steered, monitor, options, n_turns, study)


def _run_stages(
    config: RunnerConfig,
    scripts: Sequence[Script],
    steered: SteeredModel,
    monitor: StudyMonitor | None,
    options: DriftOptions,
    n_turns: int,
    study: Study,
) -> StudyData:
    turns = options.turns or 0
    arms = steered.arms | _random_arms(config, scripts, steered, study)
    study.start(ARM_TURNS)
    with progress("turns", n_turns * len(arms)) as advance:
        transcripts = run_conversations(config, scripts, arms, turns, advance)
    own = _save_reference(config, transcripts, options)
    monitor = monitor or _own_monitor(config.axis, own, options)
    if steered.steered_arms and monitor.monitor.rule is not None:
        adaptive = {f"{name}{ADAPTIVE}": plan for name, plan in steered.steered_arms.items()}
        arms |= adaptive
        monitors = dict.fromkeys(adaptive, monitor.monitor)
        study.start(ADAPTIVE_TURNS)
        with progress("turns, adaptive", n_turns * len(adaptive)) as advance:
            transcripts |= run_conversations(config, scripts, adaptive, turns, advance, monitors)
    return StudyData(config, scripts, transcripts, arms, monitor, options)


def _random_arms(
    config: RunnerConfig, scripts: Sequence[Script], steered: SteeredModel, study: Study
) -> dict[str, Interventions]:
    """Random controls, matched to the first cap on the baseline's first answers; kept in the folder."""
    cap, some = steered.control_cap, spread(scripts, MATCHED)
    if cap is None or not steered.n_random:
        return {}
    study.start(CONTROL_ANSWERS)
    with progress("answers", len(some)) as advance:
        turns = run_conversations(config, some, {BASELINE: []}, 1, advance).turns.values()
    study.start(CONTROLS)
    texts = [
        Rollout(
            turn.conversation,
            messages_before(script, [], turn.user),
            turn.prompt_ids,
            turn.ids,
            turn.text,
            turn.seed,
            turn.stopped,
        )
        for turn, script in zip(turns, some, strict=True)
        if turn.ids
    ]
    return random_arms(config.model, cap, texts, steered.n_random, config.log.with_name(CAPS))


def _saved_monitor(axis: Axis, reference: Path | None, options: DriftOptions) -> StudyMonitor | None:
    """The monitor of the reference.json given or beside the axis; None without either."""
    path = reference or find_reference(axis)
    if path is None:
        return None
    if reference is not None and not is_reference_file(reference):
        raise UserError(f"--reference {reference} is no {REFERENCE_FILE} of an earlier `personatlas drift`")
    monitor = load_monitor(axis, reference, options.rule, options.false_alarms)
    return StudyMonitor(monitor, str(path))


def _save_reference(
    config: RunnerConfig, transcripts: Transcripts, options: DriftOptions
) -> ReferenceConversations | None:
    """Write reference.json from the baseline in the reference domains; None where there is none."""
    projections: dict[tuple[str, str], list[float]] = {}
    for (arm, name, _), turn in transcripts.turns.items():
        if arm == BASELINE and turn.domain in options.references and turn.uncapped is not None:
            projections.setdefault((name, turn.domain), []).append(turn.uncapped)
    if not projections:
        return None
    rows = tuple(ReferenceConversation(*key, tuple(values)) for key, values in projections.items())
    provenance: JsonObject = {
        "by": "personatlas drift",
        "sampling": asdict(options.sampling),
        "seed": options.seed,
        "samples": options.seeds,
        "turns": options.turns,
        "domains": list(options.references),
        "user": options.user_model or "scripts",
        "dtype": str(config.model.dtype).removeprefix("torch."),
    }
    save_reference(
        config.log.with_name(REFERENCE_FILE), config.axis, config.model.describe(), rows, provenance
    )
    return ReferenceConversations(rows, provenance)


def _own_monitor(axis: Axis, reference: ReferenceConversations | None, options: DriftOptions) -> StudyMonitor:
    """Calibrated on the study's own reference conversations; where they are too few, without an alarm."""
    if reference is None:
        domains = ", ".join(options.references)
        return StudyMonitor(load_monitor(axis), f"no conversation is of the reference domains ({domains})")
    try:
        monitor = reference.monitor(options.rule, options.false_alarms)
    except UserError as error:
        say(f"no alarm: {error}")
        projections = [one.projections for one in reference.conversations]
        try:
            distribution = fit_reference(projections)
        except UserError:
            return StudyMonitor(load_monitor(axis), str(error))
        return StudyMonitor(DriftMonitor(distribution, "reference conversations"), str(error))
    return StudyMonitor(monitor, "this study's own reference conversations")


def _record(steered: SteeredModel, options: DriftOptions) -> JsonObject:
    """The fields of `DriftResult` that say what was run."""
    model, axis = steered.model, steered.axis
    return {
        "model": model.describe(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "axis": {"layer": axis.layer, "poles": list(axis.poles), "of": axis.source},
        "asked": options,
        "versions": versions(),
    }


def _stored_answers(data: StudyData, conversations: Sequence[Conversation]) -> StoredAnswers | None:
    """The stored answers by the user's message that they follow; of several to one message, the last.

    None without any.
    """
    config = data.config
    answered = [one for one in conversations if any(m["role"] == "assistant" for m in one.messages)]
    if not answered:
        return None
    left_out = Exclusions()
    read = trace_conversations(config.model, config.axis, answered, left_out=left_out)
    left_out.say("stored answers")
    traces = {one.name: one for one in read}
    names = [f"{conversation.name}/0" for conversation in conversations]
    baseline = data.values(BASELINE, names)
    values = np.full_like(baseline, np.nan)
    rows = []
    for index, (name, conversation) in enumerate(zip(names, conversations, strict=True)):
        users = [message["content"] for message in conversation.messages if message["role"] == "user"]
        stored: list[tuple[int, str, float]] = []
        for turn in traces[conversation.name].turns if conversation.name in traces else ():
            before = sum(message["role"] == "user" for message in conversation.messages[: turn.message])
            if before:  # not a greeting before the user has said anything
                text = conversation.messages[turn.message]["content"]
                stored.append((before - 1, text, turn.projection))
        examples = data.monitor.example_turns((users[n], text, p, False, p) for n, text, p in stored)
        by_turn = dict(zip((n for n, *_ in stored), examples, strict=True))
        for n, example in by_turn.items():
            if n < values.shape[1]:
                values[index, n] = example.projection
        last = max(by_turn, default=-1)
        own = {STORED: tuple(by_turn.get(n) for n in range(last + 1))} if by_turn else {}
        arms = own | {arm: data.example(arm, name) for arm in data.arms}
        cut_short = tuple(arm for arm in data.arms if (arm, name) in data.transcripts.truncated)
        rows.append(StoredConversation(conversation.name, conversation.domain, arms, tuple(users), cut_short))
    return StoredAnswers(data.mean(values, names, baseline), tuple(rows))


def _save_conversations(folder: Path, transcripts: Transcripts, scripts: Sequence[Script]) -> None:
    """Write every conversation of every arm in OpenAI's form, as `personatlas trace` reads it."""
    by_name = {script.name: script for script in scripts}
    conversations: dict[tuple[str, str], list[Message]] = {}
    for (arm, name, _), turn in sorted(transcripts.turns.items(), key=lambda item: item[0][2]):
        messages = conversations.setdefault((arm, name), list(by_name[name].opening))
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.text}]
    rows = [
        {"id": f"{name}/{arm}", "arm": arm, "domain": by_name[name].domain, "messages": messages}
        for (arm, name), messages in sorted(conversations.items())
    ]
    with atomic(folder / "conversations.jsonl") as temporary:
        append_lines(temporary, rows)
