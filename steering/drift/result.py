"""The result of a drift study: trajectories, slopes, differences, alarms, what each arm wrote and cost.

    result = DriftResult.load(folder)
    result.trajectories["therapy"]["assistant"][7].mean      # of the arm cap:assistant at turn 8
    result.slopes["therapy"]["baseline"].value               # residual units per turn

Means and slopes are by domain, and over `ALL` of them, then by arm.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from personatlas.analysis.drift_alarm import AlarmState
from personatlas.analysis.next_message import Embedding, Prediction, UserMessage, predict_from_messages
from personatlas.analysis.stats import Array, Interval, ratio_interval, share_interval
from personatlas.analysis.trajectories import (
    AlarmRate,
    Slope,
    TurnMean,
    alarm_rate,
    clustered_mean,
    slope,
    turn_means,
)
from personatlas.persona.artifacts import read_record
from personatlas.persona.interventions import BASELINE, Interventions
from personatlas.persona.records import (
    Count,
    Ends,
    FractionOrNaN,
    JsonObject,
    JsonRecord,
    NonNegative,
    check_distinct,
)
from personatlas.persona.rollout import Rollout, spread_evenly
from personatlas.steering.arms import InterventionSummary, distinct_ngrams
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

STORED = "stored"  # the arm of stored answers
ADAPTIVE = ", adaptive"  # how the names of arms end that act only while the alarm is on
OLD_ARMS = "capped", "adaptive"  # the arms of earlier versions
ALL = "all"
CPU_READ, GPU_READ = 24, 400  # answers on which the arms' costs are measured
EXAMPLES = 2  # conversations


@dataclass(frozen=True)
class ArmMean(Interval):
    """Mean projection of n answers and, but for the baseline, its paired difference to the baseline's."""

    change: Interval | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("n", "change")


@dataclass(frozen=True)
class Share(JsonRecord):
    """A share of answers with its interval over scripts."""

    share: FractionOrNaN
    interval: Ends


@dataclass(frozen=True)
class ArmSummary(JsonRecord):
    """What an arm did and wrote: shares of answers, mean fired share, mean distinct tokens, mean length in
    tokens.
    """

    answers: Count
    empty: Count
    acted: FractionOrNaN
    fired: FractionOrNaN
    degenerate: Share
    loops: Share
    distinct: FractionOrNaN | None
    tokens: NonNegative
    ended_by_context: Count


@dataclass(frozen=True)
class DriftCost(JsonRecord):
    """Relative increase of loss per token on n baseline answers of the reference domains, by arm.

    An adaptive arm acts only where it did in the same turn of the same conversation.
    """

    n: Count
    arms: dict[str, Interval]


@dataclass(frozen=True)
class NextTurn(JsonRecord):
    """How well the user's message predicts the next baseline answer's projection, and its change since the
    one before.
    """

    projection: Prediction
    features: str
    change: Prediction | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("change",)


@dataclass(frozen=True)
class ExampleTurn(JsonRecord):
    """A turn as the page shows it."""

    user: str
    text: str
    projection: float | None
    acted: bool
    z: float | None
    alarm: bool | None
    raised: bool


@dataclass(frozen=True)
class Example(JsonRecord):
    """A conversation's turns by arm; None where an arm has no answer to a turn."""

    name: str
    domain: str
    arms: dict[str, tuple[ExampleTurn | None, ...]]


@dataclass(frozen=True)
class StoredConversation(Example):
    """A stored conversation run again, with the stored answers as an arm.

    `cut_short` are arms that filled the context.
    """

    users: tuple[str, ...]
    cut_short: tuple[str, ...]


@dataclass(frozen=True)
class StoredAnswers(JsonRecord):
    """The mean projection of the stored answers beside the baseline's, and the conversations."""

    mean: ArmMean
    conversations: tuple[StoredConversation, ...]


@dataclass(frozen=True)
class DriftResult(JsonRecord):
    """The content of drift.json: what was run, and all figures by domain and arm."""

    model: JsonObject
    dtype: str
    device: str
    axis: JsonObject
    interventions: dict[str, InterventionSummary]
    watch: JsonObject
    asked: DriftOptions
    versions: JsonObject
    arms: tuple[str, ...]
    domains: tuple[str, ...]
    scripts: Count
    conversations: dict[str, Count]
    trajectories: dict[str, dict[str, tuple[TurnMean, ...]]]
    differences: dict[str, dict[str, tuple[TurnMean, ...]]]
    slopes: dict[str, dict[str, Slope | None]]
    means: dict[str, dict[str, ArmMean]]
    alarms: dict[str, dict[str, AlarmRate]]
    wrote: dict[str, ArmSummary]
    cost: DriftCost | None
    next_turn: NextTurn | None
    examples: tuple[Example, ...]
    warnings: tuple[str, ...]
    stored: StoredAnswers | None = None
    uncapped: dict[str, dict[str, tuple[TurnMean, ...]]] | None = None
    """trajectories of the same answers read without the intervention, of arms that act: a capped projection
    is level by construction, this one is what the text shows; None in files of earlier versions"""

    omit_none: ClassVar[tuple[str, ...]] = ("stored", "uncapped")

    def __post_init__(self) -> None:
        check_distinct(self.arms)
        check_distinct(self.domains)
        names = {*self.domains, ALL}
        for part in (self.conversations, self.trajectories, self.slopes, self.means):
            if set(part) != names:
                raise ValueError(
                    f"its figures are of {', '.join(part)}, its domains {', '.join(self.domains)}"
                )
        if not {BASELINE} <= set(self.arms) == set(self.wrote):
            raise ValueError(f"its arms {', '.join(self.arms)} lack the baseline, or what one wrote")

    @classmethod
    def load(cls, folder: Path) -> "DriftResult":
        """Reads drift.json of a study's folder. Raises `UserError` where there is none."""
        return read_record(folder / "drift.json", cls)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "DriftResult":
        """What `to_json` wrote, or an earlier version: a cap, and the same cap adaptive."""
        known = isinstance(row, dict) and "interventions" not in row
        names, cap, cost = (row.get(name) if known else None for name in ("arms", "cap", "cost"))
        if isinstance(names, list) and isinstance(cap or {}, dict) and isinstance(cost or {}, dict):
            arms = [arm for arm in OLD_ARMS if arm in names]
            if cost:
                cost = {**cost, "arms": {arm: cost[arm] for arm in arms if arm in cost}}
            cap = {"population": None, "spare_first": True, **(cap or {})}
            row = {**row, "cost": cost, "interventions": dict.fromkeys(arms, cap)}
        return super().from_json(row)


@dataclass(frozen=True)
class StudyMonitor:
    """The monitor of a study, and where its reference conversations are from."""

    monitor: DriftMonitor
    source: str

    def example_turns(
        self, turns: Iterable[tuple[str, str, float | None, bool, float | None]], script: str | None = None
    ) -> tuple[ExampleTurn, ...]:
        """Turns (user, text, projection, acted, uncapped projection) with z and the alarm's state."""
        alarm, rows = self.monitor.start(script), []
        for number, (user, text, projection, acted, uncapped) in enumerate(turns):
            state = None if alarm is None or uncapped is None else alarm.update(uncapped)
            z = None if projection is None else self.monitor.reference.z(projection, number)
            on, raised = (None, False) if state is None else (state.alarm, state.raised)
            rows.append(ExampleTurn(user, text, projection, acted, z, on, raised))
        return tuple(rows)


@dataclass(frozen=True)
class StudyData:
    """The conversations of a study in all arms, and what they were run with."""

    config: RunnerConfig
    scripts: Sequence[Script]
    transcripts: Transcripts
    arms: Mapping[str, Interventions]
    monitor: StudyMonitor
    options: DriftOptions

    def names(self, domains: Sequence[str]) -> list[str]:
        """Names of the domains' conversations."""
        turns = self.transcripts.turns.values()
        return list(dict.fromkeys(turn.conversation for turn in turns if turn.domain in domains))

    def alarm_states(self, arm: str, names: Sequence[str]) -> list[list[AlarmState]]:
        """The alarm's states over each conversation's answers, as the model reads them without the step."""
        rows = []
        for name in names:
            alarm = self.monitor.monitor.start(name.rpartition("/")[0])
            assert alarm is not None
            read = [turn.uncapped for turn in self.turns(arm, [name]) if turn.uncapped is not None]
            rows.append([alarm.update(projection) for projection in read])
        return rows

    def turns(self, arm: str, names: Sequence[str]) -> list[TurnRecord]:
        """All turns of some conversations in an arm."""
        return [turn for name in names for turn in self.transcripts.history(arm, name)]

    def values(self, arm: str, names: Sequence[str], *, uncapped: bool = False) -> Array:
        """Projections (N, T) of some conversations' answers; NaN where there is none. With `uncapped`, as the
        model reads the same answers without the intervention.
        """
        values = np.full((len(names), self.options.turns or 0), np.nan)
        row = {name: index for index, name in enumerate(names)}
        for turn in self.turns(arm, names):
            read = turn.uncapped if uncapped else turn.projection
            values[row[turn.conversation], turn.turn] = np.nan if read is None else read
        return values

    def mean(self, values: Array, names: Sequence[str], baseline: Array | None) -> ArmMean:
        """The mean of projections (N, T) and its difference to the baseline's."""
        scripts = script_names(names)
        change = None if baseline is None else clustered_mean(values - baseline, scripts)
        mean = clustered_mean(values, scripts)
        return ArmMean(mean.value, mean.low, mean.high, mean.n, change)

    def example(self, arm: str, name: str) -> tuple[ExampleTurn, ...]:
        """A conversation's turns in an arm."""
        return self.monitor.example_turns(
            (
                (turn.user, turn.text, turn.projection, turn.acted, turn.uncapped)
                for turn in self.turns(arm, [name])
            ),
            name.rpartition("/")[0],
        )


def script_names(names: Sequence[str]) -> list[str]:
    """Script names of conversations SCRIPT/SAMPLE."""
    return [name.rpartition("/")[0] for name in names]


def summarise(
    data: StudyData, record: JsonObject, stored: StoredAnswers | None = None, embed: Embedding | None = None
) -> DriftResult:
    """Computes all figures of a study. `record` holds the fields of `DriftResult` up to `versions`."""
    arms, turns = list(data.arms), data.transcripts.turns.values()
    monitor = data.monitor.monitor
    domains = list(dict.fromkeys(turn.domain for turn in turns))
    every = {domain: data.names((domain,)) for domain in domains} | {ALL: data.names(domains)}
    trajectories: dict[str, dict[str, tuple[TurnMean, ...]]] = {}
    differences: dict[str, dict[str, tuple[TurnMean, ...]]] = {}
    slopes: dict[str, dict[str, Slope | None]] = {}
    means: dict[str, dict[str, ArmMean]] = {}
    alarms: dict[str, dict[str, AlarmRate]] = {}
    uncapped: dict[str, dict[str, tuple[TurnMean, ...]]] = {}
    for domain, names in every.items():
        scripts = script_names(names)
        values = {arm: data.values(arm, names) for arm in arms}
        baseline = values[BASELINE]
        trajectories[domain] = {arm: tuple(turn_means(values[arm], scripts)) for arm in arms}
        differences[domain] = {
            arm: tuple(turn_means(values[arm] - baseline, scripts)) for arm in arms if arm != BASELINE
        }
        uncapped[domain] = {
            arm: tuple(turn_means(data.values(arm, names, uncapped=True), scripts))
            for arm in arms
            if data.arms[arm]
        }
        slopes[domain] = {arm: slope(values[arm], scripts) for arm in arms}
        means[domain] = {
            arm: data.mean(values[arm], names, None if arm == BASELINE else baseline) for arm in arms
        }
        if monitor.rule is not None:  # from answers as the model itself reads them
            alarms[domain] = {arm: alarm_rate(data.alarm_states(arm, names), scripts) for arm in arms}
    wrote = {arm: _summary(data, arm, every[ALL]) for arm in arms}
    n_scripts = len({turn.script for turn in turns})
    return DriftResult(
        **record,
        arms=tuple(arms),
        domains=tuple(domains),
        scripts=n_scripts,
        conversations={domain: len(names) for domain, names in every.items()},
        trajectories=trajectories,
        differences=differences,
        slopes=slopes,
        means=means,
        alarms=alarms,
        wrote=wrote,
        cost=_cost(data),
        next_turn=_next_turn(data, every[ALL], embed),
        examples=_examples(data, domains),
        warnings=tuple(_warnings(data, n_scripts, wrote)),
        stored=stored,
        uncapped=uncapped,
    )


def _summary(data: StudyData, arm: str, names: Sequence[str]) -> ArmSummary:
    turns = data.turns(arm, names)
    n, answered = len(turns), [turn for turn in turns if turn.ids]
    scripts = [turn.script for turn in turns]

    def share(outcomes: list[bool]) -> Share:
        values = np.array(outcomes, dtype=float)
        return Share(float(values.mean()), share_interval(values, scripts))

    return ArmSummary(
        answers=n,
        empty=n - len(answered),
        acted=sum(turn.acted for turn in turns) / n,
        fired=float(np.mean([turn.fired or 0.0 for turn in turns])),
        degenerate=share([refusal_of(turn.text) == "degenerate" for turn in turns]),
        loops=share([loops(turn.ids) for turn in turns]),
        distinct=float(np.mean([distinct_ngrams(turn.ids) for turn in answered])) if answered else None,
        tokens=float(np.mean([len(turn.ids) for turn in turns])),
        ended_by_context=sum(truncated == arm for truncated, _ in data.transcripts.truncated),
    )


def _cost(data: StudyData) -> DriftCost | None:
    turns = [turn for turn in data.turns(BASELINE, data.names(data.options.references)) if turn.ids]
    acting = {arm: plan for arm, plan in data.arms.items() if plan and not arm.endswith(ADAPTIVE)}
    if not acting or not turns:
        return None
    turns = spread_evenly(turns, GPU_READ if data.config.on_gpu else CPU_READ, lambda turn: turn.conversation)
    scripts = {script.name: script for script in data.scripts}
    texts = []
    for turn in turns:
        before = data.transcripts.history(BASELINE, turn.conversation)[: turn.turn]
        messages = messages_before(scripts[turn.conversation], before, turn.user)
        texts.append(
            Rollout(
                turn.conversation, messages, turn.prompt_ids, turn.ids, turn.text, turn.seed, turn.stopped
            )
        )
    costs = benign_costs(data.config.model, texts, acting)
    increases, own_scripts = dict[str, Interval](), [turn.script for turn in turns]
    for arm in data.arms:
        cost = costs.get(arm.removesuffix(ADAPTIVE))
        if cost is None:
            continue
        same = [data.transcripts.turns.get((arm, turn.conversation, turn.turn)) for turn in turns]
        was_on = np.array([turn is not None and turn.acted for turn in same])
        after = np.where(was_on, cost.after, cost.before) if arm.endswith(ADAPTIVE) else cost.after
        ratio = ratio_interval(after, cost.before, own_scripts)
        low, high = (None if bound is None else bound - 1 for bound in (ratio.low, ratio.high))
        increases[arm] = Interval(ratio.value - 1, low, high)
    return DriftCost(len(texts), increases)


def _next_turn(data: StudyData, names: Sequence[str], embed: Embedding | None) -> NextTurn | None:
    messages = []
    for name in names:
        before: float | None = None
        for turn in data.turns(BASELINE, [name]):
            if turn.projection is not None:
                change = None if before is None else turn.projection - before
                messages.append(UserMessage(turn.user, turn.projection, change, turn.script, turn.domain))
            before = turn.projection
    predictions = predict_from_messages(messages, embed)
    features = data.options.embedding or "hashed words and word pairs, TF-IDF"
    return None if predictions is None else NextTurn(features=features, **predictions)


def _examples(data: StudyData, domains: Sequence[str]) -> tuple[Example, ...]:
    """The conversations whose baseline falls lowest, one per domain."""
    lowest = []
    for domain in domains:
        names = data.names((domain,))
        values = data.values(BASELINE, names)
        means = np.where(np.isfinite(values), values, 0.0).mean(axis=1)
        lowest.append((float(means.min()), names[int(means.argmin())], domain))
    return tuple(
        Example(name, domain, {arm: data.example(arm, name) for arm in data.arms})
        for _, name, domain in sorted(lowest)[:EXAMPLES]
    )


def _warnings(data: StudyData, scripts: int, wrote: Mapping[str, ArmSummary]) -> list[str]:
    warnings, monitor, rate = [], data.monitor, data.options.false_alarms
    if monitor.monitor.rule is None:
        warnings.append(
            f"no alarm is calibrated ({monitor.source}), so there is no adaptive arm and no count of alarms"
        )
    counted = monitor.monitor.false_alarms
    if counted is not None and counted.interval[0] > rate:
        low, high = counted.interval
        warnings.append(
            f"{rate:.0%} of reference conversations were to raise an alarm, and {counted.share:.0%} "
            f"[{low:.0%}, {high:.0%}] of those with other scripts do: scripts differ, and more of them are "
            "needed to set the limit"
        )
    if scripts < 20:
        warnings.append(f"intervals are over {scripts} scripts in all: few, so they are rather too narrow")
    if data.transcripts.truncated:
        warnings.append(
            f"{len(data.transcripts.truncated)} conversations ended before their last turn, at the model's "
            f"{data.config.model.context} tokens of context: means of late turns are of the shorter ones"
        )
    if data.config.user.n_silent:
        warnings.append(
            "the user's model had nothing to say, or no room to read more, "
            f"{data.config.user.n_silent} times, which ended those conversations"
        )
    for arm, summary in wrote.items():
        if arm != BASELINE and summary.fired == 0:
            warnings.append(f"{arm}: nothing fired, so its answers are the model's own")
        if summary.empty > summary.answers / 10:
            warnings.append(
                f"{arm}: {summary.empty} of {summary.answers} answers are empty and have no projection"
            )
    return warnings
