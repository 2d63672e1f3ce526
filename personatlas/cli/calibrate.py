"""The command `calibrate`: the strongest cap within a loss budget."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from personatlas.cli.options import MODEL, OPTIONS, STEERING, Json, SteeringOptions
from personatlas.cli.output import print_json, print_line, print_path, print_table, print_warning
from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions


@dataclass(frozen=True)
class SearchOptions:
    """What to search and measure."""

    windows: str = ""
    "layer windows with commas between, such as 14-25,18-23; twelve over the upper half of the model unless given (quick: 3)"
    levels: str = "0.1,0.25,0.5,0.75"
    "levels to try, quantiles from 0 to 1"
    population: str = "default"
    "whose answers the floors are quantiles of: default, roles or pooled; several with commas between"
    budget: float = 0.05
    "the most that a cap may cost: loss per token on benign answers more than as it is, 0.05 is 5%"
    quick: bool = False
    "for a CPU: three windows and none beside the best, and fewer of what has a number for it in brackets"
    steps: int | None = None
    "steps in which a floor for each layer, for prompts and for answers, is fitted by gradient: 120 (quick: 30); 0 for none"
    roles: int | None = None
    "the lowest roles on the axis, half to choose on and half to report on: 50 (quick: 20)"
    prompts: int | None = None
    "prompts a role: 2 (quick: 1)"
    answers: int | None = None
    "benign answers, half and half: 60"
    max_new_tokens: int = 48
    "longest answer"
    temperature: float = 0.7
    "sampling temperature"
    seed: int = 0
    "all arms sample with it"


def calibrate(
    run: Path,
    /,
    *,
    name: str = "assistant",
    bank: Path | None = None,
    search: Annotated[SearchOptions, OPTIONS] = SearchOptions(),
    steering: Annotated[SteeringOptions, STEERING] = SteeringOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Find the strongest cap within a loss budget, save it beside the axis, and report it on other roles. Resumes.

    The run's own axis is used unless --axis names another one; every --arm cap:... is reported beside the chosen cap.

    Parameters
    ----------
    run
        a run folder with rollouts and a fit
    name
        the cap's name: RUN/caps/NAME
    bank
        the bank that the run was made with, if not the packaged one
    """
    from personatlas.steering.calibration.calibrate import calibrated

    if not name or "/" in name or name.startswith("."):
        raise UserError(f"--name {name!r} cannot be a file's name")
    content = calibrated(run, name, steering.axis, steering.caps(), bank, search, load)
    if json:
        print_json(content)
        return
    _print_calibration(content)
    print_path("cap", content["saved"])
    print_path("page", content["page"])


def _print_calibration(content: dict[str, Any]) -> None:
    rows = []
    for name, row in content["report"].items():
        low, high = row["interval"]
        rows.append(
            [
                f"{name} {content['cap']}" if name == "chosen" else name,
                f"{row['assistant']:.1%} [{low:.0%}, {high:.0%}]",
                f"{row['more_loss']:+.1%}",
                f"{row['kl']:.3f}",
                f"{row['fired']:.0%}",
                f"{row['distinct']:.2f}",
            ]
        )
    columns = ["arm (reporting half)", "assistant [95%]", "more loss", "KL", "fired", "distinct"]
    print_table(columns, rows)
    print_line(content["why"])
    for warning in content["warnings"]:
        print_warning(warning)
