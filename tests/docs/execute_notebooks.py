"""Runs notebooks from the first cell to the last and stores them with their outputs: `make notebooks`.

    python tests/docs/execute_notebooks.py axis drift

What a run says on stderr (progress, times) is left out, and so are the ids and times that change every time.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
DATA = ("text/plain", "text/html", "image/png", "application/vnd.plotly.v1+json")


def execute(notebook: nbformat.NotebookNode, place: Path) -> None:
    """Runs a notebook in a folder, with this very Python as its kernel."""
    spec = place / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps({"argv": start, "display_name": "own", "language": "python"})
    )
    os.environ["JUPYTER_PATH"] = str(place / "jupyter")
    resources = {"metadata": {"path": str(place)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Keeps what a reader looks at."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [own for own in cell.outputs if own.get("name") != "stderr"]
            for output in cell.outputs:
                if "data" in output:
                    output.data = {kind: value for kind, value in output.data.items() if kind in DATA}
                    if "application/vnd.plotly.v1+json" in output.data:  # the page's script is 4 MB
                        output.data.pop("text/html", None)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        facts = dict(notebook.metadata)
        with tempfile.TemporaryDirectory() as place:
            execute(notebook, Path(place))
        tidy(notebook)
        notebook.metadata = facts
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        print(name)
