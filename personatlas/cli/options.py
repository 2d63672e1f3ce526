"""Option groups. An option has one name, one meaning and one panel in the help of every command.

Options of the libraries are plain dataclasses with documented fields; a command takes them flattened:

    def record(run: Path, /, *, load: Annotated[ModelOptions, MODEL] = ModelOptions()) -> None: ...
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter, Token

from personatlas.persona.models.hub import require_model_name
from personatlas.steering.arm_kinds import arm_help, match_arm, with_default

_PANELS = ("Model", "Plan", "Judge", "Fit", "Steering", "Sampling", "Size", "Output")


def _flattened(panel: str) -> Parameter:
    group = Group(panel, sort_key=1 + _PANELS.index(panel))
    return Parameter(name="*", group=group, validator=_check)


def _check(_type: object, options: object) -> None:
    """Refuses what options can know to be wrong by themselves, before anything slow is imported."""
    check: Callable[[], None] | None = getattr(options, "check", None)
    if check is not None:
        check()


MODEL, PLAN, JUDGE, FIT, STEERING, SAMPLING, SIZE = map(_flattened, _PANELS[:-1])
OPTIONS = Parameter(name="*", validator=_check)
"Options of one command, in the panel of its own parameters."

_OUTPUT = Group("Output", sort_key=1 + len(_PANELS))


ModelName = Annotated[
    str,
    Parameter(
        help="a packaged name (smollm2-135m), a local folder, a training run, a .gguf file or a hub id",
        # a name that is neither here nor on the hub is refused before anything slow is imported
        validator=lambda _, name: name is None or require_model_name(name),
    ),
]
Json = Annotated[bool, Parameter(group=_OUTPUT, help="print the result as JSON", show_default=False)]


def _output_file(_type: object, tokens: Sequence[Token]) -> Path:
    """A path to write to. "" is none, though `Path("")` is the working folder."""
    if not tokens[0].value.strip():
        raise ValueError("an empty name: give a path to write to")
    return Path(tokens[0].value)


def _output_page(type_: object, tokens: Sequence[Token]) -> Path:
    """A page to write; a file that is no page is not written over."""
    path = _output_file(type_, tokens)
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
        if start and not start.startswith((b"<!doctype html", b"<html")):
            raise ValueError(f"{path} is a file and no page: give another name")
    return path


def _output_folder(type_: object, tokens: Sequence[Token]) -> Path:
    """A folder to write to; the working folder only where it is a run or empty."""
    folder = _output_file(type_, tokens)
    if folder.is_file():
        raise ValueError(f"{folder} is a file, not a folder")
    is_own = any((folder / name).is_file() for name in ("run.json", "axis.json"))
    if folder.resolve() == Path.cwd() and not is_own and any(folder.iterdir()):
        raise ValueError(f"{folder} is the working folder and holds other files: name a folder in it")
    return folder


Out = Annotated[Path | None, Parameter(group=_OUTPUT, converter=_output_folder)]
Html = Annotated[Path | None, Parameter(group=_OUTPUT, converter=_output_page)]
OutFolder = Annotated[Path, Parameter(converter=_output_folder)]
OutFile = Annotated[Path, Parameter(converter=_output_file)]


@dataclass(frozen=True)
class AxisOptions:
    """Which axis to measure along."""

    axis: str | None = None
    """a run folder, an axis file, or smollm2-135m; by default the axis packaged with the model or made by
    `personatlas axis MODEL`"""
    force: bool = False
    "accept an axis of the same model in another weight format"


@dataclass(frozen=True)
class SteeringOptions(AxisOptions):
    """Which axis to measure along, and which arms to compare with the baseline."""

    arm: Annotated[tuple[str, ...], Parameter(help=arm_help())] = ()

    def check(self) -> None:
        """Raises `UserError` for a text that names no arm."""
        for text in self.arm:
            match_arm(text)

    def arms(self, axis: str) -> list[str]:
        """The arms' texts, behind the default arm of the axis where they name nothing but random controls."""

        def default() -> str | None:
            from personatlas.persona.axis import load_axis
            from personatlas.persona.runs import resolve_axis
            from personatlas.steering.arms import default_arm

            return default_arm(load_axis(resolve_axis(axis)))

        return with_default(self.arm, default)
