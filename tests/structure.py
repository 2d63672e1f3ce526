"""What the code's structure looks like, as numbers: `python tests/structure.py [FOLDER]` prints them with the places they count.

The counts in structure.json may only fall (test_architecture.py).
"""

import ast
import json
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("personatlas", "persona", "analysis", "steering", "training")
SHORT = 12  # lines; a longer function explains more by its name than it costs by being elsewhere
WIDTH = 110


def library_files() -> list[Path]:
    """Every Python file that is installed."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


def place(path: Path, node: ast.AST | None = None, name: str = "") -> str:
    """FILE:LINE NAME."""
    at = f"{path.relative_to(ROOT)}" + (f":{node.lineno}" if node is not None else "")  # type: ignore[attr-defined]
    return f"{at} {name}".strip()


def one_caller_functions(files: list[Path]) -> list[str]:
    """Private module-level functions of fewer than SHORT lines that are named once besides their definition."""
    found = []
    for path in files:
        tree = tree_of(path)
        uses = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and not node.decorator_list:
                length = node.end_lineno - node.lineno + 1
                if length < SHORT and uses[node.name] <= 1:
                    found.append(place(path, node, node.name))
    return found


def wide_lines(files: list[Path]) -> list[str]:
    """Lines over WIDTH columns."""
    return [
        f"{place(path)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > WIDTH
    ]


def untyped_signatures(files: list[Path]) -> list[str]:
    """Public functions and methods whose signature says Any, also inside dict[str, Any]."""
    found = []
    for path in files:
        for owner in (tree_of(path), *(n for n in tree_of(path).body if isinstance(n, ast.ClassDef))):
            if isinstance(owner, ast.ClassDef) and owner.name.startswith("_"):
                continue
            for node in owner.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                    every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                    hints = [node.returns, *(argument.annotation for argument in every)]
                    if any(
                        (h is not None and "Any" in ast.unparse(h).replace("[", " ").split(" "))
                        or (h is not None and "Any]" in ast.unparse(h))
                        for h in hints
                    ):
                        found.append(place(path, node, node.name))
    return found


def shared_names(files: list[Path]) -> list[str]:
    """Class and public function names that are defined in more than one module (commands apart: they carry their job's name)."""
    where = defaultdict(list)
    for path in files:
        if path.relative_to(ROOT).parts[:2] == ("personatlas", "cli") or path.name == "api.py":
            continue
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                where[node.name].append(place(path, node))
    return [f"{name}: {', '.join(places)}" for name, places in sorted(where.items()) if len(places) > 1]


MEASURES = {
    "private functions with one caller": one_caller_functions,
    "lines over 110 columns": wide_lines,
    "public signatures with Any": untyped_signatures,
    "names defined twice": shared_names,
}


def counts() -> dict[str, int]:
    """Each measure over the whole library."""
    files = library_files()
    return {name: len(measure(files)) for name, measure in MEASURES.items()}


if __name__ == "__main__":
    chosen = [
        path for path in library_files() if str(path.relative_to(ROOT)).startswith(tuple(sys.argv[1:]) or "")
    ]
    for title, measure in MEASURES.items():
        rows = measure(chosen)
        if len(sys.argv) > 1:
            print(*rows, sep="\n")
        print(f"{title}: {len(rows)}\n" if len(sys.argv) > 1 else f"{title}: {len(rows)}")
    lines = sum(len(path.read_text().splitlines()) for path in chosen)
    print(json.dumps({"files": len(chosen), "lines": lines}))
