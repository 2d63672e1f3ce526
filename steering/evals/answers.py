"""Answers of all arms to a suite's cases: the same prompts, the same seeds, the same engine, logged as they come.

    answers = answer_suite(bench, suite, {"baseline": [], "assistant": [cap]})
    answers["assistant", "pirate/0/r12/0", 0].text

The log is append-only and keyed by content (the interventions' numbers, the conversation, the seed, the sampling), so an
evaluation that was interrupted resumes, also between two arms, and a changed cap is answered anew. Work is cut into chunks
that depend on the cases alone and are shared by ranks. The projection is the mean over the answer's tokens at the axis's
layer, before the arm's own step there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from personatlas.persona.axis import Axis
from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message
from personatlas.persona.interventions import Interventions, interventions_digest
from personatlas.persona.logs import ResultCache
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model
from personatlas.persona.progress import progress
from personatlas.persona.records import JsonObject, JsonRecord
from personatlas.persona.rollout import Request, Rollout
from personatlas.steering.arms import Arm, run_arms
from personatlas.steering.evals.suites import Case, Suite
from personatlas.steering.teacher_forcing import mean_projections

CPU_CHUNK, GPU_CHUNK = 32, 4096  # cases; what an interruption can cost of one arm


@dataclass(frozen=True)
class CaseAnswer(JsonRecord):
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

    def rollout(self) -> Rollout:
        """The answer as a rollout without messages."""
        return Rollout(self.key, (), self.prompt_ids, self.ids, self.text, self.seed, self.stopped)


Answers = dict[tuple[str, str, int], CaseAnswer]  # by arm, case key and turn
Conversations = dict[str, tuple[Message, ...]]  # by case key


@dataclass(frozen=True)
class Bench:
    """What answers: a model, the axis that it is measured along, and the folder of the log."""

    model: Model
    chat: ChatFormat
    axis: Axis
    folder: Path
    world: World = field(default_factory=World)

    def cache(self) -> ResultCache:
        """The answers of all ranks; new ones go to this rank's log."""
        name = "answers.jsonl" if self.world.size == 1 else f"answers.{self.world.rank:04d}.jsonl"
        return ResultCache(self.folder / name, also=sorted(self.folder.glob("answers*.jsonl")))

    def fits(self, messages: Sequence[Message], max_new_tokens: int) -> bool:
        """Whether the model's context leaves room for an answer."""
        context = self.model.context
        return not context or len(self.chat.prompt_ids(list(messages))) + max_new_tokens + 1 <= context


def fit_to_context(bench: Bench, suite: Suite) -> tuple[Suite, int]:
    """The suite without the cases whose prompt leaves no room for an answer, and how many those were."""
    cases = tuple(case for case in suite.cases if bench.fits(case.messages, suite.max_new_tokens))
    if not cases:
        raise UserError(
            f"no case of {suite.name} fits into the {bench.model.context} tokens that {bench.model.id} holds"
        )
    return replace(suite, cases=cases), len(suite.cases) - len(cases)


def answer_suite(bench: Bench, suite: Suite, arms: Mapping[str, Interventions]) -> Answers:
    """Every arm's answers, those of other ranks too. A conversation ends early where its next prompt leaves no room for
    an answer."""
    answers: Answers = {}
    for turn in range(suite.turns):
        conversations = {name: _conversations(bench, suite, answers, name, turn) for name in arms}
        one = _Turn(bench, suite, arms, turn, conversations)
        one.answer_missing()
        bench.world.barrier()
        cache = bench.cache()
        for name in arms:
            for case in suite.cases:
                if case.key in conversations[name]:
                    row = cache[one.id(name, case)]
                    answers[name, case.key, turn] = CaseAnswer.from_json(row | {"arm": name})
    return answers


def _conversations(bench: Bench, suite: Suite, answers: Answers, arm: str, turn: int) -> Conversations:
    """What an arm is asked in a turn: its own conversation so far and what the user says next, where there is room."""
    if turn == 0:
        return {case.key: case.messages for case in suite.cases}
    conversations: Conversations = {}
    for case in suite.cases:
        if len(case.later) < turn or (arm, case.key, turn - 1) not in answers:
            continue
        messages = list(case.messages)
        for number in range(turn):
            messages += [
                {"role": "assistant", "content": answers[arm, case.key, number].text},
                {"role": "user", "content": case.later[number]},
            ]
        if bench.fits(messages, suite.max_new_tokens):
            conversations[case.key] = tuple(messages)
    return conversations


@dataclass(frozen=True)
class _Turn:
    """One turn of all cases in all arms. `conversations` are by arm: from the second turn on each has its own."""

    bench: Bench
    suite: Suite
    arms: Mapping[str, Interventions]
    turn: int
    conversations: Mapping[str, Conversations]

    def id(self, arm: str, case: Case) -> str:
        """A hash of what decides the answer."""
        content = [
            interventions_digest(self.arms[arm]),
            list(self.conversations[arm][case.key]),
            self.suite.seed_of(case),
            asdict(self.suite.sampling),
            case.key,
            self.turn,
        ]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]

    def answer_missing(self) -> None:
        """Answers what no log has yet, chunk by chunk; on a first turn the arms are asked the same and can share batches."""
        bench, cases, missing = self.bench, self.suite.cases, list[tuple[list[Case], list[str]]]()
        cache = bench.cache()
        size = GPU_CHUNK if bench.model.device.type == "cuda" else CPU_CHUNK
        for number, start in enumerate(range(0, len(cases), size)):
            if not bench.world.owns(number):
                continue
            part = cases[start : start + size]
            own = {arm: [case for case in part if case.key in self.conversations[arm]] for arm in self.arms}
            lacking = [arm for arm in own if any(self.id(arm, case) not in cache for case in own[arm])]
            if self.turn == 0 and lacking:
                missing.append((own[lacking[0]], lacking))
            else:
                missing += [(own[arm], [arm]) for arm in lacking]
        total = sum(len(chunk) * len(arms) for chunk, arms in missing)
        title = f"answering ({self.suite.name}{f', turn {self.turn + 1}' if self.turn else ''})"
        with progress(title, total, quiet=not total or bench.world.rank > 0) as advance:
            for chunk, names in missing:
                conversations = self.conversations[names[0]]
                requests = [
                    Request(case.key, conversations[case.key], self.suite.seed_of(case) + self.turn)
                    for case in chunk
                ]
                arms = {name: self.arms[name] for name in names}
                sampling = self.suite.sampling
                for arm in run_arms(bench.model, bench.chat, requests, arms, sampling, advance):
                    cache.add(self._rows(arm, chunk, requests))

    def _rows(self, arm: Arm, cases: Sequence[Case], requests: Sequence[Request]) -> list[JsonObject]:
        """The log's rows of an arm's answers."""
        bench = self.bench
        prompts = [tuple(bench.chat.prompt_ids(list(request.messages))) for request in requests]
        texts = [
            Rollout(request.key, request.messages, ids, answer.ids, text, request.seed, answer.stopped)
            for request, ids, answer, text in zip(requests, prompts, arm.answers, arm.texts, strict=True)
        ]
        vector = bench.axis.at(bench.axis.layer)
        projections = mean_projections(bench.model, texts, self.arms[arm.name], bench.axis.layer, vector)
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
                "projection": None if projection != projection else projection,
                "fired": 0.0 if share != share else share,
            }
            for case, text, projection, share in zip(cases, texts, projections, shares, strict=True)
        ]
