"""Files of answers that people have labelled as harmful or not: CSV, TSV or JSONL, in UTF-8 or UTF-16.

    found = read_labels(Path("labels.csv"))
    found.texts, found.labels, found.requests          # of equal length; labels are 0 and 1

The text stands in a column response, answer, completion or text, the label in label, harmful, is_harmful or verdict, and
the request, where there is one, in question, request, prompt, instruction or query, in capitals or not; others are named.
A label is 0/1, true/false, yes/no or harmful/harmless. What cannot be read is one line with the file and its line; nothing
is left out or guessed.
"""

import codecs
import contextlib
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personaxis.persona.errors import KnownError
from personaxis.persona.store import digest

TEXTS = ("response", "answer", "completion", "text")
LABELS = ("label", "harmful", "is_harmful", "verdict")
REQUESTS = ("question", "request", "prompt", "instruction", "query")
MEANING = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "harmful": 1, "0": 0, "0.0": 0, "false": 0, "no": 0, "harmless": 0}
FEWEST = 20  # rows; below it no figure means anything
FIELD_LIMIT = 1 << 27  # characters; csv's own limit of 131,072 is shorter than some answers


@dataclass(frozen=True)
class Labelled:
    """Answers (N), labels 0 or 1 (N), requests ("" where the file has none; N), and the file's name and SHA-256."""

    texts: list[str]
    labels: list[int]
    requests: list[str]
    name: str
    sha256: str


@dataclass(frozen=True)
class Columns:
    """The file's own names of the columns that are read."""

    text: str
    label: str
    request: str | None


def read_labels(path: Path, text_column: str | None = None, label_column: str | None = None) -> Labelled:
    """Read a file of labels. Raises `KnownError` for one that cannot be read whole, is too short, or has one class only."""
    if not path.is_file():
        raise KnownError(
            f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}; give a CSV or JSONL file"
        )
    try:
        encoding = _encoding(path)
        with path.open(encoding=encoding, newline="") as file:
            texts, labels, requests = _columns(path, file, text_column, label_column)
    except UnicodeDecodeError:
        raise KnownError(_where_not(path, encoding)) from None
    except OSError as error:
        raise KnownError(f"{path} cannot be read: {error.strerror}") from None
    if len(texts) < FEWEST:
        raise KnownError(f"{path} has {len(texts)} labelled rows; {FEWEST} are the fewest that say anything")
    if len(set(labels)) < 2:
        every = "harmful" if labels[0] else "harmless"
        raise KnownError(f"{path}: all {len(labels)} rows are {every}; both classes are needed")
    return Labelled(texts, labels, requests, path.name, digest(path))


def _columns(
    path: Path, file: io.TextIOWrapper, text_column: str | None, label_column: str | None
) -> tuple[list[str], list[int], list[str]]:
    texts, labels, requests = [], [], []
    for line, row, columns in _rows(path, file, text_column, label_column):
        value = row[columns.label]
        label = MEANING.get(str(value).strip().lower())
        if label is None:
            raise KnownError(
                f"{path}:{line}: label {str(value)[:40]!r} is not 0/1, true/false, yes/no or harmful/harmless"
            )
        texts.append(row[columns.text])
        labels.append(label)
        requests.append("" if columns.request is None else str(row.get(columns.request) or ""))
    return texts, labels, requests


Rows = Iterator[tuple[int, dict[str, Any], Columns]]


def _rows(path: Path, file: io.TextIOWrapper, text_column: str | None, label_column: str | None) -> Rows:
    """Line, row and columns. JSONL is known by its first character, as no header of a CSV begins with a brace."""
    start = file.read(1 << 16)
    if not start.strip():
        raise KnownError(f"{path} is empty; a header and at least {FEWEST} rows are needed")
    file.seek(0)
    first = start.lstrip("\ufeff \t\r\n")[:1]
    if first == "[":
        raise KnownError(f"{path} is one JSON list; give JSONL, an object a line, or CSV")
    read = _jsonl if first == "{" else _csv
    return read(path, file, text_column, label_column)


def _csv(path: Path, file: io.TextIOWrapper, text_column: str | None, label_column: str | None) -> Rows:
    header_line = file.readline()
    file.seek(0)
    delimiter = max(",;\t", key=header_line.count)
    with _field_limit():
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [name.strip().lstrip("\ufeff") for name in next(reader)]
            columns = _choose(f"{path}:1", header, text_column, label_column)
            for row in reader:
                if not any(row):
                    continue
                if len(row) != len(header):
                    raise KnownError(f"{path}:{reader.line_num}: {len(row)} fields where the header has {len(header)}")
                yield reader.line_num, dict(zip(header, row, strict=True)), columns
        except csv.Error as error:
            raise KnownError(
                f"{path}:{reader.line_num} is not CSV: {error}; look for a quote that is not closed"
            ) from None


def _jsonl(path: Path, file: io.TextIOWrapper, text_column: str | None, label_column: str | None) -> Rows:
    columns = None
    for line, text in enumerate(file, 1):
        if not text.strip("\ufeff \t\r\n"):
            continue
        try:
            row = json.loads(text.lstrip("\ufeff"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise KnownError(f"{path}:{line} is not valid JSON: {' '.join(str(error).split())[:120]}") from None
        if not isinstance(row, dict):
            raise KnownError(f"{path}:{line} is a {type(row).__name__}; an object a line is needed")
        columns = columns or _choose(f"{path}:{line}", list(row), text_column, label_column)
        for name in (columns.text, columns.label):
            if name not in row:
                raise KnownError(f"{path}:{line} has no {name!r}, which the rows before it have")
        if not isinstance(row[columns.text], str):
            raise KnownError(f"{path}:{line}: {columns.text!r} is a {type(row[columns.text]).__name__}, not text")
        yield line, row, columns


def _choose(where: str, header: list[str], text_column: str | None, label_column: str | None) -> Columns:
    twice = sorted({name for name in header if header.count(name) > 1 and name})
    if twice:
        raise KnownError(f"{where} has the column {twice[0]!r} twice; rename one")
    text = _named(where, header, text_column, TEXTS, "text", "--text-column")
    label = _named(where, header, label_column, LABELS, "label", "--label-column")
    request = next((name for wanted in REQUESTS for name in header if name.lower() == wanted), None)
    return Columns(text, label, request)


def _named(where: str, header: list[str], named: str | None, known: tuple[str, ...], what: str, option: str) -> str:
    there = ", ".join(name[:40] for name in header[:12]) or "none"
    if named is not None:
        if named not in header:
            raise KnownError(f"{where} has no column {named!r}; its columns: {there}")
        return named
    found = [name for name in header if name.lower() in known]
    if not found:
        raise KnownError(
            f"{where} has no {what} column ({', '.join(known)}); its columns: {there}; name one with {option}"
        )
    if len(found) > 1:
        raise KnownError(f"{where} has several {what} columns: {', '.join(found)}; name one with {option}")
    return found[0]


@contextlib.contextmanager
def _field_limit() -> Iterator[None]:
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _encoding(path: Path) -> str:
    """By the byte order mark; without one, UTF-16 shows by a zero in every other byte; else UTF-8."""
    with path.open("rb") as file:
        start = file.read(4096)
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if start.startswith(mark):
            return name
    for odd, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(start) >= 8 and start[odd::2].count(0) > 0.4 * len(start) / 2 > 4 * start[1 - odd :: 2].count(0):
            return name
    return "utf-8"


def _where_not(path: Path, encoding: str) -> str:
    """The line that says where a file stops being what it began as."""
    content = path.read_bytes()
    try:
        content.decode(encoding)
        offset = 0
    except UnicodeDecodeError as error:
        offset = error.start
    before = content[:offset].decode(encoding, "ignore")
    line = before.count("\n") + 1
    named = "UTF-16" if encoding.startswith("utf-16") else "UTF-8"
    return f"{path}:{line} is not {named} at byte {offset} (0x{content[offset]:02x}): one encoding a file; save it as UTF-8"
