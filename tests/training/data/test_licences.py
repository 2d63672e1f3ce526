"""Project Gutenberg's headers and licences, which are left out of a corpus and counted."""

import json

import pytest
from corpora import write_book

from personatlas.training.data.corpus import Corpus
from personatlas.training.data.documents import TextFile, read_pieces

BOOK = (
    "\nTHE LIGHTHOUSE\n\nIt was a dark night, and the keeper read by a candle.\n\n" + "The sea rose.\n" * 300
)
LICENCE = "Updated editions will replace the previous one. Project Gutenberg-tm is a trademark.\n" * 200
HEADERS = {
    "now": "The Project Gutenberg eBook of The Lighthouse\n\nThis eBook is for anyone.\n\n"
    "*** START OF THE PROJECT GUTENBERG EBOOK THE LIGHTHOUSE ***\n",
    "two lines": "Project Gutenberg's The Lighthouse\n\n*** START OF THIS PROJECT GUTENBERG EBOOK THE\nLIGHTHOUSE ***\n",
    "old": "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWhy is this here?\n"
    "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n",
}
ENDS = {
    "now": "*** END OF THE PROJECT GUTENBERG EBOOK THE LIGHTHOUSE ***\n" + LICENCE,
    "two lines": "End of Project Gutenberg's The Lighthouse\n\n*** END OF THIS PROJECT GUTENBERG EBOOK ***\n"
    + LICENCE,
    "old": "End of The Project Gutenberg Etext of The Lighthouse\n",
}


def read(path, **options):
    return list(read_pieces(TextFile(path.name, path), column="text", size=1000, **options))


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_book_is_what_stands_between_the_marks(tmp_path, kind, newline):
    path = tmp_path / "a.txt"
    text = HEADERS[kind] + BOOK * 20 + ENDS[kind]
    path.write_bytes(text.replace("\n", newline).encode())
    pieces = read(path)
    assert "".join(piece.text for piece in pieces) == (BOOK * 20).replace("\n", newline)
    assert sum(piece.licence for piece in pieces) == len(text.replace("\n", newline)) - len(
        (BOOK * 20).replace("\n", newline)
    )
    kept = read(path, keep_licences=True)
    assert "".join(piece.text for piece in kept) == text.replace("\n", newline)
    assert sum(piece.licence for piece in kept) == 0


def test_several_books_in_one_file_and_rows_of_a_table_are_each_freed(tmp_path):
    one = HEADERS["now"] + BOOK + ENDS["now"]
    (tmp_path / "a.txt").write_text(one * 3)
    assert "".join(piece.text for piece in read(tmp_path / "a.txt")) == BOOK * 3
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": one}) + "\n" + json.dumps({"text": BOOK}) + "\n")
    assert {piece.document for piece in read(tmp_path / "a.jsonl") if piece.licence} == {"a.jsonl:1"}


@pytest.mark.parametrize(
    "text",
    [
        BOOK + "Thanks to Project Gutenberg.\n",
        "He cried: *** START OF THE PROJECT GUTENBERG EBOOK ***\n" + BOOK,  # in the middle of a line
        BOOK * 20 + HEADERS["now"] + BOOK,  # far behind what a header's length can be
        "End of the Project Gutenberg text\n" + BOOK,
    ],
)
def test_what_has_no_marks_where_a_header_ends_is_left_as_it_is(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert "".join(piece.text for piece in read(tmp_path / "a.txt")) == text


def test_text_far_behind_a_licence_is_kept(tmp_path):
    text = HEADERS["now"] + BOOK + "*** END OF THE PROJECT GUTENBERG EBOOK ***\n" + "An appendix.\n" * 9000
    (tmp_path / "a.txt").write_text(text)
    found = "".join(piece.text for piece in read(tmp_path / "a.txt"))
    assert found.startswith(BOOK)
    assert 0 < len(text) - len(HEADERS["now"]) - len(found) <= 1 << 15


def test_headers_are_counted_named_and_kept_on_request(tmp_path):
    write_book(tmp_path / "a.txt", 50_000, seed=1)
    text = (tmp_path / "a.txt").read_text()
    without = Corpus.open(tmp_path)
    assert (without.scan().licences, without.scan().named) == (0, 0)
    (tmp_path / "a.txt").write_text(HEADERS["now"] + text + ENDS["now"])
    corpus, kept = Corpus.open(tmp_path), Corpus.open(tmp_path, keep_licences=True)
    assert "".join(piece.text for piece in corpus.pieces()) == text
    assert corpus.scan().licences == len(HEADERS["now"] + ENDS["now"])
    assert (
        f"licences, {corpus.scan().licences:,} characters, left out (--keep-licences" in corpus.scan().notes()
    )
    assert "1 documents with Project Gutenberg's name in front, kept" in kept.scan().notes()
    assert len({without.digest, corpus.digest, kept.digest}) == 3
