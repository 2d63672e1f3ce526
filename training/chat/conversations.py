"""Conversations to tune a model on, from files and from a run's rollouts. What cannot be used is counted and
named.

    left_out = Exclusions()
    examples = read_examples(Path("chats.jsonl.xz"), left_out)
    examples[0].place, examples[0].messages     # "chats.jsonl.xz:1", ({"role": "user", "content": ...}, ...)
    left_out.lines()                            # ["2 with two user turns running (chats.jsonl.xz:7, ...)"]
    read_rollout_examples(Path("runs/smollm2-135m"), left_out, RolloutFilter(score=2, per_role=40))

A row holds its messages (`messages` or `conversations`; role and content, or from and value), or one question
and one answer under the names in `Columns`. A `system` text beside them is the system message; a `persona` is
one too, in its own words or, where it is one word, as "You are a witty assistant.". `weight` is how many
times the row is read in an epoch; `source` names where it comes from, the file unless given. Nothing is
repaired.

Of a run the messages are those that its model read: the role's prompt as the system message, then the
question. Answers that the token limit cut are left out, since a model tuned on them would learn to stop in
the middle of a sentence; so are the poles of traits, which are no roles.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

from personatlas.persona.compression import PACKED, without_packing
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message, read_json_lines, read_json_list
from personatlas.persona.judges.base import read_scores
from personatlas.persona.records import JsonObject
from personatlas.persona.roles.bank import is_pole
from personatlas.persona.rollout import Rollout, read_rollouts, spread

ROLES = ("system", "user", "assistant")
SPEAKERS = {"human": "user", "gpt": "assistant"}
PERSONA = "You are a {} assistant."
LONGEST_NAME = 60  # characters; a longer persona is a description, not a name
MAX_PLACES = 3  # that are named for one reason
MAX_WEIGHT = 1000  # times that an epoch reads something: its order is held in memory
ALLOWED = f".jsonl or .json (a list), each plain or {', '.join(PACKED)}"


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


@dataclass
class Exclusions:
    """What was left out: how many for each reason, and where the first ones are."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Counts one more."""
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < MAX_PLACES:
            places.append(place)

    def lines(self) -> list[str]:
        """One line a reason, the most frequent first."""
        return [
            f"{count:,} {reason} ({', '.join(self.places[reason])}{', ...' if count > MAX_PLACES else ''})"
            for reason, count in self.counts.most_common()
        ]

    def to_json(self) -> JsonObject:
        """As in run.json."""
        return {
            reason: {"count": count, "examples": self.places[reason]} for reason, count in self.counts.items()
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
    def parse(text: str) -> "Columns":
        """From `question=title,answer=text`. Raises `UserError` for a name that there is not."""
        names, renamed = [column.name for column in fields(Columns)], {}
        for item in filter(None, text.split(",")):
            name, _, column = item.partition("=")
            if name not in names or not column:
                raise UserError(f"--columns {item}: write NAME=COLUMN; the names are {', '.join(names)}")
            renamed[name] = (column,)
        return replace(Columns(), **renamed)

    def value(self, row: Mapping[str, object], name: str) -> object:
        """What a row has under a name; None if nothing."""
        return next((row[key] for key in getattr(self, name) if row.get(key) is not None), None)


def read_examples(
    path: Path, left_out: Exclusions, columns: Columns = Columns(), source: str | None = None
) -> list[ChatExample]:
    """All conversations of a file that can be used; the others go into `left_out`.

    Raises `UserError` for a file that cannot be read, and where nothing is left of it.
    """
    allowed = f"({ALLOWED}) or the folder of a run"
    if path.is_dir():
        raise UserError(f"--data {path} is a folder without rollouts; give a file {allowed}")
    if not path.is_file():
        raise UserError(f"--data {path} does not exist; give a file {allowed} with rollouts")
    kind = Path(without_packing(path.name)).suffix.lower()
    if kind not in (".jsonl", ".json"):
        raise UserError(f"--data {path} cannot be read as conversations; allowed: {ALLOWED}")
    examples, own = [], Exclusions()
    source = source or source_name(path)
    rows = read_json_lines(path) if kind == ".jsonl" else enumerate(read_json_list(path), 1)
    for number, row in rows:
        place = f"{path.name}:{number}"
        example = _example(row, place, columns, source)
        if isinstance(example, str):
            own.add(example, place)
            left_out.add(example, place)
        else:
            examples.append(example)
    if not examples:
        reason = "; ".join(own.lines()) or "it is empty"
        raise UserError(f"{path} has no conversation that can be used: {reason}")
    return examples


def source_name(path: Path) -> str:
    """A file's name without its endings."""
    return without_packing(path.name).removesuffix(".jsonl").removesuffix(".json")


def message_fault(messages: Sequence[object]) -> str | None:
    """What is odd about messages, as a clause that follows a count; None if nothing is."""
    if not messages:
        return "without messages"
    before = ""
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return "with a message that has no role and content"
        role, text = message["role"], message["content"]
        odd = [key for key in message if key not in ("role", "content") and message[key] is not None]
        if role not in ROLES:
            return f"with the role {str(role)[:40]!r}, which is not {', '.join(ROLES)}"
        if odd:
            return f"with {str(odd[0])[:40]!r} in a message, which has role and content only"
        if not isinstance(text, str):
            return f"with content that is no text but a {type(text).__name__}"
        if not text.strip():
            return "with an empty answer" if role == "assistant" else f"with an empty {role} message"
        try:
            text.encode()
        except UnicodeEncodeError:
            return "with half a surrogate pair, which is no text"
        if "\0" in text:
            return "with NUL, which is no text"
        if role == "system" and index:
            return "with a system message that is not the first"
        if role == before:
            return f"with two {role} turns running"
        if role == "assistant" and before in ("", "system"):
            return "in which the assistant speaks first"
        before = role
    answered = any(isinstance(message, dict) and message["role"] == "assistant" for message in messages)
    return None if answered else "without an assistant turn"


def _example(row: object, place: str, columns: Columns, source: str) -> ChatExample | str:
    """A row as an example, or what is wrong with it."""
    if not isinstance(row, dict):
        return f"that are no objects but a {type(row).__name__}"
    persona, weight = columns.value(row, "persona"), columns.value(row, "weight")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
        return f"with a weight that is no number in 0..{MAX_WEIGHT}"
    if weight == 0:
        return "with weight 0"
    if persona is not None and not isinstance(persona, str):
        return f"with a persona that is no text but a {type(persona).__name__}"
    messages = _messages(row, persona, columns)
    if isinstance(messages, str):
        return messages
    if fault := message_fault(messages):
        return fault
    plain = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    named = columns.value(row, "source")
    role = persona if persona and len(persona) <= LONGEST_NAME else ""
    return ChatExample(plain, place, source if named is None else str(named), role, float(weight))


def _messages(row: JsonObject, persona: str | None, columns: Columns) -> list[JsonObject] | str:
    """A row's messages, not yet checked, or what is wrong with the row."""
    system, listed = columns.value(row, "system"), columns.value(row, "messages")
    question, answer = columns.value(row, "question"), columns.value(row, "answer")
    if listed is None and (question is None or answer is None):
        has = ", ".join(map(str, row))[:120] or "no keys"
        return f"with neither messages nor a question and an answer, but {has} (name them with --columns)"
    if listed is None:
        more = columns.value(row, "more")
        if isinstance(question, str) and isinstance(more, str) and more.strip():
            question = f"{question}\n\n{more}"
        listed = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if not isinstance(listed, list):
        return f"with messages that are no list but a {type(listed).__name__}"
    if persona is not None:
        if system:
            return "with a persona and a system message, of which only one can be the system message"
        words = persona.split()
        system = PERSONA.format(words[0]) if len(words) == 1 else persona
    messages = [{"role": "system", "content": system}] if system else []
    for message in listed:
        if isinstance(message, dict) and {"from", "value"} <= message.keys() and "role" not in message:
            rest = {key: value for key, value in message.items() if key not in ("from", "value")}
            speaker = message["from"]
            role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
            message = {"role": role, "content": message["value"], **rest}
        messages.append(message)
    return messages


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
        roles = {rollout.role for rollout in rollouts if not is_pole(rollout.role)}
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
        if fault := _rollout_fault(rollout, selection, score) or message_fault(messages):
            own.add(fault, place)
            left_out.add(fault, place)
        else:
            by_role[rollout.role].append(ChatExample(messages, place, folder.name, rollout.role))
    for role, examples in by_role.items():
        by_role[role] = spread(examples, selection.per_role)
        for rest in examples[len(by_role[role]) :]:
            left_out.add(f"beyond {selection.per_role} of a role", rest.place)
    if not by_role:
        raise UserError(f"{folder} has no answer that can be used: {'; '.join(own.lines()) or 'no rollouts'}")
    return [example for examples in by_role.values() for example in examples]


def _rollout_fault(rollout: Rollout, selection: RolloutFilter, score: int | None) -> str | None:
    if is_pole(rollout.role):
        return "of a trait's pole, not of a role"
    if rollout.stopped != "end" and not selection.cut:
        return "cut at the token limit"
    if score is None:
        return "without a judge's score"
    return f"with a score below {selection.score}" if score < (selection.score or 0) else None
