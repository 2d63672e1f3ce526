"""The notebooks are kept with their outputs and run from the first cell to the last, in a folder of their own; what they claim they
assert."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from execute_notebooks import execute

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("axis", "drift", "capping", "training")
SLOW = {"training"}  # most of a minute on one thread
README = (FOLDER.parent / "README.md").read_text()


def notebook(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code(name):
    return [cell for cell in notebook(name).cells if cell.cell_type == "code"]


@pytest.fixture
def own_jupyter(tmp_path, monkeypatch):
    """What Jupyter writes goes to a folder of its own."""
    monkeypatch.setenv("JUPYTER_PATH", "")
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def test_they_are_the_four_that_the_readme_names():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    assert set(re.findall(r"notebooks/([a-z]+)\.ipynb", README)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_kept_with_what_it_shows(name):
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
    cells = code(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells if re.search(r"^ *print\(|^\w+$", cell.source, re.M))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [
        output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"
    ]
    assert not re.findall(r"/(?:tmp|home|root)/", json.dumps(outputs))
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 200_000


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_asserts_what_it_claims(name):
    assert sum("\nassert " in cell.source for cell in code(name)) >= 2


@pytest.mark.usefixtures("own_jupyter")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NAMES]
)
def test_a_notebook_runs_from_the_first_cell_to_the_last(name, tmp_path):
    content, place = notebook(name), tmp_path / "place"
    place.mkdir()
    execute(content, place)
    ran = [cell for cell in content.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    for cell in ran:
        if cell.source.endswith("figure"):
            assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in cell.outputs)
