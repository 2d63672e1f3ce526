"""The notebooks are kept without outputs and run from the first cell to the last, in a folder of their own; what they claim they assert."""

import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("axis", "drift", "capping", "training")
SLOW = {"training"}  # most of a minute on one thread
README = (FOLDER.parent / "README.md").read_text()


def notebook(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code(name):
    return [cell for cell in notebook(name).cells if cell.cell_type == "code"]


@pytest.fixture
def own_python(tmp_path, monkeypatch):
    """A kernel python3 that is this very Python, whatever else this machine calls so; what it writes goes to a folder of its own."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps({"argv": start, "display_name": "own", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def test_they_are_the_four_that_the_readme_names():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    assert set(re.findall(r"notebooks/([a-z]+)\.ipynb", README)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_kept_without_outputs(name):
    content = notebook(name)
    nbformat.validate(content)
    assert (content.nbformat, content.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in content.cells}) == len(content.cells)
    assert content.cells[0].cell_type == "markdown"
    assert content.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in content.cells:
        assert cell.metadata == {}
        assert cell.source.strip()
    for cell in code(name):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_asserts_what_it_claims(name):
    assert sum("\nassert " in cell.source for cell in code(name)) >= 2


@pytest.mark.usefixtures("own_python")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NAMES]
)
def test_a_notebook_runs_from_the_first_cell_to_the_last(name, tmp_path):
    content, place = notebook(name), tmp_path / "place"
    place.mkdir()
    NotebookClient(
        content, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(place)}}
    ).execute()
    ran = [cell for cell in content.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    for cell in ran:
        if cell.source.endswith("figure"):
            assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in cell.outputs)
