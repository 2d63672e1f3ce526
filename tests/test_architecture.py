"""The import rule: persona <- analysis <- steering and persona <- training, nothing else, by installed names only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("persona", "analysis", "steering", "training")
MAY_IMPORT = {
    "persona": {"persona"},
    "analysis": {"analysis", "persona"},
    "steering": {"steering", "analysis", "persona"},
    "training": {"training", "analysis", "persona"},
}
# packages that are slow or heavy to import are met at module level in these files only
CONFINED = {
    "transformers": {"persona/slots.py", "persona/graph.py"},
    "triton": {"persona/kernels.py", "steering/kernels.py", "training/kernels.py"},
    "transformer_lens": set(),
    "sklearn": {"analysis/geometry.py"},
    "plotly": {
        "analysis/canvas.py",
        "analysis/figures.py",
        "analysis/figures_curve.py",
        "analysis/figures_drift.py",
        "analysis/figures_emergence.py",
        "analysis/figures_eval.py",
        "analysis/figures_traits.py",
        "analysis/figures_pareto.py",
        "analysis/figures_training.py",
        "analysis/page.py",
    },
    "inspect_ai": {"steering/evals/inspect_model.py"},
    "lm_eval": {"steering/evals/lm_eval_model.py"},
    "fastapi": {"steering/serve/app.py"},
    "vllm": set(),
}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path, *, top_level: bool = False) -> list[str]:
    """Names of all modules that a file imports, `a.b` for `from a.b import c`."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_folder_may(path):
    folder = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in FOLDERS, f"{path} imports {name}: write personatlas.{name}"
        if parts[0] == "personatlas" and path.name != "cli.py":
            assert parts[1] in MAY_IMPORT[folder], f"{path} imports {name}: {folder} may not"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    here = str(path.relative_to(ROOT))
    for name in imports(path, top_level=True):
        allowed = CONFINED.get(name.split(".")[0])
        assert allowed is None or here in allowed, f"{here} imports {name} at module level"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    source = path.read_text()
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 45, f"{path}:{node.lineno} {node.name}"


def test_nothing_unpickles():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads", "joblib.load"), path
                if called == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), path
