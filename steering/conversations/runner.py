"""Conversations had turn by turn in several arms at once: what users say is asked, answered, measured, and asked on.

    stage = Stage(model, chat, axis, Sampling(128), folder / "turns.jsonl", User())
    said = had(stage, talks, [Arm("baseline"), Arm("capped", [cap]), Arm("adaptive", [cap], watcher)])
    said["adaptive", "therapy-03/0", 5].uncapped

Each arm has a conversation of its own. In an adaptive arm the cap acts on the next answer only while the alarm is on, which hears
every answer so far as the model itself, uncapped, reads it. All conversations and arms of a turn are rows of one batch (on a CPU
capped and uncapped rows apart). Rows that would be the very same (before its first alarm an adaptive arm is the model as it is) are
answered once.

The log is append-only and keyed by content, so a study that was killed goes on where it was and ends the same: work is cut into
chunks of conversations that depend on nothing else, and an unfinished chunk is done again as a whole.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message
from personatlas.persona.interventions import Interventions, interventions_digest
from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model
from personatlas.persona.rollout import Rollout, seed_of
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Answer, Prompt, Sampler, Sampling
from personatlas.steering.drift_monitor import Watcher, direction_of
from personatlas.steering.hooks.steering import steer
from personatlas.steering.teacher_forcing import mean_projections

CPU_CHUNK, GPU_CHUNK = 8, 1024  # conversations; what an interruption can cost of one turn


@dataclass(frozen=True)
class Talk:
    """A conversation to be had: what its user says (or only how it begins, for a user who reacts), under which seed."""

    script: str
    domain: str
    users: tuple[str, ...]
    sample: int = 0
    system: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """SCRIPT/SAMPLE, which no other conversation has."""
        return f"{self.script}/{self.sample}"


@dataclass(frozen=True)
class Arm:
    """What acts in an arm: nothing, a plan always, or (with a watcher that has a rule) a plan while the alarm is on."""

    name: str
    plan: Interventions = ()
    watcher: Watcher | None = None

    def acts(self, heard: Sequence["Spoken"]) -> bool:
        """Whether the plan acts on the answer after those heard."""
        if self.watcher is None or not self.plan:
            return bool(self.plan)
        monitor = self.watcher.monitor()
        if monitor is None:
            raise ValueError(f"the arm {self.name} has no calibrated alarm")
        for one in heard:
            if one.uncapped is not None:
                monitor.turn(one.uncapped)
        return monitor.alarm


@dataclass(frozen=True)
class Spoken:
    """A turn in an arm: what the user said, what was answered, and where that lies (None for an empty answer).

    `projection` is read with what acted on this answer, before its step at the axis's layer, `uncapped` as the model itself reads the
    conversation. `acted` says whether the plan was on, `fired` the share of tokens times layers that it changed, over prompt and answer.
    """

    conversation: str
    domain: str
    arm: str
    turn: int
    seed: int
    user: str
    text: str
    ids: tuple[int, ...]
    stopped: Literal["end", "length"]
    projection: float | None
    uncapped: float | None
    acted: bool
    fired: float | None

    @property
    def script(self) -> str:
        """What its user's turns come from."""
        return self.conversation.rpartition("/")[0]

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Spoken":
        """What the log holds of it."""
        kept = {own.name: row[own.name] for own in fields(cls)}
        return cls(**kept | {"ids": tuple(row["ids"])})


Said = dict[tuple[str, str, int], Spoken]  # by arm, conversation and turn


class User:
    """A user who says what the script holds, whatever is answered. Others react."""

    silent = 0  # how often one who reacts had nothing to say

    def says(self, talks: Sequence[Talk], so_far: Sequence[Sequence[Spoken]]) -> list[str | None]:
        """The next turn of each conversation; None where its user has no more to say."""
        return [
            talk.users[len(own)] if len(own) < len(talk.users) else None
            for talk, own in zip(talks, so_far, strict=True)
        ]


@dataclass
class Stage:
    """Where conversations are had: a model, the axis they are measured along, how it samples, the log, and the user."""

    model: Model
    chat: ChatFormat
    axis: Axis
    sampling: Sampling
    log: Path
    user: User = field(default_factory=User)
    overflown: set[tuple[str, str]] = field(
        default_factory=set
    )  # arm, conversation: ended by the model's context

    @property
    def room(self) -> int | None:
        """Tokens that the model holds, where it says so."""
        return self.model.context

    @property
    def on_gpu(self) -> bool:
        """Whether all rows of a turn go into one batch."""
        return self.model.device.type == "cuda"

    @cached_property
    def sampler(self) -> Sampler:
        """One for all turns; building it proves the cached decoder."""
        return fastest_sampler(self.model, self.chat.end_ids, self.sampling)

    def fits(self, ids: Sequence[int]) -> bool:
        """Whether the model's context leaves room for an answer."""
        return not self.room or len(ids) + self.sampling.max_new_tokens + 1 <= self.room


def run_conversations(
    stage: Stage,
    talks: Sequence[Talk],
    arms: Sequence[Arm],
    turns: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Said:
    """All conversations in all arms, up to so many turns; `advance` counts turns. A conversation ends early where its next prompt
    leaves no room for an answer, which `stage.overflown` then holds."""
    said: Said = {}
    size = GPU_CHUNK if stage.on_gpu else CPU_CHUNK
    for turn in range(turns):
        known = _known(stage.log, {arm.name for arm in arms})
        for first in range(0, len(talks), size):
            rows = _asked(stage, talks[first : first + size], arms, said, turn)
            for one in _answered(stage, rows, known, advance):
                said[one.arm, one.conversation, one.turn] = one
    return said


@dataclass(frozen=True)
class _Row:
    """One turn of one conversation in one arm, about to be answered."""

    talk: Talk
    arm: Arm
    turn: int
    user: str
    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    acts: bool

    @property
    def seed(self) -> int:
        """All arms sample a turn with it."""
        return seed_of(f"{self.talk.name}/{self.turn}", self.talk.seed)

    @property
    def plan(self) -> Interventions:
        """What acts on this answer."""
        return self.arm.plan if self.acts else ()


def _known(log: Path, arms: set[str]) -> tuple[dict[tuple[str, str], Spoken], dict[str, Spoken]]:
    """What the log holds of these arms, by arm and id, and of others, by id."""
    own: dict[tuple[str, str], Spoken] = {}
    others: dict[str, Spoken] = {}
    for row in read_lines(log):
        one = Spoken.from_json(row)
        if one.arm in arms:
            own.setdefault((one.arm, row["id"]), one)
        else:
            others.setdefault(row["id"], one)
    return own, others


def _asked(stage: Stage, talks: Sequence[Talk], arms: Sequence[Arm], said: Said, turn: int) -> list[_Row]:
    """The rows of a turn: conversations that go on, with what their users say next."""
    live, heard = [], []
    for arm in arms:
        for talk in talks:
            so_far = [
                said[arm.name, talk.name, before]
                for before in range(turn)
                if (arm.name, talk.name, before) in said
            ]
            if len(so_far) == turn:
                live.append((arm, talk))
                heard.append(so_far)
    rows = []
    for (arm, talk), so_far, user in zip(
        live, heard, stage.user.says([talk for _, talk in live], heard), strict=True
    ):
        if user is None:
            continue
        messages = asked_with(talk.system, so_far, user)
        ids = tuple(stage.chat.prompt_ids(messages))
        if stage.fits(ids):
            rows.append(_Row(talk, arm, turn, user, messages, ids, arm.acts(so_far)))
        elif turn == 0:
            raise UserError(
                f"the first turn of {talk.name} leaves no room for an answer in the {stage.room} tokens of {stage.model.id}"
            )
        else:
            stage.overflown.add((arm.name, talk.name))
    return rows


def asked_with(system: str, so_far: Sequence[Spoken], user: str) -> tuple[Message, ...]:
    """The messages of a conversation so far and what its user says now."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for one in so_far:
        messages += [{"role": "user", "content": one.user}, {"role": "assistant", "content": one.text}]
    return (*messages, {"role": "user", "content": user})


def _answered(
    stage: Stage,
    rows: Sequence[_Row],
    known: tuple[dict[tuple[str, str], Spoken], dict[str, Spoken]],
    advance: Callable[[int], None],
) -> list[Spoken]:
    """The rows' answers, from the log or anew: a chunk that the log does not hold as a whole is done as a whole."""
    own, others = known
    ids = [_id(stage, row) for row in rows]
    if any((row.arm.name, id) not in own for row, id in zip(rows, ids, strict=True)):
        new = {id: row for row, id in reversed(list(zip(rows, ids, strict=True))) if id not in others}
        order = sorted(new, key=lambda id: ids.index(id))
        made = dict(zip(order, _made(stage, [new[id] for id in order]), strict=True)) if new else {}
        lines = []
        for row, id in zip(rows, ids, strict=True):
            if (row.arm.name, id) not in own:
                same = made.get(id) or others[id]
                one = Spoken(
                    **{own.name: getattr(same, own.name) for own in fields(Spoken)} | {"arm": row.arm.name}
                )
                own[row.arm.name, id] = one
                lines.append({"id": id, **asdict(one)})
        append_lines(stage.log, lines)
    advance(len(rows))
    return [own[row.arm.name, id] for row, id in zip(rows, ids, strict=True)]


def _id(stage: Stage, row: _Row) -> str:
    """What decides the answer and where it lies."""
    axis = [stage.axis.layer, direction_of(stage.axis)]
    content = [
        interventions_digest(row.plan),
        row.messages,
        row.seed,
        asdict(stage.sampling),
        axis,
        row.talk.name,
        row.turn,
    ]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _made(stage: Stage, rows: Sequence[_Row]) -> list[Spoken]:
    """Answer and measure."""
    answers, fired = _sampled(stage, rows)
    texts = [stage.model.tokenizer.decode(list(answer.ids), skip_special_tokens=True) for answer in answers]
    read = [
        Rollout(row.talk.name, row.messages, row.ids, answer.ids, text, row.seed, answer.stopped)
        for row, answer, text in zip(rows, answers, texts, strict=True)
    ]
    vector = stage.axis.at(stage.axis.layer)
    plain = mean_projections(stage.model, read, [], stage.axis.layer, vector)
    held = list(plain)
    for digest, plan in {interventions_digest(row.plan): row.plan for row in rows if row.acts}.items():
        places = [
            place for place, row in enumerate(rows) if row.acts and interventions_digest(row.plan) == digest
        ]
        capped = mean_projections(
            stage.model, [read[place] for place in places], plan, stage.axis.layer, vector
        )
        for place, value in zip(places, capped, strict=True):
            held[place] = value
    return [
        Spoken(
            conversation=row.talk.name,
            domain=row.talk.domain,
            arm=row.arm.name,
            turn=row.turn,
            seed=row.seed,
            user=row.user,
            text=text.answer.encode("utf-8", "replace").decode(),
            ids=text.answer_ids,
            stopped=text.stopped,
            projection=_or_none(capped_place),
            uncapped=_or_none(place),
            acted=row.acts,
            fired=share,
        )
        for row, text, place, capped_place, share in zip(rows, read, plain, held, fired, strict=True)
    ]


def _sampled(stage: Stage, rows: Sequence[_Row]) -> tuple[list[Answer], list[float | None]]:
    """Answers in the rows' order, and what share of its tokens times layers each row's plan changed (None without one)."""
    digests = [interventions_digest(row.plan) if row.acts else "" for row in rows]
    plans = {digest: row.plan for digest, row in zip(digests, rows, strict=True) if row.acts}
    together = [list(range(len(rows)))]
    if not stage.on_gpu:  # where every hooked layer costs
        together = [
            [place for place, own in enumerate(digests) if own == digest] for digest in dict.fromkeys(digests)
        ]
    sampler = (
        stage.sampler
    )  # built before anything is steered: its own forwards know nothing of rows and plans
    answers: dict[int, Answer] = {}
    fired: list[float | None] = [None] * len(rows)
    for places in together:
        on = [digest for digest in plans if any(digests[place] == digest for place in places)]
        prompts = [
            Prompt(rows[place].ids, rows[place].seed, on.index(own) if (own := digests[place]) else -1)
            for place in places
        ]
        acting = steer(stage.model, *(plans[digest] for digest in on)) if on else nullcontext()
        with acting as held:
            for answer in sampler.answers(prompts, held):
                answers[places[answer.index]] = answer
            if held is not None:
                tally = held.tally
                for row, place in enumerate(places):
                    fired[place] = _or_none(tally.rows([row]).share) if digests[place] else None
    return [answers[place] for place in range(len(rows))], fired


def _or_none(value: float) -> float | None:
    return None if value != value else value
