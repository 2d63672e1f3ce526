"""Answers of all arms to a suite's cases: the same prompts, the same seeds, the same engine, logged as they
come.

    answers = answer_suite(bench, suite, {"baseline": [], "assistant": [cap]})
    answers["assistant", "pirate/0/r12/0", 0].text

A case is a script of the turn runner; answers.jsonl is its log, keyed by content (the interventions' numbers,
the conversation, the seed, the sampling), so an interrupted evaluation resumes and a changed cap is answered
anew.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from personatlas.persona.axis import Axis
from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Interventions
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model
from personatlas.persona.progress import progress
from personatlas.persona.rollout import Rollout
from personatlas.steering.conversations.runner import (
    RunnerConfig,
    Script,
    TurnFormat,
    TurnRecord,
    TurnRequest,
    run_conversations,
)
from personatlas.steering.evals.suites import Suite

CHUNK = (32, 4096)  # cases on a CPU and a GPU; what an interruption can cost of one arm
Answers = dict[tuple[str, str, int], TurnRecord]  # by arm, case key and turn


@dataclass(frozen=True)
class Bench:
    """What answers: a model, the axis that it is measured along, and the folder of the log."""

    model: Model
    chat: ChatFormat
    axis: Axis
    folder: Path
    world: World = field(default_factory=World)

    def runner(self, suite: Suite) -> RunnerConfig:
        """The runner of a suite's cases."""
        return RunnerConfig(
            self.model,
            self.chat,
            self.axis,
            suite.sampling,
            self.folder / "answers.jsonl",
            format=_AnswerFormat(suite.name),
            world=self.world,
            measure_uncapped=False,
            chunk=CHUNK,
        )


class _AnswerFormat(TurnFormat):
    """Seeds, keys and rows of answers.jsonl, whose rows name no arm."""

    names_arms = False

    def __init__(self, suite: str) -> None:
        self.suite = suite

    def seed(self, script: Script, turn: int) -> int:
        """The case's seed, one more with each turn."""
        return script.seed + turn

    def key_content(self, request: TurnRequest, config: RunnerConfig) -> list[object]:
        """Interventions, messages, seed, sampling, case and turn."""
        script, sampling = request.script, asdict(config.sampling)
        return [request.digest, request.messages, script.seed, sampling, script.name, request.turn]

    def row(self, turn: TurnRecord) -> dict[str, object]:
        """The answer; `fired` is 0 without interventions."""
        names = ("turn", "seed", "prompt_ids", "ids", "text", "stopped", "projection")
        row = {name: getattr(turn, name) for name in names}
        return {"suite": self.suite, "key": turn.conversation, **row, "fired": turn.fired or 0.0}


def fit_to_context(bench: Bench, suite: Suite) -> tuple[Suite, int]:
    """The suite without the cases whose prompt leaves no room for an answer, and how many those were."""
    runner = bench.runner(suite)
    cases = tuple(case for case in suite.cases if runner.fits(bench.chat.prompt_ids(list(case.messages))))
    if not cases:
        raise UserError(
            f"no case of {suite.name} fits into the {bench.model.context} tokens that {bench.model.id} holds"
        )
    return replace(suite, cases=cases), len(suite.cases) - len(cases)


def answer_suite(bench: Bench, suite: Suite, arms: Mapping[str, Interventions]) -> Answers:
    """Every arm's answers, those of other ranks too. A conversation ends early where its next prompt leaves
    no room for an answer."""
    scripts = [
        Script(case.key, "", (case.question, *case.later), case.messages[:-1], suite.seed_of(case))
        for case in suite.cases
    ]
    total = sum(len(script.users) for script in scripts) * len(arms)
    with progress(f"answering ({suite.name})", total, quiet=bench.world.rank > 0) as advance:
        return run_conversations(bench.runner(suite), scripts, arms, suite.turns, advance).turns


def answer_rollout(answer: TurnRecord) -> Rollout:
    """The answer as a rollout without messages."""
    ids = answer.prompt_ids, answer.ids
    return Rollout(answer.conversation, (), *ids, answer.text, answer.seed, answer.stopped)
