"""Memory of long requests, given back to the system."""

import ctypes
import sys


def return_memory() -> None:
    """Gives back what the C library keeps of freed memory; does nothing where it is not glibc."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
