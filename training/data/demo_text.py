"""A small English text that is on every machine: Python's own documentation, for a first run without a
network.

    write_demo(Path("demo/data"))  # text/: 2 MB in 400 documents; chats.jsonl: 4,000 questions and answers
    python -m personatlas.training.data.demo_text FOLDER

Topics are what `help("topics")` shows, written as prose about the language, and docstrings of the standard
library, a document for each module. The conversations ask what a function or a class does, and answer with
the first paragraph of its docstring. Nothing is imported to read them, and one Python gives the same every
time.
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from personatlas.persona.artifacts import make_folder
from personatlas.persona.errors import UserError
from personatlas.persona.progress import say

# Folders without prose, or that are not part of every installation
EXCLUDED = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"),
    *("encodings", "ensurepip"),
}
MIN_DOCUMENT = 400  # characters of a module's docstrings that make a document
MIN_TEXT = 500_000  # characters in all, below which nothing can be learned
MAX_ANSWER = 240  # characters of an answer


Function = ast.FunctionDef | ast.AsyncFunctionDef


class Docstring(NamedTuple):
    """A docstring and what it is about; no name is the module itself."""

    name: str
    text: str
    is_class: bool


def write_demo(folder: Path) -> tuple[int, int]:
    """Writes text/*.txt and chats.jsonl into a folder; returns characters of text and conversations.

    Raises `UserError` where the folder holds other texts or this Python comes without its documentation.
    """
    modules = dict(_modules())
    texts = dict(_documents(modules))
    size = sum(map(len, texts.values()))
    if size < MIN_TEXT:
        raise UserError(f"this Python ({sys.prefix}) comes without its documentation; give another --corpus")
    make_folder(folder / "text", "the demo's folder")
    others = {path.name for path in (folder / "text").iterdir()} - set(texts)
    if others:
        raise UserError(f"{folder / 'text'} holds other files ({min(others)}); choose another folder")
    for name, text in texts.items():
        (folder / "text" / name).write_text(text, encoding="utf-8")
    chats = [{"messages": messages} for messages in _conversations(modules)]
    lines = [json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats]
    (folder / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    return size, len(lines)


def _modules() -> Iterator[tuple[str, list[Docstring]]]:
    """Modules of the standard library and their docstrings, in order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if EXCLUDED.isdisjoint(parts):
            yield ".".join(parts).removesuffix(".__init__"), list(_docstrings(path))


def _documents(modules: Mapping[str, Sequence[Docstring]]) -> Iterator[tuple[str, str]]:
    """File names and texts: topics, and modules with enough to say, nothing twice in one."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topic-{name}.txt", text.strip() + "\n"
    for module, docstrings in modules.items():
        first = {item.text: item for item in reversed(docstrings)}
        unique = [item for item in docstrings if first[item.text] is item]
        parts = [f"{item.name}: {item.text}" if item.name else item.text for item in unique]
        text = "\n\n".join(parts)
        if len(text) >= MIN_DOCUMENT:
            yield f"module-{module}.txt", text + "\n"


def _conversations(modules: Mapping[str, Sequence[Docstring]]) -> Iterator[list[dict[str, str]]]:
    """A question and an answer for every public function and class whose docstring begins with a sentence."""
    for module, docstrings in modules.items():
        for name, text, is_class in docstrings:
            answer, full_name = " ".join(text.split("\n\n")[0].split()), f"{module}.{name}"
            public = name and "._" not in f".{full_name}"
            if public and answer.endswith(".") and 20 <= len(answer) <= MAX_ANSWER:
                question = f"What is {full_name}?" if is_class else f"What does {full_name} do?"
                yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _docstrings(path: Path) -> Iterator[Docstring]:
    """A module's docstrings in the order of its source."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and other files that are no Python
        return
    for name, node in _definitions(tree, ""):
        text = ast.get_docstring(node)
        if text:
            yield Docstring(name, text, isinstance(node, ast.ClassDef))


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.Module | ast.ClassDef | Function]]:
    """A module, its classes and its functions with their names, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | Function):
        if not isinstance(node, ast.Module):
            name = f"{name}.{node.name}" if name else node.name
        yield name, node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # most of a tree, and nothing is defined there
            yield from _definitions(child, name)


if __name__ == "__main__":
    characters, chats = write_demo(Path(sys.argv[1]))
    say(f"{characters:,} characters of text and {chats:,} conversations in {sys.argv[1]}")
