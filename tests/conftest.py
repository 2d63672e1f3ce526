"""Shape annotations are checked in the tests: every jaxtyping signature of the package runs under beartype here."""

from jaxtyping import install_import_hook

install_import_hook("personaxis", "beartype.beartype")
