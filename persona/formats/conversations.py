"""Conversations as people keep them, read alike by every command; what cannot be used is counted and said.

    for conversation in read_conversations(Path("chats.jsonl")):
        conversation.name, conversation.domain, conversation.messages[0]["role"]

One conversation is a list of messages, or an object that has one:

    OpenAI, WildChat, LMSYS     {"messages" | "conversation": [{"role", "content"}]}, content as text or parts
    ShareGPT                    {"conversations": [{"from", "value"}], "system"}
    ChatGPT's export            {"mapping": {ID: {"message", "parent"}}, "current_node"}: its branch
    Tavern, SillyTavern         a header, then a line a message: {"name", "is_user", "mes"}
    columns                     {"prompt" | "instruction" | "question", "response" | "output" | "answer"}
    plain text (.txt, .md)      every message on a line of its own with "User:" or "Assistant:"

A system text or a persona beside the messages is the first one. Files are all those of `read_records`; rows
that are single messages make one conversation, or one for each `conversation_id`. Calls of tools, what tools
say, images and thoughts are left out of a conversation, and those that cannot be read are left out of a file.
"""

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from personatlas.persona.errors import UserError, describe_value
from personatlas.persona.formats.compression import unpacked_name, without_packing
from personatlas.persona.formats.tables import LINES, PROSE, Row, parse_json, read_records, read_text
from personatlas.persona.progress import say
from personatlas.persona.records import JsonObject

SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "ai"), "assistant"),
}
CALLS = ("tool_calls", "function_call")  # fields of a message that asks for a tool
HIDDEN = "is_visually_hidden_from_conversation"  # ChatGPT's word for what the user never saw
TOOLS = (
    "tool",
    "function",
    "observation",
    "ipython",
    "environment",
    "tool_call",
    "tool_calls",
    "function_call",
) + ("tool_response", "tool_result", "function_response", "function_result")
SPEAKER_FIELDS, TEXT_FIELDS = (
    ("role", "from", "speaker", "author"),
    ("content", "value", "text", "mes", "parts"),
)
# fields that tell conversations apart where every row is a message
GROUP_FIELDS = ("conversation_id", "conversation", "chat_id", "session_id", "thread_id")
# fewer names than SPEAKERS has: a line of an answer may well begin with "Model:"
TRANSCRIPT_SPEAKER = re.compile(
    r"^[ \t]*\**(system|user|human|assistant|ai|chatgpt)(?:\**[ \t]*:|:\**)\**", re.IGNORECASE | re.MULTILINE
)
NO_TEXT = re.compile("think|thought|reason|tool|function")  # kinds of parts whose text was not said
PERSONA = "You are a {} assistant."
MAX_PLACES = 3  # that are named for one reason
MAX_CHARACTERS = 1 << 24  # of a conversation; tokenising more takes minutes and no model reads them
EXPECTED = (
    "a conversation is a list of messages (role and content, or from and value), an object with it under "
    "messages, conversation or conversations, or a question and an answer"
)
Message = dict[str, str]  # role and content


class Conversation(NamedTuple):
    """What was said, by whom, under which name; `domain` is what it is about, "" where nobody says."""

    name: str
    messages: tuple[Message, ...]
    domain: str = ""


@dataclass
class Exclusions:
    """What was left out: how many for each reason, and where the first ones are. `n_lost` are whole
    conversations that nobody asked to leave out.
    """

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    n_lost: int = 0

    def add(self, reason: str, place: str, *, lost: bool = True) -> None:
        """Counts one more; not `lost` is a part of a conversation, or one that was not asked for."""
        self.counts[reason] += 1
        self.n_lost += lost
        places = self.places.setdefault(reason, [])
        if len(places) < MAX_PLACES:
            places.append(place)

    def update(self, others: "Exclusions") -> None:
        """Adds what was left out elsewhere."""
        self.counts.update(others.counts)
        self.n_lost += others.n_lost
        for reason, places in others.places.items():
            self.places[reason] = [*self.places.get(reason, []), *places][:MAX_PLACES]

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

    def say(self, source: str) -> None:
        """Says on stderr what was left out of `source`, in one line, if anything was."""
        if self.counts:
            say(f"{source}: left out {'; '.join(self.lines())}")


@dataclass(frozen=True)
class Columns:
    """Under which names a row keeps what; the first that it has is taken."""

    messages: tuple[str, ...] = ("messages", "conversation", "conversations", "chat", "dialogue", "turns")
    system: tuple[str, ...] = (
        "system",
        "system_prompt",
        "system_message",
        "system_instruction",
        "systemPrompt",
    )
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


class NotUsable(Exception):
    """What is wrong with a row, as a clause that follows a count, and the number of the message."""

    def __init__(self, reason: str, number: int = 0) -> None:
        super().__init__(reason)
        self.number = number


class FoundConversation(NamedTuple):
    """Messages with the place in their file, their number there, and the whole row, {} for none."""

    place: str
    number: int
    messages: tuple[Message, ...]
    row: Row


def read_conversations(
    path: Path, *, require_user: bool = True, left_out: Exclusions | None = None
) -> list[Conversation]:
    """Every conversation of a file, or of the .json, .jsonl and .parquet files of a folder, in order.

    A name is the conversation's "id", else "conversation N", counted from 0; one that comes again gets a
    number. What cannot be used, and with `require_user` a conversation without a user, goes into `left_out`,
    or is said where none is given. Raises `UserError` for a file that cannot be read and where no
    conversation is left.
    """
    excluded = Exclusions() if left_out is None else left_out
    conversations, names = list[Conversation](), set[str]()
    for place, number, messages, row in find_conversations(path, excluded):
        if require_user and not any(message["role"] == "user" for message in messages):
            excluded.add("without a user", place)
            continue
        given = name = str(row.get("id") or f"conversation {number}").replace("/", "_")
        again = itertools.count(2)
        while name in names:
            name = f"{given} ({next(again)})"
        names.add(name)
        conversations.append(Conversation(name, messages, str(row.get("domain") or "")))
    if not conversations:
        reason = "; ".join(excluded.lines()) or "it is empty"
        raise UserError(f"{path} holds no conversation that can be used: {reason}; {EXPECTED}")
    if left_out is None:
        excluded.say(str(path))
    return conversations


def find_conversations(
    path: Path, left_out: Exclusions, columns: Columns = Columns()
) -> Iterator[FoundConversation]:
    """The conversations of a file or folder as they come; what cannot be used goes into `left_out`."""
    files = [path]
    if path.is_dir():
        endings = (".json", *LINES, ".parquet")
        files = [
            file
            for file in sorted(path.rglob("*"))
            if Path(without_packing(file.name)).suffix.lower() in endings and file.is_file()
        ]
        if not files:
            raise UserError(f"{path} holds no .json, .jsonl or .parquet file")
    values = (pair for file in files for pair in _conversation_values(file, columns))
    for number, (place, value) in enumerate(values):
        place = place.removeprefix(f"{path.parent}/")
        try:
            messages, parts = row_messages(value, columns)
        except NotUsable as error:
            left_out.add(str(error), f"{place}, message {error.number}" if error.number else place)
            continue
        for part in parts:
            left_out.add(part, place, lost=False)
        yield FoundConversation(place, number, messages, value if isinstance(value, dict) else {})


def read_messages(messages: Sequence[Mapping[str, object]]) -> tuple[Message, ...]:
    """Messages in any form that a file may have them in. Raises `UserError` for what none of them is, and for
    what the reader of a file would leave out.
    """
    try:
        found, parts = row_messages(list(messages))
    except NotUsable as error:
        raise UserError(f"this is a conversation {error}; {EXPECTED}") from None
    if parts:
        raise UserError(f"this conversation has {parts[0]}, which no model here reads: leave them out")
    return found


def row_messages(value: object, columns: Columns = Columns()) -> tuple[tuple[Message, ...], list[str]]:
    """The messages of a row, a system text beside them first, and what was left out of them.

    Raises `NotUsable` for a row that is no conversation.
    """
    row: Row = value if isinstance(value, dict) else {"messages": value}
    messages, left_out = list[Message](), list[str]()
    for number, message in enumerate(_listed(row, columns if isinstance(value, dict) else Columns()), 1):
        try:
            found, parts = _message(message)
        except NotUsable as error:
            raise NotUsable(str(error), number) from None
        left_out += parts
        messages += [found] if found else []
    if system := _system(row, columns):
        if not messages or messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        elif messages[0]["content"] != system:
            raise NotUsable("with a system text and another system message, of which one must go")
    if all(message["role"] == "system" for message in messages):
        raise NotUsable("without messages")
    if sum(len(message["content"]) for message in messages) > MAX_CHARACTERS:
        raise NotUsable(f"longer than {MAX_CHARACTERS:,} characters")
    try:
        "".join(message["content"] for message in messages).encode()
    except UnicodeEncodeError:
        raise NotUsable("with half a surrogate pair, which is no text") from None
    return tuple(messages), left_out


def _conversation_values(path: Path, columns: Columns) -> list[tuple[str, Any]]:
    """What may each be a conversation, with its place."""
    name = Path(unpacked_name(path))
    if name.suffix.lower() in PROSE and (text := read_text(path)).lstrip()[:1] not in ("[", "{"):
        text = text.replace("\r\n", "\n")
        marks = list(TRANSCRIPT_SPEAKER.finditer(text))
        if not marks or text[: marks[0].start()].strip():
            raise UserError(
                f"{path} does not begin with who speaks: "
                'write "User: ..." and "Assistant: ..." on lines of their own'
            )
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        said = [
            (mark[1].lower(), text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)
        ]
        messages = [{"role": speaker, "content": content} for speaker, content in said]
        return [(str(path), {"id": name.stem, "messages": messages})]
    rows, found = list(read_records(path)), list[tuple[str, Any]]()
    for place, value in rows:
        if len(rows) == 1 and isinstance(value, dict) and not any(map(value.get, columns.messages)):
            lists = [own for own in value.values() if isinstance(own, list) and any(map(_is_object, own))]
            value = lists[0] if len(lists) == 1 else value
        elif len(rows) == 1 and isinstance(value, dict):  # {"conversations": [conversations]}
            lists = [own for key in columns.messages if isinstance(own := value.get(key), list)]
            value = lists[0] if len(lists) == 1 and not any(map(_is_message, lists[0])) else value
        if isinstance(value, list) and value and not any(map(_is_message, value)):
            found += [(f"{place}, item {number}", item) for number, item in enumerate(value, 1)]
        else:
            found.append((place, value))
    single = [(place, value) for place, value in found if _is_message(value)]
    if not single:
        return found
    groups: dict[
        str, list[Row]
    ] = {}  # of rows that are messages, by the field that tells conversations apart
    for _, row in single:
        key = next((str(row[name]) for name in GROUP_FIELDS if isinstance(row.get(name), str | int)), "")
        groups.setdefault(key, []).append(row)
    others = [(place, value) for place, value in found if not _is_message(value) and not _is_header(value)]
    if len(groups) == 1:
        return [(str(path), next(iter(groups.values()))), *others]
    return [*((f"{path}, {key}", {"id": key, "messages": rows}) for key, rows in groups.items()), *others]


def _is_message(value: object) -> bool:
    """Whether a value is one message and no conversation."""
    if not isinstance(value, dict) or Columns().value(value, "answer") is not None:
        return False
    is_spoken = "is_user" in value or any(isinstance(value.get(name), str) for name in SPEAKER_FIELDS)
    return is_spoken and any(name in value for name in (*TEXT_FIELDS, *CALLS))


def _is_header(value: object) -> bool:
    """Whether a value is what Tavern writes above the messages."""
    return isinstance(value, dict) and "user_name" in value and "mes" not in value


def _system(row: Row, columns: Columns) -> str:
    """The system text beside the messages, "" for none.

    A persona is one in its own words or, where it is one word, as "You are a witty assistant.".
    """
    persona, system = columns.value(row, "persona"), columns.value(row, "system")
    if persona and system:
        raise NotUsable("with a persona and a system text, of which one must go")
    if not (beside := persona or system):
        return ""
    text, _ = _flat(beside)
    if text is None:
        raise NotUsable(f"with a system text that is no text but {describe_value(beside)}")
    return PERSONA.format(text.strip()) if persona and len(text.split()) == 1 else text


def _listed(row: Row, columns: Columns) -> list[Any]:
    """A row's messages, not yet read."""
    if isinstance(row.get("mapping"), dict):
        return _branch(row["mapping"], row.get("current_node"))
    present = {name: row[name] for name in columns.messages if row.get(name) is not None}
    for name, value in present.items():
        if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a table that holds JSON
            with contextlib.suppress(UserError):
                present[name] = parse_json(name, value)
    lists = [own for own in present.values() if isinstance(own, list)]
    lists = [own for own in lists if any(map(_is_object, own))] or lists
    if len(lists) > 1:
        raise NotUsable(f"with several lists of messages ({', '.join(present)})")
    if lists:
        return lists[0]
    question, answer = columns.value(row, "question"), columns.value(row, "answer")
    if question is not None and answer is not None:
        more = columns.value(row, "more")
        if isinstance(question, str) and isinstance(more, str) and more.strip():
            question = f"{question}\n\n{more}"
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for value in present.values():
        raise NotUsable(f"with messages that are no list but {describe_value(value)}")
    has = ", ".join(map(str, row))[:120] or "no keys"
    raise NotUsable(f"with neither messages nor a question and an answer, but {has}")


def _is_object(value: object) -> bool:
    return isinstance(value, dict | list)


def _message(message: object) -> tuple[Message | None, list[str]]:
    """A message, None where nothing of it is left, and what was left out of it."""
    if _is_header(message):
        return None, []
    if not isinstance(message, dict):
        raise NotUsable(f"with a message that is {describe_value(message)}")
    if message.get("is_user") is not None and message.get("is_system"):
        return None, ["hidden messages"]
    speaker = next((message[name] for name in SPEAKER_FIELDS if message.get(name) is not None), None)
    if message.get("is_user") is not None:
        speaker = "user" if message["is_user"] else "assistant"
    if not isinstance(speaker, str):
        raise NotUsable("with a message that has no role and content")
    if speaker.lower() in TOOLS:
        return None, ["turns of tools"]
    if speaker.lower() not in SPEAKERS:
        raise NotUsable(f"with the speaker {speaker[:40]!r}, which is not one of {', '.join(SPEAKERS)}")
    calls = ["calls of tools"] if any(message.get(name) for name in CALLS) else []
    named = [name for name in TEXT_FIELDS if name in message]
    content = next((message[name] for name in named if message[name] is not None), None)
    if content is None and not calls:
        raise NotUsable(f"with content that is {'null' if named else 'missing'}")
    text, parts = _flat(content)
    if text is None and not parts + calls:
        raise NotUsable(f"with content that is no text but {describe_value(content)}")
    if text is None or (calls and not text.strip()):
        return None, parts + calls
    return {"role": SPEAKERS[speaker.lower()], "content": text}, parts + calls


def _flat(content: object) -> tuple[str | None, list[str]]:
    """The text of content, its parts joined by newlines, None for none, and what was left out."""
    if isinstance(content, str):
        return content, []
    if isinstance(content, dict) and isinstance(content.get("parts"), list):
        content = content["parts"]
    if not isinstance(content, list):
        return None, []
    texts, dropped = list[str](), list[str]()
    for part in content:
        fields_ = part if isinstance(part, dict) else {"text": part}
        kind = str(fields_.get("type") or fields_.get("content_type") or "text")
        if isinstance(fields_.get("text"), str) and not NO_TEXT.search(kind):
            texts.append(fields_["text"])
        else:
            dropped.append(f"parts of the kind {kind[:40]!r}")
    return ("\n".join(texts) if texts or not dropped else None), dropped


def _branch(mapping: Row, current: object) -> list[Any]:
    """The messages of ChatGPT's tree from the root to the current node, else to the last leaf."""
    if current not in mapping:
        parents = {node.get("parent") for node in mapping.values() if isinstance(node, dict)}
        current = next((name for name in reversed(mapping) if name not in parents), None)
    messages, seen = list[Any](), set[object]()
    while current not in seen and isinstance(node := mapping.get(str(current)), dict):
        seen.add(current)
        current = node.get("parent")
        if not isinstance(message := node.get("message"), dict):
            continue
        author, content, meta = (
            own if isinstance(own := message.get(name), dict) else {}
            for name in ("author", "content", "metadata")
        )
        kind, text = str(content.get("content_type") or "text"), content.get("parts") or content.get("text")
        if message.get("recipient") not in (None, "all"):
            kind = "call of a tool"
        elif meta.get(HIDDEN):
            kind = "hidden"
        if kind not in ("text", "multimodal_text"):
            text = [{"type": kind}]
        if text not in (None, [], [""]):  # the export has empty messages between the others
            messages.append({"role": author.get("role"), "content": text})
    return messages[::-1]
