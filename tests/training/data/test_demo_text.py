"""The text of `make demo-train` is on every machine, the same every time, and a corpus; its conversations are ones."""

import json
from pathlib import Path

import pytest

from personatlas.persona.errors import UserError
from personatlas.training.data import demo_text
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.demo_text import write_demo


def test_it_is_prose_enough_to_learn_from(tmp_path):
    size, chats = write_demo(tmp_path)
    assert size > 1_000_000
    assert "context manager" in (tmp_path / "text" / "topic-context-managers.txt").read_text(encoding="utf-8")
    assert (
        (tmp_path / "text" / "module-textwrap.txt")
        .read_text(encoding="utf-8")
        .startswith("Text wrapping and fill")
    )
    corpus = Corpus.open(tmp_path / "text", held_share=0.05)
    found = corpus.scan()
    assert found.train.documents > 300
    assert found.held_out.documents >= 5
    assert (found.invalid, found.nul, found.blank) == (0, 0, 0)
    lines = (tmp_path / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == chats > 3000
    asked = {one["messages"][0]["content"]: one["messages"][1]["content"] for one in map(json.loads, lines)}
    assert (
        asked["What does textwrap.indent do?"]
        == "Adds 'prefix' to the beginning of selected lines in 'text'."
    )


def test_one_python_gives_the_same_text_every_time(tmp_path, monkeypatch):
    """A part of the standard library: all of it is read in the test above."""
    library = Path(json.__file__).parent
    monkeypatch.setattr(demo_text, "MIN_TEXT", 1)
    monkeypatch.setattr(demo_text.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    first = write_demo(tmp_path / "one")
    digest = Corpus.open(tmp_path / "one" / "text", held_share=0.05).digest
    assert write_demo(tmp_path / "one") == write_demo(tmp_path / "two") == first
    assert {Corpus.open(tmp_path / name / "text", held_share=0.05).digest for name in ("one", "two")} == {
        digest
    }


SOURCE = '''"""The module."""
def f():
    """One.

    More of it."""
class C:
    """Two is a class."""
    def g(self):
        "Two is a class."
    def _h(self):
        """This is private to it."""
'''


def test_docstrings_keep_their_order_and_names_and_only_sentences_are_answers(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    told = list(demo_text._docstrings(path))
    assert [one.name for one in told] == ["", "f", "C", "C.g", "C._h"]
    assert [messages[0]["content"] for messages in demo_text._conversations({"a": told})] == []  # too short
    longer = [one._replace(text=one.text.replace("is a class", "is a class of things")) for one in told]
    chats = list(demo_text._conversations({"a": longer}))
    assert [messages[0]["content"] for messages in chats] == ["What is a.C?", "What does a.C.g do?"]
    assert chats[0][1] == {"role": "assistant", "content": "Two is a class of things."}
    path.write_text("def f(:")
    assert list(demo_text._docstrings(path)) == []


def test_a_document_says_nothing_twice():
    said = [demo_text.Docstring(name, "x" * 400, False) for name in ("", "f", "g")]
    texts = dict(demo_text._documents({"a": said}))
    assert texts["module-a.txt"] == "x" * 400 + "\n"


def test_a_folder_with_other_files_and_a_python_without_documentation_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_text, "_modules", lambda: iter(()))
    monkeypatch.setattr(demo_text, "_documents", lambda _: iter([("a.txt", "x" * 600_000)]))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(mine.txt\)"):
        write_demo(tmp_path)
    monkeypatch.setattr(demo_text, "_documents", lambda _: iter([("a.txt", "x")]))
    with pytest.raises(UserError, match="comes without its documentation; give another --corpus"):
        write_demo(tmp_path / "new")
    assert not (tmp_path / "new").exists()
