"""A run folder: what was asked, what was made, and a lock so that two processes never write into one folder.

run.json  rollouts.jsonl  scores.jsonl  activations.*  axis.*  space.*  fit.json  report.html
and, with traits, trait_activations.*  traits.*

with open_run(folder) as run:
    run.require_subject(subject)
"""

import errno
import fcntl
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from personaxis.persona.errors import KnownError
from personaxis.persona.store import read_json, write_json
from personaxis.persona.trained import KIND

# What must not change under a run: rollouts made with other values would be another population.
FIXED = (
    "model",
    "bank",
    "traits_bank",
    "seed",
    "max_new_tokens",
    "temperature",
    "top_p",
    "dtype",
    "engine",
    "chat_template",
    "chunk",
)


@dataclass(frozen=True)
class Run:
    """An open run folder. `rank` 0 writes the shared files; other ranks write only their own shards."""

    folder: Path
    rank: int = 0

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of run.json, {} before the first step."""
        path = self.folder / "run.json"
        content = read_json(path) if path.exists() else {}
        if not isinstance(content, dict):
            raise KnownError(
                f"{path} is not the record of a run, but a {type(content).__name__}; choose another folder"
            )
        return content

    def ask(self, asked: dict[str, Any]) -> None:
        """Record what this call asks for. What makes a run one run (`FIXED`) must agree with what is there."""
        if self.manifest.get("kind") == KIND:
            raise KnownError(f"{self.folder} is a training run, whose own this folder stays; choose another with --out")
        before = self.manifest.get("asked", {})
        for name in FIXED:
            if name in before and name in asked and before[name] != asked[name]:
                raise KnownError(
                    f"{self.folder} is a run with {name} {_short(before[name])}, not {_short(asked[name])}; "
                    f"choose another folder with --out"
                )
        if self.rank == 0:
            content = {**self.manifest, "asked": {**before, **asked}, "versions": versions()}
            content.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
            if content != self.manifest:
                write_json(self.folder / "run.json", content)

    def note(self, **facts: Any) -> None:
        """Add facts about what was done to run.json (rank 0 only)."""
        content = {**self.manifest, **facts}
        if self.rank == 0 and content != self.manifest:
            write_json(self.folder / "run.json", content)


@contextmanager
def open_run(folder: Path, *, create: bool = False, rank: int = 0) -> Iterator[Run]:
    """Lock and open a run folder. `KnownError` when it is missing (without `create`) or another process holds it."""
    if not folder.exists() and not create:
        raise KnownError(f"run folder {folder} does not exist")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise KnownError(f"{folder} is a file, not a run folder") from None
    except (PermissionError, FileNotFoundError) as error:
        raise KnownError(f"run folder {folder} cannot be made ({error.strerror}); choose another with --out") from None
    if rank:
        yield Run(folder, rank)
        return
    try:
        lock = (folder / ".lock").open("w")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise KnownError(f"{folder} cannot be written to ({error.strerror}); choose another with --out") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KnownError(
                f"{folder} is in use by another process; wait for it, or choose another folder with --out"
            ) from None
        yield Run(folder, rank)


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("personaxis", "torch", "transformers", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = (
            f"{value.get('id')} ({value.get('weights')}, {value.get('fingerprint', '')[:8]})"
            if "id" in value
            else value
        )
    return str(value)[:80]
