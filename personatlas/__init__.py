"""Map, monitor and hold the persona of a language model, from training to serving."""

from pathlib import Path

# In a checkout the other packages lie beside this folder: an editable or uninstalled checkout finds them there.
if (_checkout := Path(__file__).parent.parent).joinpath("pyproject.toml").is_file():
    __path__.append(str(_checkout))
