"""Conversations to tune a model on, from files as people keep them. What is odd is counted, named and left out.

    faults = Faults()
    found = read_conversations(Path("chats.jsonl.xz"), faults)
    found[0].messages, found[0].where        # ({"role": "user", "content": "Who are you?"}, ...), "chats.jsonl.xz:1"
    faults.lines()                           # ["2 with two user turns running (chats.jsonl.xz:7, chats.jsonl.xz:31)"]

A row holds its messages (`messages` or `conversations`; role and content, or from and value), or one question and one answer
under the names in `Columns`. A `system` text beside them is the system message; a `persona` is one too, in its own words or,
where it is one word, as "You are a witty assistant.". `weight` is how many times the row is read in an epoch, 1 unless given; `source` names
where it came from, the file unless given. Nothing is repaired: no turns are joined, no message is dropped.

A run's rollouts as conversations, so that a small model learns roles, and to be an Assistant, from a bigger one's answers.

    found = conversations_of_run(Path("runs/smollm2-135m"), faults, Wanted(score=2, per_role=40))
    found[0].style, found[0].where        # "pirate", "smollm2-135m: pirate/0/q001/0"

The messages are those that the bigger model read: the role's prompt as the system message, then the question. The default is
a role like the others. Answers that the token limit cut are left out, since a model tuned on them would learn to stop in the
middle of a sentence; so are the poles of traits, which are no roles.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from personatlas.persona.compression import PACKED, without_packing
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message, read_json_lines, read_json_list
from personatlas.persona.judges.base import read_scores
from personatlas.persona.roles.traits import is_pole
from personatlas.persona.rollout import Rollout, read_rollouts, spread

ROLES = ("system", "user", "assistant")
SPEAKERS = {"human": "user", "gpt": "assistant"}
PERSONA = "You are a {} assistant."
LONGEST_NAME = 60  # characters; a longer persona is a description, not a name
EXAMPLES = 3
MOST = 1000  # times that an epoch reads something: its order is held in memory
ALLOWED = f".jsonl or .json (a list), each plain or {', '.join(PACKED)}"


@dataclass(frozen=True)
class Conversation:
    """Messages in the order that training wants them: maybe a system message, then user and assistant in turn."""

    messages: tuple[Message, ...]
    where: str
    "file and line, or rollout"
    source: str
    "where it came from"
    style: str = ""
    "the persona or role that its system message asks for, by name; empty if nobody says"
    weight: float = 1.0
    "times that it is read in an epoch"
    apart: bool = False
    "whether its style is held out altogether"

    @cached_property
    def question(self) -> str:
        """What the user says, in all turns: conversations that share it are never on both sides of a split."""
        return "\x1f".join(message["content"] for message in self.messages if message["role"] == "user")

    @property
    def answers(self) -> list[str]:
        """What the assistant says."""
        return [message["content"] for message in self.messages if message["role"] == "assistant"]

    @property
    def group(self) -> str:
        """Under which name its figures are given."""
        return f"{self.source}, held-out roles" if self.apart else self.source

    @property
    def label(self) -> str:
        """Source and style in one name."""
        return f"{self.source}/{self.style}" if self.style else self.source


@dataclass
class Faults:
    """What was left out: how many of each kind, and where the first ones are."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, fault: str, where: str) -> None:
        """One more."""
        self.counts[fault] += 1
        examples = self.examples.setdefault(fault, [])
        if len(examples) < EXAMPLES:
            examples.append(where)

    def lines(self) -> list[str]:
        """One line a kind, the most frequent first."""
        return [
            f"{count:,} {fault} ({', '.join(self.examples[fault])}{', ...' if count > EXAMPLES else ''})"
            for fault, count in self.counts.most_common()
        ]

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return {
            fault: {"count": count, "examples": self.examples[fault]} for fault, count in self.counts.items()
        }


@dataclass(frozen=True)
class Columns:
    """Under which names a row keeps what; the first that it has is taken."""

    messages: tuple[str, ...] = ("messages", "conversations")
    system: tuple[str, ...] = ("system", "system_prompt")
    persona: tuple[str, ...] = ("persona",)
    question: tuple[str, ...] = ("prompt", "instruction", "question")
    more: tuple[str, ...] = ("input",)
    "what an instruction is about; a blank line and this come after the question"
    answer: tuple[str, ...] = ("response", "output", "answer", "completion")
    source: tuple[str, ...] = ("source",)
    weight: tuple[str, ...] = ("weight",)

    @staticmethod
    def of(asked: Sequence[str]) -> "Columns":
        """From `answer=text` and the like. Raises `UserError` for a name that there is not."""
        known, found = [one.name for one in fields(Columns)], {}
        for item in asked:
            name, _, column = item.partition("=")
            if name not in known or not column:
                raise UserError(f"--columns {item}: write NAME=COLUMN; the names are {', '.join(known)}")
            found[name] = (column,)
        return replace(Columns(), **found)

    def value(self, row: Mapping[str, Any], name: str) -> Any:
        """What a row has under a name; None if nothing."""
        return next((row[key] for key in getattr(self, name) if row.get(key) is not None), None)


def read_conversations(
    path: Path, faults: Faults, columns: Columns = Columns(), source: str | None = None
) -> list[Conversation]:
    """All conversations of a file that are in order; the others go into `faults`.

    Raises `UserError` for a file that cannot be read, and where nothing is left of it.
    """
    found, own = [], Faults()
    source = source or source_name(path)
    for number, row in _rows(path):
        where = f"{path.name}:{number}"
        made = _conversation(row, where, columns, source)
        if isinstance(made, str):
            own.add(made, where)
            faults.add(made, where)
        else:
            found.append(made)
    if not found:
        reason = "; ".join(own.lines()) or "it is empty"
        raise UserError(f"{path} has no conversation that can be used: {reason}")
    return found


def source_name(path: Path) -> str:
    """A file's name without its endings."""
    return without_packing(path.name).removesuffix(".jsonl").removesuffix(".json")


def fault_of(messages: Sequence[Any]) -> str | None:
    """What is odd about messages, as a clause that follows a count; None if nothing is."""
    if not messages:
        return "without messages"
    before = ""
    for place, message in enumerate(messages):
        fault = _fault_of_message(message)
        if fault:
            return fault
        role = message["role"]
        if role == "system" and place:
            return "with a system message that is not the first"
        if role == before:
            return f"with two {role} turns running"
        if role == "assistant" and before in ("", "system"):
            return "in which the assistant speaks first"
        before = role
    roles = [message["role"] for message in messages]
    return None if "assistant" in roles else "without an assistant turn"


def _fault_of_message(message: Any) -> str | None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return "with a message that has no role and content"
    odd = [key for key in message if key not in ("role", "content") and message[key] is not None]
    if message["role"] not in ROLES:
        return f"with the role {str(message['role'])[:40]!r}, which is not {', '.join(ROLES)}"
    if odd:
        return f"with {str(odd[0])[:40]!r} in a message, which has role and content only"
    text = message["content"]
    if not isinstance(text, str):
        return f"with content that is no text but a {type(text).__name__}"
    if not text.strip():
        return (
            "with an empty answer"
            if message["role"] == "assistant"
            else f"with an empty {message['role']} message"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        return "with half a surrogate pair, which is no text"
    return "with NUL, which is no text" if "\0" in text else None


def _conversation(row: Any, where: str, columns: Columns, source: str) -> Conversation | str:
    """A row as a conversation, or what is wrong with it."""
    if not isinstance(row, dict):
        return f"that are no objects but a {type(row).__name__}"
    persona, weight = columns.value(row, "persona"), columns.value(row, "weight")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MOST:
        return f"with a weight that is no number in 0..{MOST}"
    if weight == 0:
        return "with weight 0"
    if persona is not None and not isinstance(persona, str):
        return f"with a persona that is no text but a {type(persona).__name__}"
    messages = _messages(row, persona, columns)
    if isinstance(messages, str):
        return messages
    fault = fault_of(messages)
    if fault:
        return fault
    plain = tuple({"role": one["role"], "content": one["content"]} for one in messages)
    named = columns.value(row, "source")
    style = persona if persona and len(persona) <= LONGEST_NAME else ""
    return Conversation(plain, where, source if named is None else str(named), style, float(weight))


def _messages(row: dict[str, Any], persona: str | None, columns: Columns) -> list[Any] | str:
    """A row's messages, not yet looked at, or what is wrong with the row."""
    system, listed = columns.value(row, "system"), columns.value(row, "messages")
    question, answer = columns.value(row, "question"), columns.value(row, "answer")
    if listed is None and (question is None or answer is None):
        has = ", ".join(map(str, row))[:120] or "no keys"
        return f"with neither messages nor a question and an answer, but {has} (name them with --columns)"
    if listed is None:
        more = columns.value(row, "more")
        if more is not None and isinstance(question, str) and isinstance(more, str) and more.strip():
            question = f"{question}\n\n{more}"
        listed = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if not isinstance(listed, list):
        return f"with messages that are no list but a {type(listed).__name__}"
    if persona is not None:
        if system:
            return "with a persona and a system message, of which only one can be the system message"
        words = persona.split()
        system = PERSONA.format(words[0]) if len(words) == 1 else persona
    front = [{"role": "system", "content": system}] if system else []
    return [*front, *map(_named, listed)]


def _named(message: Any) -> Any:
    """from and value as role and content; anything else as it is."""
    if isinstance(message, dict) and {"from", "value"} <= message.keys() and "role" not in message:
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        said = message["from"]
        return {
            "role": SPEAKERS.get(said, said) if isinstance(said, str) else said,
            "content": message["value"],
            **rest,
        }
    return message


# Files


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows and their numbers: lines of .jsonl, places in the list of a .json, both from 1."""
    if path.is_dir():
        raise UserError(
            f"--data {path} is a folder without rollouts; give a file ({ALLOWED}) or the folder of a run"
        )
    if not path.is_file():
        raise UserError(
            f"--data {path} does not exist; give a file ({ALLOWED}) or the folder of a run with rollouts"
        )
    kind = Path(without_packing(path.name)).suffix.lower()
    if kind not in (".jsonl", ".json"):
        raise UserError(f"--data {path} cannot be read as conversations; allowed: {ALLOWED}")
    return read_json_lines(path) if kind == ".jsonl" else iter(enumerate(read_json_list(path), 1))


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
            raise UserError(f"--score {self.score} is not in 0..3")
        if self.per_role is not None and self.per_role < 1:
            raise UserError(f"--per-role {self.per_role} is below 1")


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run with rollouts."""
    return path.is_dir() and any(path.glob("rollouts*.jsonl"))


def conversations_of_run(folder: Path, faults: Faults, wanted: Wanted = Wanted()) -> list[Conversation]:
    """The run's answers that are wanted, by role in the run's order; what is left out goes into `faults`.

    Raises `UserError` where nothing is left, and where a score is wanted that no judge gave.
    """
    scores = {} if wanted.score is None else read_scores(folder / "scores.jsonl")
    by_role: dict[str, list[Conversation]] = defaultdict(list)
    own = Faults()
    rollouts = sorted(
        read_rollouts(folder), key=lambda rollout: rollout.key
    )  # the log is in the order of finishing
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
        raise UserError(f"{folder} has no answer that can be used: {'; '.join(own.lines()) or 'no rollouts'}")
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
        raise UserError(
            f"--score needs scores, and {len(left)} roles of {folder} have none ({', '.join(left[:3])}); "
            f"judge them first: personatlas run judge {folder}"
        )
    return left[0] if left else ""
