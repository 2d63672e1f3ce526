"""Corpora from every kind of file, whole, damaged and strange."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from itertools import pairwise

import pytest
from corpora import write_parquet

from personatlas.persona.errors import UserError
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.documents import TextFile, read_pieces
from personatlas.training.data.split import hash_share

PACK = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pytest.importorskip("zstandard").ZstdCompressor().compress(data),
}


def pieces_of(path, size=1000, column="text"):
    return list(read_pieces(TextFile(path.name, path), column=column, size=size))


def texts_of(path, **options):
    return [piece.text for piece in pieces_of(path, **options)]


def books(folder, count=40):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"book{number}.txt").write_text(
            f"This is book {number}. It has a few words.\n" * (1 + number % 3)
        )
    return folder


def tar_of(members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize("suffix", ["", *PACK])
def test_every_kind_of_file_gives_its_documents_packed_or_not(tmp_path, suffix):
    pack = PACK.get(suffix, bytes)
    (tmp_path / f"a.txt{suffix}").write_bytes(pack("Grüße\r\nvom Meer\n".encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(pack(b'{"text": "one"}\n\n{"text": "two", "x": 1}'))
    (tmp_path / f"c.tar{suffix}").write_bytes(
        pack(tar_of({"x/one.txt": b"1", "two.txt": b"2", "no.pdf": b"%"}))
    )
    assert texts_of(tmp_path / f"a.txt{suffix}") == ["Grüße\r\nvom Meer\n"]
    assert texts_of(tmp_path / f"b.jsonl{suffix}") == ["one", "two"]
    assert [piece.document for piece in pieces_of(tmp_path / f"c.tar{suffix}")] == [
        f"c.tar{suffix}/x/one.txt",
        f"c.tar{suffix}/two.txt",
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_parquet_table_gives_its_rows(tmp_path, suffix):
    write_parquet(tmp_path / "plain.parquet", ["one", None, "two"])
    path = tmp_path / f"t.parquet{suffix}"
    path.write_bytes(PACK.get(suffix, bytes)((tmp_path / "plain.parquet").read_bytes()))
    assert texts_of(path) == ["one", "", "two"]
    with pytest.raises(UserError, match=r"no column 'body', but text, n"):
        texts_of(path, column="body")


@pytest.mark.parametrize("suffix", [*PACK, ".tar", ".tar.xz", ".tar.gz", ".tar.zst", ".tar.bz2"])
def test_a_file_cut_short_is_an_error_and_not_a_shorter_document(tmp_path, suffix):
    text = "".join(f"line {number}\n" for number in range(20_000)).encode()
    whole = tar_of({"a.txt": text, "b.txt": text}) if ".tar" in suffix else text
    packed = PACK.get(suffix.removeprefix(".tar"), bytes)(whole)
    path = tmp_path / (f"a{suffix}" if ".tar" in suffix else f"a.txt{suffix}")
    path.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(UserError, match="damaged or cut short"):
        texts_of(path)


def test_two_frames_of_zstandard_are_one_text(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(PACK[".zst"](b"one ") + PACK[".zst"](b"two"))
    assert texts_of(path) == ["one two"]


def test_a_long_document_is_cut_at_lines_or_blanks_and_nothing_is_lost(tmp_path):
    text = "word and another " * 500 + "\n" + "a line\n" * 500 + "x" * 5000 + " end"
    (tmp_path / "a.txt").write_text(text)
    pieces = pieces_of(tmp_path / "a.txt", size=700)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    assert max(len(piece.text) for piece in pieces) <= 700
    assert pieces[1].text.startswith(" ")  # a word keeps the blank before it
    assert all("x" in piece.text or piece.text.endswith(("\n", "d", "r")) for piece in pieces)
    assert sum(set(piece.text) == {"x"} for piece in pieces) >= 6  # no blank: cut where it stands


def test_a_huge_line_streams_in_bounded_memory(tmp_path):
    import tracemalloc

    (tmp_path / "a.txt").write_bytes(b"no newline here " * (1 << 20))  # 16 MiB
    tracemalloc.start()
    characters = sum(
        len(p.text) for p in read_pieces(TextFile("a.txt", tmp_path / "a.txt"), column="text", size=1 << 16)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert characters == 16 << 20
    assert peak < 2 << 20


def test_characters_cut_by_a_chunk_are_whole_and_bad_bytes_are_counted(tmp_path):
    text = "é€😀" * 30_000
    (tmp_path / "good.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    pieces = pieces_of(tmp_path / "good.txt", size=1 << 16)
    assert "".join(piece.text for piece in pieces) == text  # without its byte order mark
    assert not any(piece.invalid for piece in pieces)
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait")
    assert [(p.text, p.invalid) for p in pieces_of(tmp_path / "bad.txt")] == [("caf\ufffd au lait", True)]
    (tmp_path / "end.txt").write_bytes(b"caf\xc3")
    assert [(p.text, p.invalid) for p in pieces_of(tmp_path / "end.txt")] == [("caf\ufffd", True)]
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    assert [(p.text, p.invalid) for p in pieces_of(tmp_path / "bad.jsonl")] == [("caf\ufffd", True)]
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert [(p.text, p.invalid) for p in pieces_of(tmp_path / "half.jsonl")] == [
        ("a\ufffd b", True),
        ("😀", False),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "a.jsonl:2 is not valid JSON"),
        ('{"body": "x", "id": 3}', "has no 'text', but the keys body, id; .*--text-column"),
        ("[1]", "has no 'text', but a list"),
        ('{"text": 7}', "'text' is a int, not text"),
    ],
)
def test_a_row_that_has_no_text_is_named(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=said):
        texts_of(tmp_path / "a.jsonl")


def test_a_scan_counts_sides_and_what_is_wrong(tmp_path):
    folder = books(tmp_path / "books")
    (folder / "binary.txt").write_bytes(b"MZ\0\0text")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "empty.txt").write_text("")
    (folder / "long.txt").write_text("word " * 300)
    (folder / ".hidden.txt").write_text("not read")
    (folder / "notes.pdf").write_text("not read")
    corpus = Corpus.open(folder, held_share=0.2, size=1000)
    scan = corpus.scan()
    assert (scan.nul, scan.invalid, scan.blank, scan.cut) == (1, 1, 2, 1)
    assert scan.train.documents + scan.held_out.documents == 42
    assert scan.train.pieces + scan.held_out.pieces == 43
    kept = list(corpus.pieces("train"))
    assert kept == [piece for piece in corpus.pieces() if not corpus.holds_out(piece)]
    assert scan.train.bytes == sum(len(piece.text.encode()) for piece in kept)
    assert "1 pieces with NUL bytes left out" in scan.notes()


def test_a_document_stays_on_its_side_whatever_else_is_in_the_folder(tmp_path):
    folder = books(tmp_path / "books")
    before = {
        p.document: Corpus.open(folder, held_share=0.3).holds_out(p) for p in Corpus.open(folder).pieces()
    }
    assert 0 < sum(before.values()) < len(before)
    (folder / "another.txt").write_text("Another book.")
    corpus = Corpus.open(folder, held_share=0.3)
    after = {piece.document: corpus.holds_out(piece) for piece in corpus.pieces()}
    assert {name: after[name] for name in before} == before


def test_the_order_of_files_is_that_of_their_hashed_names(tmp_path):
    names = [source.name for source in Corpus.open(books(tmp_path / "books")).files]
    assert names == sorted(names, key=hash_share)
    assert names != sorted(names)


def test_held_out_files_are_taken_out_of_the_corpus(tmp_path):
    folder = books(tmp_path / "books")
    corpus = Corpus.open(folder, held_out=folder / "book3.txt")
    held = [piece.document for piece in corpus.pieces("held-out")]
    assert held == ["/held-out/book3.txt"]
    assert corpus.scan().train.documents == 39
    (folder / "copy.txt").write_bytes((folder / "book3.txt").read_bytes())
    with pytest.raises(UserError, match=r"copy\.txt is held out and trained on"):
        _ = Corpus.open(folder, held_out=folder / "book3.txt").digest
    with pytest.raises(UserError, match="nothing is left to train on"):
        Corpus.open(folder / "book3.txt", held_out=folder)


def test_the_digest_knows_the_bytes_the_names_and_how_they_are_read(tmp_path):
    folder = books(tmp_path / "books", 3)
    first = Corpus.open(folder).digest
    assert Corpus.open(folder).digest == first
    assert Corpus.open(folder, size=500).digest != first
    assert Corpus.open(folder, held_share=0.5).digest != first
    (folder / "book0.txt").write_text("changed")
    changed = Corpus.open(folder).digest
    (folder / "book0.txt").rename(folder / "renamed.txt")
    assert len({first, changed, Corpus.open(folder).digest}) == 3


def test_one_text_is_split_by_its_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("a word or two\n" * 2000)
    corpus = Corpus.open(tmp_path / "a.txt", held_share=0.2, size=500)
    scan = corpus.scan()
    assert scan.train.documents > scan.held_out.documents > 0
    assert scan.train.bytes + scan.held_out.bytes == 28_000


@pytest.mark.parametrize("budget", [3, 300, 5_000, 28_000, 1 << 40])
def test_a_sample_is_spread_evenly_and_keeps_its_budget(tmp_path, budget):
    (tmp_path / "a.txt").write_text("".join(f"line {n:08}\n" for n in range(2000)))
    (tmp_path / "held.txt").write_text("other")
    corpus = Corpus.open(tmp_path / "a.txt", held_out=tmp_path / "held.txt", size=200)
    scan = corpus.scan()
    texts = list(corpus.sample(scan, budget))
    assert texts == list(corpus.sample(scan, budget))
    assert sum(map(len, texts)) == pytest.approx(min(budget, 28_000), abs=200)
    if budget == 5_000:
        places = [int(text.split()[1]) for text in texts]
        gaps = [b - a for a, b in pairwise(places)]
        assert max(gaps) - min(gaps) <= 2 * 15  # within two pieces of each other


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "has nothing; allowed: .txt"),
        (lambda folder: (folder / "a.pdf").write_text("x"), r"has 1 other files \(\.pdf\)"),
        (
            lambda folder: (folder / "a.txt").write_bytes("hello".encode("utf-16")),
            "no text: .*1 pieces with NUL.*UTF-16",
        ),
        (lambda folder: (folder / "a.jsonl").write_text(""), "no text: its files have no rows"),
        (lambda folder: (folder / "a.txt").write_text("\n"), "no text: 1 blank"),
    ],
)
def test_a_folder_without_text_says_what_is_in_it(tmp_path, make, said):
    make(tmp_path)
    with pytest.raises(UserError, match=said):
        Corpus.open(tmp_path).scan()


def test_paths_and_shares_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Corpus.open(tmp_path / "nowhere")
    (tmp_path / "a.csv").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"a\.csv cannot be read as documents"):
        Corpus.open(tmp_path / "a.csv")
    with pytest.raises(UserError, match="not between 0 and 1"):
        Corpus.open(tmp_path, held_share=1.0)
