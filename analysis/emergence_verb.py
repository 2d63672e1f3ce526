"""The verb `emergence`: the axis of a training run's checkpoints, one after another, and a page that shows it emerge."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from personaxis.persona.errors import KnownError
from personaxis.persona.options import FitOptions, JudgeOptions, ModelOptions, PlanOptions
from personaxis.persona.progress import say

MOST = 8  # checkpoints, unless told


def emergence(
    run: Path,
    /,
    *,
    checkpoints: int = MOST,
    out: Path | None = None,
    how: ModelOptions = ModelOptions(),
    what: PlanOptions = PlanOptions(plan="demo"),
    who: JudgeOptions = JudgeOptions(),
    fitting: FitOptions = FitOptions(),
    json: bool = False,
) -> None:
    """Watch the axis of a training run emerge over its checkpoints. Resumes where it stopped.

    Every checkpoint is asked the same questions under the same roles; the last one comes first, and all are compared at its layer.

    Parameters
    ----------
    run
        a folder of `personaxis train base` or `train chat`, with checkpoints
    checkpoints
        how many at most, spread evenly over the logarithm of their steps
    out
        where the checkpoints' runs and the page go; runs/NAME-emergence unless given
    json
        print the result as JSON
    """
    from personaxis.analysis.emergence import emergence as emerging
    from personaxis.analysis.emergence_page import write_emergence_page
    from personaxis.persona.store import write_json
    from personaxis.persona.trained import model_name
    from personaxis.persona.verbs import print_json

    folders = chosen(run, checkpoints)
    out = out or Path("runs") / f"{model_name(run)}-emergence"
    found = {"kind": "emergence", "run": str(run), "folders": {str(s): path.name for s, path in folders.items()}}
    found |= emerging(_fits(folders, out, how, what, who, fitting))
    write_json(out / "emergence.json", found)
    write_emergence_page(out / "emergence.html", model_name(run), found)
    if json:
        print_json(found)
    else:
        _say(found, out / "emergence.html")


def _fits(
    folders: dict[int, Path],
    out: Path,
    how: ModelOptions,
    what: PlanOptions,
    who: JudgeOptions,
    fitting: FitOptions,
) -> dict[int, tuple[dict[str, Any], Any]]:
    """The fit and the axis of every checkpoint, each in a run folder of its own; the last one comes first and says which layer."""
    from personaxis.analysis.verbs import fitted_run
    from personaxis.persona.axis import load_axis
    from personaxis.persona.ranks import ranks

    if ranks().world > 1:
        raise KnownError("emergence works with one process: start it without torchrun")
    fits: dict[int, Any] = {}
    for step in sorted(folders, reverse=True):
        own = out / folders[step].name
        say(f"step {step:,}: {own}")
        fit = fitted_run(str(folders[step]), own, how, what, who, fitting)
        assert fit is not None  # of several processes only the first has one
        fits[step] = fit, load_axis(own / "axis")
        fitting = replace(fitting, layer=fit["layer"])
    return fits


def chosen(run: Path, most: int) -> dict[int, Path]:
    """Checkpoints by step, at most so many. Raises `KnownError` for what is no training run and for fewer than two."""
    from personaxis.analysis.training_report import spread
    from personaxis.persona.trained import checkpoint_folders, is_training_run

    if most < 2:
        raise KnownError(f"--checkpoints {most}: at least 2 are needed to see a change")
    if not is_training_run(run):
        raise KnownError(f"{run} is not the folder of a training run (`personaxis train base`, `train chat`)")
    folders = checkpoint_folders(run)
    if len(folders) < 2:
        raise KnownError(
            f"{run} has {len(folders) or 'no'} checkpoint{'s'[: len(folders) != 1]}: train with --keep log to watch the axis emerge"
        )
    steps = [min(folders), max(folders)] if most == 2 else spread(list(folders), most)
    return {step: folders[step] for step in steps}


def _say(found: dict[str, Any], page: Path) -> None:
    from personaxis.analysis.tables import interval, number
    from personaxis.persona.verbs import console

    names = ["step", "cos(PC1, axis)", "shuffled", "split-half", "|axis|", "shuffled"]
    names += [found["positive"], "ranks as at the end"]
    table = Table(
        *names, title=f"Layer {found['layer']} (intervals 95%)", title_justify="left", box=None, pad_edge=False
    )
    for row in found["checkpoints"]:
        place = row["pole"]
        table.add_row(
            f"{row['step']:,}",
            interval(row["cos_pc1"]),
            number(row["cos_pc1_shuffled"]),
            interval(row["split_half"]),
            f"{row['length']:.3g}",
            "-" if row["length_shuffled"] is None else f"{row['length_shuffled']:.3g}",
            f"{place['z']:+.1f}, {place['place']} of {place['of']}",
            interval(row["ranked_alike"]),
        )
    console().print(table)
    say(f"page: {page}")
