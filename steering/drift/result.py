"""What a drift study found: trajectories, slopes, differences, alarms, what each arm wrote and cost, and what predicts the next turn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from personatlas.analysis.next_message import Turn, predict_from_messages
from personatlas.analysis.stats import Array, cluster_weights, percentile_interval, wilson_interval
from personatlas.analysis.trajectories import alarm_rate, clustered_mean, slope, turn_means
from personatlas.persona.interventions import BASELINE, Interventions
from personatlas.persona.records import json_object
from personatlas.persona.rollout import Rollout, spread
from personatlas.steering.arms import distinct_ngrams
from personatlas.steering.conversations.runner import (
    RunnerConfig,
    Script,
    Transcripts,
    TurnRecord,
    messages_before,
)
from personatlas.steering.drift.options import DriftOptions
from personatlas.steering.drift_monitor import DriftMonitor
from personatlas.steering.evals.capability import loops
from personatlas.steering.evals.harm.refusal_rules import refusal_of
from personatlas.steering.loss_cost import benign_costs

CAPPED, ADAPTIVE = "capped", "adaptive"
ALL = "all"
CPU_READ, GPU_READ = 24, 400  # answers on which the cap's cost is measured
EXAMPLES = 2  # conversations


@dataclass(frozen=True)
class Watched:
    """The watcher, where its calm conversations are from, and the scripts that set its limit and so count no false alarms."""

    watcher: DriftMonitor
    source: str
    fitted_on: frozenset[str] = frozenset()


def result(
    stage: RunnerConfig,
    said: Transcripts,
    talks: Sequence[Script],
    arms: Mapping[str, Interventions],
    watched: Watched,
    asked: DriftOptions,
    embed: Callable[[Sequence[str]], np.ndarray] | None,
) -> dict[str, Any]:
    """All figures, as plain numbers."""
    names = list(arms)
    table = _Table(said, talks, asked.turns)
    domains = list(dict.fromkeys(one.domain for one in said.turns.values()))
    every = {domain: table.names((domain,)) for domain in domains} | {ALL: table.names(domains)}
    content = {
        "arms": names,
        "domains": domains,
        "scripts": len({one.script for one in said.turns.values()}),
        "conversations": {domain: len(own) for domain, own in every.items()},
        "trajectories": {d: {arm: table.band(arm, own) for arm in names} for d, own in every.items()},
        "differences": {
            d: {arm: table.band(arm, own, BASELINE) for arm in names[1:]} for d, own in every.items()
        },
        "slopes": {d: {arm: table.slope(arm, own) for arm in names} for d, own in every.items()},
        "means": {d: {arm: table.mean(arm, own) for arm in names} for d, own in every.items()},
        "alarms": _alarms(table, names, every, watched),
        "wrote": {arm: _wrote(table, arm, stage, every[ALL]) for arm in names},
        "cost": _cost(stage, table, arms, asked),
        "next_turn": _next_turn(table, every[ALL], embed, asked),
        "examples": _examples(table, names, domains, watched),
    }
    return json_object(content | {"warnings": _warnings(content, stage, said, watched, asked.false_alarms)})


class _Table:
    """The study by conversation: what was said, and projections (N, T) with NaN where a conversation had ended."""

    def __init__(self, said: Transcripts, talks: Sequence[Script], turns: int) -> None:
        self.said, self.turns = said, turns
        self.scripts = {talk.name: talk for talk in talks}

    def rollout(self, stage: RunnerConfig, one: TurnRecord) -> Rollout:
        """A turn as a text to be read again."""
        before = self.said.history(one.arm, one.conversation)[: one.turn]
        messages = messages_before(self.scripts[one.conversation], before, one.user)
        return Rollout(one.conversation, messages, one.prompt_ids, one.ids, one.text, one.seed, one.stopped)

    def names(self, domains: Sequence[str]) -> list[str]:
        """The domains' conversations."""
        return list(
            dict.fromkeys(one.conversation for one in self.said.turns.values() if one.domain in domains)
        )

    def spoken(self, arm: str, name: str) -> list[TurnRecord]:
        """A conversation's turns in order."""
        return self.said.history(arm, name)

    def values(self, arm: str, names: Sequence[str]) -> Array:
        """Projections of some conversations' answers, as they were made."""
        found = np.full((len(names), self.turns), np.nan)
        for row, name in enumerate(names):
            for one in self.spoken(arm, name):
                found[row, one.turn] = np.nan if one.projection is None else one.projection
        return found

    def band(self, arm: str, names: Sequence[str], less: str | None = None) -> list[dict[str, Any]]:
        """Means by turn, or mean differences to another arm, in the same conversations."""
        values = self.values(arm, names)
        change = values if less is None else values - self.values(less, names)
        return [row.to_json() for row in turn_means(change, _scripts(names))]

    def slope(self, arm: str, names: Sequence[str]) -> dict[str, Any] | None:
        """The mean slope."""
        found = slope(self.values(arm, names), _scripts(names))
        return None if found is None else found.to_json()

    def mean(self, arm: str, names: Sequence[str]) -> dict[str, Any]:
        """The mean projection of all answers and, but for the model as it is, its difference to that."""
        values = self.values(arm, names)
        told: dict[str, Any] = clustered_mean(values, _scripts(names)).to_json()
        if arm != BASELINE:
            change = values - self.values(BASELINE, names)
            told["change"] = clustered_mean(change, _scripts(names)).to_json()
        return told


def _scripts(names: Sequence[str]) -> list[str]:
    return [name.rpartition("/")[0] for name in names]


def _alarms(
    table: _Table, arms: Sequence[str], every: dict[str, list[str]], watched: Watched
) -> dict[str, Any]:
    """By domain and arm, from answers as the model itself reads them. Scripts that set the limit are left out."""
    watcher = watched.watcher
    if watcher.rule is None:
        return {}
    found: dict[str, Any] = {}
    for domain, names in every.items():
        own = [name for name in names if name.rpartition("/")[0] not in watched.fitted_on]
        found[domain] = {
            arm: alarm_rate(
                watcher.rule,
                watcher.reference,
                [
                    [one.uncapped for one in table.spoken(arm, name) if one.uncapped is not None]
                    for name in own
                ],
            ).to_json()
            for arm in arms
        }
    return found


def _wrote(table: _Table, arm: str, stage: RunnerConfig, names: Sequence[str]) -> dict[str, Any]:
    """What an arm did and wrote, over all answers."""
    own = [one for name in names for one in table.spoken(arm, name)]
    spoken = [one for one in own if one.ids]
    broken = sum(refusal_of(one.text) == "degenerate" for one in own)
    again = sum(loops(one.ids) for one in own)
    return {
        "answers": len(own),
        "empty": len(own) - len(spoken),
        "acted": sum(one.acted for one in own) / len(own),
        "fired": float(np.mean([one.fired or 0.0 for one in own])),
        "degenerate": {"share": broken / len(own), "interval": list(wilson_interval(broken, len(own)))},
        "loops": {"share": again / len(own), "interval": list(wilson_interval(again, len(own)))},
        "distinct": float(np.mean([distinct_ngrams(one.ids) for one in spoken])) if spoken else None,
        "tokens": float(np.mean([len(one.ids) for one in own])),
        "ended_by_context": sum(name == arm for name, _ in table.said.truncated),
    }


def _cost(
    stage: RunnerConfig, table: _Table, arms: Mapping[str, Interventions], asked: DriftOptions
) -> dict[str, Any] | None:
    """More loss per token on the model's own answers in the domains that hold, read again: with the cap on all of them, and only
    where the adaptive arm's was on in the same turn of the same conversation."""
    capped = arms.get(CAPPED)
    names = table.names(asked.calm)
    whole = [one for name in names for one in table.spoken(BASELINE, name) if one.ids]
    if capped is None or not whole:
        return None
    texts = spread(whole, GPU_READ if stage.on_gpu else CPU_READ)
    cost = benign_costs(stage.model, [table.rollout(stage, one) for one in texts], {CAPPED: capped})[CAPPED]
    weights = cluster_weights([one.script for one in texts])

    def more(after: Array) -> dict[str, float]:
        low, high = percentile_interval((weights @ after) / (weights @ cost.before) - 1)
        return {"value": float(after.sum() / cost.before.sum() - 1), "low": low, "high": high}

    found: dict[str, Any] = {"n": len(texts), CAPPED: more(cost.after)}
    if ADAPTIVE in arms:
        met = [table.said.turns.get((ADAPTIVE, one.conversation, one.turn)) for one in texts]
        was_on = np.array([one is not None and one.acted for one in met])
        found[ADAPTIVE] = more(np.where(was_on, cost.after, cost.before))
    return found


def _next_turn(
    table: _Table,
    names: Sequence[str],
    embed: Callable[[Sequence[str]], np.ndarray] | None,
    asked: DriftOptions,
) -> dict[str, Any] | None:
    """How much of the next answer's projection, as the model is, the user's message says."""
    turns = []
    for name in names:
        before: float | None = None
        for one in table.spoken(BASELINE, name):
            if one.projection is not None:
                change = None if before is None else one.projection - before
                turns.append(Turn(one.user, one.projection, change, one.script, one.domain))
            before = one.projection
    found = predict_from_messages(turns, embed)
    if found is None:
        return None
    features = {"features": asked.embedding or "hashed words and word pairs, TF-IDF"}
    return {name: prediction.to_json() for name, prediction in found.items()} | features


def _examples(
    table: _Table, names: Sequence[str], domains: Sequence[str], watched: Watched
) -> list[dict[str, Any]]:
    """The conversations that fall lowest as the model is, one a domain, in every arm."""
    lowest = []
    for domain in domains:
        own = table.names((domain,))
        means = np.nanmean(np.where(np.isfinite(values := table.values(BASELINE, own)), values, 0.0), axis=1)
        lowest.append((float(means.min()), own[int(means.argmin())], domain))
    found = []
    for _, name, domain in sorted(lowest)[:EXAMPLES]:
        told = {arm: _turns(table.spoken(arm, name), watched.watcher) for arm in names}
        found.append({"name": name, "domain": domain, "arms": told})
    return found


def _turns(own: Sequence[TurnRecord], watcher: DriftMonitor) -> list[dict[str, Any]]:
    monitor, rows = watcher.start(), []
    for one in own:
        state = None if monitor is None or one.uncapped is None else monitor.update(one.uncapped)
        row = {"user": one.user, "text": one.text, "projection": one.projection, "acted": one.acted}
        row["z"] = None if one.projection is None else watcher.reference.z(one.projection)
        rows.append(
            row | {"alarm": None if state is None else state.alarm, "raised": bool(state and state.raised)}
        )
    return rows


def _warnings(
    content: dict[str, Any], stage: RunnerConfig, conversations: Transcripts, watched: Watched, rate: float
) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    if watched.watcher.rule is None:
        found.append(
            f"no alarm is calibrated ({watched.source}), so there is no adaptive arm and no count of alarms"
        )
    elif watched.fitted_on:
        found.append(f"{len(watched.fitted_on)} scripts set the alarm's limit: their alarms are left out")
    seen = watched.watcher.false_alarms
    if seen is not None and seen.interval[0] > rate:
        low, high = seen.interval
        found.append(
            f"{rate:.0%} of calm conversations were to raise an alarm, and {seen.share:.0%} [{low:.0%}, {high:.0%}] of those with other "
            "scripts do: scripts differ, and more of them are needed to set the limit"
        )
    if content["scripts"] < 20:
        found.append(
            f"intervals are over {content['scripts']} scripts in all: few, so they are rather too narrow"
        )
    if conversations.truncated:
        said = f"{len(conversations.truncated)} conversations ended before their last turn, at the model's {stage.model.context} tokens of context"
        found.append(f"{said}: means of late turns are of the shorter ones")
    if stage.user.n_silent:
        found.append(
            f"the user's model had nothing to say, or no room to read more, {stage.user.n_silent} times, which ended those conversations"
        )
    for arm, row in content["wrote"].items():
        if arm != BASELINE and row["fired"] == 0:
            found.append(f"{arm}: the cap never fired, so its answers are the model's own")
        if row["empty"] > row["answers"] / 10:
            found.append(f"{arm}: {row['empty']} of {row['answers']} answers are empty and lie nowhere")
    return found
