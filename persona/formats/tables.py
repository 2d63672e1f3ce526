"""Rows as people keep them: JSON in every layout, CSV, TSV, Parquet or plain lines, each plain or packed.

    for place, value in read_records(Path("requests.json.gz")):
        place, value                                   # "requests.json.gz, item 1", {"goal": "..."}
    for place, row in read_table(Path("requests.csv")):
        row["goal"]                                    # place is "requests.csv:12"

JSON is known by its first character, as no header of a CSV begins with a brace, and Parquet by its own mark.
JSON values follow each other, one a line or over several; a list, or an object with a list of objects in it,
holds rows. Lines end at "\\n" alone: U+2028, U+0085 and form feeds are text. Text is UTF-8 or UTF-16, with or
without a byte order mark; a file that mixes encodings is refused with the line at which it does: a text whose
letters were guessed is another text. So are NaN, and keys that stand twice in one object.
"""

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from personatlas.persona.errors import UserError, describe_value
from personatlas.persona.formats.compression import open_unpacked, require_package, unpacked_name
from personatlas.persona.records import DECODER

LINES, PROSE = (".jsonl", ".ndjson"), (".txt", ".md")
LONGEST_LINE = 1 << 28  # bytes of one line, which json must hold whole
FIELD_LIMIT = 1 << 27  # characters; csv's own limit of 131,072 is shorter than some answers
# fields of an object that hold a table's rows; any other list of objects may be a cell
CONTAINERS = ("data", "rows", "items", "examples", "records", "requests", "prompts", "behaviors", "samples")
_BLANK = re.compile(r"[ \t\n\r\ufeff]*")
Row = dict[str, Any]
Placed = tuple[str, Row]


def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """Every value of a file with its place: rows of tables, values of JSON, plain lines as {"text": line}.

    Raises `UserError` for a file that is not there, is damaged or cannot be decoded, and for what is no JSON.
    """
    require_file(path)
    with open_unpacked(path) as file:
        start = file.read(4096)
    if start.startswith(b"PAR1"):
        for number, row in enumerate(parquet_rows(path), 1):
            yield f"{path}, row {number}", row
        return
    ending = Path(unpacked_name(path)).suffix.lower()
    first = start.decode(_encoding(start), "ignore").removeprefix("\ufeff").lstrip()[:1]
    if first in ("[", "{") or ending in (".json", *LINES):
        values = _json_values(path, start)
        head = next(values, None)
        second = next(values, None)
        if (
            head is not None and second is None
        ):  # a file of one value is its place, unless values come in lines
            yield f"{path}:{head[0]}" if ending in LINES else str(path), head[1]
            return
        for line, value in itertools.chain(filter(None, (head, second)), values):
            yield f"{path}:{line}", value
    elif ending in PROSE:
        for number, text in enumerate(read_text(path).split("\n"), 1):
            if text.strip():
                yield f"{path}:{number}", {"text": text.strip()}
    elif first:
        yield from _csv(path, read_text(path))


def read_table(path: Path) -> list[Placed]:
    """Every row with its place. Keys of CSV columns are as written; a plain line is {"text": line}.

    Raises `UserError` like `read_records`, for an empty file, and for a value that is no row.
    """
    values = list(read_records(path))
    if not values:
        raise UserError(f"{path} is empty or has a header and no row; at least one row is needed")
    place, only = values[0]
    if len(values) == 1 and isinstance(only, dict):
        lists = [own for name, own in only.items() if name in CONTAINERS and isinstance(own, list)]
        lists = [own for own in lists if own and isinstance(own[0], dict)]
        values = [(place, lists[0])] if len(lists) == 1 else values
    rows: list[Placed] = []
    for place, value in values:
        for number, row in enumerate(value, 1) if isinstance(value, list) else [(0, value)]:
            where = f"{place}, item {number}" if number else place
            if not isinstance(row, dict):
                raise UserError(f"{where} is {describe_value(row)}; an object is needed")
            require_unicode(where, row)
            rows.append((where, row))
    if not rows:
        raise UserError(f"{path} is empty; at least one row is needed")
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


def require_unicode(place: str, value: object) -> None:
    """Raises `UserError` for a JSON value with half a surrogate pair in a text, which no file or tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{place} holds half a surrogate pair, which is no text; correct it") from None


def read_text(path: Path) -> str:
    """A file's text, unpacked and decoded, without a byte order mark. Raises `UserError` for mixed encodings.

    The lines of prose and CSV end as the system that wrote them has it: "\\r\\n" becomes "\\n".
    """
    require_file(path)
    with open_unpacked(path) as file:
        content = file.read()
    return _decoded(path, content, _encoding(content[:4096]))


def parse_json(place: str, text: str) -> object:
    """The one JSON value of a text. Raises `UserError` for another text."""
    values = [value for _, value in _values(place, text, 1)]
    if len(values) != 1:
        raise UserError(f"{place} holds {len(values) or 'no'} JSON values; one is needed")
    return values[0]


def read_json_value(path: Path) -> object:
    """The one JSON value of a file. Raises `UserError` for another file."""
    require_file(path)
    with open_unpacked(path) as file:
        content = file.read()
    return parse_json(str(path), _decoded(path, content, _encoding(content[:4096])))


def _encoding(start: bytes) -> str:
    """By the byte order mark; without one, UTF-16 shows by a zero in every other byte; else UTF-8."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for odd, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros, other_zeros = start[odd::2].count(0), start[1 - odd :: 2].count(0)
        if len(start) >= 8 and zeros > 0.4 * len(start) / 2 > 4 * other_zeros:
            return name
    return "utf-8"


def _decoded(path: Path, content: bytes, encoding: str, line: int = 1) -> str:
    """The text of bytes that begin at a line. `UserError` says which line is not of the encoding."""
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        offset = error.start
    line += content[:offset].decode(encoding, "ignore").count("\n")
    name = "UTF-16" if encoding.startswith("utf-16") else "UTF-8"
    raise UserError(
        f"{path}:{line} is not {name} at byte {offset} (0x{content[offset]:02x}): one encoding a file; "
        "save it as UTF-8"
    )


def _json_values(path: Path, start: bytes) -> Iterator[tuple[int, Any]]:
    """Line (from 1) and value of all JSON of a file, by lines as long as each holds whole values."""
    encoding, is_list = _encoding(start), start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    number, rest = 0, b""
    with open_unpacked(path) as file:
        if encoding != "utf-8":
            rest, number = file.read(), 1
        while not rest and (line := file.readline(-1 if is_list else LONGEST_LINE + 1)):
            number += 1
            if not is_list and len(line) > LONGEST_LINE:
                raise UserError(
                    f"{path}:{number} is longer than {LONGEST_LINE >> 20} MiB: one record a line is wanted"
                )
            try:
                values = list(_values("", _decoded(path, line, encoding, number), number))
            except _NotWhole:
                rest = line + file.read()  # a value over several lines, or no JSON
            else:
                yield from values
        if rest:
            yield from _values(str(path), _decoded(path, rest, encoding, number), number)


class _NotWhole(Exception):
    """A line that does not hold whole JSON values."""


def _values(place: str, text: str, line: int) -> Iterator[tuple[int, Any]]:
    """Values that follow each other, each with the line that it begins at; the first one begins at `line`.

    Without a `place` what is no JSON raises `_NotWhole`.
    """
    at = counted = 0
    while (at := _BLANK.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if not place:
                raise _NotWhole from None
            reason = getattr(error, "msg", None) or (
                "too deep" if isinstance(error, RecursionError) else error
            )
            end = getattr(error, "pos", at)
            where = f" at line {line + text.count(chr(10), at, end)}" if "\n" in text[at:end] else ""
            raise UserError(f"{place}:{line} is not valid JSON: {str(reason)[:120]}{where}") from None
        yield line, value


def parquet_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """The rows of a Parquet file, with all columns or one. `UserError` where that is not there."""
    pyarrow = require_package("pyarrow", path)
    from pyarrow import parquet

    with open_unpacked(path, pyarrow.ArrowException) as file, tempfile.TemporaryFile() as whole:
        seekable: io.BufferedIOBase = file
        if path.suffix.lower() != ".parquet":  # a table is read from its end
            shutil.copyfileobj(file, whole)
            whole.seek(0)
            seekable = cast(io.BufferedIOBase, whole)
        table = parquet.ParquetFile(seekable)
        names = table.schema_arrow.names
        if column is not None and column not in names:
            raise UserError(
                f"{path} has no column {column!r}, but {', '.join(names)}; "
                "name the one with the text: --text-column"
            )
        for batch in table.iter_batches(batch_size=256, columns=None if column is None else [column]):
            yield from batch.to_pylist()


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
