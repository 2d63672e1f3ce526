"""The command `calibrate`: the strongest cap within a loss budget."""

from pathlib import Path
from typing import Annotated

from personatlas.cli.options import MODEL, OPTIONS, STEERING, Json, SteeringOptions
from personatlas.cli.output import print_json, print_line, print_path, print_table, print_warning
from personatlas.persona.artifacts import require_file_names
from personatlas.persona.options import ModelOptions
from personatlas.steering.calibration.options import CalibrationOptions


def calibrate(
    run: Path,
    /,
    *,
    name: str = "assistant",
    bank: Path | None = None,
    search: Annotated[CalibrationOptions, OPTIONS] = CalibrationOptions(),
    steering: Annotated[SteeringOptions, STEERING] = SteeringOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Find the strongest cap within a loss budget, save it beside the axis, and report it. Resumes.

    The report is on other roles. The run's own axis is used unless --axis names another one; every --arm is
    reported beside the chosen cap, with three random controls unless random:N says otherwise.

    Parameters
    ----------
    run
        a run folder with rollouts and a fit
    name
        the cap's name: RUN/caps/NAME
    bank
        the bank that the run was made with, if not the packaged one
    """
    from personatlas.steering.calibration.calibrate import calibrate as run_calibration

    require_file_names([name], "--name")
    result = run_calibration(
        run, name=name, axis=steering.axis, arms=steering.arm, bank=bank, options=search, load=load
    )
    if json:
        print_json(result.to_json())
        return
    rows = [
        [
            f"{arm} {result.cap}" if arm == "chosen" else arm,
            f"{row.assistant:.1%} [{row.interval[0]:.0%}, {row.interval[1]:.0%}]",
            f"{row.more_loss:+.1%}",
            f"{row.kl:.3f}",
            f"{row.fired:.0%}",
            f"{row.distinct:.2f}",
        ]
        for arm, row in result.report.items()
    ]
    columns = ["arm (reporting half)", "assistant [95%]", "more loss", "KL", "fired", "distinct"]
    print_table(columns, rows)
    print_line(result.why)
    for warning in result.warnings:
        print_warning(warning)
    print_path("cap", result.saved)
    print_path("page", result.page)
