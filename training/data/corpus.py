"""The texts that a model is made from: which files, in which order, what is held out, how much there is.

    corpus = Corpus.open(Path("books"))                                  # one document in a hundred is held out
    corpus = Corpus.open(Path("books"), held_out=Path("other-books"))    # or other files are
    corpus.scan().train.bytes, corpus.digest
    for piece in corpus.pieces(): piece.text, corpus.holds_out(piece)

Order: files by the SHA-256 of their relative names, so that neither the alphabet nor a file's content decides, then
documents as they stand in their file. Held out is a document whose hashed name falls into the share; with one .txt file
that is the whole corpus, its pieces count as documents. Pieces with a NUL byte (binary files, UTF-16) and blank ones
are left out and counted.

Data sets of the Hugging Face hub as corpora: fetched once into its own cache, read as a folder after that.

    corpus_of(Path("books"))                                          # a folder or file here, as Corpus.open takes it
    corpus_of(Path("hub:OWNER/NAME"))                                 # every readable file of a data set
    corpus_of(Path("hub:OWNER/NAME/data/train@refs/convert/parquet")) # one folder or file of it, at a branch, tag or commit

Only files that can be read as documents are fetched, and no code of a data set is run. What is in the cache is used where the
hub cannot be reached, if all of it is there. A branch moves: a run that is to be repeated names a commit.
"""

import errno
import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from personatlas.persona.artifacts import digest
from personatlas.persona.compression import PACKED
from personatlas.persona.errors import UserError
from personatlas.persona.progress import progress, say
from personatlas.training.data.documents import ALLOWED, KINDS, Piece, Source, kind_of, read_pieces

# Characters of the longest piece, about 15,000 tokens: several contexts long, and a file without a newline still streams.
PIECE = 1 << 16
HELD_SHARE = 0.01
APART = "/held-out/"  # before the names of texts held out by path: no name in a folder begins with a slash
READING = 1  # goes into the digest: raise it when the same files are cut, split or ordered in another way

Side = Literal["train", "held-out"]


@dataclass
class Amount:
    """How much there is of one side."""

    documents: int = 0
    pieces: int = 0
    bytes: int = 0
    "of UTF-8, as it is tokenised"


@dataclass
class Scan:
    """What one reading of a corpus finds."""

    train: Amount = field(default_factory=Amount)
    held_out: Amount = field(default_factory=Amount)
    cut: int = 0
    "documents that are in more than one piece"
    invalid: int = 0
    "pieces with bytes that are no UTF-8, replaced by U+FFFD"
    nul: int = 0
    "pieces with NUL bytes, left out"
    blank: int = 0
    "pieces without a visible character, left out"

    def side(self, side: Side) -> Amount:
        return self.train if side == "train" else self.held_out

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def notes(self) -> str:
        """What was unusual, as a clause; empty if nothing was."""
        told = {
            f"{self.cut:,} long documents cut into pieces": self.cut,
            f"{self.invalid:,} pieces with bytes that are no UTF-8 (now U+FFFD)": self.invalid,
            f"{self.nul:,} pieces with NUL bytes left out": self.nul,
            f"{self.blank:,} blank ones left out": self.blank,
        }
        return ", ".join(text for text, count in told.items() if count)


@dataclass(frozen=True)
class Corpus:
    """Files to read and how. Build it with `Corpus.open`."""

    sources: tuple[Source, ...]
    held_out_sources: tuple[Source, ...]
    held_share: float
    column: str
    size: int

    @staticmethod
    def open(
        path: Path,
        *,
        held_out: Path | None = None,
        held_share: float = HELD_SHARE,
        column: str = "text",
        size: int = PIECE,
    ) -> "Corpus":
        """List the files of a folder, or take one file. What `held_out` names is taken out of the rest.

        Raises `UserError` for what is not there, is empty or cannot be read as documents.
        """
        if not 0 < held_share < 1:
            raise UserError(
                f"--held-share {held_share} is not between 0 and 1 (0.01 holds out one document in 100)"
            )
        apart = sources_of(held_out, "--held-out") if held_out else ()
        elsewhere = {source.path.resolve() for source in apart}
        sources = tuple(s for s in sources_of(path, "--corpus") if s.path.resolve() not in elsewhere)
        if not sources:
            raise UserError(f"--held-out {held_out} is the whole corpus; nothing is left to train on")
        return Corpus(sources, apart, 0.0 if apart else held_share, column, size)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the files' names and bytes and over how they are read."""
        asked = [READING, self.held_share, self.column, self.size]
        names = [[s.name for s in sources] for sources in (self.sources, self.held_out_sources)]
        files = [[digest(s.path) for s in sources] for sources in (self.sources, self.held_out_sources)]
        twice = set(files[0]) & set(files[1])
        if twice:
            name = next(s.name for s, file in zip(self.sources, files[0], strict=True) if file in twice)
            raise UserError(
                f"{name} is held out and trained on: the same bytes are in both; take it out of one"
            )
        return hashlib.sha256(repr([asked, names, files]).encode()).hexdigest()

    @cached_property
    def one_text(self) -> bool:
        """Whether all there is is one .txt: its pieces are then split as documents are."""
        return len(self.sources) == 1 and kind_of(self.sources[0].name) == ".txt"

    def holds_out(self, piece: Piece) -> bool:
        """Whether a piece is for validation only."""
        if self.held_out_sources:
            return piece.document.startswith(APART)
        return share_of(self.unit(piece)) < self.held_share

    def unit(self, piece: Piece) -> str:
        """The name of what a piece belongs to when sides are split and documents are counted."""
        return f"{piece.document}#{piece.number}" if self.one_text else piece.document

    def pieces(self, side: Side | None = None, *, quiet: bool = True) -> Iterator[Piece]:
        """Every piece of a side, or of both, in order; documents held out by path come last."""
        found = (piece for piece in self._read("reading", quiet, side) if _fault(piece) is None)
        return (piece for piece in found if side is None or self.holds_out(piece) == (side == "held-out"))

    def scan(self, *, quiet: bool = True) -> Scan:
        """Read everything once and count. Raises `UserError` if a side has no text."""
        scan, last, cut = Scan(), "", ""
        for piece in self._read("scanning", quiet):
            fault = _fault(piece)
            scan.invalid += piece.invalid
            scan.nul += fault == "nul"
            scan.blank += fault == "blank"
            if piece.number == 1 and piece.document != cut:
                scan.cut, cut = scan.cut + 1, piece.document
            if fault is None:
                amount = scan.side("held-out" if self.holds_out(piece) else "train")
                unit = self.unit(piece)
                amount.documents += unit != last
                amount.pieces += 1
                amount.bytes += len(piece.text.encode())
                last = unit
        self._require_text(scan)
        return scan

    def sample(self, scan: Scan, budget: int) -> Iterator[str]:
        """Texts of the training side, at most about `budget` bytes in all, spread evenly over the corpus.

        No draw: a piece is taken whenever the bytes taken so far, with half of it, are at most the share (budget over
        all training bytes) of the bytes met so far. The error never exceeds one piece, and the same corpus and budget
        give the same texts. If that takes nothing (one short piece, a tiny budget), the last piece is taken.
        """
        share = min(budget / scan.train.bytes, 1.0)
        met = taken = 0
        text = None
        for piece in self.pieces("train"):
            text = piece.text
            length = len(text.encode())
            met += length
            if share == 1.0 or taken + length / 2 <= met * share:
                taken += length
                yield text
        if not taken and text is not None:
            yield text

    def _read(self, what: str, quiet: bool, side: Side | None = None) -> Iterator[Piece]:
        sources = self.sources + self.held_out_sources
        if self.held_out_sources and side is not None:
            sources = self.sources if side == "train" else self.held_out_sources
        with progress(what, len(sources), "characters", quiet=quiet) as advance:
            for source in sources:
                units = 0
                for piece in read_pieces(source, column=self.column, size=self.size):
                    units += len(piece.text)
                    yield piece
                advance(1, units)

    def _require_text(self, scan: Scan) -> None:
        found = scan.train.documents + scan.held_out.documents
        if not found:
            reason = scan.notes() or "its files have no rows or no .txt members"
            hint = "; UTF-16 must be saved as UTF-8" if scan.nul else ""
            raise UserError(f"the corpus has no text: {reason}{hint}")
        if not scan.train.documents:
            raise UserError(
                f"all {found} documents of the corpus are held out at a share of {self.held_share:g}; "
                "lower --held-share or name others with --held-out PATH"
            )
        if not scan.held_out.documents:
            share = "" if self.held_out_sources else f" at a share of {self.held_share:g}"
            raise UserError(
                f"none of the corpus's {found} documents is held out{share}; "
                "raise --held-share or name other texts with --held-out PATH"
            )


def share_of(name: str) -> float:
    """A name's place in [0, 1), evenly spread."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / (1 << 48)


def _fault(piece: Piece) -> Literal["nul", "blank"] | None:
    if "\0" in piece.text:
        return "nul"
    return None if piece.text.strip() else "blank"


def sources_of(path: Path, option: str) -> tuple[Source, ...]:
    """The readable files of a path in the order of their hashed names. Raises `UserError` where there is none."""
    prefix = APART if option == "--held-out" else ""
    if path.is_file():
        if kind_of(path.name) is None:
            raise UserError(f"{option} {path} cannot be read as documents; allowed: {ALLOWED}")
        return (Source(prefix + path.name, path),)
    if not path.is_dir():
        raise UserError(f"{option} {path} does not exist; give a folder or a file ({ALLOWED})")
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    found = [name for name in names if kind_of(name)]
    if not found:
        others = sorted({Path(name).suffix or name for name in names})[:5]
        has = f"{len(names)} other files ({', '.join(others)})" if names else "nothing"
        raise UserError(f"{option} {path} has {has}; allowed: {ALLOWED}")
    found.sort(key=lambda name: (share_of(name), name))
    return tuple(Source(prefix + name, path / name) for name in found)


PREFIX = "hub:"
NAMED = re.compile(r"hub:(?P<repo>[^/@\s]+/[^/@\s]+)(/(?P<inside>[^@]+?))?/?(@(?P<revision>\S+))?")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def corpus_of(
    path: Path, *, held_out: Path | None = None, held_share: float = HELD_SHARE, column: str = "text"
) -> Corpus:
    """`Corpus.open`, which may also name data sets of the hub. Raises `UserError` for one that cannot be had."""
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
        raise UserError(
            f"{option} {text} is not hub:OWNER/NAME, with /FOLDER or @REVISION behind it if need be"
        )
    inside, revision = named["inside"], named["revision"]
    folder = _fetched(text, option, named["repo"], inside, revision)
    found = folder / inside if inside else folder
    if not found.exists():
        where = f" at {inside}" if inside else ""
        raise UserError(
            f"{option} {text}: the data set has no files{where} that can be read; allowed: {ALLOWED}"
        )
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
    raise UserError(f"{option} {text}: {reason}")


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
