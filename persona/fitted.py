"""The fitted axis and persona space that come with the packaged model, so that chat and monitoring can begin at once.

    axis = load_axis(fitted_folder("smollm2-135m") / "axis")

`axes/NAME/README.md` has the command that made them. The axis's quantiles over the default's and the roles' answers, at
every layer, are the floors that a cap can be made of.
"""

from pathlib import Path

from personaxis.persona.errors import KnownError

FITTED = Path(__file__).parent / "axes"
ENDINGS = (".json", ".safetensors")


def fitted_names() -> tuple[str, ...]:
    """Models that an axis comes with."""
    return tuple(sorted(path.name for path in FITTED.iterdir() if (path / "axis.json").is_file()))


def fitted_folder(name: str) -> Path:
    """The folder with `axis.*` and `space.*` of a packaged model. `KnownError` when none comes with it."""
    if name not in fitted_names():
        raise KnownError(
            f"no axis comes with {name!r}, only with {', '.join(fitted_names())}; fit one: personaxis axis"
        )
    return FITTED / name


def axis_stem(name: str) -> Path:
    """Where an axis lies that is named by a run folder, an artefact (with or without its ending) or a packaged model."""
    path = Path(name)
    if name in fitted_names() and not path.exists():
        return fitted_folder(name) / "axis"
    stem = path / "axis" if path.is_dir() else path.with_suffix("") if path.suffix in ENDINGS else path
    if not stem.with_name(stem.name + ".json").is_file():
        raise KnownError(f"no axis at {name}: give a run folder with a fit, an axis.safetensors or {fitted_names()[0]}")
    return stem
