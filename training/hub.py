"""Data sets of the Hugging Face hub as corpora: fetched once into its own cache, read as a folder after that.

    corpus_of(Path("books"))                                          # a folder or file here, as Corpus.open takes it
    corpus_of(Path("hub:OWNER/NAME"))                                 # every readable file of a data set
    corpus_of(Path("hub:OWNER/NAME/data/train@refs/convert/parquet")) # one folder or file of it, at a branch, tag or commit

Only files that can be read as documents are fetched, and no code of a data set is run. What is in the cache is used where the
hub cannot be reached, if all of it is there. A branch moves: a run that is to be repeated names a commit.
"""

import errno
import re
import sys
from pathlib import Path
from typing import Any

from personaxis.persona.errors import KnownError
from personaxis.persona.progress import say
from personaxis.training.corpus import HELD_SHARE, Corpus
from personaxis.training.documents import ALLOWED, KINDS, PACKED

PREFIX = "hub:"
NAMED = re.compile(r"hub:(?P<repo>[^/@\s]+/[^/@\s]+)(/(?P<inside>[^@]+?))?/?(@(?P<revision>\S+))?")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def corpus_of(
    path: Path, *, held_out: Path | None = None, held_share: float = HELD_SHARE, column: str = "text"
) -> Corpus:
    """`Corpus.open`, which may also name data sets of the hub. Raises `KnownError` for one that cannot be had."""
    return Corpus.open(
        located(path, "--corpus"),
        held_out=None if held_out is None else located(held_out, "--held-out"),
        held_share=held_share,
        column=column,
    )


def located(path: Path, option: str = "--corpus") -> Path:
    """Where a corpus lies: a path as it is, a data set of the hub in the cache, fetched unless it is there."""
    text = str(path)
    if not text.startswith(PREFIX):
        return path
    named = NAMED.fullmatch(text)
    if named is None:
        raise KnownError(f"{option} {text} is not hub:OWNER/NAME, with /FOLDER or @REVISION behind it if need be")
    inside, revision = named["inside"], named["revision"]
    folder = _fetched(text, option, named["repo"], inside, revision)
    found = folder / inside if inside else folder
    if not found.exists():
        where = f" at {inside}" if inside else ""
        raise KnownError(f"{option} {text}: the data set has no files{where} that can be read; allowed: {ALLOWED}")
    say(f"{text}: revision {folder.name[:12]}, in {found}")
    return found


def _fetched(text: str, option: str, repo: str, inside: str | None, revision: str | None) -> Path:
    """The data set's folder in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = are_progress_bars_disabled() or not sys.stderr.isatty()
    shown = not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        patterns = [f"{inside}/*{kind}" if inside else f"*{kind}" for kind in _endings()]
        wanted = [*([inside] if inside else []), *patterns]
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except GatedRepoError:
        reason = "it must be asked for on its page first; then `hf auth login`"
    except RepositoryNotFoundError:
        reason = "there is no such data set, or it is private (`hf auth login`)"
    except RevisionNotFoundError:
        reason = f"it has no revision {revision}"
    except _failures() as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        reason = _reason(error)
    finally:
        if quiet and shown:
            enable_progress_bars()
    raise KnownError(f"{option} {text}: {reason}")


def _failures() -> tuple[type[Exception], ...]:
    """What else a download may fail with: names that are none, OSError, and errors of the HTTP client beneath."""
    from huggingface_hub.errors import HfHubHTTPError

    client: Any = HfHubHTTPError.__bases__  # which client depends on the version
    return (*client, OSError, ValueError)


def _endings() -> list[str]:
    return [kind + packed for kind in KINDS for packed in ("", *PACKED)]


def _reason(error: Exception) -> str:
    """One line for whatever else goes wrong on the way."""
    text = " ".join(str(error).split())
    if "incomplete" in text:
        return "only a part of it is in the cache, and the hub cannot be reached"
    if "locate the files on the Hub" in text or "outgoing traffic has been disabled" in text:
        return "the hub cannot be reached, and it is not in the cache; give a folder of text files instead"
    return text[:300] or type(error).__name__
