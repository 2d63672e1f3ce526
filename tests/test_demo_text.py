"""The text of `make demo-train` is on every machine, the same every time, and a corpus."""

import pytest

from personaxis.persona.errors import KnownError
from personaxis.training import demo_text
from personaxis.training.corpus import Corpus
from personaxis.training.demo_text import write_demo_text


def test_it_is_prose_enough_to_learn_from_and_the_same_again(tmp_path):
    size = write_demo_text(tmp_path / "text")
    assert size > 1_000_000
    assert "context manager" in (tmp_path / "text" / "topic-context-managers.txt").read_text(encoding="utf-8")
    assert (tmp_path / "text" / "module-textwrap.txt").read_text(encoding="utf-8").startswith("Text wrapping and fill")
    corpus = Corpus.open(tmp_path / "text", held_share=0.05)
    first, found = corpus.digest, corpus.scan()
    assert found.train.documents > 300
    assert found.held_out.documents >= 5
    assert (found.invalid, found.nul, found.blank) == (0, 0, 0)
    assert write_demo_text(tmp_path / "text") == size
    assert Corpus.open(tmp_path / "text", held_share=0.05).digest == first


def test_a_docstring_stands_once_under_the_name_that_it_is_about_in_the_order_of_the_source(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        '"""The module."""\ndef f():\n    """One."""\nclass C:\n    """Two."""\n    def g(self):\n        "One."\n'
    )
    assert list(demo_text._docstrings(path)) == ["The module.", "f: One.", "C: Two."]
    path.write_text("def f(:")
    assert list(demo_text._docstrings(path)) == []


def test_a_folder_with_other_files_and_a_python_without_documentation_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_text, "_documents", lambda: iter([("a.txt", "x" * 600_000)]))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(KnownError, match=r"holds other files \(mine.txt\)"):
        write_demo_text(tmp_path)
    monkeypatch.setattr(demo_text, "_documents", lambda: iter([("a.txt", "x")]))
    with pytest.raises(KnownError, match="come without its documentation; give a --corpus of your own"):
        write_demo_text(tmp_path / "text")
    assert not (tmp_path / "text").exists()
