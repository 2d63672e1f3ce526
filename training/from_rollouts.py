"""A run's rollouts as conversations, so that a small model learns roles, and to be an Assistant, from a bigger one's answers.

    found = conversations_of_run(Path("runs/smollm2-135m"), faults, Wanted(score=2, per_role=40))
    found[0].style, found[0].where        # "pirate", "smollm2-135m: pirate/0/q001/0"

The messages are those that the bigger model read: the role's prompt as the system message, then the question. The default is
a role like the others. Answers that the token limit cut are left out, since a model tuned on them would learn to stop in the
middle of a sentence; so are the poles of traits, which are no roles.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from personaxis.persona.errors import KnownError
from personaxis.persona.judge import read_scores
from personaxis.persona.rollouts import Rollout, read_rollouts, spread
from personaxis.persona.traits import is_pole
from personaxis.training.conversations import Conversation, Faults, fault_of


@dataclass(frozen=True)
class Wanted:
    """Which answers of a run to tune on."""

    score: int | None = None
    "at least this judge's score, 0 to 3; None takes all"
    per_role: int | None = None
    "at most so many of a role, spread over its questions and prompts"
    cut: bool = False
    "answers that the token limit cut, too"

    def __post_init__(self) -> None:
        if self.score is not None and not 0 <= self.score <= 3:
            raise KnownError(f"--score {self.score} is not in 0..3")
        if self.per_role is not None and self.per_role < 1:
            raise KnownError(f"--per-role {self.per_role} is below 1")


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run with rollouts."""
    return path.is_dir() and any(path.glob("rollouts*.jsonl"))


def conversations_of_run(folder: Path, faults: Faults, wanted: Wanted = Wanted()) -> list[Conversation]:
    """The run's answers that are wanted, by role in the run's order; what is left out goes into `faults`.

    Raises `KnownError` where nothing is left, and where a score is wanted that no judge gave.
    """
    scores = {} if wanted.score is None else read_scores(folder / "scores.jsonl")
    by_role: dict[str, list[Conversation]] = defaultdict(list)
    own = Faults()
    rollouts = sorted(read_rollouts(folder), key=lambda rollout: rollout.key)  # the log is in the order of finishing
    unjudged = _without_scores(rollouts, scores, folder) if wanted.score is not None else ""
    for rollout in rollouts:
        where = f"{folder.name}: {rollout.key}"
        made = (*rollout.messages, {"role": "assistant", "content": rollout.answer})
        fault = _unwanted(rollout, wanted, scores, unjudged) or fault_of(made)
        if fault:
            own.add(fault, where)
            faults.add(fault, where)
        else:
            by_role[rollout.role].append(Conversation(made, where, folder.name, rollout.role))
    for role, found in by_role.items():
        by_role[role] = spread(found, wanted.per_role)
        for rest in found[len(by_role[role]) :]:
            faults.add(f"beyond {wanted.per_role} of a role", rest.where)
    if not by_role:
        raise KnownError(f"{folder} has no answer that can be used: {'; '.join(own.lines()) or 'no rollouts'}")
    return [conversation for found in by_role.values() for conversation in found]


def _unwanted(rollout: Rollout, wanted: Wanted, scores: dict[str, int | None], unjudged: str) -> str | None:
    if is_pole(rollout.role):
        return "of a trait's pole, not of a role"
    if rollout.stopped != "end" and not wanted.cut:
        return "cut at the token limit"
    if wanted.score is None or rollout.role == unjudged:
        return None
    score = scores.get(rollout.key)
    if score is None:
        return "without a judge's score"
    return f"with a score below {wanted.score}" if score < wanted.score else None


def _without_scores(rollouts: list[Rollout], scores: dict[str, int | None], folder: Path) -> str:
    """The one role that no judge scores: the default, which cannot fail to be itself."""
    roles = {rollout.role for rollout in rollouts if not is_pole(rollout.role)}
    judged = {key.split("/", 1)[0] for key in scores}
    left = sorted(roles - judged)
    if len(left) > 1:
        raise KnownError(
            f"--score needs scores, and {len(left)} roles of {folder} have none ({', '.join(left[:3])}); "
            f"judge them first: personaxis judge {folder}"
        )
    return left[0] if left else ""
