"""Shape annotations are checked in the tests: every jaxtyping signature of the package runs under beartype here."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is defined: kernels run without a GPU

ROOT = Path(__file__).parent.parent
# Triton reads its kernels' source, which the hook would wrap
MODULES = [
    ".".join(("personaxis", *path.relative_to(ROOT).with_suffix("").parts))
    for folder in ("persona", "analysis", "steering", "training")
    for path in (ROOT / folder).rglob("*.py")
    if path.stem not in ("__init__", "kernels")
]
install_import_hook(MODULES, "beartype.beartype")


@pytest.fixture
def triton_interpreter():
    """Kernels as the interpreter runs them, where Triton is installed; `test_gpu.py` runs them on a GPU."""
    pytest.importorskip("triton")
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("there is a GPU: test_gpu.py runs the kernels themselves")


@pytest.fixture(scope="module")
def tiny_run(whole_run, tmp_path_factory):
    """A folder with a tiny model ("tiny"), a bank of six roles ("bank") and a whole run over them ("run"), for one file's tests: what
    they put beside the run is not found by another file's."""
    return shutil.copytree(whole_run, tmp_path_factory.mktemp("tiny") / "own")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The same, made once and left as it is."""
    from families import save_tiny
    from test_stages import write_bank

    from personaxis.persona.cli import main

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "tiny")
    bank = write_bank(folder / "bank")
    how = (
        "--device cpu --dtype float32 --samples 4 --chunk 32 --max-new-tokens 8 --judge none --keep all --replicates 4"
    )
    main(["axis", str(folder / "tiny"), "--bank", str(bank), "--out", str(folder / "run"), *how.split()])
    return folder


@pytest.fixture(scope="module")  # not longer: other tests start processes, which forks of many threads take ill
def tiny_server(tiny_run, tmp_path_factory):
    """The real server around the tiny model, with the caps `held` and `firm`, in a thread (serving.Served)."""
    from serving import axis_folder, served, tiny_host

    folder = axis_folder(tiny_run, tmp_path_factory.mktemp("served"))
    with served(tiny_host(tiny_run, folder)) as server:
        yield server
