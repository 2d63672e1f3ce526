"""The commands `drift` and `trace`: do conversations leave the Assistant, where, and does a cap hold them?"""

from pathlib import Path
from typing import Annotated, Literal

from personatlas.cli.options import (
    MODEL,
    OPTIONS,
    STEERING,
    AxisOptions,
    Html,
    Json,
    ModelName,
    Out,
    SteeringOptions,
)
from personatlas.cli.output import print_json
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import default_folder, find_axis
from personatlas.steering.drift.options import DriftOptions


def drift(
    model: ModelName,
    /,
    *,
    reference: Path | None = None,
    options: Annotated[DriftOptions, OPTIONS] = DriftOptions(),
    steering: Annotated[SteeringOptions, STEERING] = SteeringOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure persona drift over conversations, at baseline and in every arm. Resumes.

    Each arm comes twice: always on, and adaptive, on only while an alarm is. Without --arm the arm is
    cap:assistant, where that cap is saved beside the axis.

    Parameters
    ----------
    reference
        a reference.json of an earlier study, on which the alarm is calibrated; unless given the one beside
        the axis, else this study's own conversations in the reference domains
    out
        the folder of the study; runs/NAME-drift unless given
    """
    from personatlas.cli.drift_tables import print_drift
    from personatlas.steering.drift.page import write_drift_page
    from personatlas.steering.drift.study import run_drift_study

    folder = out or default_folder(model, "drift")
    result = run_drift_study(
        model,
        find_axis(model, steering.axis),
        folder,
        arms=steering.arm,
        options=options,
        reference=reference,
        load=load,
        force=steering.force,
    )
    write_drift_page(folder / "drift.html", result)
    if json:
        print_json({name: value for name, value in result.to_json().items() if name != "examples"})
    else:
        print_drift(result, folder)


def trace(
    model: ModelName,
    conversations: Path,
    /,
    *,
    reference: Path | None = None,
    rule: Literal["cusum", "two_of_three"] = "cusum",
    false_alarms: float = 0.05,
    steering: Annotated[AxisOptions, STEERING] = AxisOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    html: Html = None,
    json: Json = False,
) -> None:
    """Trace stored conversations along an axis, turn by turn, and say where the persona drifts.

    Parameters
    ----------
    conversations
        conversations in any common form (messages, ShareGPT, ChatGPT's export, Tavern logs, question and
        answer) as JSON, JSONL, CSV or Parquet, also packed, or one as plain text (.txt: "User: ...",
        "Assistant: ...")
    reference
        a reference.json of `personatlas drift`, or at least 40 conversations of this model that do not drift:
        the alarm is calibrated on all of them and its false alarms are cross-validated. Unless given, the
        reference.json beside the axis; without one there are z but no alarms
    rule
        what raises an alarm: cusum (a small drift that lasts) or two_of_three (two of three turns far below)
    false_alarms
        share of reference conversations that may raise an alarm
    html
        write a page that ranks the conversations and shows the first 20, their turns and tokens coloured,
        with their trajectories
    """
    from personatlas.cli.drift_tables import print_trace
    from personatlas.persona.artifacts import require_writable
    from personatlas.steering.drift.trace import run_trace, write_trace_page

    if html is not None:
        require_writable(html, "--html")
    study = run_trace(
        model,
        find_axis(model, steering.axis),
        conversations,
        reference=reference,
        rule=rule,
        false_alarms=false_alarms,
        load=load,
        force=steering.force,
    )
    print_json(study.to_json()) if json else print_trace(study)
    if html is not None:
        write_trace_page(html, study)
        say(f"page: {html}")
