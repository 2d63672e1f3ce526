"""Files that survive a crash: atomic artefacts and append-only logs.

An artefact is `NAME.safetensors` (tensors, and everything else as one JSON string under the header key
`meta`) followed by `NAME.json` (the same meta for people, with the SHA-256 of the tensor file). Each is
written to a temporary file and renamed, the JSON last, so an artefact without its JSON is one whose writing
was interrupted. Nothing is ever unpickled.

A temporary file or folder is `.NAME.HEX` beside NAME, and its process holds a lock on it. One that nobody
locks was left by a killed process: the next writer of NAME removes it, `remove_leftovers` all in a folder.

    save_tensors(folder / "thing", {"vectors": v}, {"kind": "thing"})
    tensors, meta = load_tensors(folder / "thing", kind="thing")

A dataclass that is such an artefact derives from `TensorRecord`; its annotations are the schema, checked in
`load`.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from personatlas.persona.errors import UserError, describe_value, explain_os_error, find_os_error
from personatlas.persona.records import (
    FieldError,
    JsonObject,
    JsonRecord,
    Record,
    decode_json,
    decode_object,
    type_hints,
)

if TYPE_CHECKING:  # torch is slow to import, and JSON needs none
    from torch import Tensor

FORMAT = 1
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}")
LOCK = "0" * 12  # the HEX of a lock file: one that a killed process left is removed as any leftover
LONGEST_NAME = 200  # bytes, which leaves room for endings
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)\d)", re.IGNORECASE)  # on Windows
REMAKE = "delete it and run the command that made it again"
Stored = TypeVar("Stored", bound="TensorRecord")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, renamed to it on success and removed on any failure."""
    with _temporary(path, is_folder=False) as temporary:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, renamed to it on success and removed on any failure.

    At `path` nothing or an empty folder may stand; with `replace` whatever stands there is removed.
    """
    with _temporary(path, is_folder=True) as temporary:
        yield temporary
        if replace and path.is_dir():
            remove_folder(path)
        temporary.replace(path)


def remove_folder(path: Path) -> None:
    """Removes a folder, renamed first: a kill in the middle leaves no half of it under its name."""
    doomed = _beside(path, secrets.token_hex(6))
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files and folders of killed processes from a folder and from the folders in it."""
    _remove_unlocked(path for pattern in (".*", "*/.*") for path in folder.glob(pattern))


@contextlib.contextmanager
def locked(path: Path, *, lock: Path | None = None, wait: bool = False) -> Iterator[None]:
    """Holds the only right to write `path`, by a file beside it (or at `lock`) that is removed at the end.

    `UserError` where another process has it, unless `wait`, where nothing can be written, and where the
    file system has no locks.
    """
    lock = lock or _beside(path, LOCK)
    while True:
        try:
            file = lock.open("w")
        except OSError as error:
            raise UserError(f"{path} cannot be written to: {explain_os_error(error)}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(
                    f"{path} is in use by another process; wait for it, or choose another path with --out"
                ) from None
            except OSError as error:
                raise UserError(f"{path} cannot be locked: {explain_os_error(error, lock)}") from None
            if not _is_at(file.fileno(), lock):
                continue  # its last owner has removed it meanwhile
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def require_file_names(names: Iterable[str], where: str) -> None:
    """`UserError` for names of which one cannot be a file's name on every system, or two would be one file's."""
    seen: dict[str, str] = {}
    for name in names:
        printable = name.isprintable() and not set(name) & {"/", "\\"}
        plain = bool(name) and name[0] != "." and name[-1] not in ". "
        reserved = RESERVED.fullmatch(name.partition(".")[0].strip()) is not None
        if not printable or not plain or reserved or len(name.encode(errors="replace")) > LONGEST_NAME:
            raise UserError(f"{where}: {name[:60]!r} cannot be a file's name; rename it")
        if (other := seen.setdefault(name.casefold(), name)) is not name:
            raise UserError(f"{where}: {other[:60]!r} and {name[:60]!r} would be one file; rename one")


def set_aside(path: Path) -> Path:
    """Rename a damaged file so that another can be written in its place; returns where it is now."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    aside = next(name for name in names if not name.exists())
    return path.replace(aside)


def require_writable(path: Path, option: str) -> None:
    """`UserError` unless a file can be written at this path: before the work that it is to hold, not after."""
    if path.is_dir():
        raise UserError(f"{option} {path}: this is a folder; give a file's name in it")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist")
    try:
        with _temporary(path, is_folder=False):
            pass
    except OSError as error:
        raise UserError(f"{option} {explain_os_error(error)}") from None


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder with its parents; `UserError` where it cannot be made or written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder / "probe", is_folder=False):
            pass
    except OSError as error:
        if isinstance(error, FileExistsError):
            error.errno = errno.ENOTDIR
        raise UserError(f"{option} {folder} cannot be made: {explain_os_error(error)}") from None


@contextlib.contextmanager
def _temporary(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """A locked temporary file or folder for `path`, which errors of the disk carry as their file's name."""
    try:
        _remove_unlocked(path.parent.glob(f".{glob.escape(path.name)}.*"))
        # not tempfile: its files are 0600 whatever the umask, and the renamed file would stay so
        while (
            descriptor := _make_locked(temporary := _beside(path, secrets.token_hex(6)), is_folder)
        ) is None:
            pass
        try:
            yield temporary
        finally:
            _remove(temporary)
            os.close(descriptor)
    except Exception as error:
        found = find_os_error(error)
        if found is None:
            raise
        name = found.filename
        if name is not None and TEMPORARY.fullmatch(Path(os.fsdecode(name)).name) is None:
            raise
        raise OSError(found.errno, found.strerror, str(path)) from error


def _make_locked(path: Path, is_folder: bool) -> int | None:
    """Makes and locks a file or folder; None where another process took it for a leftover before its lock."""
    flags = os.O_CLOEXEC | (os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT | os.O_EXCL)
    if is_folder:
        path.mkdir()
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        _remove(path)
        if is_folder and isinstance(error, FileNotFoundError):
            return None
        raise
    with contextlib.suppress(OSError):  # a network disk without locks: nobody removes leftovers there
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if _is_at(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _beside(path: Path, ending: str) -> Path:
    path = Path(os.path.abspath(path))  # "." has no name; links stay links
    return path.with_name(f".{path.name}.{ending}")


def _remove_unlocked(paths: Iterable[Path]) -> None:
    """Removes those temporary files and folders that no living process writes."""
    for path in paths:
        if TEMPORARY.fullmatch(path.name) is None or path.is_symlink():
            continue
        with contextlib.suppress(OSError):  # locked, gone, or not ours to open
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_json(path: Path, content: object) -> None:
    """Write `content` as sorted, indented JSON, atomically. NaN and infinity are refused: JSON has none."""
    text = _json_text(content)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _json_text(content: Any) -> str:
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Parse a JSON file; `UserError` names the file and the line of a mistake."""
    try:
        return decode_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_object(path: Path) -> JsonObject:
    """Parse a JSON file that holds an object; `UserError` for anything else."""
    if not isinstance(content := read_json(path), dict):
        raise UserError(f"{path} is {describe_value(content)}, not an object")
    return content


def read_record(path: Path, kind: type[Record], remedy: str = REMAKE) -> Record:
    """Read a record from a JSON file; `UserError` for a file that holds none, ending with the remedy."""
    try:
        return kind.from_json(read_object(path))
    except FieldError as error:
        raise UserError(f"{path} is damaged: {error}; {remedy}") from None


def digest(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(stem: Path, tensors: "dict[str, Tensor]", meta: JsonObject) -> None:
    """Write `stem.safetensors` and then `stem.json`. `meta` must hold `kind`; equal content gives equal
    bytes.
    """
    from safetensors.torch import save

    meta = {**meta, "format": FORMAT}
    header = json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False)
    content = save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata={"meta": header}
    )
    record = {**meta, "tensors": _shapes(tensors), "sha256": hashlib.sha256(content).hexdigest()}
    tensor_path, json_path = stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")
    # both are written before either is renamed, so that a disk too full for the JSON leaves the earlier
    # artefact whole
    with atomic(json_path) as json_temporary, atomic(tensor_path) as tensor_temporary:
        tensor_temporary.write_bytes(content)
        json_temporary.write_text(_json_text(record), encoding="utf-8")


def load_tensors(stem: Path, kind: str) -> "tuple[dict[str, Tensor], JsonObject]":
    """Read an artefact written by `save_tensors`, checking its hash, its kind and its format.

    Raises `UserError` for a missing, unfinished, damaged or foreign artefact.
    """
    from safetensors import SafetensorError, safe_open

    tensor_path, json_path = stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")
    for path in (tensor_path, json_path):
        if not path.is_file():
            raise UserError(
                f"{path} does not exist: the artefact was never finished; run the step that makes it again"
            )
    record = read_object(json_path)
    if record.get("kind") != kind:
        raise UserError(f"{json_path} is of kind {record.get('kind')!r}, not {kind!r}")
    if record.get("format") != FORMAT:
        raise UserError(f"{json_path} has format {record.get('format')}; this version reads {FORMAT}")
    if record.get("sha256") != digest(tensor_path):
        raise UserError(
            f"{tensor_path} does not match the hash in {json_path.name}: damaged or half replaced; {REMAKE}"
        )
    try:
        with safe_open(tensor_path, framework="pt") as file:
            meta = decode_object(file.metadata()["meta"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{tensor_path} is not a readable artefact: {error}; {REMAKE}") from None
    if {**meta, "tensors": _shapes(tensors), "sha256": record["sha256"]} != record:
        raise UserError(f"{json_path} does not say what is in {tensor_path.name}: one was changed; {REMAKE}")
    return tensors, meta


def _shapes(tensors: "dict[str, Tensor]") -> dict[str, list[str | int]]:
    return {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in sorted(tensors.items())}


@dataclass(frozen=True)
class TensorRecord(JsonRecord):
    """Base of the dataclasses that are stored as artefacts: jaxtyped fields are its tensors, all others its
    meta.

    `kind` is the artefact's; `nonfinite` names tensors that may hold NaN and infinity. `optional` tensors are
    left out while they are None or empty. Floating-point tensors are fp32, others int64. A field `stem` is
    not stored: it is the path that the record was loaded from.
    """

    kind: ClassVar[str]
    nonfinite: ClassVar[tuple[str, ...]] = ()

    def save(self, stem: Path) -> None:
        """Write `stem.safetensors` and `stem.json`."""
        tensors, hints = {}, self._tensor_hints()
        meta = {key: value for key, value in self.to_json().items() if key not in (*hints, "stem")}
        for name in hints:
            value = getattr(self, name)
            if value is not None and (value.numel() or name not in self.optional):
                tensors[name] = value
        save_tensors(stem, tensors, {"kind": self.kind, **meta})

    @classmethod
    def load(cls: type[Stored], stem: Path) -> Stored:
        """Read what `save` wrote; `UserError` when it is missing, damaged, or holds what this record cannot."""
        tensors, meta = load_tensors(stem, cls.kind)
        try:
            cls._check_tensors(tensors)
            return cls.from_json({**meta, **tensors, "stem": stem})
        except FieldError as error:
            raise UserError(f"{stem}.json is damaged: {error}; {REMAKE}") from None

    @classmethod
    def _tensor_hints(cls) -> dict[str, Any]:
        """The jaxtyping annotation of each field that is a tensor."""
        found = {}
        for name, hint in type_hints(cls).items():
            for kind in (hint, *getattr(hint, "__args__", ())):
                if hasattr(kind, "dim_str"):
                    found[name] = kind
        return found

    @classmethod
    def _check_tensors(cls, tensors: "dict[str, Tensor]") -> None:
        import torch

        hints, sizes = cls._tensor_hints(), dict[str, int]()
        if extra := sorted(set(tensors) - set(hints)):
            raise FieldError(" is a tensor that does not belong there", extra[0][:60])
        for name, hint in hints.items():
            if (value := tensors.get(name)) is None:
                if name in cls.optional:
                    continue
                raise FieldError(" is a missing tensor", name)
            dtype = torch.float32 if "float32" in hint.dtypes else torch.int64
            dims = hint.dim_str.split()
            if value.dtype != dtype or value.ndim != len(dims):
                wanted = f"{str(dtype).removeprefix('torch.')} ({', '.join(dims)})"
                raise FieldError(f" is {describe_value(value)}, not {wanted}", name)
            for dim, size in zip(dims, value.shape, strict=True):
                if sizes.setdefault(dim, int(dim) if dim.isdigit() else size) != size:
                    raise FieldError(f" is {describe_value(value)} where {dim} is {sizes[dim]}", name)
            if name not in cls.nonfinite and not torch.isfinite(value).all():
                raise FieldError(" holds NaN or infinity", name)
