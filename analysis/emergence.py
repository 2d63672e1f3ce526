"""How an axis emerges in training: the fits of a training run's checkpoints beside one another, at one layer.

    result = compute_emergence(Path("runs/mine"), Path("runs/mine-emergence"))
    result.checkpoints[-1].pole             # PoleRank(z=1.8, rank=2, n=105)

Projections of different weights have different scales, so a role's position is its z-score among the roles of
its checkpoint, the positive pole left out of mean and standard deviation. All numbers are at the layer to use
of the last checkpoint, which is fitted first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from personatlas.analysis.fit.comparison import rank_correlation
from personatlas.analysis.fit.pipeline import compute_axis
from personatlas.analysis.fit.result import FitResult
from personatlas.analysis.stats import Interval
from personatlas.persona.artifacts import write_json
from personatlas.persona.axis import Axis, load_axis
from personatlas.persona.distributed import get_world
from personatlas.persona.errors import UserError
from personatlas.persona.options import FitOptions, JudgeOptions, ModelOptions, PlanOptions
from personatlas.persona.progress import say
from personatlas.persona.records import (
    CosineOrNaN,
    Count,
    FractionOrNaN,
    JsonRecord,
    NonNegative,
    Number,
    check_ascending,
)
from personatlas.persona.runs import checkpoint_folders, is_training_run, model_name, open_run, spread_steps

SETTLED = 0.8  # rank correlation with the last checkpoint from which on the roles count as ordered


@dataclass(frozen=True)
class PoleRank(JsonRecord):
    """The positive pole's z-score among the roles, and its rank from the top among n with it."""

    z: Number
    rank: Count
    n: Count

    json_names: ClassVar[Mapping[str, str]] = {"rank": "place", "n": "of"}


@dataclass(frozen=True)
class CheckpointFit(JsonRecord):
    """A checkpoint's fit at the layer: its own numbers, and its axis and roles beside those of the last
    checkpoint.

    `cosine` is between the axes, `rank_correlation` (Spearman) between the roles' projections, None where
    these are all equal. `role_play` is the share of judged answers that show their role.
    """

    step: Count
    cos_pc1: Interval
    cos_pc1_shuffled: CosineOrNaN | None
    split_half: Interval | None
    norm: NonNegative
    norm_shuffled: NonNegative | None
    p_norm: FractionOrNaN | None
    role_play: FractionOrNaN | None
    pole: PoleRank
    rank_correlation: Interval | None
    cosine: CosineOrNaN

    json_names: ClassVar[Mapping[str, str]] = {
        "norm": "length",
        "norm_shuffled": "length_shuffled",
        "p_norm": "p",
        "rank_correlation": "ranked_alike",
    }


@dataclass(frozen=True)
class EmergenceResult(JsonRecord):
    """The checkpoints by step, and every role's z-scores over them, in the order of the last one
    (emergence.json)."""

    layer: Count
    positive: str
    checkpoints: tuple[CheckpointFit, ...]
    roles: dict[str, tuple[Number, ...]]
    run: str = ""
    folders: dict[str, str] | None = None
    kind: Literal["emergence"] = "emergence"

    def __post_init__(self) -> None:
        check_ascending([row.step for row in self.checkpoints])
        if len(self.checkpoints) < 2 or self.positive not in self.roles:
            raise ValueError(
                "there are fewer than two checkpoints, or the positive pole is not among the roles"
            )
        if any(len(course) != len(self.checkpoints) for course in self.roles.values()):
            raise ValueError("a role's course is not as long as the checkpoints are many")

    def ends(self, count: int) -> tuple[list[str], list[str]]:
        """Returns the lowest and the highest roles at the last checkpoint, without the positive pole."""
        names = sorted(
            (name for name in self.roles if name != self.positive), key=lambda n: self.roles[n][-1]
        )
        count = min(count, len(names) // 2)
        return names[:count], names[len(names) - count :]

    @property
    def settled_step(self) -> int | None:
        """The first step from which on roles are ranked as at the end (0.8); the last checkpoint does not
        count."""
        step = None
        for row in reversed(self.checkpoints[:-1]):
            value = math.nan if row.rank_correlation is None else row.rank_correlation.value
            if not value >= SETTLED:
                break
            step = row.step
        return step


def compute_emergence(
    run: Path,
    out: Path,
    *,
    checkpoints: int = 8,
    load: ModelOptions = ModelOptions(),
    plan: PlanOptions = PlanOptions(plan="demo"),
    judge: JudgeOptions = JudgeOptions(),
    fit: FitOptions = FitOptions(),
) -> EmergenceResult:
    """Computes the axis of a training run's checkpoints, each in a run folder below `out`, and their page.
    Resumes.

    `checkpoints` is how many at most. Writes emergence.json and emergence.html. Raises `UserError` under
    torchrun, and for a folder that is no training run or has fewer than two checkpoints.
    """
    folders = select_checkpoints(run, checkpoints)
    if get_world().size > 1:
        raise UserError("emergence works with one process: start it without torchrun")
    with open_run(out, create=True):
        fits = {}
        for step in sorted(folders, reverse=True):
            folder = out / folders[step].name
            say(f"step {step:,}: {folder}")
            result = compute_axis(str(folders[step]), folder, load=load, plan=plan, judge=judge, fit=fit)
            assert result is not None  # None on further processes only
            fits[step] = result, load_axis(folder / "axis")
            fit = replace(fit, layer=result.layer)
        names = {str(step): folder.name for step, folder in folders.items()}
        emergence = replace(compare_checkpoints(fits), run=str(run), folders=names)
        write_json(out / "emergence.json", emergence.to_json())
        from personatlas.analysis.emergence_page import write_emergence_page  # with plotly

        write_emergence_page(out / "emergence.html", model_name(run), emergence)
    return emergence


def select_checkpoints(run: Path, count: int) -> dict[int, Path]:
    """Returns at most `count` of a training run's checkpoints by step, evenly over the logarithm of the
    steps."""
    if count < 2:
        raise UserError(f"--checkpoints {count}: at least 2 are needed to see a change")
    if not is_training_run(run):
        raise UserError(f"{run} is not the folder of a training run (`personatlas train base`, `train chat`)")
    folders = checkpoint_folders(run)
    if len(folders) < 2:
        found = f"{len(folders)} checkpoint" if folders else "no checkpoints"
        raise UserError(f"{run} has {found}: train with --keep log to watch the axis emerge")
    return {step: folders[step] for step in spread_steps(list(folders), count)}


def compare_checkpoints(fits: Mapping[int, tuple[FitResult, Axis]]) -> EmergenceResult:
    """Returns the fits of checkpoints by step beside one another.

    Raises `UserError` for fewer than two, for fits at different layers, or with fewer than three roles in
    common.
    """
    steps = sorted(fits)
    if len(steps) < 2:
        raise UserError("an axis emerges over checkpoints: at least 2 are needed")
    last, last_axis = fits[steps[-1]]
    layer, positive = last.layer, last.positive
    for step in steps:
        if fits[step][0].layer != layer:
            raise UserError(
                f"the fit of step {step} is about layer {fits[step][0].layer}, the last one about {layer}"
            )
    projections = {step: {role.role: role.projection for role in fits[step][0].roles} for step in steps}
    shared = sorted(set.intersection(*map(set, projections.values())) - {positive})
    if len(shared) < 3:
        raise UserError(f"the checkpoints have {len(shared)} roles in common: at least 3 are needed")
    z: dict[int, dict[str, float]] = {}
    for step in steps:
        values = np.array([projections[step][name] for name in shared])
        mean, std = float(values.mean()), float(values.std()) or 1.0
        z[step] = {name: (projections[step][name] - mean) / std for name in (*shared, positive)}
    others = {step: {name: z[step][name] for name in shared} for step in steps}
    rows = []
    for step in steps:
        result, axis = fits[step]
        row, cos_pc1 = result.at_layer, result.cos_pc1
        rows.append(
            CheckpointFit(
                step=step,
                cos_pc1=Interval(cos_pc1.value, cos_pc1.low, cos_pc1.high),
                cos_pc1_shuffled=row.null.cos_pc1 if row.null else None,
                split_half=row.split_half,
                norm=row.norm,
                norm_shuffled=row.null.norm if row.null else None,
                p_norm=row.null.p_norm if row.null else None,
                role_play=result.role_play.share if result.role_play else None,
                pole=PoleRank(
                    z[step][positive],
                    1 + sum(value > z[step][positive] for value in others[step].values()),
                    len(z[step]),
                ),
                rank_correlation=rank_correlation(others[step], others[steps[-1]]),
                cosine=float(axis.at(layer).double() @ last_axis.at(layer).double()),
            )
        )
    order = sorted(z[steps[-1]], key=lambda name: z[steps[-1]][name])
    courses = {name: tuple(z[step][name] for step in steps) for name in order}
    return EmergenceResult(layer, positive, tuple(rows), courses)
