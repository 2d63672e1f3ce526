"""Shape annotations are checked in the tests: every jaxtyping signature of the package runs under beartype here."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is defined: kernels run without a GPU

ROOT = Path(__file__).parent.parent
# Triton reads its kernels' source, which the hook would wrap
MODULES = [
    f"personaxis.{path.parent.name}.{path.stem}"
    for folder in ("persona", "analysis", "steering", "training")
    for path in (ROOT / folder).glob("*.py")
    if path.stem not in ("__init__", "kernels")
]
install_import_hook(MODULES, "beartype.beartype")


@pytest.fixture
def triton_interpreter():
    """Kernels as the interpreter runs them, where Triton is installed; `test_gpu.py` runs them on a GPU."""
    pytest.importorskip("triton")
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("there is a GPU: test_gpu.py runs the kernels themselves")
