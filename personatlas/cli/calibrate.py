"""The verbs that measure caps: calibrate, and susceptibility, the paper's behavioural test."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from personatlas.cli.options import MODEL, OPTIONS, Json, ModelName
from personatlas.cli.output import print_json, print_line, print_table, print_warning
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


@dataclass(frozen=True)
class TestOptions:
    """What to ask, and who classes the answers."""

    roles: int = 50
    "the lowest roles on the axis"
    prompts: int = 2
    "prompts a role; each is asked five identity questions"
    max_new_tokens: int = 48
    "longest answer"
    temperature: float = 0.7
    "sampling temperature"
    seed: int = 0
    "all arms sample with it"
    judge: str = "rules"
    "rules (offline), or the URL of an OpenAI-compatible endpoint, which does not see which arm it judges"
    judge_model: str = ""
    "the model to ask for at that URL"


def calibrate(
    run: Path,
    /,
    *,
    name: str = "assistant",
    axis: str | None = None,
    also: list[str] | None = None,
    bank: Path | None = None,
    search: Annotated[SearchOptions, OPTIONS] = SearchOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Find the strongest cap within a loss budget, save it beside the axis, and report it on other roles. Resumes.

    Parameters
    ----------
    run
        a run folder with rollouts and a fit
    name
        the cap's name: RUN/caps/NAME
    axis
        another axis of the same model; the run's own unless given
    also
        a cap to report beside the chosen one, by name, file or LEVEL@LAYERS; may be given several times
    bank
        the bank that the run was made with, if not the packaged one
    """
    from personatlas.steering.calibration.calibrate import calibrated

    if not name or "/" in name or name.startswith("."):
        raise UserError(f"--name {name!r} cannot be a file's name")
    content = calibrated(run, name, axis, also or [], bank, search, load)
    if json:
        print_json(content)
        return
    _print_calibration(content)
    print_line(f"cap: {content['saved']}")
    print_line(f"page: {content['page']}")


def susceptibility(
    model: ModelName,
    /,
    *,
    axis: str,
    cap: list[str] | None = None,
    add: str = "4,8,16",
    bank: Path | None = None,
    force: bool = False,
    asked: Annotated[TestOptions, OPTIONS] = TestOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Who does the model say that it is under the lowest roles? As it is, capped, and with the axis added.

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it
    cap
        a cap by name, file or LEVEL@LAYERS, "assistant" unless given; may be given several times
    add
        strengths of plain addition at the axis's layer, residual units, with commas between; "" for none
    bank
        a bank with the axis's roles, if not the packaged one
    force
        use an axis of the same model in another weight format
    """
    from personatlas.steering.evals.suites.susceptibility_run import run_susceptibility

    content = run_susceptibility(
        model, load, axis, cap or ["assistant"], _amounts(add), asked, bank, force=force
    )
    if json:
        print_json(content)
    else:
        _print_susceptibility(content)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _amounts(text: str) -> list[float]:
    try:
        found = [float(part) for part in _split(text)]
    except ValueError:
        raise UserError(f"--add {text!r} is not numbers with commas between") from None
    if not all(map(isfinite, found)):
        raise UserError(f"--add {text!r}: NaN and infinity are no strengths")
    return found


def _print_susceptibility(content: dict[str, Any]) -> None:
    first = next(iter(content["arms"].values()))
    classes = list(first["shares"])[1:]
    rows = []
    for name, arm in content["arms"].items():
        low, high = arm["interval"]
        assistant = f"{arm['shares']['assistant']:.1%} [{low:.0%}, {high:.0%}]"
        rows.append(
            [name, assistant, *(f"{arm['shares'][cls]:.0%}" for cls in classes), f"{arm['fired']:.0%}"]
        )
    print_table(["arm", "assistant [95%]", *classes, "fired"], rows)
    print_line(
        f"{first['n']} answers an arm under the {content['roles']} lowest roles, classed by {content['judge']}; "
        "intervals are bootstraps over roles"
    )


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
