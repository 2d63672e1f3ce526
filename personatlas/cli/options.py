"""Option groups. An option has one name, one meaning and one panel in the help of every command.

Options of the libraries are plain dataclasses with documented fields; a command takes them flattened:

    def record(run: Path, /, *, load: Annotated[ModelOptions, MODEL] = ModelOptions()) -> None: ...
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from personatlas.persona.errors import UserError
from personatlas.persona.models.hub import require_model_name

_PANELS = ("Model", "Plan", "Judge", "Fit", "Steering", "Sampling", "Size", "Output")


def _flattened(panel: str) -> Parameter:
    return Parameter(name="*", group=Group(panel, sort_key=1 + _PANELS.index(panel)))


MODEL, PLAN, JUDGE, FIT, STEERING, SAMPLING, SIZE = map(_flattened, _PANELS[:-1])
OPTIONS = Parameter(name="*")
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
Out = Annotated[Path | None, Parameter(group=_OUTPUT)]
Html = Annotated[Path | None, Parameter(group=_OUTPUT)]


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

    arm: tuple[str, ...] = ()
    """an arm beside the baseline: cap:assistant (saved beside the axis), cap:FILE, cap:p50@18-23 (level and
    layers), cap:roles:p75@20,22, add:8@21, ablate@20-22, random:3 (random controls); may be repeated"""

    def caps(self, *default: str) -> list[str]:
        """The cap specs of the arms, else the default. Raises `UserError` for other arms and repetitions."""
        caps = [self._value(arm, "cap") for arm in self.arm] or list(default)
        if repeated := [cap for cap in caps if caps.count(cap) > 1]:
            raise UserError(f"--arm cap:{repeated[0]} is given twice")
        return caps

    def arms(self, *default: str) -> list[str]:
        """The arms without random controls, else the default. Raises `UserError` for repetitions."""
        arms = [arm for arm in self.arm if not arm.startswith("random:")] or list(default)
        if repeated := [arm for arm in arms if arms.count(arm) > 1]:
            raise UserError(f"--arm {repeated[0]} is given twice")
        return arms

    def cap(self, *default: str) -> str:
        """The cap of the only arm, else the default. Raises `UserError` for several arms."""
        caps = self.caps(*default)
        if len(caps) != 1:
            raise UserError(
                f"one cap is compared with the baseline: give one --arm cap:..., not {len(self.arm)}"
            )
        return caps[0]

    def n_random(self, default: int = 0) -> int:
        """The number of random controls, else the default. Raises `UserError` for what is no number."""
        numbers = [self._value(arm, "random") for arm in self.arm if arm.startswith("random:")]
        if not all(number.isdigit() for number in numbers):
            raise UserError(f"--arm random:{numbers[0]} is not random:N, a number of random controls")
        return sum(map(int, numbers)) if numbers else default

    @staticmethod
    def _value(arm: str, kind: str) -> str:
        found, _, value = arm.partition(":")
        if found != kind or not value:
            raise UserError(
                f"--arm {arm!r} is not cap:NAME, cap:FILE or cap:LEVEL@LAYERS, the arms of this command"
            )
        return value
