"""Map, monitor and hold the persona of a language model, from training to serving.

    import personatlas as pa

    model = pa.load("smollm2-135m", device="cpu")
    run = pa.compute_axis(model, out="runs/demo", plan="demo")
    trace = pa.project(model, messages, run.axis)

Every name below is loaded on first use, so importing this package loads neither torch nor transformers.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from personatlas.api import (
        Run,
        calibrate,
        compute_axis,
        evaluate,
        generate,
        load,
        load_axis,
        load_bank,
        open_run,
        project,
        serve,
        steer,
        train_base,
        train_chat,
    )
    from personatlas.persona.axis import Axis, PersonaSpace
    from personatlas.persona.errors import UserError
    from personatlas.persona.interventions import Ablate, Add, Cap, MeanAblate
    from personatlas.persona.models.load import Model
    from personatlas.persona.roles.bank import Bank
    from personatlas.persona.sampling.sampler import Sampling
    from personatlas.steering.evals.suites import Suite

__all__ = [
    "Ablate",
    "Add",
    "Axis",
    "Bank",
    "Cap",
    "MeanAblate",
    "Model",
    "PersonaSpace",
    "Run",
    "Sampling",
    "Suite",
    "UserError",
    "calibrate",
    "compute_axis",
    "evaluate",
    "generate",
    "load",
    "load_axis",
    "load_bank",
    "open_run",
    "project",
    "serve",
    "steer",
    "train_base",
    "train_chat",
]

_MODULES = {
    "persona.axis": ("Axis", "PersonaSpace"),
    "persona.errors": ("UserError",),
    "persona.interventions": ("Ablate", "Add", "Cap", "MeanAblate"),
    "persona.models.load": ("Model",),
    "persona.roles.bank": ("Bank",),
    "persona.sampling.sampler": ("Sampling",),
    "steering.evals.suites": ("Suite",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

# In a checkout the other packages lie beside this folder: an editable or uninstalled checkout finds them
# there.
if (_checkout := Path(__file__).parent.parent).joinpath("pyproject.toml").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> object:
    """Loads a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'personatlas' has no attribute {name!r}")
    value = getattr(import_module(f"personatlas.{_HOME.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
