"""What a fit found, as typed records: fit.json of a run folder.

    fit = FitResult.load(Path("runs/demo"))
    fit.layer, fit.cos_pc1.value, fit.cos_pc1.low   # the layer to use, cos(PC1, axis) there, its interval
    [role.role for role in fit.roles[:5]]               # the roles furthest from the positive pole

The keys of fit.json are the attributes' names, but for those in `json_names`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np

from personatlas.analysis.stats import Interval, p_text
from personatlas.persona.artifacts import digest, read_object, read_record
from personatlas.persona.errors import UserError
from personatlas.persona.records import (
    CosineOrNaN,
    Count,
    Ends,
    Fraction,
    FractionOrNaN,
    JsonObject,
    JsonRecord,
    NonNegative,
    Number,
    check_ascending,
    check_distinct,
)

FIT_VERSION = 8  # raise it when fitting changes: stored fits of another version are computed again
SIGNIFICANCE = 0.05  # a p-value above this is called chance
LOW_ROLE_PLAY = 0.25  # a share of answers in their role below this is warned of


@dataclass(frozen=True)
class ShuffledNull(JsonRecord):
    """|axis| and cos(PC1, axis) of n fits with shuffled role labels: mean, 95th percentile, and p-value of
    the fit."""

    norm: NonNegative
    norm_95: NonNegative
    p_norm: FractionOrNaN
    cos_pc1: CosineOrNaN
    cos_pc1_95: CosineOrNaN
    p_cos_pc1: FractionOrNaN
    n: Count


@dataclass(frozen=True)
class PoleNull(JsonRecord):
    """The positive pole beside each of n other roles as the pole.

    `cos_pc1` and `cos_pc1_90` are the mean and the 90th percentile of cos(PC1, axis) with another role as the
    pole, `percentile` the share of those that the pole's own exceeds. `z` and `rank` (1 is the highest) are
    the pole's projection among the roles on questions that its axis was not fitted on; None without two
    questions.
    """

    cos_pc1: CosineOrNaN
    cos_pc1_90: float
    percentile: float
    z: float | None
    rank: float | None
    n: Count


@dataclass(frozen=True)
class ControlPlace(JsonRecord):
    """A control: its mean projection (residual units), and where it lies between the mean role (0) and the
    positive pole (1), with its 95% interval over questions and prompts.
    """

    name: str
    projection: Number
    place: Interval


@dataclass(frozen=True)
class ScoreAxis(JsonRecord):
    """The axis from the n answers of some roles with one score alone: its cosine with the axis of all."""

    score: Count
    n: Count
    roles: Count
    cosine: CosineOrNaN


@dataclass(frozen=True)
class LayerFit(JsonRecord):
    """The fit at one layer. What needs rollout means is None at layers that kept none, or without replicates.

    `norm` is |axis| (residual units), `angle_pc1` the angle between PC1 and axis (degrees), `variance_pc1`
    PC1's share of the variance between roles. cos(PC1, axis) has an interval over resampled questions and one
    over resampled roles; `angle_resampled` is the median angle (degrees) between the axis and those of
    resampled questions. `axis_share` is the roles' variance along the axis over that along PC1, and `swapped`
    the share of resampled roles whose PC1 is another component. The split cosines are between the axes of two
    halves of the answers, of the roles, and of the questions.
    """

    layer: Count
    norm: NonNegative
    cos_pc1: CosineOrNaN
    angle_pc1: NonNegative
    variance_pc1: FractionOrNaN
    cos_pc1_by_questions: Interval | None = None
    cos_pc1_by_roles: Interval | None = None
    angle_resampled: NonNegative | None = None
    axis_share: Interval | None = None
    swapped: FractionOrNaN | None = None
    split_half: Interval | None = None
    split_roles: Interval | None = None
    split_questions: Interval | None = None
    null: ShuffledNull | None = None

    json_names: ClassVar[Mapping[str, str]] = {"angle_resampled": "wobble"}
    omit_none: ClassVar[tuple[str, ...]] = (
        "cos_pc1_by_questions",
        "cos_pc1_by_roles",
        "angle_resampled",
        "axis_share",
        "swapped",
        "split_half",
        "split_roles",
        "split_questions",
        "null",
    )


@dataclass(frozen=True)
class RoleProjection(JsonRecord):
    """A role's mean projection on the axis (residual units) of n answers, with its 95% interval over
    questions.

    `coordinates` are those of its mean in persona space (the first three); `positive` marks the positive
    pole.
    """

    role: str
    projection: Number
    n: Count
    coordinates: tuple[Number, ...]
    positive: bool
    low: float | None = None
    high: float | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("low", "high")


@dataclass(frozen=True)
class AnswerProjections(JsonRecord):
    """Projections of single answers at the layer to use, empty where it kept no rollout means.

    `keys` are the keys of their rollouts, in the same order, by "positive" and "others".
    """

    positive: tuple[Number, ...] = ()
    others: tuple[Number, ...] = ()
    keys: dict[str, tuple[str, ...]] | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("keys",)


@dataclass(frozen=True)
class LearningCurve(JsonRecord):
    """Cosine between two axes of n answers per role each, by n (the median role's).

    `needed` is the n at which it would be `goal`, extrapolated from the last point by the Spearman-Brown
    formula r(n) = n k / (1 + n k); None where that is not defined.
    """

    answers: tuple[float, ...]
    cosines: tuple[Interval, ...]
    goal: NonNegative
    needed: NonNegative | None


@dataclass(frozen=True)
class TraitProjection(JsonRecord):
    """A trait's cosine with the axis and its 95% interval, both without the noise that lengthens its vector
    where its questions let that be told, else as it is and without an interval; `along` is its length along
    the axis, `norm` its length.

    `n` counts the answers at its positive and its negative pole; `coordinates` are those in trait space
    (three).
    """

    trait: str
    cosine: CosineOrNaN
    along: Number
    norm: NonNegative
    n: tuple[Count, Count]
    coordinates: tuple[Number, ...]
    low: float | None = None
    high: float | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("low", "high")


@dataclass(frozen=True)
class TraitResult(JsonRecord):
    """Traits by their cosine with the axis, lowest first, and the variance of trait space.

    95% of the cosines of shuffled answers are at most `chance` in size. `other_side` counts judged answers
    that did not show their pole, `left_out` names traits without an answer at a pole.
    """

    layer: Count
    traits: tuple[TraitProjection, ...]
    chance: float | None
    cos_pc1_axis: CosineOrNaN
    variance_ratio: tuple[Fraction, ...]
    components_for: dict[str, Count]
    n_rollouts: Count
    judged: bool
    other_side: Count
    unjudged: Count
    left_out: tuple[str, ...]

    @property
    def n_beyond_chance(self) -> int | None:
        """How many traits have a larger cosine than `chance`; None where it is not known."""
        if self.chance is None:
            return None
        return sum(abs(row.along) > self.chance * row.norm for row in self.traits)  # both with their noise


@dataclass(frozen=True)
class RoleCorrelation(Interval):
    """Spearman correlation of n roles' projections on two axes, with its 95% interval."""

    json_names: ClassVar[Mapping[str, str]] = {"value": "spearman"}


@dataclass(frozen=True)
class AxisComparison(JsonRecord):
    """This axis beside another: cosine by layer (None for another width or depth), the roles' rank
    correlation, and the projections of the roles that both have (here, there; None for fewer than three, and
    in fits of earlier versions)."""

    path: str
    model: str | None
    poles: tuple[str, ...]
    same_model: bool
    cosines: dict[str, CosineOrNaN] | None
    roles: RoleCorrelation | None = None
    projections: dict[str, tuple[float, float]] | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("roles", "projections")

    @property
    def z_scores(self) -> dict[str, tuple[float, float]]:
        """The roles' projections (here, there) as z-scores among these roles: two models' residuals differ in
        scale."""
        if not self.projections:
            return {}
        values = np.array(list(self.projections.values()))
        z = (values - values.mean(0)) / values.std(0)
        return {name: (here, there) for name, (here, there) in zip(self.projections, z.tolist(), strict=True)}

    @property
    def moved(self) -> list[tuple[str, float]]:
        """The roles with the z-score here less that there, the largest change first."""
        changes = [(name, here - there) for name, (here, there) in self.z_scores.items()]
        return sorted(changes, key=lambda change: (-abs(change[1]), change[0]))


@dataclass(frozen=True)
class RolePlay(JsonRecord):
    """Share of n judged answers that show their role (score 2 or 3), with its 95% interval, clustered by role and question."""

    share: FractionOrNaN
    n: Count
    interval: Ends


@dataclass(frozen=True)
class DroppedRollouts(JsonRecord):
    """Answers left out: by role and score ("unjudged" without one), empty ones by role, whole roles with the
    reason."""

    by_score: dict[str, dict[str, Count]] = field(default_factory=dict)
    empty: dict[str, Count] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FitResult(JsonRecord):
    """All numbers of a fit.

    Parameters
    ----------
    layers
        the fit at every layer of the model
    layer, layer_reason
        the layer to use, and why
    poles, positive
        names of the two sides, + toward the first; the role that is the positive pole
    roles
        the roles by their projection at the layer to use, lowest first, the positive pole among them
    variance_ratio, components_for
        shares of the variance between roles (the first 50 components); components that hold 50, 70 and 90% of
        it
    projections, n_rollouts
        projections of single answers; how many answers were fitted
    curve
        how many answers an axis needs; None without replicates or rollout means
    pole_null, gap
        the positive pole beside other roles as the pole; the positive pole less the mean role, paired by
        question (residual units); None like the curve
    controls, by_score
        prompts that ask for no character, lowest first; the axis from answers of one score alone
    default, model
        the default role's name; `Model.describe()` of the model
    options
        what was fitted with which options (content hashes, version, `FitOptions`)
    artefacts
        SHA-256 of the artefacts written beside it
    dropped, role_play
        answers left out; the share of role-play, None where none was judged
    traits, trait_problem
        the traits along the axis, or why there are none; both None without traits
    comparison
        the axis that `FitOptions.compare` names beside this one
    """

    layers: tuple[LayerFit, ...]
    layer: Count
    layer_reason: str
    poles: tuple[str, str]
    positive: str
    roles: tuple[RoleProjection, ...]
    variance_ratio: tuple[Fraction, ...]
    components_for: dict[str, Count]
    projections: AnswerProjections
    n_rollouts: Count
    curve: LearningCurve | None
    default: str
    model: JsonObject
    options: JsonObject = field(default_factory=dict)
    artefacts: dict[str, str] = field(default_factory=dict)
    dropped: DroppedRollouts = field(default_factory=DroppedRollouts)
    role_play: RolePlay | None = None
    pole_null: PoleNull | None = None
    gap: Interval | None = None
    controls: tuple[ControlPlace, ...] = ()
    by_score: tuple[ScoreAxis, ...] = ()
    traits: TraitResult | None = None
    trait_problem: str | None = None
    comparison: AxisComparison | None = None

    json_names: ClassVar[Mapping[str, str]] = {
        "layer_reason": "why",
        "options": "asked",
        "comparison": "compared",
    }
    omit_none: ClassVar[tuple[str, ...]] = ("pole_null", "gap")

    @classmethod
    def load(cls, folder: Path) -> "FitResult":
        """Reads fit.json of a run folder. Raises `UserError` for none, or one of another version."""
        remedy = f"run `personatlas run fit {folder}`"
        asked = read_object(folder / "fit.json").get("asked")
        if isinstance(asked, dict) and asked.get("version") != FIT_VERSION:
            raise UserError(f"{folder} was fitted by another version of personatlas; {remedy}")
        result = read_record(folder / "fit.json", cls, remedy)
        for name, sha in result.artefacts.items():
            path = folder / f"{name}.safetensors"
            if not path.is_file() or digest(path) != sha:
                raise UserError(
                    f"{path} is missing or not the one of fit.json: it was changed since; {remedy}"
                )
        return result

    def __post_init__(self) -> None:
        check_ascending([row.layer for row in self.layers])
        check_distinct([row.role for row in self.roles])
        if self.layer not in [row.layer for row in self.layers]:
            raise ValueError(f"the layer to use, {self.layer}, is not among those fitted")
        if [row.role for row in self.roles if row.positive] != [self.positive]:
            raise ValueError(f"{self.positive!r} is not the one role at the positive pole")
        if any(before.projection > after.projection for before, after in pairwise(self.roles)):
            raise ValueError("its roles are not sorted by their projection")

    @property
    def at_layer(self) -> LayerFit:
        """The fit at the layer to use."""
        return next(row for row in self.layers if row.layer == self.layer)

    @property
    def cos_pc1(self) -> Interval:
        """cos(PC1, axis) at the layer to use, with its interval over roles where there is one."""
        row = self.at_layer
        return row.cos_pc1_by_roles or Interval(row.cos_pc1, None, None)

    @property
    def split_half(self) -> Interval | None:
        """Cosine between the axes of two halves of the answers, at the layer to use."""
        return self.at_layer.split_half

    @property
    def null(self) -> ShuffledNull | None:
        """What shuffled labels give at the layer to use."""
        return self.at_layer.null

    @property
    def positive_role(self) -> RoleProjection:
        """The positive pole."""
        return next(role for role in self.roles if role.positive)

    @property
    def other_roles(self) -> tuple[RoleProjection, ...]:
        """All roles but the positive pole, lowest first."""
        return tuple(role for role in self.roles if not role.positive)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before using the axis: tests that do not reject chance, little role-play, missing
        parts."""
        found, null = [], self.null
        if null is None:
            found.append(f"no null at layer {self.layer}: no rollout means there, or --replicates 0")
        elif null.p_norm > SIGNIFICANCE:
            found.append(f"|axis| is no larger than with shuffled labels ({p_text(null.p_norm, null.n)})")
        elif null.p_cos_pc1 > SIGNIFICANCE:
            found.append(
                f"cos(PC1, axis) is no larger than with shuffled labels ({p_text(null.p_cos_pc1, null.n)})"
            )
        if self.role_play is not None and self.role_play.share < LOW_ROLE_PLAY:
            found.append(f"only {self.role_play.share:.0%} of the judged answers show their role")
        if self.trait_problem is not None:
            found.append(f"no trait space: {self.trait_problem}")
        return tuple(found)
