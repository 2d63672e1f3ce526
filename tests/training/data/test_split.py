"""What is held out: documents by hash where there are many, passages where there are few."""

import hashlib
import json

import pytest
from corpora import write_book, write_corpus

from personatlas.cli.app import main
from personatlas.persona.artifacts import read_json
from personatlas.persona.errors import UserError
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.split import PASSAGES, find_passage, hash_share
from personatlas.training.data.token_shards import make_tokens
from personatlas.training.data.tokenizer import make_tokenizer


def texts_of(corpus, side):
    """What each document has on a side, joined."""
    found = {}
    for piece in corpus.pieces(side):
        found[piece.document] = found.get(piece.document, "") + piece.text
    return found


def test_many_documents_are_split_as_they_always_were(tmp_path):
    """Digests and splits of before passages were held out: runs on such corpora resume."""
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "row {number} of a few words"}}\n' for number in range(300))
    )
    for corpus, digest, content in (
        (Corpus.open(write_corpus(tmp_path / "t"), held_share=0.2), "85b9095529bab91c", "10e7dcf35ebddd94"),
        (Corpus.open(tmp_path / "a.jsonl"), "69532c7ad4b3676f", None),
    ):
        pieces = [(p.document, p.number, p.text, corpus.holds_out(p)) for p in corpus.pieces()]
        if content:
            assert hashlib.sha256(repr(pieces).encode()).hexdigest().startswith(content)
        assert [held for *_, held in pieces] == [hash_share(p[0]) < corpus.split.share for p in pieces]
        assert corpus.digest.startswith(digest)
        assert corpus.split.whole is None
        assert not corpus.split.passages


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_of_a_few_books_a_passage_of_each_is_held_out(tmp_path, count):
    for number in range(count):
        write_book(tmp_path / f"book{number}.txt", 150_000 // count, seed=number)
    corpus = Corpus.open(tmp_path, size=20_000)
    scan = corpus.scan()
    held_out, train = texts_of(corpus, "held-out"), texts_of(corpus, "train")
    assert set(held_out) == set(train) == {f"book{number}.txt" for number in range(count)}
    for name, passage in held_out.items():
        start, stop = corpus.split.passages[name]
        text = (tmp_path / name).read_text()
        assert text[start:stop] == passage
        assert text[:start] + text[stop:] == train[name]
        assert passage.endswith("\n\n")
        assert start == 0 or text[:start].endswith("\n\n")
    assert scan.held_out.documents == scan.train.documents == count
    assert scan.held_out.bytes == pytest.approx(0.1 * (scan.train.bytes + scan.held_out.bytes), rel=0.4)
    assert scan.repeated == 0
    assert len({places[0] / 150_000 for places in corpus.split.passages.values()}) == count


def test_passages_have_as_many_bytes_as_measure_something_unless_a_share_is_asked_for(tmp_path):
    for name in ("one.txt", "two.txt"):
        write_book(tmp_path / name, 700_000, seed=len(name))
    assert Corpus.open(tmp_path).scan().held_out.bytes == pytest.approx(PASSAGES, rel=0.05)
    asked = Corpus.open(tmp_path, held_share=0.02).scan()
    assert asked.held_out.bytes == pytest.approx(28_000, rel=0.1)
    assert "a passage of each of 2 documents" in "".join(asked.lines())


def test_short_rows_are_held_out_whole_and_the_first_by_hash_where_none_is_below_the_share(tmp_path):
    rows = [f"sentence {number} of a few words" for number in range(40)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    corpus = Corpus.open(tmp_path / "few.jsonl")
    names = sorted({piece.document for piece in corpus.pieces()}, key=hash_share)
    assert corpus.split.whole == set(names[:4])
    assert corpus.scan().held_out.documents == 4
    many = next(
        folder for n in range(50) if hash_share(min_name(folder := tmp_path / f"m{n}.jsonl", 101)) >= 0.01
    )
    many.write_text("".join(json.dumps({"text": row}) + "\n" for row in (rows * 3)[:101]))
    corpus = Corpus.open(many)
    assert corpus.split.whole == {min_name(many, 101)}
    assert corpus.scan().held_out.documents == 1


def min_name(path, rows):
    return min((f"{path.name}:{number}" for number in range(1, rows + 1)), key=hash_share)


@pytest.mark.parametrize(
    ("text", "start", "length", "found"),
    [
        ("one\n\ntwo\n\nthree\n\nfour", 4, 6, "two\n\n"),
        ("one\r\n\r\ntwo\r\n\r\nthree", 6, 6, "two\r\n\r\n"),
        ("a line\nanother\nthe last", 6, 8, "another\n"),
        ("no break at all", 3, 5, None),
        ("one\n\ntwo", 0, 0, None),
        ("A sentence. " * 1000, 1003, 2000, "A sentence. " * 167),
        ("字" * 9000, 100, 2000, "字" * 2000),
    ],
)
def test_a_passage_begins_and_ends_at_the_nearest_paragraph_or_line(text, start, length, found):
    place = find_passage(text, start, length)
    assert (None if place is None else text[slice(*place)]) == found


def test_the_records_of_tokenizer_and_tokens_say_what_is_held_out(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    write_book(folder / "a.txt", 30_000, seed=1)
    corpus = Corpus.open(folder)
    record = make_tokenizer(corpus, tmp_path / "tokenizer", quiet=True)
    tokens = make_tokens(corpus, tmp_path / "tokenizer", tmp_path / "tokens", quiet=True)
    split = read_json(tmp_path / "tokens" / "tokens.json")["split"]
    assert split == record["scan"]["split"] == json.loads(json.dumps(corpus.split.to_json()))
    assert tokens.held_out.bytes == corpus.scan().held_out.bytes


def test_held_out_paragraphs_that_are_trained_on_too_are_counted(tmp_path):
    write_book(tmp_path / "a.txt", 100_000, seed=1)
    text = (tmp_path / "a.txt").read_text()
    start, stop = Corpus.open(tmp_path).split.passages["a.txt"]
    other = text[start:stop].replace("\n\n", "\n\n\n").replace(" ", "  ")  # laid out differently
    (tmp_path / "b.txt").write_text("Something else before.\n\n" + other)
    scan = Corpus.open(tmp_path / "a.txt", held_out=tmp_path / "b.txt").scan()
    assert scan.repeated == scan.paragraphs > 20
    assert any(
        line.startswith(f"warning: {scan.repeated} of {scan.paragraphs} held-out") for line in scan.lines()
    )


def test_what_is_too_short_to_be_split_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Just one line.")
    with pytest.raises(UserError, match=r"so short a corpus; give more text, or .*--held-out PATH"):
        Corpus.open(tmp_path).scan()
    with pytest.raises(SystemExit) as end:
        main(["train", "tokenizer", "--corpus", str(tmp_path / "a.txt"), "--out", str(tmp_path / "t")])
    assert end.value.code == 2
    assert "so short" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
