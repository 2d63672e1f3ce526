"""Conversations and tables, in the forms that people keep them in, each plain or compressed (.gz .xz .bz2 .zst).

    for conversation in read_conversations(Path("chats.jsonl")):
        conversation.name, conversation.domain, conversation.messages[0]["role"]
    for place, row in read_table(Path("requests.csv")):
        row["goal"]                                    # place is "requests.csv:12"

A conversation is OpenAI's form ({"messages": [{"role", "content"}]}, or that list alone) or ShareGPT's
({"conversations": [{"from", "value"}]}), the field also being called "conversation"; a "system" or "system_prompt"
beside it is its first message. They stand one a line in .jsonl, one or a list of them in .json. A transcript in
plain text (.txt, .md) begins every message on a line of its own with "User:" or "Assistant:".

A table is CSV, TSV, JSON Lines, a JSON list or (.txt) plain lines. JSON is known by its first character, as no
header of a CSV begins with a brace. Text is UTF-8 or UTF-16, with or without a byte order mark; a file that mixes
encodings is refused with the line at which it does: a text whose letters were guessed is another text.
"""

import codecs
import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from personatlas.persona.compression import open_unpacked, without_packing
from personatlas.persona.errors import UserError, describe_value

SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "ai"), "assistant"),
}
MESSAGE_FIELDS = ("conversation", "messages", "conversations")
SYSTEM_FIELDS = ("system_prompt", "system")
LINES, TRANSCRIPTS = (".jsonl", ".ndjson"), (".txt", ".md")
# fewer names than SPEAKERS has: a line of an answer may well begin with "Model:"
TRANSCRIPT_SPEAKER = re.compile(
    r"^[ \t]*\**(system|user|human|assistant|ai|chatgpt)(?:\**[ \t]*:|:\**)\**", re.IGNORECASE | re.MULTILINE
)
LONGEST_LINE = 1 << 28  # bytes of one line, which json must hold whole
FIELD_LIMIT = 1 << 27  # characters; csv's own limit of 131,072 is shorter than some answers
Message = dict[str, str]  # role and content
Row = dict[str, Any]
Placed = tuple[str, Row]


class Conversation(NamedTuple):
    """What was said, by whom, under which name; `domain` is what it is about, "" where the file does not say."""

    name: str
    messages: tuple[Message, ...]
    domain: str = ""


def read_conversations(path: Path, *, require_user: bool = True) -> list[Conversation]:
    """Every conversation of a file, or of the .json and .jsonl files of a folder, searched through in order.

    A name is the conversation's "id", else "conversation N", counted from 0. Raises `UserError`, naming file and
    place, for another form, an unknown speaker, content that is no text, two conversations of one id, and (with
    `require_user`) a conversation without a user.
    """
    found: list[tuple[str, Any]] = []
    if path.is_dir():
        files = [
            file for file in sorted(path.rglob("*")) if file.suffix in (".json", ".jsonl") and file.is_file()
        ]
        if not files:
            raise UserError(f"{path} holds no .json or .jsonl file")
    for file in files if path.is_dir() else [path]:
        ending = Path(without_packing(file.name)).suffix.lower()
        if ending in LINES:
            found += [(f"{file}:{number}", value) for number, value in read_json_lines(file)]
        elif ending in TRANSCRIPTS:
            found.append((str(file), {"id": file.stem, "messages": _transcript(file)}))
        else:
            content = _parsed(str(file), read_text(file), whole_file=True)
            first = content[0] if isinstance(content, list) and content else None
            if isinstance(content, list) and not (
                isinstance(first, dict) and {"role", "from"} & first.keys()
            ):
                found += [(f"{file}, item {number}", value) for number, value in enumerate(content, 1)]
            else:
                found.append((str(file), content))
    if not found:
        raise UserError(f"{path} holds no conversation")
    conversations = []
    for number, (place, value) in enumerate(found):
        about = value if isinstance(value, dict) else {}
        name = str(about.get("id") or f"conversation {number}").replace("/", "_")
        messages = _messages(place, value)
        if require_user and not any(message["role"] == "user" for message in messages):
            raise UserError(f"{place} has no turn of a user")
        conversations.append(Conversation(name, messages, str(about.get("domain") or "")))
    names = [conversation.name for conversation in conversations]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} has two conversations with the id {twice!r}")
    return conversations


def _transcript(path: Path) -> list[Message]:
    text = read_text(path)
    marks = list(TRANSCRIPT_SPEAKER.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise UserError(
            f'{path} does not begin with who speaks: write "User: ..." and "Assistant: ..." on lines of their own'
        )
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": SPEAKERS[mark[1].lower()], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def _messages(place: str, value: Any) -> tuple[Message, ...]:
    """The messages of one conversation, a system prompt beside them first."""
    rows, system = value, None
    if isinstance(value, dict):
        present = [name for name in MESSAGE_FIELDS if name in value]
        names = [name for name in present if isinstance(value[name], list)] or present
        if len(names) != 1:
            wanted = ", ".join(MESSAGE_FIELDS)
            raise UserError(f"{place} is no conversation but {describe_value(value)}; it has one of {wanted}")
        rows, system = value[names[0]], next((value[name] for name in SYSTEM_FIELDS if value.get(name)), None)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{place} is {describe_value(rows)}, not a list of messages that is not empty")
    messages: list[Message] = []
    for number, row in enumerate(rows, 1):
        where = f"{place}: message {number}"
        fields = ("from", "value") if isinstance(row, dict) and "from" in row else ("role", "content")
        if not isinstance(row, dict) or not set(fields) <= row.keys():
            raise UserError(
                f"{where} is {describe_value(row)}, not a dict with 'role' and 'content' (or 'from' and 'value')"
            )
        speaker, content = (row[field] for field in fields)
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise UserError(f"{where}: speaker {speaker!r} is not one of {', '.join(SPEAKERS)}")
        if not isinstance(content, str):
            raise UserError(f"{where}: its content is {describe_value(content)}, not text")
        messages.append({"role": SPEAKERS[speaker], "content": content})
    if not system:
        return tuple(messages)
    if not isinstance(system, str):
        raise UserError(f"{place}: its system prompt is {describe_value(system)}, not text")
    if messages[0]["role"] != "system":
        return ({"role": "system", "content": system}, *messages)
    if messages[0]["content"] != system:
        raise UserError(
            f"{place}: its system prompt and its first message, a system message, differ; keep one"
        )
    return tuple(messages)


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of each line that is not blank. Unlike our own logs, the last needs no newline.

    Raises `UserError`, with the line's number, for what is no JSON or no UTF-8, and for a line beyond
    `LONGEST_LINE` bytes.
    """
    require_file(path)
    number = 0
    with open_unpacked(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}:{number} is longer than {LONGEST_LINE >> 20} MiB: not JSON Lines?")
            try:
                text = line.decode().removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number} is not UTF-8: {error}") from None
            if text.strip():
                yield number, _parsed(f"{path}:{number}", text)


def read_json_list(path: Path) -> list[Any]:
    """The list in a .json file. Raises `UserError` for anything else."""
    content = _parsed(str(path), read_text(path), whole_file=True)
    if not isinstance(content, list):
        raise UserError(f"{path} is one {type(content).__name__}, not a list")
    return content


def read_table(path: Path) -> list[Placed]:
    """Every row with its place. Keys of CSV columns are as written; a plain line is {"text": line}.

    Raises `UserError` for a file that is not there, is empty, cannot be decoded, or has a line that is no row.
    """
    text = read_text(path)
    first = text.lstrip()[:1]
    if not first:
        raise UserError(f"{path} is empty; a header and at least one row are needed")
    rows: list[Placed] = []
    if first == "[":
        for number, value in enumerate(_parsed(str(path), text, whole_file=True), 1):
            rows.append(_object(f"{path}, item {number}", value))
    elif first == "{":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append(_object(f"{path}:{number}", _parsed(f"{path}:{number}", line)))
    elif path.suffix.lower() == ".txt":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                rows.append((f"{path}:{number}", {"text": line.strip()}))
    else:
        rows = list(_csv(path, text))
    if not rows:
        raise UserError(f"{path} has a header and no row")
    return rows


def find_column(
    rows: Sequence[Placed], names: Sequence[str], purpose: str, option: str = "", requested: str | None = None
) -> str:
    """The first of these columns that the first row has, whatever the letters' case, or the requested one.

    `option` is what names the `purpose` column on the command line. Raises `UserError` with the columns that
    there are.
    """
    place, row = rows[0]
    columns = ", ".join(str(name)[:40] for name in list(row)[:12]) or "none"
    if requested is not None:
        if requested not in row:
            raise UserError(f"{place} has no column {requested!r}; its columns: {columns}")
        return requested
    known = {str(name).lower(): str(name) for name in row}
    found = next((known[name] for name in names if name in known), None)
    if found is None:
        hint = f"; name one with {option}" if option else ""
        raise UserError(f"{place} has no {purpose} column ({', '.join(names)}); its columns: {columns}{hint}")
    return found


def require_file(path: Path) -> None:
    """Raises `UserError` unless there is a file at this path."""
    if not path.is_file():
        raise UserError(f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")


def read_text(path: Path) -> str:
    """A file's text, unpacked and decoded, without a byte order mark. Raises `UserError` for mixed encodings."""
    require_file(path)
    try:
        with open_unpacked(path) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    encoding = _encoding(content[:4096])
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        offset = error.start
    line = content[:offset].decode(encoding, "ignore").count("\n") + 1
    name = "UTF-16" if encoding.startswith("utf-16") else "UTF-8"
    raise UserError(
        f"{path}:{line} is not {name} at byte {offset} (0x{content[offset]:02x}): one encoding a file; "
        "save it as UTF-8"
    )


def _encoding(start: bytes) -> str:
    """By the byte order mark; without one, UTF-16 shows by a zero in every other byte; else UTF-8."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for odd, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros, other_zeros = start[odd::2].count(0), start[1 - odd :: 2].count(0)
        if len(start) >= 8 and zeros > 0.4 * len(start) / 2 > 4 * other_zeros:
            return name
    return "utf-8"


def _parsed(place: str, text: str, *, whole_file: bool = False) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; one object a line is .jsonl" if whole_file and "Extra data" in str(error) else ""
        raise UserError(f"{place} is not valid JSON: {' '.join(str(error).split())[:120]}{hint}") from None


def _object(place: str, value: Any) -> Placed:
    if not isinstance(value, dict):
        raise UserError(f"{place} is a {type(value).__name__}; an object is needed")
    return place, value


def _csv(path: Path, text: str) -> Iterator[Placed]:
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    with _field_limit():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader)]
            twice = next((name for name in header if name and header.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"{path}:1 has the column {twice!r} twice; rename one")
            begins = reader.line_num + 1
            for row in reader:
                place, begins = f"{path}:{begins}", reader.line_num + 1
                if not any(row):
                    continue
                if len(row) != len(header):
                    raise UserError(f"{place}: {len(row)} fields where the header has {len(header)}")
                yield place, dict(zip(header, row, strict=True))
        except csv.Error as error:
            place = f"{path}:{reader.line_num}"
            raise UserError(f"{place} is not CSV: {error}; look for a quote that is not closed") from None


@contextlib.contextmanager
def _field_limit() -> Iterator[None]:
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)
