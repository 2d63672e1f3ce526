"""Shape annotations are checked in the tests: every jaxtyping signature of the package runs under beartype here."""

import os

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("TRITON_INTERPRET", "1")

install_import_hook("personaxis", "beartype.beartype")


@pytest.fixture
def triton_interpreter():
    """Kernels can be run without a GPU in Triton's interpreter; it must be chosen before the first kernel is defined."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("set TRITON_INTERPRET=1 to run the kernels on the CPU")
