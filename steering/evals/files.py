"""Tables as people keep them: CSV, JSON Lines, a JSON array or plain lines, read row by row with the place of every mistake.

    for place, row in read_rows(Path("requests.csv")):
        row["goal"]                                   # place is "requests.csv:12"

Files are UTF-8, with or without a byte order mark, or UTF-16 with one. A file that mixes encodings is refused with the line
at which it does: a request whose letters were guessed is another request.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from personaxis.persona.errors import KnownError

LONGEST_FIELD = 1 << 24  # characters; a CSV with an unclosed quote would otherwise swallow the file
Row = dict[str, Any]


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """Every row with its place. Keys of CSV columns are as written; a plain line is {"text": line}.

    Raises `KnownError` for a file that is not there, is empty, cannot be decoded, or has a line that is no row.
    """
    text = _decoded(path)
    if not text.strip():
        raise KnownError(f"{path} is empty: at least one row is needed")
    kind = path.suffix.lower()
    readers = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _lines, ".ndjson": _lines, ".txt": _plain}
    if kind not in readers:
        raise KnownError(f"{path} is {kind or 'a file without an ending'}; {', '.join(readers)} can be read")
    rows = list(readers[kind](path, text))
    if not rows:
        raise KnownError(f"{path} has a header and no row")
    return rows


def column(path: Path, rows: list[tuple[str, Row]], names: tuple[str, ...], what: str, asked: str | None = None) -> str:
    """The name of the first of these columns that the first row has (letters' case does not count), or of the one asked for.

    Raises `KnownError` and names the columns that there are.
    """
    there = {str(name).strip().lower(): name for name in rows[0][1] if name is not None}
    for name in (asked,) if asked else names:
        if name.strip().lower() in there:
            return str(there[name.strip().lower()])
    looked = repr(asked) if asked else f"any of {', '.join(names)}"
    raise KnownError(f"{path} has no column for {what}: looked for {looked}, found {', '.join(map(str, rows[0][1]))}")


def _decoded(path: Path) -> str:
    if not path.is_file():
        raise KnownError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        encoding = "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise KnownError(
            f"{path}:{line} is not {encoding.removesuffix('-sig').upper()} (byte 0x{content[error.start]:02x}): the file mixes "
            "encodings or has another one; save it as UTF-8"
        ) from None


def _csv(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        names = reader.fieldnames or []
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise KnownError(f"{path} has two columns named {twice!r}")
        first = reader.line_num + 1
        for row in reader:
            place, first = f"{path}:{first}", reader.line_num + 1
            if None in row:
                raise KnownError(f"{place} has more fields than the header's {len(names)}")
            yield place, {name: value or "" for name, value in row.items()}
    except csv.Error as error:
        raise KnownError(f"{path}:{reader.line_num} is not CSV: {error}") from None


def _lines(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _row(f"{path}:{number}", line)


def _row(place: str, line: str) -> tuple[str, Row]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise KnownError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise KnownError(f"{place} is a JSON {type(row).__name__}, not an object")
    return place, row


def _json(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise KnownError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise KnownError(f"{path} is not a JSON array of objects")
    for number, row in enumerate(found, 1):
        yield f"{path}, item {number}", row


def _plain(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{path}:{number}", {"text": line.strip()}
