"""Which texts of a corpus are held out for validation.

    split = make_split(read_pieces, unit=lambda piece: piece.document, share=None)
    split.whole, split.passages         # None, {"emma.txt": (204_113, 251_930)}
    for piece in cut_passages(pieces, split): piece.held_out

Many documents are split by the hash of their names: those below the share are held out, or the first one
where none is. Where that share is less than one document, a passage of each is held out instead, from one
paragraph's end to another's at a place drawn by the name; documents that are too short for it stay whole, and
if all are, whole ones are held out. Unless a share is asked for, passages have `PASSAGES` bytes in all, as
far as a tenth of the text allows: a hundredth of two books measures little.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from personatlas.persona.records import JsonObject
from personatlas.training.data.documents import Piece

HELD_SHARE = 0.01
PASSAGES = 1 << 16
MOST = 0.1  # of the text
NEAR = 1 << 14  # characters around a passage in which its ends are looked for
LONG = 1000  # characters of a passage that may end within a paragraph that is one line
BREAKS = (r"\n[^\S\n]*\n\s*", r"\n")  # the ends of paragraphs and of lines
WITHIN = (r"(?<=[.!?])\s+", r"\s+", "")  # and, for long passages, of sentences and words


@dataclass(frozen=True)
class Split:
    """The held-out side. With neither units nor passages it is decided by hash and `share` alone."""

    share: float
    whole: frozenset[str] | None = None
    "names of documents (of pieces, where the corpus is one text)"
    passages: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    "characters [start, stop) of documents"
    licences: int = 0
    "documents with Project Gutenberg's header or licence, taken out"

    def to_json(self) -> JsonObject:
        """As in the records of tokens and of a tokenizer."""
        whole = None if self.whole is None else sorted(self.whole)
        return {"share": self.share, "documents": whole, "passages": dict(self.passages)}


def hash_share(name: str) -> float:
    """A name's hash in [0, 1), evenly spread."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / (1 << 48)


def make_split(
    read: Callable[[], Iterator[Piece]], unit: Callable[[Piece], str], share: float | None
) -> Split:
    """Decides by reading the pieces once, twice where there are few documents.

    `unit` names what is split by hash; `share` is None unless it was asked for.
    """
    sizes: dict[str, int] = {}  # bytes of the first units
    lengths: dict[str, int] = {}  # characters of the first documents
    units, last, licensed, first = 0, "", set[str](), (1.0, "")
    few = 1 / (share or HELD_SHARE)
    for piece in read():
        name = unit(piece)
        units += name != last
        last, first = name, min(first, (hash_share(name), name))
        if piece.licence:
            licensed.add(piece.document)
        if units <= few:
            sizes[name] = sizes.get(name, 0) + len(piece.text.encode())
            lengths[piece.document] = lengths.get(piece.document, 0) + len(piece.text)
    licences = len(licensed)
    if units >= few:
        lowest = None if first[0] < 1 / few else frozenset([first[1]])
        return Split(share or HELD_SHARE, lowest, licences=licences)
    total = sum(sizes.values())
    share = share or min(MOST, max(HELD_SHARE, PASSAGES / max(total, 1)))
    if passages := _passages(read, lengths, share):
        return Split(share, passages=passages, licences=licences)
    whole, covered = list[str](), 0
    for name in sorted(sizes, key=lambda name: (hash_share(name), name))[: len(sizes) - 1]:
        if covered < share * total:
            whole.append(name)
            covered += sizes[name]
    return Split(share, frozenset(whole), licences=licences)


def _passages(
    read: Callable[[], Iterator[Piece]], lengths: Mapping[str, int], share: float
) -> dict[str, tuple[int, int]]:
    """A passage of each document that has one; reads only as much as is near it into memory."""
    texts = dict.fromkeys(lengths, "")
    offset, document = 0, ""
    for piece in read():
        offset, document = (offset if piece.document == document else 0), piece.document
        start, length = _wanted(document, lengths[document], share)
        low, high = max(0, start - NEAR - offset), max(0, start + length + NEAR - offset)
        texts[document] += piece.text[low:high]
        offset += len(piece.text)
    found = {}
    for document, text in texts.items():
        start, length = _wanted(document, lengths[document], share)
        before = max(0, start - NEAR)
        if (passage := find_passage(text, start - before, length)) is not None:
            found[document] = (before + passage[0], before + passage[1])
    return found


def _wanted(document: str, characters: int, share: float) -> tuple[int, int]:
    """Where a document's passage begins, and its length, before its ends are moved to breaks."""
    length = round(share * characters)
    return round(hash_share(document) * (characters - length)), length


def find_passage(text: str, start: int, length: int) -> tuple[int, int] | None:
    """The stretch between the breaks nearest to [start, start + length), of half to twice that length.

    Paragraphs are tried before lines, and those before sentences and words, which only long passages may cut.
    """
    for pattern in BREAKS + (WITHIN if length >= LONG else ()):
        places = [0, *(match.end() for match in re.finditer(pattern, text)), len(text)]
        low = min(places, key=lambda place: abs(place - start))
        high = min(places, key=lambda place: abs(place - low - length))
        if 0 < length / 2 <= high - low <= 2 * length and high - low < len(text):
            return low, high
    return None


def cut_passages(pieces: Iterator[Piece], split: Split) -> Iterator[Piece]:
    """Pieces, cut where a held-out passage begins and ends."""
    offset, document = 0, ""
    for piece in pieces:
        offset, document = (offset if piece.document == document else 0), piece.document
        passage = split.passages.get(document)
        if passage is None:
            yield piece
            continue
        low, high = (min(max(0, place - offset), len(piece.text)) for place in passage)
        for start, stop in ((0, low), (low, high), (high, len(piece.text))):
            if start < stop:
                licence = 0 if start else piece.licence
                yield replace(
                    piece, text=piece.text[start:stop], licence=licence, held_out=(start, stop) == (low, high)
                )
        offset += len(piece.text)
