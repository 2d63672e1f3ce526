"""Conversations to tune a model on, from files and from a run's rollouts. What cannot be used is counted and
named.

    left_out = Exclusions()
    examples = read_examples(Path("chats.jsonl.xz"), left_out)
    examples[0].place, examples[0].messages     # "chats.jsonl.xz:1", ({"role": "user", "content": ...}, ...)
    left_out.lines()                            # ["2 with two user turns running (chats.jsonl.xz:7, ...)"]
    read_rollout_examples(Path("runs/smollm2-135m"), left_out, RolloutFilter(score=2, per_role=40))

Files are read as by every command (`personatlas.persona.formats.conversations`); of a row's other fields
`persona` (one word means "You are a witty assistant.") is the role, `weight` how many times it is read in an
epoch, and `source` names where it comes from, the file unless given. Nothing is repaired.

Of a run the messages are those that its model read: the role's prompt as the system message, then the
question. Answers that the token limit cut are left out, since a model tuned on them would learn to stop in
the middle of a sentence; so are the poles of traits, which are no roles.
"""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from personatlas.persona.errors import UserError
from personatlas.persona.formats import Columns, Exclusions, Message, find_conversations
from personatlas.persona.formats.compression import without_packing
from personatlas.persona.formats.tables import LINES, PROSE, Row
from personatlas.persona.judges.base import read_scores
from personatlas.persona.roles.bank import role_kind
from personatlas.persona.rollout import Rollout, read_rollouts, spread

CUT = "cut at the token limit"
LONGEST_NAME = 60  # characters; a longer persona is a description, not a name
MAX_WEIGHT = 1000  # times that an epoch reads something: its order is held in memory
ENDINGS = (*LINES, *PROSE, ".json", ".parquet", ".csv", ".tsv")


@dataclass(frozen=True)
class ChatExample:
    """A conversation to tune on: maybe a system message, then user and assistant in turn."""

    messages: tuple[Message, ...]
    place: str
    "file and line, or rollout"
    source: str
    "the data that it is counted under"
    role: str = ""
    "the persona or role that its system message asks for, by name; empty if nobody says"
    weight: float = 1.0
    "times that it is read in an epoch"
    is_role_held_out: bool = False

    @cached_property
    def question(self) -> str:
        """What the user says, in all turns: examples that share it are never on both sides of a split."""
        return "\x1f".join(message["content"] for message in self.messages if message["role"] == "user")

    @property
    def answers(self) -> list[str]:
        """What the assistant says."""
        return [message["content"] for message in self.messages if message["role"] == "assistant"]

    @property
    def group(self) -> str:
        """Under which name its losses are given."""
        return f"{self.source}, held-out roles" if self.is_role_held_out else self.source

    @property
    def label(self) -> str:
        """Source and role in one name."""
        return f"{self.source}/{self.role}" if self.role else self.source


def read_examples(
    path: Path, left_out: Exclusions, columns: Columns = Columns(), source: str | None = None
) -> list[ChatExample]:
    """All conversations of a file that can be used; the others go into `left_out`.

    Raises `UserError` for a file that cannot be read, and where nothing is left of it.
    """
    if path.is_dir():
        raise UserError(f"--data {path} is a folder without rollouts; give a file, or the folder of a run")
    examples, own = list[ChatExample](), Exclusions()
    source = source or source_name(path)
    for place, _, messages, row in find_conversations(path, own, columns):
        weight = _weight(row, columns)
        if fault := message_fault(messages):
            own.add(fault, place)
            continue
        if isinstance(weight, str):
            own.add(weight, place, lost=False)
            continue
        persona, named = columns.value(row, "persona"), columns.value(row, "source")
        role = persona if isinstance(persona, str) and len(persona) <= LONGEST_NAME else ""
        examples.append(ChatExample(messages, place, str(named or source), role, float(weight)))
    if not examples:
        reason = "; ".join(own.lines()) or "it is empty"
        raise UserError(f"{path} has no conversation that can be used: {reason}")
    _require_most(path, len(examples), own, "mend those, or take them out of the file")
    left_out.update(own)
    return examples


def source_name(path: Path) -> str:
    """A file's name without its endings."""
    name = without_packing(path.name)
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def message_fault(messages: Sequence[Message]) -> str | None:
    """Why a model cannot be tuned on messages, as a clause that follows a count; None if nothing is odd."""
    before = ""
    for index, message in enumerate(messages):
        role, text = message["role"], message["content"]
        if not text.strip():
            return "with an empty answer" if role == "assistant" else f"with an empty {role} message"
        if "\0" in text:
            return "with NUL, which is no text"
        if role == "system" and index:
            return "with a system message that is not the first"
        if role == before:
            return f"with two {role} turns running"
        if role == "assistant" and before in ("", "system"):
            return "in which the assistant speaks first"
        before = role
    return (
        None if any(message["role"] == "assistant" for message in messages) else "without an assistant turn"
    )


def _weight(row: Row, columns: Columns) -> float | str:
    """How often a row is read in an epoch, or why it is not."""
    weight, listed = columns.value(row, "weight"), columns.value(row, "messages")
    if isinstance(weight, str):  # of a CSV
        with contextlib.suppress(ValueError):
            weight = float(weight or 1)
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
        return f"with a weight that is no number in 0..{MAX_WEIGHT}"
    if weight == 0:
        return "with weight 0"
    parts = [own for own in listed if isinstance(own, dict)] if isinstance(listed, list) else []
    if any(own.get("weight") == 0 or own.get("train") is False for own in parts):
        return "with a message that is not to be learned"
    return float(weight)


@dataclass(frozen=True)
class RolloutFilter:
    """Which answers of a run to tune on. Raises `UserError` for values that are not allowed."""

    score: int | None = None
    "at least this judge's score, 0 to 3; None takes all"
    per_role: int | None = None
    "at most so many of a role, spread over its questions and prompts"
    cut: bool = False
    "answers that the token limit cut, too"

    def __post_init__(self) -> None:
        if self.score is not None and not 0 <= self.score <= 3:
            raise UserError(f"--score {self.score} is not in 0..3")
        if self.per_role is not None and self.per_role < 1:
            raise UserError(f"--per-role {self.per_role} is below 1")


def has_rollouts(path: Path) -> bool:
    """Whether a path is the folder of a run with rollouts."""
    return path.is_dir() and any(path.glob("rollouts*.jsonl"))


def read_rollout_examples(
    folder: Path, left_out: Exclusions, selection: RolloutFilter = RolloutFilter()
) -> list[ChatExample]:
    """A run's answers, by role in the run's order; those that are not selected go into `left_out`.

    Raises `UserError` where nothing is left, and where a score is wanted that no judge gave.
    """
    rollouts = sorted(
        read_rollouts(folder), key=lambda rollout: rollout.key
    )  # the log is in order of finishing
    scores, unjudged = {}, ""
    if selection.score is not None:
        scores = read_scores(folder / "scores.jsonl")
        roles = {rollout.role for rollout in rollouts if role_kind(rollout.role) == "role"}
        without = sorted(roles - {key.split("/", 1)[0] for key in scores})
        if len(without) > 1:
            raise UserError(
                f"--score needs scores, and {len(without)} roles of {folder} have none "
                f"({', '.join(without[:3])}); judge them first: personatlas run judge {folder}"
            )
        unjudged = "".join(without)  # the default, which cannot fail to be itself
    by_role: dict[str, list[ChatExample]] = defaultdict(list)
    own = Exclusions()
    for rollout in rollouts:
        place = f"{folder.name}: {rollout.key}"
        messages = (*rollout.messages, {"role": "assistant", "content": rollout.answer})
        score = 3 if selection.score is None or rollout.role == unjudged else scores.get(rollout.key)
        unselected = _rollout_fault(rollout, selection, score)
        if fault := unselected or message_fault(messages):
            own.add(fault, place, lost=unselected in (None, CUT))
        else:
            by_role[rollout.role].append(ChatExample(messages, place, folder.name, rollout.role))
    if not by_role:
        raise UserError(f"{folder} has no answer that can be used: {'; '.join(own.lines()) or 'no rollouts'}")
    _require_most(
        folder,
        sum(map(len, by_role.values())),
        own,
        "--cut keeps cut ones, a run with longer answers has fewer",
    )
    left_out.update(own)
    for role, examples in by_role.items():
        by_role[role] = spread(examples, selection.per_role)
        for rest in examples[len(by_role[role]) :]:
            left_out.add(f"beyond {selection.per_role} of a role", rest.place, lost=False)
    return [example for examples in by_role.values() for example in examples]


def _require_most(path: Path, kept: int, own: Exclusions, remedy: str) -> None:
    """Raises `UserError` where more is left out than is kept, though nobody asked for that."""
    if own.n_lost > kept:
        raise UserError(
            f"{path}: {own.n_lost:,} of {own.n_lost + kept:,} conversations would be left out "
            f"({'; '.join(own.lines())}): {remedy}"
        )


def _rollout_fault(rollout: Rollout, selection: RolloutFilter, score: int | None) -> str | None:
    if (kind := role_kind(rollout.role)) != "role":
        return f"of a {kind}, not of a role"
    if rollout.stopped != "end" and not selection.cut:
        return CUT
    if score is None:
        return "without a judge's score"
    return f"with a score below {selection.score}" if score < (selection.score or 0) else None
