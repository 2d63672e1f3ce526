"""Runs multi-turn conversations in several arms in one batch and projects every answer on the axis.

    config = RunnerConfig(model, chat, axis, Sampling(128), folder / "turns.jsonl")
    arms = {"baseline": [], "capped": [cap], "adaptive": [cap]}
    done = run_conversations(config, scripts, arms, turns=8, monitors={"adaptive": monitor})
    done.turns["adaptive", "therapy-03/0", 5].uncapped

Each arm has a conversation of its own. In an arm with a monitor the interventions act on the next answer only
while the alarm is on, which is updated with every answer so far as the model itself, uncapped, reads it.
Requests that are the same in two arms (before its first alarm an adaptive arm is the baseline) are answered
once.

The log is append-only and keyed by content, so an interrupted run resumes and ends the same. Work is cut into
chunks of scripts that depend on nothing else and are shared by ranks; a chunk that the log does not hold as a
whole is done again as a whole. Seeds, keys and rows come from a `TurnFormat`, so other studies keep logs of
their own form."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from personatlas.persona.axis import Axis
from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message
from personatlas.persona.interventions import BASELINE, Interventions, interventions_digest
from personatlas.persona.logs import ResultCache
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model
from personatlas.persona.progress import Advance, no_advance
from personatlas.persona.records import Fraction, JsonRecord, Number
from personatlas.persona.rollout import Rollout, TokenIds, check_vocabulary, seed_of
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Answer, Prompt, Sampler, Sampling
from personatlas.steering.drift_monitor import DriftMonitor, direction_digest
from personatlas.steering.hooks.steering import steer
from personatlas.steering.teacher_forcing import mean_projections

ANSWER_FIELDS = ("ids", "text", "stopped", "projection", "uncapped", "fired")  # of a TurnRecord
WRITING = 0.85  # of an answer's time, about; the rest is reading it again
CPU_CHUNK, GPU_CHUNK = 8, 1024  # scripts; what an interruption can cost of one turn
OLD_ARM_NAMES = {"as it is": BASELINE}  # in logs of earlier versions


@dataclass(frozen=True)
class Script:
    """What a conversation begins with and what its user says.

    For a user who reacts only the first message counts. `name` is SCRIPT/SAMPLE and unique, `opening` stands
    before the user's first message (a system message, say), `seed` is the base of the turns' seeds."""

    name: str
    domain: str
    users: tuple[str, ...]
    opening: tuple[Message, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class TurnRecord:
    """One turn in one arm: the user's message, the answer, and its mean projection (None for an empty
    answer).

    `projection` is measured with what acted on this answer, before its step at the axis's layer, `uncapped`
    as the model itself reads the conversation (None where the run does not measure it). `acted` says whether
    the arm's interventions were on, `fired` is the share of tokens times layers that they changed, over
    prompt and answer (None or 0 without)."""

    conversation: str
    domain: str
    arm: str
    turn: int
    seed: int
    user: str
    text: str = ""
    ids: tuple[int, ...] = ()
    stopped: Literal["end", "length"] = "end"
    projection: float | None = None
    uncapped: float | None = None
    acted: bool = False
    fired: float | None = None
    prompt_ids: tuple[int, ...] = ()

    @property
    def script(self) -> str:
        """The script's name without its sample: samples of one script are not independent."""
        return self.conversation.rpartition("/")[0]


@dataclass(frozen=True)
class TurnRequest:
    """A turn to be answered: `record` lacks its answer, `acting` acts on it, `key` is its id in the log."""

    script: Script
    record: TurnRecord
    messages: tuple[Message, ...]
    acting: Interventions
    digest: str
    key: str = ""

    @property
    def turn(self) -> int:
        """The turn's number, from 0."""
        return self.record.turn


class TurnFormat:
    """Seeds, keys and rows of `turns.jsonl`. A subclass is the format of another log.

    `names_arms` says whether rows carry their arm; without it, equal requests of two arms share a row.
    """

    names_arms = True

    def seed(self, script: Script, turn: int) -> int:
        """The seed with which all arms sample a turn."""
        return seed_of(f"{script.name}/{turn}", script.seed)

    def key_content(self, request: TurnRequest, config: "RunnerConfig") -> list[object]:
        """Everything that decides the answer and its projection, as JSON values; the key is its hash."""
        return [
            request.digest,
            request.messages,
            request.record.seed,
            asdict(config.sampling),
            [config.axis.layer, direction_digest(config.axis)],
            request.script.name,
            request.turn,
        ]

    def row(self, turn: TurnRecord) -> dict[str, object]:
        """What the log holds besides `id`; `ANSWER_FIELDS` keep their names (`uncapped` may be left out)."""
        row = asdict(turn)
        del row["prompt_ids"]
        return row


@dataclass(frozen=True)
class StoredAnswer(JsonRecord):
    """What a log's row says of a turn's answer (see `TurnRecord`)."""

    ids: TokenIds
    text: str
    stopped: Literal["end", "length"]
    projection: Number | None
    fired: Fraction | None
    uncapped: Number | None = None

    optional: ClassVar[tuple[str, ...]] = ("uncapped",)


class ScriptedUser:
    """A user who says what the script holds, whatever is answered. Subclasses react."""

    n_silent = 0  # how often one who reacts had nothing to say

    def next_messages(
        self, scripts: Sequence[Script], histories: Sequence[Sequence[TurnRecord]]
    ) -> list[str | None]:
        """The next message of each conversation; None where its user has no more to say."""
        return [
            script.users[len(history)] if len(history) < len(script.users) else None
            for script, history in zip(scripts, histories, strict=True)
        ]


@dataclass(frozen=True)
class RunnerConfig:
    """What runs conversations: the model, the axis of the projections, the sampling, the log, and the user.

    With `measure_uncapped` every answer is also read without interventions; the texts of all arms are then
    read in the same batches, and a chunk is logged in one piece. Without it, each arm of a chunk is answered
    and logged by itself, but that on a GPU the first turn of all arms is one batch. `chunk` is the number of
    scripts in a chunk, (CPU, GPU). With several ranks each writes a log of its own, `STEM.RANK.jsonl`."""

    model: Model
    chat: ChatFormat
    axis: Axis
    sampling: Sampling
    log: Path
    user: ScriptedUser = field(default_factory=ScriptedUser)
    format: TurnFormat = field(default_factory=TurnFormat)
    world: World = field(default_factory=World)
    measure_uncapped: bool = True
    chunk: tuple[int, int] | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether capped and uncapped rows share batches: on a CPU every hooked layer costs."""
        return self.model.device.type == "cuda"

    @property
    def chunk_size(self) -> int:
        """Scripts in a chunk."""
        cpu, gpu = self.chunk or (CPU_CHUNK, GPU_CHUNK)
        return gpu if self.on_gpu else cpu

    @cached_property
    def sampler(self) -> Sampler:
        """One for all turns; building it checks the cached decoder."""
        return fastest_sampler(self.model, self.chat.end_ids, self.sampling)

    def fits(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the model's context leaves room for an answer to the prompt."""
        room = self.model.context
        return not room or len(prompt_ids) + self.sampling.max_new_tokens + 1 <= room


@dataclass(frozen=True)
class Transcripts:
    """Turns by (arm, conversation, turn); `truncated` are (arm, conversation) that filled the model's
    context.
    """

    turns: dict[tuple[str, str, int], TurnRecord] = field(default_factory=dict)
    truncated: frozenset[tuple[str, str]] = frozenset()

    def __or__(self, other: "Transcripts") -> "Transcripts":
        """Both, as of two calls with other arms."""
        return Transcripts(self.turns | other.turns, self.truncated | other.truncated)

    def history(self, arm: str, conversation: str) -> list[TurnRecord]:
        """A conversation's turns in order."""
        found: list[TurnRecord] = []
        while (turn := self.turns.get((arm, conversation, len(found)))) is not None:
            found.append(turn)
        return found


def run_conversations(
    config: RunnerConfig,
    scripts: Sequence[Script],
    arms: Mapping[str, Interventions],
    turns: int,
    advance: Advance = no_advance,
    monitors: Mapping[str, DriftMonitor] = MappingProxyType({}),
) -> Transcripts:
    """Runs all scripts in all arms, up to `turns` turns each; `monitors` are those of adaptive arms.

    `advance` counts turns, also while they are written. A conversation ends where its user says nothing more,
    or where its next prompt leaves no room for an answer (then it is in `truncated`). Raises `UserError`
    where a first prompt leaves no room, and `ValueError` for a monitor without a rule."""
    for name, monitor in monitors.items():
        if monitor.rule is None:
            raise ValueError(f"the arm {name} has no calibrated alarm")
    if config.world.size > 1 and type(config.user) is not ScriptedUser:
        raise ValueError("a user who reacts speaks in one process only")
    done, truncated = Transcripts(), set[tuple[str, str]]()
    log = _Log(config)
    plans = {name: (plan, interventions_digest(plan)) for name, plan in arms.items()}
    for turn in range(turns):
        requests: list[TurnRequest] = []
        for chunk, first in enumerate(range(0, len(scripts), config.chunk_size)):
            part = scripts[first : first + config.chunk_size]
            own = _requests(config, part, plans, monitors, done, turn, truncated)
            requests += own
            if config.world.owns(chunk):
                for unit in _units(config, own, log):
                    _complete(config, unit, log, advance)
        config.world.barrier()
        if config.world.size > 1:
            log = _Log(config)
        for request in requests:
            answered = replace(request.record, **log.answer(request))
            done.turns[answered.arm, answered.conversation, turn] = answered
    return replace(done, truncated=frozenset(truncated))


def messages_before(script: Script, history: Iterable[TurnRecord], user: str) -> tuple[Message, ...]:
    """The messages of a conversation so far and what its user says now."""
    messages = list(script.opening)
    for turn in history:
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.text}]
    return (*messages, {"role": "user", "content": user})


class _Log:
    """Rows of all ranks' logs by arm ("" where rows carry none) and key."""

    def __init__(self, config: RunnerConfig) -> None:
        path, world = config.log, config.world
        own = path if world.size == 1 else path.with_name(f"{path.stem}.{world.rank:04d}{path.suffix}")
        ranks = sorted(path.parent.glob(f"{path.stem}*{path.suffix}"))
        self.names_arms = config.format.names_arms
        key, size = ("arm", "id") if self.names_arms else "id", config.model.vocab_size

        def check(row: dict[str, Any]) -> None:
            check_vocabulary(StoredAnswer.from_json(row).ids, size)

        self.cache = ResultCache(own, key, also=ranks, schema=check, mend=world.size == 1)
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}
        self.index(self.cache.rows())

    def index(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            arm = str(row["arm"]) if self.names_arms else ""
            self.rows.setdefault(OLD_ARM_NAMES.get(arm, arm), {})[row["id"]] = row

    def arm(self, request: TurnRequest) -> str:
        return request.record.arm if self.names_arms else ""

    def has(self, request: TurnRequest) -> bool:
        return request.key in self.rows.get(self.arm(request), {})

    def answer(self, request: TurnRequest, *, other_than: set[str] | None = None) -> dict[str, Any]:
        """The answer in the request's arm or, with `other_than`, in any arm but those; empty without one."""
        own = self.arm(request)
        arms = [arm for arm in self.rows if (arm == own if other_than is None else arm not in other_than)]
        row = next((self.rows[arm][request.key] for arm in arms if request.key in self.rows[arm]), None)
        if row is None:
            return {}
        return {name: row.get(name) for name in ANSWER_FIELDS} | {"ids": tuple(row["ids"])}


def alarm_after(monitor: DriftMonitor, history: Sequence[TurnRecord]) -> bool:
    """Whether the alarm is on after these turns, by their projections without interventions."""
    alarm = monitor.start(history[0].script if history else None)
    assert alarm is not None
    for turn in history:
        if turn.uncapped is not None:
            alarm.update(turn.uncapped)
    return alarm.alarm


def _requests(
    config: RunnerConfig,
    scripts: Sequence[Script],
    plans: Mapping[str, tuple[Interventions, str]],
    monitors: Mapping[str, DriftMonitor],
    done: Transcripts,
    turn: int,
    truncated: set[tuple[str, str]],
) -> list[TurnRequest]:
    """The requests of a turn, arm after arm: conversations that go on, with what their users say next."""
    live = [
        (arm, script, history)
        for arm in plans
        for script in scripts
        if len(history := done.history(arm, script.name)) == turn
    ]
    users = config.user.next_messages([script for _, script, _ in live], [history for *_, history in live])
    found, nothing = [], ((), interventions_digest(()))
    for (arm, script, history), user in zip(live, users, strict=True):
        if user is None:
            continue
        messages = messages_before(script, history, user)
        ids = tuple(config.chat.prompt_ids(list(messages)))
        if not config.fits(ids):
            if turn == 0:
                context = f"{config.model.context} tokens of {config.model.id}"
                raise UserError(
                    f"the first turn of {script.name} leaves no room for an answer in the {context}; "
                    "shorten it or --max-new-tokens"
                )
            truncated.add((arm, script.name))
            continue
        acts = arm not in monitors or alarm_after(monitors[arm], history)
        acting, digest = plans[arm] if acts else nothing
        seed, acted = config.format.seed(script, turn), bool(acting)
        record = TurnRecord(script.name, script.domain, arm, turn, seed, user, acted=acted, prompt_ids=ids)
        request = TurnRequest(script, record, messages, acting, digest)
        content = json.dumps(config.format.key_content(request, config), sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:24]
        found.append(replace(request, key=key))
    return found


def _units(config: RunnerConfig, requests: Sequence[TurnRequest], log: _Log) -> list[list[TurnRequest]]:
    """A chunk's requests as they are answered and logged together: see `RunnerConfig`."""
    by_arm: dict[str, list[TurnRequest]] = {}
    for request in requests:
        by_arm.setdefault("" if config.measure_uncapped else request.record.arm, []).append(request)
    if config.measure_uncapped or not config.on_gpu or (requests and requests[0].turn > 0):
        return list(by_arm.values())
    missing = [unit for unit in by_arm.values() if not all(map(log.has, unit))]
    return [[request for unit in missing for request in unit]]


def _complete(config: RunnerConfig, unit: Sequence[TurnRequest], log: _Log, advance: Advance) -> None:
    """Answer and log a unit as a whole, unless the log holds all of it."""
    new: dict[str, TurnRequest] = {}
    arms = list(dict.fromkeys(request.record.arm for request in unit))
    advance = partial(advance, note=f"arm {arms[0]}" if len(arms) == 1 else f"{len(arms)} arms")
    if not all(map(log.has, unit)):
        own = set(map(log.arm, unit))
        answers = {request.key: log.answer(request, other_than=own) for request in unit}
        for request in unit:
            if not answers[request.key]:
                new.setdefault(request.key, request)
        if new:
            answers |= zip(new, _answer(config, list(new.values()), advance), strict=True)
        rows = [
            {"id": request.key, **config.format.row(replace(request.record, **answers[request.key]))}
            for request in unit
            if not log.has(request)
        ]
        log.cache.add(rows)
        log.index(rows)
    advance(len(unit) - len(new), known=True)


def _answer(config: RunnerConfig, requests: Sequence[TurnRequest], advance: Advance) -> list[dict[str, Any]]:
    """Sample the answers and measure them."""
    answers, fired = _sample(config, requests, advance)
    texts = [
        Rollout(
            request.script.name,
            request.messages,
            request.record.prompt_ids,
            answer.ids,
            config.model.decode(answer.ids),
            request.record.seed,
            answer.stopped,
        )
        for request, answer in zip(requests, answers, strict=True)
    ]
    layer = config.axis.layer
    vector = config.axis.at(layer)
    uncapped: list[float] | None = None
    projections = [float("nan")] * len(requests)
    if config.measure_uncapped:
        uncapped = mean_projections(config.model, texts, [], layer, vector)
        projections = list(uncapped)
    measured = [i for i, request in enumerate(requests) if request.acting or uncapped is None]
    for digest in dict.fromkeys(requests[i].digest for i in measured):
        rows = [i for i in measured if requests[i].digest == digest]
        values = mean_projections(
            config.model, [texts[i] for i in rows], requests[rows[0]].acting, layer, vector
        )
        for i, value in zip(rows, values, strict=True):
            projections[i] = value
    advance((1 - WRITING) * len(requests))
    return [
        {
            "ids": text.answer_ids,
            "text": text.answer.encode("utf-8", "replace").decode(),
            "stopped": text.stopped,
            "projection": _number(projections[i]),
            "uncapped": None if uncapped is None else _number(uncapped[i]),
            "fired": fired[i],
        }
        for i, text in enumerate(texts)
    ]


def _sample(
    config: RunnerConfig, requests: Sequence[TurnRequest], advance: Advance
) -> tuple[list[Answer], list[float | None]]:
    """Answers in the requests' order, and the fired share of each (None without interventions)."""

    def write(done: float | int, units: int = 0, *, note: str = "", known: bool = False) -> None:
        advance(done * WRITING)

    plans = {request.digest: request.acting for request in requests if request.acting}
    batches = [list(range(len(requests)))]
    if not config.on_gpu:
        digests = [request.digest for request in requests]
        batches = [[i for i, own in enumerate(digests) if own == digest] for digest in dict.fromkeys(digests)]
    answers: dict[int, Answer] = {}
    fired: list[float | None] = [None] * len(requests)
    for batch in batches:
        acting = [digest for digest in plans if any(requests[i].digest == digest for i in batch)]
        prompts = [
            Prompt(
                requests[i].record.prompt_ids,
                requests[i].record.seed,
                acting.index(requests[i].digest) if requests[i].acting else -1,
            )
            for i in batch
        ]
        context = steer(config.model, *(plans[digest] for digest in acting)) if acting else nullcontext()
        with context as steering:
            callback = None if steering is None else steering.callback
            for answer in config.sampler.answers(prompts, callback, write):
                answers[batch[answer.index]] = answer
            if steering is not None:
                tally = steering.callback.tally
                for row, i in enumerate(batch):
                    fired[i] = _number(tally.rows([row]).share) if requests[i].acting else None
    return [answers[i] for i in range(len(requests))], fired


def _number(value: float) -> float | None:
    """None for NaN, which JSON has not."""
    return None if value != value else value
