"""A small English text that is on every machine: Python's own documentation, for a first training run without a network.

    write_demo_text(Path("runs/demo-train/text"))         # about 2 MB in 650 .txt documents, the same for one Python
    python -m personaxis.training.demo_text FOLDER

Topics are what `help("topics")` shows, written as prose about the language; to them come the docstrings of the standard library,
a document for each module. Nothing is imported to read them.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from personaxis.persona.errors import KnownError
from personaxis.persona.progress import say
from personaxis.persona.store import make_folder

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


def write_demo_text(folder: Path) -> int:
    """Write the documents into a folder, new or made before; returns their characters.

    Raises `KnownError` where the folder holds other files or this Python has come without its documentation.
    """
    texts = dict(_documents())
    size = sum(map(len, texts.values()))
    if size < LEAST:
        raise KnownError(f"this Python ({sys.prefix}) has come without its documentation; give a --corpus of your own")
    make_folder(folder, "the demo's text")
    others = {path.name for path in folder.iterdir()} - set(texts)
    if others:
        raise KnownError(f"{folder} holds other files ({min(others)}); choose another folder")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return size


def _documents() -> Iterator[tuple[str, str]]:
    """File names and texts, in order."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topic-{name}.txt", text.strip() + "\n"
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            text = "\n\n".join(_docstrings(path))
            if len(text) >= FEWEST:
                yield f"module-{'.'.join(parts)}.txt", text + "\n"


def _docstrings(path: Path) -> Iterator[str]:
    """A module's docstrings in the order of its source, each with the name that it is about, none twice."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and other files that are no Python
        return
    said = set()
    for node in _defined(tree):
        text = ast.get_docstring(node)
        if text and text not in said:
            said.add(text)
            yield text if isinstance(node, ast.Module) else f"{node.name}: {text}"


def _defined(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """A tree's module, classes and functions, as they follow one another in its source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _defined(child)


if __name__ == "__main__":
    say(f"{write_demo_text(Path(sys.argv[1])):,} characters in {sys.argv[1]}")
