"""Tables as people keep them: CSV, TSV, JSON Lines, a JSON list or plain lines, read row by row with the place of every mistake.

    for place, row in read_rows(Path("requests.csv")):
        row["goal"]                                   # place is "requests.csv:12"

Files are UTF-8 or UTF-16, with or without a byte order mark. A file that mixes encodings is refused with the line at which it
does: a text whose letters were guessed is another text. JSON is known by its first character, as no header of a CSV begins
with a brace; plain lines by the ending .txt.
"""

import codecs
import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from personatlas.persona.errors import UserError

FIELD_LIMIT = 1 << 27  # characters; csv's own limit of 131,072 is shorter than some answers
Row = dict[str, Any]
Placed = tuple[str, Row]


def read_rows(path: Path) -> list[Placed]:
    """Every row with its place. Keys of CSV columns are as written; a plain line is {"text": line}.

    Raises `UserError` for a file that is not there, is empty, cannot be decoded, or has a line that is no row.
    """
    text = _decoded(path)
    first = text.lstrip()[:1]
    if not first:
        raise UserError(f"{path} is empty; a header and at least one row are needed")
    read = {"{": _lines, "[": _json}.get(first) or (_plain if path.suffix.lower() == ".txt" else _csv)
    rows = list(read(path, text))
    if not rows:
        raise UserError(f"{path} has a header and no row")
    return rows


def column(
    rows: list[Placed], names: tuple[str, ...], what: str, option: str = "", asked: str | None = None
) -> str:
    """The first of these columns that the first row has, whatever the letters' case, or the one asked for (by `option`, if there is one).

    Raises `UserError` and names the columns that there are.
    """
    place, row = rows[0]
    there = ", ".join(str(name)[:40] for name in list(row)[:12]) or "none"
    if asked is not None:
        if asked not in row:
            raise UserError(f"{place} has no column {asked!r}; its columns: {there}")
        return asked
    known = {str(name).lower(): str(name) for name in row}
    found = next((known[name] for name in names if name in known), None)
    if found is None:
        named = f"; name one with {option}" if option else ""
        raise UserError(f"{place} has no {what} column ({', '.join(names)}); its columns: {there}{named}")
    return found


def _decoded(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    encoding = _encoding(content[:4096])
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        offset = error.start
    line = content[:offset].decode(encoding, "ignore").count("\n") + 1
    named = "UTF-16" if encoding.startswith("utf-16") else "UTF-8"
    raise UserError(
        f"{path}:{line} is not {named} at byte {offset} (0x{content[offset]:02x}): one encoding a file; save it as UTF-8"
    )


def _encoding(start: bytes) -> str:
    """By the byte order mark; without one, UTF-16 shows by a zero in every other byte; else UTF-8."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for odd, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(start) >= 8 and start[odd::2].count(0) > 0.4 * len(start) / 2 > 4 * start[1 - odd :: 2].count(
            0
        ):
            return name
    return "utf-8"


def _csv(path: Path, text: str) -> Iterator[Placed]:
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    with _field_limit():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader)]
            _require_unique(path, header)
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


def _require_unique(path: Path, header: list[str]) -> None:
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}:1 has the column {twice!r} twice; rename one")


@contextlib.contextmanager
def _field_limit() -> Iterator[None]:
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _lines(path: Path, text: str) -> Iterator[Placed]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _object(f"{path}:{number}", _parsed(f"{path}:{number}", line))


def _json(path: Path, text: str) -> Iterator[Placed]:
    for number, row in enumerate(_parsed(str(path), text), 1):
        yield _object(f"{path}, item {number}", row)


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON: {' '.join(str(error).split())[:120]}") from None


def _object(place: str, row: Any) -> Placed:
    if not isinstance(row, dict):
        raise UserError(f"{place} is a {type(row).__name__}; an object is needed")
    return place, row


def _plain(path: Path, text: str) -> Iterator[Placed]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{path}:{number}", {"text": line.strip()}
