"""A corpus as token ids on disk, made once, memory-mapped after that.

    tokens = make_tokens(corpus, Path("tokenizer"), Path("tokens"))
    tokens.train.read(1000, 3049)       # (2049,) of 103,000,000 ids, through the page cache
    tokens.train.starts()               # where documents begin: at every <|bos|>

Every piece of the corpus is <|bos|> and its ids; text cannot make a <|bos|> (`load_corpus_tokenizer`), so the
mark is the boundary. Shards hold about `SHARD` bytes of text each, as uint16, or uint32 for a vocabulary
above 65,536:

    tokens/asked.json          digests of the corpus and the tokenizer, written first
    tokens/train-00000.npy     ids; tokens/train-00000.json counts and their SHA-256, written after it
    tokens/tokens.json         everything, written last

An interrupted run goes on after its finished shards, and the result is the same. Encoding uses all cores (or
`RAYON_NUM_THREADS`). A folder of another tokenizer, or of a corpus that has changed, is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Integer
from numpy import ndarray as Array
from tokenizers import Tokenizer

from personatlas.persona.artifacts import (
    REMAKE,
    atomic,
    digest,
    locked,
    make_folder,
    read_object,
    read_record,
    write_json,
)
from personatlas.persona.errors import UserError
from personatlas.persona.progress import say
from personatlas.persona.records import Count, FieldError, JsonObject, JsonRecord, Positive, read_field
from personatlas.training.data.corpus import Corpus, Side
from personatlas.training.data.documents import Piece
from personatlas.training.data.tokenizer import BOS, ENCODED_AT_ONCE, chunked, encode, load_corpus_tokenizer

SHARD = 1 << 26  # bytes of text
FORMAT = 1
SIDES: tuple[Side, ...] = ("train", "held-out")


@dataclass(frozen=True)
class Stream:
    """All tokens of one side, over its shards."""

    shards: tuple[Array, ...]
    bos: int
    documents: int
    bytes: int

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def _ends(self) -> Array:
        return np.cumsum([len(shard) for shard in self.shards])

    def read(self, start: int, stop: int) -> Integer[Array, "T"]:
        """Ids [start, stop) as int64: torch has no uint16 indices. Raises ValueError outside the stream."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"tokens {start} to {stop} of a stream of {len(self)}")
        parts, shard = [np.empty(0, np.int64)], int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            before = int(self._ends[shard - 1]) if shard else 0
            end = min(stop, int(self._ends[shard]))
            parts.append(self.shards[shard][start - before : end - before].astype(np.int64))
            start, shard = end, shard + 1
        return np.concatenate(parts)

    def starts(self) -> Integer[Array, "N"]:
        """Positions at which documents (or pieces of one) begin."""
        offsets = (0, *self._ends[:-1].tolist())
        marks = (np.flatnonzero(shard == self.bos) for shard in self.shards)
        return np.concatenate([mark + offset for mark, offset in zip(marks, offsets, strict=True)])


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus. Make it with `make_tokens`, read it with `open_tokens`."""

    train: Stream
    held_out: Stream
    corpus: str
    tokenizer: str
    vocabulary: int


def make_tokens(
    corpus: Corpus, tokenizer_folder: Path, folder: Path, *, shard: int = SHARD, quiet: bool = False
) -> Tokens:
    """Tokenises both sides; resumes an interrupted run, and reads finished tokens.

    Raises `UserError` for a folder with tokens of another corpus or tokenizer, and a corpus without text.
    """
    tokenizer = load_corpus_tokenizer(tokenizer_folder)
    settings = {
        "corpus": corpus.digest,
        "tokenizer": digest(tokenizer_folder / "tokenizer.json"),
        "shard": shard,
        "format": FORMAT,
    }
    if (folder / "tokens.json").is_file():
        _claim(folder, settings)
        return open_tokens(folder, tokenizer_folder)
    make_folder(folder.absolute().parent, "--token-folder")
    with locked(folder):
        _claim(folder, settings)
        _write_shards(corpus, tokenizer, folder, settings, quiet)
    return open_tokens(folder, tokenizer_folder)


def open_tokens(folder: Path, tokenizer_folder: Path | None = None) -> Tokens:
    """Memory-maps finished tokens. Raises `UserError` for unfinished ones and those of another tokenizer."""
    path = folder / "tokens.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no finished tokens; make them again, finished shards are kept")
    record = read_object(path)
    if record.get("kind") != "tokens" or record.get("format") != FORMAT:
        raise UserError(f"{path} is not the record of tokens that this version reads")
    try:
        for name, hint in RECORD.items():
            read_field(record, name, hint)
    except FieldError as error:
        raise UserError(f"{path} is damaged: {error}; {REMAKE}") from None
    if tokenizer_folder is not None and digest(tokenizer_folder / "tokenizer.json") != record["tokenizer"]:
        raise UserError(f"{folder} holds tokens of another tokenizer than {tokenizer_folder}; choose another")
    train, held_out = (_stream(folder, record, side) for side in SIDES)
    return Tokens(train, held_out, record["corpus"], record["tokenizer"], record["vocabulary"])


@dataclass(frozen=True)
class ShardRecord(JsonRecord):
    """What is said of a shard: sizes, and the hash of its file."""

    tokens: Positive
    documents: Positive
    bytes: Positive
    sha256: str


RECORD: dict[str, object] = {
    **dict.fromkeys(("corpus", "tokenizer"), str),
    "vocabulary": Positive,
    "bos": Count,
    "dtype": Literal["uint16", "uint32"],
    **dict.fromkeys(SIDES, tuple[ShardRecord, ...]),
}


def _claim(folder: Path, settings: JsonObject) -> None:
    """Writes the settings into a new folder; `UserError` for one of other settings or of something else."""
    path = folder / "asked.json"
    if not path.is_file():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{folder} is there and holds no tokens; choose another folder")
        make_folder(folder, "--token-folder")
        write_json(path, settings)
        return
    before = read_object(path)
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        what = {
            "corpus": "another corpus, or files of it have changed or are read in another way",
            "tokenizer": "another tokenizer",
        }
        reasons = "; ".join(what.get(name, f"another {name}") for name in changed)
        raise UserError(f"{folder} holds tokens of {reasons}; choose another folder")


def _stream(folder: Path, record: JsonObject, side: Side) -> Stream:
    shards = []
    for number, known in enumerate(record[side]):
        path = folder / f"{side}-{number:05}.npy"
        try:
            shard = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read: {error}; remove {folder} and make it again") from None
        if shard.shape != (known["tokens"],) or str(shard.dtype) != record["dtype"]:
            raise UserError(f"{path} has {shard.shape} {shard.dtype}, not as tokens.json says; make it again")
        if digest(path) != known["sha256"]:
            raise UserError(f"{path} is damaged or was changed; remove {folder} and make it again")
        shards.append(shard)
    documents, size = (sum(known[name] for known in record[side]) for name in ("documents", "bytes"))
    return Stream(tuple(shards), record["bos"], documents, size)


def _write_shards(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, settings: JsonObject, quiet: bool
) -> None:
    size = tokenizer.get_vocab_size()
    kind = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
    shards: dict[Side, list[JsonObject]] = {side: [] for side in SIDES}
    for side, pieces in _groups(corpus, settings["shard"], quiet):
        shards[side].append(_shard(tokenizer, pieces, folder / f"{side}-{len(shards[side]):05}", kind))
    for side in SIDES:
        if not shards[side]:
            raise UserError(f"the corpus has no {side} text; change --held-share or give --held-out PATH")
    record = {"kind": "tokens", "vocabulary": size, "dtype": str(kind), "bos": tokenizer.token_to_id(BOS)}
    sides = {str(side): shards[side] for side in SIDES}
    write_json(folder / "tokens.json", {**settings, **record, "split": corpus.split.to_json(), **sides})


def _groups(corpus: Corpus, limit: int, quiet: bool) -> Iterator[tuple[Side, list[Piece]]]:
    """Pieces for one shard: as many as reach `limit` bytes. Always the same for the same corpus."""
    waiting: dict[Side, list[Piece]] = {side: [] for side in SIDES}
    sizes: dict[Side, int] = dict.fromkeys(SIDES, 0)
    for piece in corpus.pieces(quiet=quiet):
        side: Side = "held-out" if corpus.holds_out(piece) else "train"
        waiting[side].append(piece)
        sizes[side] += len(piece.text.encode())
        if sizes[side] >= limit:
            yield side, waiting[side]
            waiting[side], sizes[side] = [], 0
    for side in SIDES:
        if waiting[side]:
            yield side, waiting[side]


def _shard(tokenizer: Tokenizer, pieces: list[Piece], stem: Path, kind: np.dtype) -> JsonObject:
    """Encodes and writes one shard, unless it was finished before; its record."""
    path, record_path = stem.with_suffix(".npy"), stem.with_suffix(".json")
    if record_path.is_file() and path.is_file():
        try:
            known = read_record(record_path, ShardRecord)
        except UserError as error:
            say(f"{error.args[0].partition(';')[0]}: made again")
        else:
            if digest(path) == known.sha256:
                return known.to_json()
    bos = tokenizer.token_to_id(BOS)
    parts = [
        np.array([bos, *ids], dtype=kind)
        for chunk in chunked(pieces, ENCODED_AT_ONCE)
        for ids in encode(tokenizer, [piece.text for piece in chunk])
    ]
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(parts), allow_pickle=False)
    record = {
        "tokens": sum(map(len, parts)),
        "documents": len(parts),
        "bytes": sum(len(piece.text.encode()) for piece in pieces),
        "sha256": digest(path),
    }
    write_json(record_path, record)
    return record
