"""Stored conversations, in the forms that chats are kept in.

    for one in read_conversations(Path("chats.jsonl")):
        one.name, one.domain, one.messages[0]["role"], one.messages[0]["content"]

OpenAI's ({"messages": [{"role", "content"}]}, or that list alone) and ShareGPT's ({"conversations": [{"from", "value"}]}), one
a line in JSONL, one or a list of them in JSON; and a transcript in plain text (.txt, .md), in which every message begins on a line
of its own with "User:" or "Assistant:". `SCRIPTS` are our own, in five domains: what users say in eight turns of talk about
coding, writing, themselves (as to a therapist) and the philosophy of AI, ten conversations each, and in forty of everyday help. Nobody
answers in them yet. Everyday has forty because a drift alarm is calibrated on conversations that do not drift: half of the scripts
set its limit and the others count its false alarms, and a limit that fits five scripts of coding misses on the other five.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from personatlas.persona.artifacts import read_json
from personatlas.persona.errors import UserError
from personatlas.persona.rollout import Message

SCRIPTS = Path(__file__).parent.parent / "steering" / "conversations" / "scripts.jsonl"
EVERYDAY = "everyday"  # the domain of SCRIPTS that is there to calibrate alarms on
SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "ai"), "assistant"),
}
PLAIN = (".txt", ".md")
# fewer names than SPEAKERS has: a line of an answer may well begin with "Model:"
SAYS = re.compile(
    r"^[ \t]*\**(system|user|human|assistant|ai|chatgpt)(?:\**[ \t]*:|:\**)\**", re.IGNORECASE | re.MULTILINE
)


class Conversation(NamedTuple):
    """What was said, by whom, under which name; `domain` is what it is about, "" where the file does not say."""

    name: str
    messages: tuple[Message, ...]
    domain: str = ""


def read_conversations(path: Path) -> list[Conversation]:
    """Every conversation of a file. Raises `UserError` for one without a user, with an unknown speaker or of another form."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        found = _lines(path)
    elif path.suffix.lower() in PLAIN:
        found = [(str(path), {"id": path.stem, "messages": _spoken(path)})]
    else:
        content = read_json(path)
        many = isinstance(content, list) and not (content and _is_message(content[0]))
        found = (
            [(f"{path}, item {n}", one) for n, one in enumerate(content, 1)]
            if many
            else [(str(path), content)]
        )
    if not found:
        raise UserError(f"{path} holds no conversation")
    read = []
    for number, (place, one) in enumerate(found):
        about = one if isinstance(one, dict) else {}
        name = str(about.get("id") or f"conversation {number}").replace("/", "_")
        read.append(Conversation(name, _messages(place, one), str(about.get("domain") or "")))
    names = [one.name for one in read]
    if len(set(names)) != len(names):
        raise UserError(
            f"{path} has two conversations with the id {next(n for n in names if names.count(n) > 1)!r}"
        )
    return read


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from None


def _spoken(path: Path) -> list[Message]:
    """The messages of a transcript in plain text."""
    text = _text(path)
    marks = list(SAYS.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise UserError(
            f'{path} does not begin with who speaks: write "User: ..." and "Assistant: ..." on lines of their own'
        )
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": SPEAKERS[mark[1].lower()], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def _lines(path: Path) -> list[tuple[str, Any]]:
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            try:
                found.append((f"{path}:{number}", json.loads(line)))
            except ValueError as error:
                raise UserError(f"{path}:{number} is not valid JSON: {error}") from None
    return found


def _messages(place: str, one: Any) -> tuple[Message, ...]:
    told = (
        one
        if isinstance(one, list)
        else one.get("messages", one.get("conversations"))
        if isinstance(one, dict)
        else None
    )
    if not isinstance(told, list) or not all(_is_message(message) for message in told):
        raise UserError(f'{place} is no conversation: {{"messages": [{{"role", "content"}}]}} is needed')
    messages = []
    for message in told:
        speaker, content = (
            message.get("role", message.get("from")),
            message.get("content", message.get("value")),
        )
        if speaker not in SPEAKERS:
            raise UserError(f"{place}: speaker {speaker!r} is not one of {', '.join(SPEAKERS)}")
        if not isinstance(content, str):
            raise UserError(f"{place}: a message of {speaker} holds {type(content).__name__}, not text")
        messages.append({"role": SPEAKERS[speaker], "content": content})
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{place} has no turn of a user")
    return tuple(messages)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool({"role", "from"} & value.keys())
        and bool({"content", "value"} & value.keys())
    )
