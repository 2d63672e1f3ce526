"""Guard rails: layers, sizes of folders, files and functions, heavy imports, and counts that may only fall."""

import ast
import json
import tomllib
from pathlib import Path

import pytest
from structure import FOLDERS, ROOT, counts, library_files, tree_of

MAY_IMPORT = {
    "persona": {"persona"},
    "analysis": {"analysis", "persona"},
    "steering": {"steering", "analysis", "persona"},
    "training": {"training", "analysis", "persona"},
}
# slow packages are imported at module level in these files only, elsewhere where they are used
HEAVY = {
    "transformers": {"persona/sampling/kv_cache.py", "persona/sampling/cuda_graph.py"},
    "triton": {"persona/sampling/kernels.py", "steering/hooks/kernels.py", "training/model/kernels.py"},
    "transformer_lens": set(),
    "sklearn": {"analysis/fit/geometry.py"},
    "plotly": None,  # figures and pages, which commands import last
    "inspect_ai": {"steering/evals/harnesses/inspect_provider.py"},
    "lm_eval": {"steering/evals/harnesses/lm_eval.py"},
    "fastapi": {"steering/serve/http/app.py"},
    "vllm": set(),
}
FIGURES = ("figures.py", "canvas.py", "page.py")
FILES = library_files()
MOST_LINES, LONGEST_FUNCTION, MOST_FILES = 600, 80, 16


def name_of(path: Path) -> str:
    """The import name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "personatlas" else ("personatlas", *parts))


def imports(path: Path, *, top_level: bool = False) -> list[str]:
    """Names of all modules that a file imports: `a.b` and `a.b.c` for `from a.b import c`."""
    nodes = tree_of(path).body if top_level else ast.walk(tree_of(path))
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_each_layer_imports_only_those_below_it():
    for path in FILES:
        layer = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] not in MAY_IMPORT, f"{path} imports {name}: write personatlas.{name}"
            if parts[0] == "personatlas" and layer in MAY_IMPORT and len(parts) > 1:
                assert parts[1] in MAY_IMPORT[layer], f"{path} imports {name}: {layer} may not"


def test_no_module_imports_itself_by_way_of_others():
    names = {name_of(path): path for path in FILES}
    graph = {name: set(imports(path, top_level=True)) & set(names) - {name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"an import circle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_commands_and_their_tables_are_in_the_command_line_only():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != "personatlas":
            for name in imports(path):
                assert name.split(".")[0] != "cyclopts", f"{path} imports cyclopts"
                assert not name.startswith("rich.table"), f"{path} imports {name}"


def test_heavy_packages_are_imported_where_they_are_used():
    for path in FILES:
        here = str(path.relative_to(ROOT))
        for name in imports(path, top_level=True):
            allowed = HEAVY.get(name.split(".")[0], {here})
            where = path.name.endswith(FIGURES) if allowed is None else here in allowed
            assert where, f"{here} imports {name} at module level"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    assert path.read_text().count("\n") <= MOST_LINES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= LONGEST_FUNCTION, f"{path}:{node.lineno} {node.name}"


def test_a_folder_can_be_read_at_a_glance():
    for folder in {path.parent for path in FILES}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{folder} has {len(files)} files"


def test_every_package_of_the_tree_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {name_of(path) for path in FILES if path.name == "__init__.py"}
    for folder in {path.parent for path in FILES}:
        assert (folder / "__init__.py").is_file(), f"{folder} is not a package"


def test_tests_stand_in_the_folders_of_what_they_test():
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        known = (
            folder.parts[:1] in ((), ("docs",), ("cli",), ("robustness",), ("first_hour",))
            or (ROOT / folder).is_dir()
        )
        assert known, f"{path} tests no folder of the library"


def test_nothing_unpickles():
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads", "joblib.load"), path
                if called == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), path


def test_libraries_do_not_print():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != "personatlas":
            for node in ast.walk(tree_of(path)):
                is_print = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
                assert not is_print, f"{path}:{node.lineno} prints"


def test_counts_of_what_should_go_only_fall():
    """structure.json is the ratchet: `python tests/structure.py` prints the counts; write a lower one down."""
    limits = json.loads((ROOT / "tests" / "structure.json").read_text())
    found = counts()
    assert found.keys() == limits.keys()
    for name, count in found.items():
        assert count <= limits[name], (
            f"{name}: {count}, at most {limits[name]}; see python tests/structure.py {FOLDERS}"
        )
