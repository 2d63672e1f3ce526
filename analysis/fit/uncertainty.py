"""How sure the axis is: bootstrap intervals, split-half agreement, and what shuffled labels would give.

All functions work on one layer's rollout means x (N, D) and draw from a generator that the caller seeds alike for every
layer, so layers are compared on the same resamples. Intervals are percentile intervals at 95%.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from personatlas.analysis.fit.geometry import Array, Groups, cosine, direction, first_component


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval and the number of replicates behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float]:
        """Plain numbers."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def interval(value: float, replicates: Array) -> Interval:
    """The percentile interval of replicates around an estimate."""
    low, high = np.percentile(replicates, [2.5, 97.5])
    return Interval(value, float(low), float(high), len(replicates))


def split_half(x: Array, groups: Groups, generator: Generator, splits: int = 100) -> Interval | None:
    """Cosine between the axes of two random halves of every role's rollouts: mean over splits, with their spread.

    The halves keep the run's design: either has half of every role's answers to each question, as far as that goes, and
    every question weighs the same in it. Of the default's answers two thirds of the variance are between questions, which
    every role answers too; halves that mixed questions anyhow would find noise that no second run has. A role with one
    rollout is in one half only. None where no half has the pole and another role.
    """
    return _summary([_halves_agree(x, groups, generator) for _ in range(splits)])


def _halves_agree(x: Array, groups: Groups, generator: Generator) -> float | None:
    """The cosine of one split; None where a half lacks the pole or every other role."""
    flip = generator.integers(2, size=len(groups.names))  # which side gets the odd one
    side = (_places(groups, generator) + flip[groups.index]) % 2
    weight = _question_weights(groups, side)
    return _agreement(*(groups.sums(x, weight * (side == half)) for half in (0, 1)))


def _agreement(first: tuple[Array, Array], second: tuple[Array, Array]) -> float | None:
    """The cosine between the axes from two sets of groups' sums and weights; None where a set has no pole or no role."""
    if any(total[0] <= 0 or not (total[1:] > 0).any() for _, total in (first, second)):
        return None
    return cosine(_contrast(*first), _contrast(*second))


def _summary(found: Sequence[float | None]) -> Interval | None:
    """Mean and spread of those splits that could be made; None without any."""
    made = [value for value in found if value is not None and np.isfinite(value)]
    return interval(float(np.mean(made)), np.array(made)) if made else None


def split_questions(x: Array, groups: Groups, generator: Generator, splits: int = 100) -> Interval | None:
    """The same with the questions dealt to the halves, so that no question is in both: what other questions would give.

    None where fewer than two questions were asked.
    """
    number = 0 if groups.question is None else int(groups.question.max()) + 1
    if groups.question is None or number < 2:
        return None
    found = []
    whole, count = groups.sums(x)
    for _ in range(splits):
        chosen = (generator.permutation(number) < number // 2).astype(float)
        sums, total = groups.sums(x, chosen[groups.question])
        found.append(_agreement((sums, total), (whole - sums, count - total)))
    return _summary(found)


@dataclass(frozen=True)
class Curve:
    """How two axes from n answers a role each agree, by n (the typical role's), and how many answers a role would make it `goal`.

    `needed` extends the last point by Spearman and Brown's rule, r(n) = n k / (1 + n k); None where that says nothing.
    """

    answers: tuple[float, ...]
    cosines: tuple[Interval, ...]
    goal: float
    needed: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "answers": list(self.answers),
            "cosines": [found.to_json() for found in self.cosines],
            "goal": self.goal,
            "needed": self.needed,
        }


def learning_curve(
    x: Array, groups: Groups, generator: Generator, splits: int = 50, goal: float = 0.9
) -> Curve:
    """`split_half` of smaller runs: of 1, 2, 4, ... and all of the questions, the same for every role.

    Where questions are not known, of as many answers of every role.
    """
    typical = float(np.median(np.bincount(groups.index)))
    number = int(typical) if groups.question is None else int(groups.question.max()) + 1
    sizes = [2**power for power in range(max(number, 1).bit_length()) if 2**power < number] + [number]
    sizes = [size for size in sizes if typical * size / number / 2 >= 1]
    answers, cosines = [], []
    for size in sizes:
        splits_of_size = []
        for _ in range(splits):
            own = (
                _places(groups, generator)
                if groups.question is None
                else generator.permutation(number)[groups.question]
            )
            taken = own < size
            splits_of_size.append(_halves_agree(x[taken], groups.only(taken), generator))
        if (found := _summary(splits_of_size)) is not None:
            answers.append(typical * size / number / 2)
            cosines.append(found)
    return Curve(tuple(answers), tuple(cosines), goal, _needed(answers, cosines, goal))


def _needed(answers: Sequence[float], cosines: Sequence[Interval], goal: float) -> float | None:
    if not answers or not 0 < cosines[-1].value < 1:
        return None
    signal = cosines[-1].value / (1 - cosines[-1].value) / answers[-1]  # k of one answer a role
    return goal / (1 - goal) / signal


def _contrast(sums: Array, total: Array) -> Array:
    """The axis from groups' sums; a role without an answer is left out."""
    there = total > 0
    means = np.where(there[:, None], sums / np.maximum(total, 1)[:, None], 0)
    return direction(means, there[1:].astype(float))


def split_roles(x: Array, groups: Groups, generator: Generator, splits: int = 100) -> Interval:
    """The same with the other roles split instead, each half of them against its own half of the positive pole's rollouts."""
    found = []
    means, _ = groups.means(x)
    first = groups.index == 0
    own = x[first]
    for _ in range(splits):
        side = _places(groups, generator) % 2
        weight = _question_weights(groups, side)[first]
        members = np.zeros(groups.n_roles)
        members[generator.permutation(groups.n_roles)[: groups.n_roles // 2]] = 1
        axes = []
        for half, roles in ((0, members), (1, 1.0 - members)):
            chosen = weight * (side[first] == half)
            pole = chosen @ own / chosen.sum() if chosen.any() else means[0]  # a single answer serves both
            axes.append(direction(np.vstack([pole, means[1:]]), roles))
        found.append(cosine(axes[0], axes[1]))
    return interval(float(np.mean(found)), np.array(found))


@dataclass(frozen=True)
class Agreement:
    """How PC1 and the axis agree at one layer, over questions and over roles, and the axis's own wobble."""

    by_questions: Interval
    by_roles: Interval
    angle_to_estimate: float  # median degrees between an axis of resampled questions and the axis


def agreement(x: Array, groups: Groups, generator: Generator, replicates: int = 100) -> Agreement:
    """Bootstrap cos(PC1, axis), resampling the questions, the same for every role, and resampling roles.

    Where questions are not known, or only one was asked, each role's rollouts are resampled instead.
    """
    means, _ = groups.means(x)
    axis = direction(means)
    value = cosine(first_component(means)[0], axis)
    questions, roles, angles = [], [], []
    for_questions, for_roles = generator.spawn(2)
    for _ in range(replicates):
        sums, total = groups.sums(x, _resample(groups, for_questions))
        there = (total > 0).astype(float)
        again = sums / np.maximum(total, 1)[:, None]
        replicate = direction(again, there[1:])
        questions.append(cosine(first_component(again, there[1:])[0], replicate))
        angles.append(np.degrees(np.arccos(np.clip(cosine(replicate, axis), -1, 1))))
        drawn = for_roles.integers(groups.n_roles, size=groups.n_roles)
        while (
            drawn == drawn[0]
        ).all():  # one role drawn throughout has no directions; with three that is common
            drawn = for_roles.integers(groups.n_roles, size=groups.n_roles)
        weight = np.bincount(drawn, minlength=groups.n_roles).astype(float)
        roles.append(cosine(first_component(means, weight)[0], direction(means, weight)))
    by_questions, by_roles = interval(value, np.array(questions)), interval(value, np.array(roles))
    return Agreement(by_questions, by_roles, float(np.median(angles)))


@dataclass(frozen=True)
class Null:
    """What shuffled labels give: the axis's norm and cos(PC1, axis), as mean and 95th percentile, with p-values."""

    norm: float
    norm_95: float
    p_norm: float
    cos_pc1: float
    cos_pc1_95: float
    p_cos_pc1: float
    n: int


def shuffled(x: Array, groups: Groups, generator: Generator, replicates: int = 100) -> Null:
    """Shuffle which rollout is whose and fit again. p = (1 + shuffles at least as large) / (1 + shuffles)."""
    means, _ = groups.means(x)
    axis = direction(means)
    norm, cos = float(np.linalg.norm(axis)), cosine(first_component(means)[0], axis)
    norms, cosines = [], []
    for _ in range(replicates):
        again, _ = Groups(generator.permutation(groups.index), groups.names).means(x)
        replicate = direction(again)
        norms.append(float(np.linalg.norm(replicate)))
        cosines.append(cosine(first_component(again)[0], replicate))
    return Null(
        norm=float(np.mean(norms)),
        norm_95=float(np.percentile(norms, 95)),
        p_norm=_p(norms, norm),
        cos_pc1=float(np.mean(cosines)),
        cos_pc1_95=float(np.percentile(cosines, 95)),
        p_cos_pc1=_p(cosines, cos),
        n=replicates,
    )


def role_intervals(
    projections: Array, groups: Groups, generator: Generator, replicates: int = 500
) -> list[Interval]:
    """Each group's mean projection with a bootstrap interval over its rollouts; `projections` is (N,)."""
    found = []
    for group in range(len(groups.names)):
        own = projections[groups.index == group]
        drawn = own[generator.integers(len(own), size=(replicates, len(own)))].mean(1)
        found.append(interval(float(own.mean()), drawn))
    return found


def _p(replicates: list[float], value: float) -> float:
    return (1 + sum(replicate >= value for replicate in replicates)) / (1 + len(replicates))


def _question_weights(groups: Groups, side: NDArray[np.int64]) -> Array:
    """Weights that make each question of a role count once on either side, however many answers it has there."""
    if groups.question is None:
        return np.ones(len(groups.index))
    number = int(groups.question.max()) + 1
    cell = (groups.index * number + groups.question) * 2 + side
    return 1.0 / np.bincount(cell)[cell]


def _places(groups: Groups, generator: Generator) -> NDArray[np.int64]:
    """Each rollout's place, from 0, in a random order of its role's: question by question, the same order for all roles."""
    index, noise = groups.index, generator.random(len(groups.index))
    if groups.question is None:
        order = np.lexsort((noise, index))
    else:
        rank = generator.permutation(int(groups.question.max()) + 1)[groups.question]
        order = np.lexsort((noise, rank, index))
    place = np.empty(len(index), dtype=np.int64)
    place[order] = np.arange(len(index)) - np.searchsorted(index[order], index[order])
    return place


TRIES = 20  # draws of questions that may leave the pole or all roles but one without an answer


def _resample(groups: Groups, generator: Generator) -> Array:
    """How often each rollout counts when the questions are drawn again with replacement, for all roles alike."""
    number = 0 if groups.question is None else int(groups.question.max()) + 1
    if groups.question is not None and number > 1:
        for _ in range(TRIES):
            drawn = np.bincount(generator.integers(number, size=number), minlength=number)
            weight = drawn[groups.question].astype(np.float64)
            there = np.bincount(groups.index, weight, minlength=len(groups.names)) > 0
            if there[0] and there[1:].sum() > 1:
                return weight
    index = groups.index
    order = np.argsort(index, kind="stable")
    count = np.bincount(index)
    own = index[order]
    first = np.concatenate([[0], np.cumsum(count)[:-1]])[own]
    chosen = first + (generator.random(len(index)) * count[own]).astype(np.int64)
    return np.bincount(order[chosen], minlength=len(index)).astype(np.float64)
