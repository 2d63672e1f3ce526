"""Files as they are on disk, plain or packed (.gz, .xz, .bz2, .zst, a .zip of one file), as streams of bytes.

with open_unpacked(Path("chats.jsonl.zst")) as file:
    first = file.readline()
"""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from personatlas.persona.errors import UserError

PACKED = (".gz", ".xz", ".zst", ".bz2", ".zip")
CHUNK = 1 << 16  # bytes read at a time


def without_packing(name: str) -> str:
    """A file's name without the endings of compression."""
    for ending in PACKED:
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return name


def unpacked_name(path: Path) -> str:
    """The name of what is packed: the one in a .zip, else the file's own without its last ending."""
    if path.suffix.lower() != ".zip":
        return without_packing(path.name)
    try:
        with zipfile.ZipFile(path) as archive:
            return Path(_only_member(path, archive)).name
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from None


def require_package(package: str, path: Path) -> ModuleType:
    """The module that is needed to read a file; `UserError` says how to install it."""
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"{path} needs the package {package}: pip install personatlas[corpus]") from None


@contextmanager
def open_unpacked(path: Path, *damage: type[Exception]) -> Iterator[io.BufferedIOBase]:
    """A file's bytes, unpacked by its ending. Damage that is found while it is read is a `UserError`.

    `damage` are further exceptions that what reads the bytes raises for a damaged file.
    """
    known: tuple[type[Exception], ...] = (EOFError, OSError, lzma.LZMAError, zlib.error, *damage)
    ending = path.suffix.lower()
    if ending == ".zst":
        known += (require_package("zstandard", path).ZstdError,)
    elif ending == ".zip":  # the latter two: an unknown method, a password
        known += (zipfile.BadZipFile, NotImplementedError, RuntimeError)
    try:
        with _open(path, ending) as file:
            yield file
    except known as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's trouble, not the file's
            raise
        raise UserError(f"{path} is damaged or cut short: {' '.join(str(error).split())}") from None


def _open(path: Path, ending: str) -> io.BufferedIOBase:
    if ending == ".zst":
        return io.BufferedReader(_ZstdFrames(path), CHUNK)
    if ending == ".zip":
        archive = zipfile.ZipFile(path)
        return cast(io.BufferedIOBase, archive.open(_only_member(path, archive)))
    if ending in (".gz", ".xz", ".bz2"):
        opener: Any = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}[ending]
        return cast(io.BufferedIOBase, opener(path))
    return path.open("rb")


def _only_member(path: Path, archive: zipfile.ZipFile) -> str:
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    names = [name for name in names if not name.startswith("__MACOSX/")]  # what a Mac adds to each file
    if len(names) != 1:
        some = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
        raise UserError(f"{path} holds {len(names)} files{some}; give a .zip of one, or unpack it")
    return names[0]


class _ZstdFrames(io.RawIOBase):
    """A .zst file as a stream. zstandard's own reader ends quietly where a frame is cut short."""

    def __init__(self, path: Path) -> None:
        decompressor = require_package("zstandard", path).ZstdDecompressor(max_window_size=1 << 31)
        self._new = decompressor.decompressobj
        self._file, self._ready = path.open("rb"), b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            left = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = left or self._file.read(CHUNK)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the compressed file ended before its end-of-frame mark")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new()
            self._ready = self._frame.decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
