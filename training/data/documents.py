"""Files to pieces of text, streaming: .txt, .jsonl, .parquet and tar archives of .txt, each plain or
compressed.

    for piece in read_pieces(TextFile("books.tar.xz", path), column="text", size=65536):
        piece.document, piece.number, piece.text      # "books.tar.xz/Austen___Emma.txt", 0, "Emma ..."

A document longer than `size` characters is cut, after the last line that ends in the second half of the
piece, else before a blank in that half, else at `size`; the pieces of a document joined are the document.
Memory is bounded by `size` for text and by one row for .jsonl and .parquet. Bytes that are no UTF-8 become
U+FFFD, and the piece says so; nothing else is changed, except that a byte order mark in front is not text,
nor are Project Gutenberg's header and licence (`licences.py`), whose characters the piece counts.
"""

import codecs
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from personatlas.persona.errors import UserError
from personatlas.persona.formats.compression import CHUNK, PACKED, open_unpacked
from personatlas.persona.formats.tables import LONGEST_LINE, parquet_rows
from personatlas.training.data.licences import without_licences

KINDS = (".txt", ".jsonl", ".parquet", ".tar")
ALLOWED = f"{', '.join(KINDS)}, each plain or {', '.join(PACKED)}"


@dataclass(frozen=True)
class TextFile:
    """A file and the name by which its documents are known."""

    name: str
    path: Path


@dataclass(frozen=True)
class Piece:
    """A document or, when it is long, a part of it."""

    document: str
    number: int
    text: str
    invalid: bool = False
    "whether bytes that are no UTF-8 were replaced in it"
    licence: int = 0
    "characters of Project Gutenberg's header and licence that were taken out around it"
    held_out: bool = False
    "whether it is a passage for validation of a document that is otherwise trained on"


def kind_of(name: str) -> str | None:
    """`.txt`, `.jsonl`, `.parquet`, `.tar`, or None for a file that cannot be read as documents."""
    bare = name.lower()
    for suffix in PACKED:
        bare = bare.removesuffix(suffix)
    return next((kind for kind in KINDS if bare.endswith(kind)), None)


def read_pieces(source: TextFile, *, column: str, size: int, keep_licences: bool = False) -> Iterator[Piece]:
    """All pieces of a file, in its order. A document without text is one empty piece.

    Raises `UserError` for a damaged file and for rows without the column.
    """

    def cut(document: str, chunks: Iterator[tuple[str, bool]]) -> Iterator[Piece]:
        marked = ((*chunk, 0) for chunk in chunks) if keep_licences else without_licences(chunks)
        return _cut(document, marked, size)

    kind = kind_of(source.name)
    assert kind, source
    if kind == ".parquet":
        for number, row in enumerate(parquet_rows(source.path, column), 1):
            text = _text(row[column], f"{source.path}, row {number}", column)
            yield from cut(f"{source.name}:{number}", iter([_encodable(text)]))
        return
    with open_unpacked(source.path, tarfile.TarError) as file:
        if kind == ".txt":
            yield from cut(source.name, _decoded(file))
        elif kind == ".tar":
            with tarfile.open(fileobj=file, mode="r|") as archive:
                for member in archive:
                    if member.isfile() and member.name.lower().endswith(".txt"):
                        content = cast(io.BufferedIOBase, archive.extractfile(member))
                        yield from cut(f"{source.name}/{member.name}", _decoded(content))
        else:
            for number, text in _json_rows(source, file, column):
                yield from cut(f"{source.name}:{number}", iter([_encodable(text)]))


def _decoded(file: io.BufferedIOBase) -> Iterator[tuple[str, bool]]:
    """Text in chunks, and whether each had bytes that are no UTF-8; cut characters wait for the rest."""
    rest, first = b"", True
    while True:
        data = file.read(CHUNK)
        waiting = rest + data
        try:
            text, used = codecs.utf_8_decode(waiting, "strict", not data)
            invalid = False
        except UnicodeDecodeError:
            text, used = codecs.utf_8_decode(waiting, "replace", not data)
            invalid = True
        rest = waiting[used:]
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        yield text, invalid
        if not data:
            return


def _encodable(text: str) -> tuple[str, bool]:
    """Text without half surrogate pairs, which JSON can name and as which invalid UTF-8 was read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True
    return text, False


def _cut(document: str, chunks: Iterator[tuple[str, bool, int]], size: int) -> Iterator[Piece]:
    """The pieces of a document, from chunks of text, whether they were invalid, and what was taken out."""
    number, parts, length, invalid, licence = 0, [""], 0, False, 0
    for chunk, bad, removed in chunks:
        parts.append(chunk)
        length, invalid, licence = length + len(chunk), invalid or bad, licence + removed
        if length <= size:
            continue
        text, start = "".join(parts), 0
        while len(text) - start > size:
            end = _piece_end(text, start, size)
            yield Piece(document, number, text[start:end], invalid, licence)
            start, number, licence = end, number + 1, 0
        parts, length, invalid = [text[start:]], len(text) - start, bad
    yield Piece(document, number, "".join(parts), invalid, licence)


def _piece_end(text: str, start: int, size: int) -> int:
    """Where a piece ends: before a blank, since a word has its blank in front when tokenised."""
    stop = start + size
    line = text.rfind("\n", start + size // 2, stop)
    if line >= 0:
        return line + 1
    for end in range(stop, start + size // 2, -1):
        if text[end].isspace() and not text[end - 1].isspace():
            return end
    return stop


def _json_rows(source: TextFile, file: io.BufferedIOBase, column: str) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        where = f"{source.path}:{number}"
        if len(line) > LONGEST_LINE:
            size = f"{LONGEST_LINE >> 20} MiB"
            raise UserError(f"{where} is longer than {size}: not JSON Lines? Text goes into a .txt")
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", "surrogateescape"))  # `_encodable` finds what is no UTF-8
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON: {error}") from None
        if not isinstance(row, dict) or column not in row:
            has = f"a {type(row).__name__}"
            if isinstance(row, dict):
                has = f"the keys {', '.join(map(str, row))}"
            raise UserError(f"{where} has no {column!r}, but {has}; name another: --text-column")
        yield number, _text(row[column], where, column)


def _text(value: object, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        has = type(value).__name__
        raise UserError(f"{where}: {column!r} is a {has}, not text; name another with --text-column")
    return value
