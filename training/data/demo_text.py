"""A small English text that is on every machine: Python's own documentation, for a first training run without a network.

    write_demo(Path("runs/demo-train/data"))          # text/: 2 MB in 400 documents; chats.jsonl: 4,000 questions and answers
    python -m personatlas.training.data.demo_text FOLDER

Topics are what `help("topics")` shows, written as prose about the language; to them come the docstrings of the standard library,
a document for each module. The conversations ask what a function or a class does, and answer with the first paragraph of its
docstring. Nothing is imported to read them, and one Python gives the same every time.
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from personatlas.persona.artifacts import make_folder
from personatlas.persona.errors import UserError
from personatlas.persona.progress import say

# no prose in them, or no part of every installation
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "ensurepip",
}
FEWEST = 400  # characters of a module's docstrings that make a document
LEAST = 500_000  # characters in all, below which nothing can be learned
LONGEST = 240  # characters of an answer


class Said(NamedTuple):
    """A docstring and what it is about; no name is the module itself."""

    name: str
    text: str
    is_class: bool


def write_demo(folder: Path) -> tuple[int, int]:
    """Write text/*.txt and chats.jsonl into a folder, new or made before; returns characters of text and conversations.

    Raises `UserError` where the folder holds other texts or this Python has come without its documentation.
    """
    modules = dict(_modules())
    texts = dict(_documents(modules))
    size = sum(map(len, texts.values()))
    if size < LEAST:
        raise UserError(
            f"this Python ({sys.prefix}) has come without its documentation; give a --corpus of your own"
        )
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


def _modules() -> Iterator[tuple[str, list[Said]]]:
    """Modules of the standard library and what their docstrings say, in order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            yield ".".join(parts).removesuffix(".__init__"), list(_said(path))


def _documents(modules: Mapping[str, Sequence[Said]]) -> Iterator[tuple[str, str]]:
    """File names and texts: topics, and modules with enough to say, nothing twice in one."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topic-{name}.txt", text.strip() + "\n"
    for module, told in modules.items():
        known = {one.text: one for one in reversed(told)}  # the first that says it
        parts = [
            f"{one.name}: {one.text}" if one.name else one.text for one in told if known[one.text] is one
        ]
        text = "\n\n".join(parts)
        if len(text) >= FEWEST:
            yield f"module-{module}.txt", text + "\n"


def _conversations(modules: Mapping[str, Sequence[Said]]) -> Iterator[list[dict[str, str]]]:
    """A question and an answer for every public function and class whose docstring begins with a sentence."""
    for module, told in modules.items():
        for one in told:
            answer = " ".join(one.text.split("\n\n")[0].split())
            if (
                one.name
                and "._" not in f".{module}.{one.name}"
                and answer.endswith(".")
                and 20 <= len(answer) <= LONGEST
            ):
                asked = (
                    f"What is {module}.{one.name}?" if one.is_class else f"What does {module}.{one.name} do?"
                )
                yield [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _said(path: Path) -> Iterator[Said]:
    """A module's docstrings in the order of its source."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and other files that are no Python
        return
    for name, node in _defined(tree, ""):
        text = ast.get_docstring(node)
        if text:
            yield Said(name, text, isinstance(node, ast.ClassDef))


def _defined(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A module, its classes and its functions with their names, as they follow one another in the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if not isinstance(node, ast.Module):
            name = f"{name}.{node.name}" if name else node.name
        yield name, node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # most of a tree, and nothing is defined there
            yield from _defined(child, name)


if __name__ == "__main__":
    characters, chats = write_demo(Path(sys.argv[1]))
    say(f"{characters:,} characters of text and {chats:,} conversations in {sys.argv[1]}")
