"""Files that survive a crash: atomic artefacts and append-only logs.

An artefact is `NAME.safetensors` (tensors, and everything else as one JSON string under the header key `meta`) followed by
`NAME.json` (the same meta for people, with the SHA-256 of the tensor file). Each is written to a temporary file and
renamed, the JSON last, so an artefact without its JSON is one whose writing was interrupted. Nothing is ever unpickled.

    save_tensors(folder / "axis", {"vectors": v}, {"kind": "axis"})
    tensors, meta = load_tensors(folder / "axis", kind="axis")
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personatlas.persona.errors import UserError

if TYPE_CHECKING:  # torch is slow to import, and JSON needs none
    from torch import Tensor

FORMAT = 1


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` on success, remove it on any failure."""
    # not tempfile.mkstemp: its files are 0600 whatever the umask, and the renamed file would stay so
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path`, where nothing or an empty folder may stand, on
    success, and remove it on any failure.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_writable(path: Path, option: str) -> None:
    """`UserError` unless a file can be written at this path: before the work that it is to hold, not after."""
    folder = path.parent
    if path.is_dir():
        raise UserError(f"{option} {path}: this is a folder; give a file's name in it")
    if not folder.is_dir():
        raise UserError(f"{option} {path}: the folder {folder} does not exist")
    probe = (
        folder / f".probe.{secrets.token_hex(6)}"
    )  # permissions alone do not say whether a file can be made
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise UserError(f"{option} {path}: nothing can be written into {folder} ({error.strerror})") from None
    probe.unlink()


def make_folder(folder: Path, option: str) -> None:
    """Make a folder with its parents; `UserError` where a file is in its place or nothing can be made there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{option} {folder} cannot be made ({error.strerror}); choose another place"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option} {folder} cannot be written to; choose another place")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as sorted, indented JSON, atomically. NaN and infinity are refused: JSON has none."""
    text = _json_text(content)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _json_text(content: Any) -> str:
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Parse a JSON file; `UserError` names the file and the line of a mistake."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def digest(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(stem: Path, tensors: "dict[str, Tensor]", meta: dict[str, Any]) -> None:
    """Write `stem.safetensors` and then `stem.json`. `meta` must hold `kind`; equal content gives equal bytes."""
    from safetensors.torch import save

    meta = {**meta, "format": FORMAT}
    header = json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False)
    content = save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata={"meta": header}
    )
    shapes = {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in sorted(tensors.items())}
    record = {**meta, "tensors": shapes, "sha256": hashlib.sha256(content).hexdigest()}
    tensor_path, json_path = stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")
    # both are written before either is renamed, so that a disk too full for the JSON leaves the earlier artefact whole
    with atomic(json_path) as json_temporary, atomic(tensor_path) as tensor_temporary:
        tensor_temporary.write_bytes(content)
        json_temporary.write_text(_json_text(record), encoding="utf-8")


def load_tensors(stem: Path, kind: str) -> "tuple[dict[str, Tensor], dict[str, Any]]":
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
    record = read_json(json_path)
    if not isinstance(record, dict):
        raise UserError(f"{json_path} is not the JSON of an artefact, but a {type(record).__name__}")
    if record.get("kind") != kind:
        raise UserError(f"{json_path} is of kind {record.get('kind')!r}, not {kind!r}")
    if record.get("format") != FORMAT:
        raise UserError(f"{json_path} has format {record.get('format')}; this version reads {FORMAT}")
    if record.get("sha256") != digest(tensor_path):
        raise UserError(
            f"{tensor_path} does not match the hash in {json_path.name}: damaged or half replaced; make it again"
        )
    try:
        with safe_open(tensor_path, framework="pt") as file:
            meta = json.loads(file.metadata()["meta"])
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{tensor_path} is not a readable artefact: {error}") from None
