"""The texts that a model is pretrained on: which files, in which order, what is held out, how much there is.

    corpus = Corpus.open(Path("books"))                                  # holds out a hundredth (`split.py`)
    corpus = Corpus.open(Path("books"), held_out=Path("other-books"))    # holds out other files
    corpus.scan().train.bytes, corpus.digest
    for piece in corpus.pieces(): piece.text, corpus.holds_out(piece)

    Corpus.open(Path("hub:OWNER/NAME/data/train@refs/convert/parquet"))  # a data set of the Hugging Face hub

Order: files by the SHA-256 of their relative names, so that neither the alphabet nor a file's content
decides, then documents as they stand in their file. Where one .txt file is the whole corpus, its pieces count
as documents. Pieces with a NUL byte (binary files, UTF-16) and blank ones are left out and counted, as are
Project Gutenberg's headers and licences (`licences.py`). Of a data set only files that can be read as
documents are fetched, into the hub's own cache, which is used where the hub cannot be reached.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from personatlas.persona.artifacts import digest
from personatlas.persona.errors import UserError
from personatlas.persona.formats.compression import PACKED
from personatlas.persona.progress import progress, say
from personatlas.persona.records import JsonObject
from personatlas.training.data.documents import ALLOWED, KINDS, Piece, TextFile, kind_of, read_pieces
from personatlas.training.data.split import HELD_SHARE, Split, cut_passages, hash_share, make_split

# Characters of the longest piece: about 15,000 tokens, several contexts, and a file without newlines streams
PIECE = 1 << 16
HELD_OUT_PREFIX = "/held-out/"  # of texts held out by path: no name in a folder begins with a slash
READING = 1  # part of the digest: raise it when the same files are cut, split or ordered in another way
PARAGRAPH = 80  # characters of a paragraph that does not stand twice in a text by chance
LICENCE = re.compile("project gutenberg", re.IGNORECASE)
LICENCE_WITHIN = 3000  # characters at a document's beginning in which its licence is named

Side = Literal["train", "held-out"]


@dataclass
class TextAmount:
    """How much text there is on one side."""

    documents: int = 0
    pieces: int = 0
    bytes: int = 0
    "of UTF-8, as it is tokenised"


@dataclass
class CorpusScan:
    """What a corpus holds, as found by reading it once."""

    train: TextAmount = field(default_factory=TextAmount)
    held_out: TextAmount = field(default_factory=TextAmount)
    cut: int = 0
    "documents that are in more than one piece"
    invalid: int = 0
    "pieces with bytes that are no UTF-8, replaced by U+FFFD"
    nul: int = 0
    "pieces with NUL bytes, left out"
    blank: int = 0
    "pieces without a visible character, left out"
    licences: int = 0
    "characters of Project Gutenberg's headers and licences, left out"
    named: int = 0
    "documents that name Project Gutenberg at their beginning"
    paragraphs: int = 0
    "different held-out paragraphs of `PARAGRAPH` characters or more"
    repeated: int = 0
    "of these, how many stand in the training text as well"
    split: JsonObject = field(default_factory=dict)
    "what is held out, see `Split`"

    def to_json(self) -> JsonObject:
        """As in training.json of a tokenizer."""
        return asdict(self)

    def notes(self) -> str:
        """What was unusual, as a clause; empty if nothing was."""
        counts = {
            f"{self.cut:,} long documents cut into pieces": self.cut,
            f"{self.invalid:,} pieces with bytes that are no UTF-8 (now U+FFFD)": self.invalid,
            f"{self.nul:,} pieces with NUL bytes left out": self.nul,
            f"{self.blank:,} blank ones left out": self.blank,
            f"Project Gutenberg's headers and licences, {self.licences:,} characters, left out "
            "(--keep-licences keeps them)": self.licences,
            f"{self.named:,} documents with Project Gutenberg's name in front, kept": self.named,
        }
        return ", ".join(text for text, count in counts.items() if count)

    def lines(self) -> list[str]:
        """For people: what was unusual, what is held out of few documents, whether it is trained on."""
        lines = [f"the corpus has {notes}"] if (notes := self.notes()) else []
        share = self.held_out.bytes / max(1, self.held_out.bytes + self.train.bytes)
        size = f"{self.held_out.bytes:,} bytes, {share:.1%}"
        if passages := len(self.split.get("passages", ())):
            lines.append(f"held out: a passage of each of {passages:,} documents ({size})")
        elif self.split.get("documents"):
            lines.append(f"held out: {self.held_out.documents:,} whole documents ({size})")
        if self.repeated:
            lines.append(
                f"warning: {self.repeated:,} of {self.paragraphs:,} held-out paragraphs are trained on "
                "too, so the held-out loss is too low; take copies out, or name other texts: --held-out"
            )
        return lines


@dataclass(frozen=True)
class Corpus:
    """Files to read and how, made by `Corpus.open`."""

    files: tuple[TextFile, ...]
    held_out_files: tuple[TextFile, ...]
    held_share: float | None
    column: str
    size: int
    keep_licences: bool = False

    @staticmethod
    def open(
        path: Path,
        *,
        held_out: Path | None = None,
        held_share: float | None = None,
        column: str = "text",
        size: int = PIECE,
        keep_licences: bool = False,
    ) -> "Corpus":
        """Lists the files of a path here or of a data set of the hub. `held_out` is taken out of the rest.

        Raises `UserError` for what does not exist, is empty or cannot be read as documents.
        """
        if held_share is not None and not 0 < held_share < 1:
            raise UserError(f"--held-share {held_share} is not between 0 and 1 (0.01: one document in 100)")
        path = locate_corpus(path, "--corpus")
        held_out = None if held_out is None else locate_corpus(held_out, "--held-out")
        held_out_files = () if held_out is None else list_text_files(held_out, "--held-out")
        elsewhere = {file.path.resolve() for file in held_out_files}
        files = tuple(f for f in list_text_files(path, "--corpus") if f.path.resolve() not in elsewhere)
        if not files:
            raise UserError(f"--held-out {held_out} is the whole corpus; nothing is left to train on")
        return Corpus(files, held_out_files, held_share, column, size, keep_licences)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the files' names and bytes and over how they are read."""
        split, usual = self.split, 0.0 if self.held_out_files else self.held_share or HELD_SHARE
        settings = [READING, usual, self.column, self.size]
        if split.whole is not None or split.passages:
            settings.append(split.to_json())
        if split.licences:
            settings.append("without licences")
        sides = (self.files, self.held_out_files)
        names = [[file.name for file in files] for files in sides]
        digests = [[digest(file.path) for file in files] for files in sides]
        if twice := set(digests[0]) & set(digests[1]):
            name = next(name for name, sha in zip(names[0], digests[0], strict=True) if sha in twice)
            raise UserError(f"{name} is held out and trained on: its bytes are in both; take it out of one")
        return hashlib.sha256(repr([settings, names, digests]).encode()).hexdigest()

    @cached_property
    def is_one_text(self) -> bool:
        """Whether one .txt is the whole corpus: its pieces are then split as documents are."""
        return len(self.files) == 1 and kind_of(self.files[0].name) == ".txt"

    @cached_property
    def split(self) -> Split:
        """What is held out, decided by reading the corpus."""

        def read() -> Iterator[Piece]:
            return (piece for piece in self._read("reading", quiet=True) if _fault(piece) is None)

        def unit(piece: Piece) -> str:
            return f"{piece.document}#{piece.number}" if self.is_one_text else piece.document

        if self.held_out_files:
            return Split(0.0, licences=len({piece.document for piece in read() if piece.licence}))
        return make_split(read, unit, self.held_share)

    def holds_out(self, piece: Piece) -> bool:
        """Whether a piece is for validation only."""
        if self.held_out_files:
            return piece.document.startswith(HELD_OUT_PREFIX)
        if self.split.passages:
            return piece.held_out
        name = self.unit(piece)
        return hash_share(name) < self.split.share if self.split.whole is None else name in self.split.whole

    def unit(self, piece: Piece) -> str:
        """The name of the document that a piece belongs to."""
        is_whole = not self.is_one_text or bool(self.split.passages)
        return piece.document if is_whole else f"{piece.document}#{piece.number}"

    def pieces(self, side: Side | None = None, *, quiet: bool = True) -> Iterator[Piece]:
        """Every piece of a side, or of both, in order; documents held out by path come last."""
        usable = (piece for piece in self._read("reading", quiet, side) if _fault(piece) is None)
        cut = cut_passages(usable, self.split)
        return (piece for piece in cut if side is None or self.holds_out(piece) == (side == "held-out"))

    def scan(self, *, quiet: bool = True) -> CorpusScan:
        """Reads everything once and counts. Raises `UserError` if a side has no text."""
        scan, last, cut = CorpusScan(split=self.split.to_json()), dict[bool, str](), ""
        held_out = {mark for piece in self.pieces("held-out") for mark in _paragraphs(piece.text)}
        repeated = set[int]()

        def usable() -> Iterator[Piece]:
            nonlocal cut
            for piece in self._read("scanning", quiet):
                fault = _fault(piece)
                scan.invalid += piece.invalid
                scan.nul += fault == "nul"
                scan.blank += fault == "blank"
                scan.licences += piece.licence
                scan.named += not piece.number and bool(LICENCE.search(piece.text, 0, LICENCE_WITHIN))
                if piece.number == 1 and piece.document != cut:
                    scan.cut, cut = scan.cut + 1, piece.document
                if fault is None:
                    yield piece

        for piece in cut_passages(usable(), self.split):
            is_held_out = self.holds_out(piece)
            amount = scan.held_out if is_held_out else scan.train
            unit = self.unit(piece)
            amount.documents += unit != last.get(is_held_out)
            amount.pieces += 1
            amount.bytes += len(piece.text.encode())
            last[is_held_out] = unit
            if not is_held_out:
                repeated.update(held_out.intersection(_paragraphs(piece.text)))
        scan.paragraphs, scan.repeated = len(held_out), len(repeated)
        total = scan.train.documents + scan.held_out.documents
        if not total:
            reason = scan.notes() or "its files have no rows or no .txt members"
            hint = "; UTF-16 must be saved as UTF-8" if scan.nul else ""
            raise UserError(f"the corpus has no text: {reason}{hint}")
        if not scan.train.documents:
            raise UserError(
                f"all {total} documents of the corpus are held out at a share of {self.split.share:g}; "
                "lower --held-share or name others with --held-out PATH"
            )
        if not scan.held_out.documents:
            raise UserError(
                "nothing can be held out of so short a corpus; give more text, "
                "or name other texts with --held-out PATH"
            )
        return scan

    def sample(self, scan: CorpusScan, budget: int) -> Iterator[str]:
        """Texts of the training side, at most about `budget` bytes in all, spread evenly over the corpus.

        A piece is taken whenever the bytes taken so far, with half of it, are at most the share (budget over
        all training bytes) of the bytes met so far: the error never exceeds one piece, and nothing is random.
        If that takes nothing (one short piece, a tiny budget), the last piece is taken.
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
        files = self.files + self.held_out_files
        if self.held_out_files and side is not None:
            files = self.files if side == "train" else self.held_out_files
        with progress(what, len(files), "characters", quiet=quiet) as advance:
            for file in files:
                characters = 0
                for piece in read_pieces(
                    file, column=self.column, size=self.size, keep_licences=self.keep_licences
                ):
                    characters += len(piece.text)
                    yield piece
                advance(1, characters)


def _paragraphs(text: str) -> Iterator[int]:
    """Hashes of paragraphs (of lines, where no line is blank), whatever the blanks in them."""
    parts = re.split(r"\n\s*\n", text)
    words = (" ".join(part.split()) for part in (parts if len(parts) > 1 else text.split("\n")))
    return (hash(part) for part in words if len(part) >= PARAGRAPH)


def _fault(piece: Piece) -> Literal["nul", "blank"] | None:
    if "\0" in piece.text:
        return "nul"
    return None if piece.text.strip() else "blank"


def list_text_files(path: Path, option: str) -> tuple[TextFile, ...]:
    """The readable files of a path by their hashed names. Raises `UserError` where there is none."""
    prefix = HELD_OUT_PREFIX if option == "--held-out" else ""
    if path.is_file():
        if kind_of(path.name) is None:
            raise UserError(f"{option} {path} cannot be read as documents; allowed: {ALLOWED}")
        return (TextFile(prefix + path.name, path),)
    if not path.is_dir():
        raise UserError(f"{option} {path} does not exist; give a folder or a file ({ALLOWED})")
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    readable = [name for name in names if kind_of(name)]
    if not readable:
        others = sorted({Path(name).suffix or name for name in names})[:5]
        has = f"{len(names)} other files ({', '.join(others)})" if names else "nothing"
        raise UserError(f"{option} {path} has {has}; allowed: {ALLOWED}")
    readable.sort(key=lambda name: (hash_share(name), name))
    return tuple(TextFile(prefix + name, path / name) for name in readable)


def sample_documents(path: Path, column: str, max_bytes: int) -> list[str]:
    """Documents of a folder or file, or pieces of long ones; evenly taken where they have more bytes."""
    files = list_text_files(locate_corpus(path, "--text"), "--text")
    pieces = [piece for file in files for piece in read_pieces(file, column=column, size=PIECE)]
    texts = [piece.text for piece in pieces if _fault(piece) is None]
    if licences := sum(piece.licence for piece in pieces):
        say(f"Project Gutenberg's headers and licences, {licences:,} characters, are not read")
    if not texts:
        raise UserError(f"--text {path} has no text")
    sample = texts[:: max(1, round(sum(len(text.encode()) for text in texts) / max_bytes))]
    if len(sample) < len(texts):
        say(f"{len(sample):,} of {len(texts):,} documents are read (--most {max_bytes:,} bytes)")
    return sample


HUB_NAME = re.compile(r"hub:(?P<repo>[^/@\s]+/[^/@\s]+)(/(?P<inside>[^@]+?))?/?(@(?P<revision>\S+))?")


def locate_corpus(path: Path, option: str = "--corpus") -> Path:
    """A path as it is; for hub:OWNER/NAME[/FOLDER][@REVISION] the folder in the cache, fetched if need be."""
    text = str(path)
    if not text.startswith("hub:"):
        return path
    named = HUB_NAME.fullmatch(text)
    if named is None:
        raise UserError(f"{option} {text} is not hub:OWNER/NAME, maybe with /FOLDER or @REVISION behind it")
    inside = named["inside"]
    folder = _fetched(text, option, named["repo"], inside, named["revision"])
    location = folder / inside if inside else folder
    if not location.exists():
        where = f" at {inside}" if inside else ""
        raise UserError(f"{option} {text}: the data set has no files{where} to read; allowed: {ALLOWED}")
    say(f"{text}: revision {folder.name[:12]}, in {location}")
    return location


def _fetched(text: str, option: str, repo: str, inside: str | None, revision: str | None) -> Path:
    """The data set's folder in the cache."""
    from huggingface_hub import errors, snapshot_download, utils

    failures: tuple[type[Exception], ...] = (OSError, ValueError)
    failures += errors.HfHubHTTPError.__bases__  # its HTTP client depends on the version
    hides_progress = not utils.are_progress_bars_disabled() and not sys.stderr.isatty()
    if hides_progress:
        utils.disable_progress_bars()
    try:
        endings = [kind + packed for kind in KINDS for packed in ("", *PACKED)]
        wanted = [f"{inside}/*{ending}" if inside else f"*{ending}" for ending in endings]
        wanted += [inside] if inside else []
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError:
        reason = "it must be asked for on its page first; then `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "there is no such data set, or it is private (`hf auth login`)"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision}"
    except failures as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's trouble, not the hub's
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "incomplete" in str(error):
            reason = "only a part of it is in the cache, and the hub cannot be reached"
        elif "locate the files on the Hub" in str(error) or "outgoing traffic has been" in str(error):
            reason = "the hub cannot be reached, and it is not in the cache; give a folder of text files"
    finally:
        if hides_progress:
            utils.enable_progress_bars()
    raise UserError(f"{option} {text}: {reason}")
