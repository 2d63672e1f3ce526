"""Answers of all arms to a suite's cases: the same prompts, the same seeds, the same engine, kept as they come.

    said = answered(bench, suite, {"baseline": [], "assistant": [cap]})
    said["assistant", "pirate/0/r12/0", 0].text

The log is append-only and keyed by content (the plan's numbers, the conversation, the seed, the sampling), so an evaluation
that was interrupted goes on where it was, also between two arms, and a changed cap is answered anew. Work is cut into chunks
that depend on the cases alone and are shared by ranks. The projection is the mean over the answer's tokens at the axis's
layer, before the arm's own step there.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from personatlas.persona.axis import Axis
from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message
from personatlas.persona.interventions import Interventions, interventions_digest
from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model
from personatlas.persona.progress import progress
from personatlas.persona.rollout import Request, Rollout
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.arms import Arm, run_arms
from personatlas.steering.evals.suites.build import Case, Suite
from personatlas.steering.teacher_forcing import mean_projections

CPU_CHUNK, GPU_CHUNK = 32, 4096  # cases; what an interruption can cost of one arm


@dataclass(frozen=True)
class Said:
    """One answer of one arm. `fired` is the share of tokens times layers that the arm changed (0 without an intervention),
    `projection` None for an answer without tokens."""

    key: str
    arm: str
    turn: int
    seed: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    stopped: Literal["end", "length"]
    projection: float | None
    fired: float

    @classmethod
    def from_json(cls, row: Mapping[str, Any], arm: str) -> "Said":
        """What the log holds of it."""
        kept = {own.name: row[own.name] for own in fields(cls) if own.name != "arm"}
        return cls(**kept | {"arm": arm, "prompt_ids": tuple(row["prompt_ids"]), "ids": tuple(row["ids"])})


Answers = dict[tuple[str, str, int], Said]


@dataclass(frozen=True)
class Bench:
    """What answers: a model, the axis that it is measured along, how it samples, and the folder of the log."""

    model: Model
    chat: ChatFormat
    axis: Axis
    temperature: float
    top_p: float
    folder: Path
    world: World = field(default_factory=World)

    def sampling(self, suite: Suite) -> Sampling:
        """The suite's sampling."""
        return Sampling(suite.max_new_tokens, self.temperature, self.top_p)

    @property
    def room(self) -> int | None:
        """Tokens that the model holds, where it says so."""
        return self.model.context

    def known(self) -> dict[str, dict[str, Any]]:
        """Rows of all ranks' logs by id."""
        return {
            row["id"]: row for path in sorted(self.folder.glob("answers*.jsonl")) for row in read_lines(path)
        }

    @property
    def log(self) -> Path:
        """This rank's log."""
        return self.folder / (
            "answers.jsonl" if self.world.size == 1 else f"answers.{self.world.rank:04d}.jsonl"
        )


def fitting(bench: Bench, suite: Suite) -> tuple[Suite, int]:
    """The suite without the cases whose prompt leaves no room for an answer, and how many those were."""
    kept = tuple(
        case
        for case in suite.cases
        if not bench.room
        or len(bench.chat.prompt_ids(list(case.messages))) + suite.max_new_tokens + 1 <= bench.room
    )
    if not kept:
        raise UserError(
            f"no case of {suite.name} fits into the {bench.room} tokens that {bench.model.id} holds"
        )
    return replace(suite, cases=kept), len(suite.cases) - len(kept)


def answered(bench: Bench, suite: Suite, arms: Mapping[str, Interventions]) -> Answers:
    """Every arm's answers by arm, case key and turn; those of other ranks too. A conversation ends early where its next prompt
    leaves no room for an answer."""
    found: Answers = {}
    digests = {name: interventions_digest(plan) for name, plan in arms.items()}
    for turn in range(1 + max(len(case.later) for case in suite.cases)):
        asked = {name: _conversations(bench, suite, found, name, turn) for name in arms}
        one = _Round(bench, suite, arms, digests, turn, asked)
        one.make()
        bench.world.barrier()
        known = bench.known()
        for name in arms:
            for case in suite.cases:
                if case.key in asked[name]:
                    found[name, case.key, turn] = Said.from_json(known[one.id(name, case)], name)
    return found


Conversations = dict[str, tuple[Message, ...]]


def _conversations(bench: Bench, suite: Suite, found: Answers, arm: str, turn: int) -> Conversations:
    """By case, what an arm is asked in a turn: its own conversation so far and what the user says next, where there is room."""
    if turn == 0:
        return {case.key: case.messages for case in suite.cases}
    asked: Conversations = {}
    for case in suite.cases:
        if len(case.later) < turn or (arm, case.key, turn - 1) not in found:
            continue
        messages = list(case.messages)
        for number in range(turn):
            said = found[arm, case.key, number].text
            messages += [
                {"role": "assistant", "content": said},
                {"role": "user", "content": case.later[number]},
            ]
        needed = len(bench.chat.prompt_ids(messages)) + suite.max_new_tokens + 1
        if not bench.room or needed <= bench.room:
            asked[case.key] = tuple(messages)
    return asked


@dataclass(frozen=True)
class _Round:
    """One turn of all cases in all arms. `asked` is by arm, since from the second turn on each has its own conversation."""

    bench: Bench
    suite: Suite
    arms: Mapping[str, Interventions]
    digests: Mapping[str, str]
    turn: int
    asked: Mapping[str, Conversations]

    def id(self, arm: str, case: Case) -> str:
        """What decides the answer."""
        sampling = asdict(self.bench.sampling(self.suite))
        content = [
            self.digests[arm],
            list(self.asked[arm][case.key]),
            case.seed,
            sampling,
            case.key,
            self.turn,
        ]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]

    def make(self) -> None:
        """Answer what no log has yet, chunk by chunk; on a first turn the arms are asked the same and can share batches."""
        known, missing = self.bench.known(), list[tuple[list[Case], list[str]]]()
        for number, chunk in enumerate(self._chunks()):
            if self.bench.world.owns(number):
                own = {arm: [case for case in chunk if case.key in self.asked[arm]] for arm in self.arms}
                lacking = [arm for arm in own if any(self.id(arm, case) not in known for case in own[arm])]
                if self.turn == 0 and lacking:
                    missing.append((own[lacking[0]], lacking))
                else:
                    missing += [(own[arm], [arm]) for arm in lacking]
        total = sum(len(cases) * len(arms) for cases, arms in missing)
        what = f"answering ({self.suite.name}{f', turn {self.turn + 1}' if self.turn else ''})"
        with progress(what, total, quiet=not total or self.bench.world.rank > 0) as advance:
            for cases, arms in missing:
                self._answer(cases, arms, advance)

    def _chunks(self) -> list[Sequence[Case]]:
        size = GPU_CHUNK if self.bench.model.device.type == "cuda" else CPU_CHUNK
        return [self.suite.cases[i : i + size] for i in range(0, len(self.suite.cases), size)]

    def _answer(self, cases: Sequence[Case], arms: Sequence[str], advance: Callable[[int], None]) -> None:
        """One chunk in some arms, an arm's rows kept together."""
        asked, bench = self.asked[arms[0]], self.bench
        requests = [Request(case.key, asked[case.key], case.seed + self.turn) for case in cases]
        plans = {name: self.arms[name] for name in arms}
        for arm in run_arms(bench.model, bench.chat, requests, plans, bench.sampling(self.suite), advance):
            append_lines(bench.log, self._rows(arm, cases, requests))

    def _rows(self, arm: Arm, cases: Sequence[Case], requests: Sequence[Request]) -> list[dict[str, Any]]:
        bench = self.bench
        prompts = [tuple(bench.chat.prompt_ids(list(request.messages))) for request in requests]
        texts = [
            Rollout(request.key, request.messages, ids, answer.ids, text, request.seed, answer.stopped)
            for request, ids, answer, text in zip(requests, prompts, arm.answers, arm.texts, strict=True)
        ]
        vector = bench.axis.at(bench.axis.layer)
        places = mean_projections(bench.model, texts, self.arms[arm.name], bench.axis.layer, vector)
        shares = [0.0 if arm.tally is None else arm.tally.rows([row]).share for row in range(len(texts))]
        return [
            {
                "id": self.id(arm.name, case),
                "suite": self.suite.name,
                "key": case.key,
                "turn": self.turn,
                "seed": text.seed,
                "prompt_ids": list(text.prompt_ids),
                "ids": list(text.answer_ids),
                "text": text.answer.encode("utf-8", "replace").decode(),
                "stopped": text.stopped,
                "projection": None if place != place else place,
                "fired": 0.0 if share != share else share,
            }
            for case, text, place, share in zip(cases, texts, places, shares, strict=True)
        ]
