"""Stored conversations asked again: what their users said, answered by the model as it is and capped, beside the answers that are stored.

    content = replay("smollm2-135m", ModelOptions(), Path("chats.jsonl"), "smollm2-135m", "assistant", ReplayOptions(), folder)

Users do not react: each says what is stored, whatever is answered now. The stored answers are read as they stand, in one reading of
the whole conversation; the new ones turn by turn, with what acts on them. With a calibrated alarm there is an adaptive arm too.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import Parameter

from personatlas.analysis.trajectories import clustered_mean
from personatlas.persona.artifacts import write_json
from personatlas.persona.axis import load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Conversation, read_conversations
from personatlas.persona.interventions import BASELINE
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import progress
from personatlas.persona.records import json_object
from personatlas.persona.runs import open_run, resolve_axis
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.conversations.runner import RunnerConfig, Script, Transcripts, run_conversations
from personatlas.steering.drift.options import talk_of
from personatlas.steering.drift.result import ADAPTIVE, CAPPED
from personatlas.steering.drift.study import require_engine
from personatlas.steering.drift.trace import Traced, traced
from personatlas.steering.drift_monitor import DriftMonitor, load_monitor
from personatlas.steering.session import SteeredModel, load_steered_model

STORED = "stored"


@Parameter(name="*")
@dataclass(frozen=True)
class ReplayOptions:
    """How to ask again."""

    turns: int | None = None
    "most turns a conversation; all unless given"
    max_new_tokens: int = 128
    "longest answer"
    temperature: float = 0.7
    "sampling temperature; 0 takes the likeliest token"
    top_p: float = 0.9
    "nucleus mass"
    seed: int = 0
    "all arms sample with it"
    reference: Path | None = None
    "a reference.json, on which an alarm is calibrated; unless given the one beside the axis. With an alarm there is an arm whose cap acts only while it is on"


def replay(
    model: str,
    how: ModelOptions,
    chats: Path,
    axis: str,
    cap: str,
    asked: ReplayOptions,
    folder: Path,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """The content of replay.json, which is written into the folder. Raises `UserError` for what cannot be."""
    if asked.turns is not None and asked.turns < 1:
        raise UserError(f"--turns {asked.turns} is below 1")
    sampling = Sampling(asked.max_new_tokens, asked.temperature, asked.top_p)
    told, stem = read_conversations(chats), resolve_axis(axis)
    watcher = load_monitor(load_axis(stem), asked.reference)
    with open_run(folder, create=True) as run:
        how = replace(how, dtype=how.dtype or run.manifest.get("asked", {}).get("dtype"))
        held = load_steered_model(model, how, axis, [cap], force=force)
        require_engine(run, held.model, asdict(asked))
        stage = RunnerConfig(held.model, held.chat, held.axis, sampling, folder / "turns.jsonl")
        talks = [talk_of(one, 0, asked.seed) for one in told]
        arms = {BASELINE: [], CAPPED: held.caps} | ({ADAPTIVE: held.caps} if watcher.rule is not None else {})
        turns = min(max(len(talk.users) for talk in talks), asked.turns or 10**6)
        with progress("turns", sum(min(len(talk.users), turns) for talk in talks) * len(arms)) as advance:
            said = run_conversations(
                stage, talks, arms, turns, advance, {ADAPTIVE: watcher} if ADAPTIVE in arms else {}
            )
        content = json_object(_content(held, watcher, told, talks, said, list(arms)))
        given = asdict(asked) | {"reference": None if asked.reference is None else str(asked.reference)}
        content |= {"cap": cap, "asked": given}
        write_json(folder / "replay.json", content)
        return content


def _content(
    held: SteeredModel,
    watcher: DriftMonitor,
    told: Sequence[Conversation],
    talks: Sequence[Script],
    said: Transcripts,
    arms: Sequence[str],
) -> dict[str, Any]:
    answered = [one for one in told if any(message["role"] == "assistant" for message in one.messages)]
    read = traced(held.model, held.chat, held.axis, answered) if answered else []
    stored = {one.name: one for one in read}
    rows = []
    for one, talk in zip(told, talks, strict=True):
        by_arm = {STORED: _stored(one, stored[one.name], watcher)} if one.name in stored else {}
        by_arm |= {arm: _answers(said, arm, talk, watcher) for arm in arms}
        cut = [arm for arm in arms if (arm, talk.name) in said.truncated]
        rows.append(
            {
                "name": one.name,
                "domain": one.domain,
                "users": list(talk.users),
                "arms": by_arm,
                "cut_short": cut,
            }
        )
    return {
        "model": held.model.describe(),
        "layer": held.axis.layer,
        "poles": list(held.axis.poles),
        **watcher.describe(),
        "arms": [*([STORED] if stored else []), *arms],
        "means": _means(rows),
        "conversations": rows,
    }


def _stored(one: Conversation, read: Traced, watcher: DriftMonitor) -> dict[str, Any]:
    """The stored answers by the user's turn that they follow; of several to one turn, the last."""
    monitor, found = watcher.start(), {}
    for turn in read.turns:
        asked = sum(message["role"] == "user" for message in one.messages[: turn.message])
        if asked:  # not a greeting before the user has said anything
            text, state = (
                one.messages[turn.message]["content"],
                monitor.update(turn.projection) if monitor else None,
            )
            found[str(asked)] = _row(text, turn.projection, watcher, state, is_on=False)
    return found


def _answers(said: Transcripts, arm: str, talk: Script, watcher: DriftMonitor) -> dict[str, Any]:
    """An arm's answers by turn, from 1."""
    monitor, found = watcher.start(), {}
    for number in range(len(talk.users)):
        one = said.turns.get((arm, talk.name, number))
        if one is not None:
            state = monitor.update(one.uncapped) if monitor and one.uncapped is not None else None
            found[str(number + 1)] = _row(one.text, one.projection, watcher, state, is_on=one.acted)
    return found


def _row(
    text: str, projection: float | None, watcher: DriftMonitor, state: Any, *, is_on: bool
) -> dict[str, Any]:
    told = {"text": text, "projection": projection, "acted": is_on}
    told["z"] = None if projection is None else watcher.reference.z(projection)
    return told if state is None else told | {"alarm": state.alarm, "raised": state.raised}


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By arm the mean projection of all answers, and its difference to the model as it is, over conversations."""
    names = [row["name"] for row in rows]
    most = max(len(row["users"]) for row in rows)

    def values(arm: str) -> np.ndarray:
        found = np.full((len(rows), most), np.nan)
        for place, row in enumerate(rows):
            for turn, told in row["arms"].get(arm, {}).items():
                if told["projection"] is not None:
                    found[place, int(turn) - 1] = told["projection"]
        return found

    plain = values(BASELINE)
    arms = dict.fromkeys(arm for row in rows for arm in row["arms"])
    return {
        arm: {
            **clustered_mean(values(arm), names).to_json(),
            "change": clustered_mean(values(arm) - plain, names).to_json(),
        }
        for arm in arms
    }
