"""Uncertainty of the axis: bootstrap intervals, split-half cosines, a learning curve, and the null of
shuffled labels.

    split_half(x, groups, np.random.default_rng(0)).value  # cosine between the axes of two halves

Every function takes one layer's rollout means x (N, D) and a generator that the caller seeds alike for all
layers, so layers are compared on the same resamples. Those of splits are the spread of 95% of the splits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import t

from personatlas.analysis.fit.geometry import Groups, cosine, direction, first_component
from personatlas.analysis.fit.result import LearningCurve, PoleNull, ShuffledNull
from personatlas.analysis.stats import TAILS, Array, Interval, bootstrap_interval, mean_interval, resample

MAX_TRIES = 20  # draws of questions that may leave the pole or all roles but one without an answer


def split_half(x: Array, groups: Groups, generator: Generator, splits: int = 100) -> Interval | None:
    """Returns the cosine between the axes of two random halves of every role's rollouts: mean and spread over
    splits.

    The halves keep the run's design: each has half of every role's answers to each question, as far as
    possible, and every question weighs the same in it. Two thirds of the variance of the default's answers
    are between questions, which every role answers too: halves that mix questions would find noise that no
    second run has. A role with one rollout is in one half only. None where no half has the pole and another
    role.
    """
    return _mean_of_splits([_half_cosine(x, groups, generator) for _ in range(splits)])


def split_questions(x: Array, groups: Groups, generator: Generator, splits: int = 100) -> Interval | None:
    """Returns the same for halves of the questions: the agreement with an axis from other questions.

    None where fewer than two questions were asked.
    """
    n = groups.n_questions
    if groups.question is None or n < 2:
        return None
    cosines = []
    sums, totals = groups.sums(x)
    for _ in range(splits):
        selected = (generator.permutation(n) < n // 2).astype(float)
        half, half_total = groups.sums(x, selected[groups.question])
        cosines.append(_axis_cosine((half, half_total), (sums - half, totals - half_total)))
    return _mean_of_splits(cosines)


def split_roles(x: Array, groups: Groups, generator: Generator, splits: int = 100) -> Interval:
    """Returns the same for halves of the other roles, each against its own half of the positive pole's
    rollouts."""
    cosines = []
    means, _ = groups.means(x)
    is_pole = groups.index == 0
    pole_rollouts = x[is_pole]
    for _ in range(splits):
        side = random_ranks(groups, generator) % 2
        weight = _question_weights(groups, side)[is_pole]
        members = np.zeros(groups.n_roles)
        members[generator.permutation(groups.n_roles)[: groups.n_roles // 2]] = 1
        axes = []
        for half, roles in ((0, members), (1, 1.0 - members)):
            selected = weight * (side[is_pole] == half)
            # a single answer of the pole serves both halves
            pole = selected @ pole_rollouts / selected.sum() if selected.any() else means[0]
            axes.append(direction(np.vstack([pole, means[1:]]), roles))
        cosines.append(cosine(*axes))
    return bootstrap_interval(float(np.mean(cosines)), cosines)


def learning_curve(
    x: Array, groups: Groups, generator: Generator, splits: int = 50, goal: float = 0.9
) -> LearningCurve:
    """Returns `split_half` of smaller runs: of 1, 2, 4, ... and all of the questions, the same for every
    role.

    Where questions are not known, of as many answers of every role.
    """
    median = float(np.median(np.bincount(groups.index)))
    n = int(median) if groups.question is None else groups.n_questions
    sizes = [2**power for power in range(max(n, 1).bit_length()) if 2**power < n] + [n]
    answers, cosines = [], []
    for size in sizes:
        if median * size / n / 2 < 1:
            continue
        splits_of_size = []
        for _ in range(splits):
            if groups.question is None:
                rank = random_ranks(groups, generator)
            else:
                rank = generator.permutation(n)[groups.question]
            selected = rank < size
            splits_of_size.append(_half_cosine(x[selected], groups.only(selected), generator))
        if (interval := _mean_of_splits(splits_of_size)) is not None:
            answers.append(median * size / n / 2)
            cosines.append(interval)
    needed = None
    if answers and 0 < cosines[-1].value < 1:
        signal = cosines[-1].value / (1 - cosines[-1].value) / answers[-1]  # k of the Spearman-Brown formula
        needed = goal / (1 - goal) / signal
    return LearningCurve(tuple(answers), tuple(cosines), goal, needed)


def _half_cosine(x: Array, groups: Groups, generator: Generator) -> float | None:
    """The cosine of one split; None where a half lacks the pole or every other role."""
    flip = generator.integers(2, size=len(groups.names))  # which side gets the odd rollout
    side = (random_ranks(groups, generator) + flip[groups.index]) % 2
    weight = _question_weights(groups, side)
    return _axis_cosine(*(groups.sums(x, weight * (side == half)) for half in (0, 1)))


def _axis_cosine(*halves: tuple[Array, Array]) -> float | None:
    """The cosine between the axes of two halves, each the groups' sums (R+1, D) and weights (R+1,)."""
    axes = []
    for sums, totals in halves:
        if totals[0] <= 0 or not (totals[1:] > 0).any():
            return None
        present = totals > 0  # a role without an answer is left out
        means = np.where(present[:, None], sums / np.maximum(totals, 1)[:, None], 0)
        axes.append(direction(means, present[1:].astype(float)))
    return cosine(*axes)


def _mean_of_splits(cosines: Sequence[float | None]) -> Interval | None:
    """Mean and spread of the splits that were possible; None without any."""
    finite = [value for value in cosines if value is not None and np.isfinite(value)]
    return bootstrap_interval(float(np.mean(finite)), finite) if finite else None


@dataclass(frozen=True)
class Pc1Agreement:
    """cos(PC1, axis) over resampled questions and over resampled roles.

    `angle_resampled` is the median angle (degrees) between the axis and those of resampled questions.
    `axis_share` is the variance of the roles along the axis over that along PC1, over resampled roles: it
    does not jump where PC1 and PC2 change places, as they do in a share `swapped` of the resamples.
    """

    by_questions: Interval
    by_roles: Interval
    angle_resampled: float
    axis_share: Interval
    swapped: float


def pc1_agreement(x: Array, groups: Groups, generator: Generator, replicates: int = 100) -> Pc1Agreement:
    """Returns the bootstrap of cos(PC1, axis): resampled questions, the same for every role, and resampled
    roles.

    Where questions are not known, or only one was asked, each role's rollouts are resampled instead. The
    cosine is biased upward in every resample, since PC1 follows its noise: intervals are corrected for the
    bootstrap's bias, on the Fisher scale (percentiles covered 0.49 to 0.86 of simulated truths).
    """
    means, _ = groups.means(x)
    axis = direction(means)
    pc1, _ = first_component(means)
    by_questions, by_roles, angles, shares, n_swapped = [], [], [], [], 0
    for_questions, for_roles = generator.spawn(2)
    for _ in range(replicates):
        sums, totals = groups.sums(x, resampled_weights(groups, for_questions))
        present = (totals > 0).astype(float)
        resampled = sums / np.maximum(totals, 1)[:, None]
        replicate = direction(resampled, present[1:])
        by_questions.append(cosine(first_component(resampled, present[1:])[0], replicate))
        angles.append(np.degrees(np.arccos(np.clip(cosine(replicate, axis), -1, 1))))
        drawn = resample(groups.n_roles, for_roles)
        while (drawn == drawn[0]).all():  # a single role has no directions; of three, one draw in nine
            drawn = resample(groups.n_roles, for_roles)
        weight = np.bincount(drawn, minlength=groups.n_roles).astype(float)
        weight *= present[1:]
        component, replicate = first_component(resampled, weight)[0], direction(resampled, weight)
        by_roles.append(cosine(component, replicate))
        shares.append(_axis_share(resampled, replicate, component, weight))
        n_swapped += abs(cosine(component, pc1)) < np.sqrt(0.5)
    value, n_questions = cosine(pc1, axis), max(groups.n_questions, 2)
    share = _axis_share(means, axis, pc1, np.ones(groups.n_roles))
    return Pc1Agreement(
        _corrected_interval(value, by_questions, n_questions, np.arctanh, np.tanh),
        _corrected_interval(value, by_roles, groups.n_roles, np.arctanh, np.tanh),
        float(np.median(angles)),
        _corrected_interval(share, shares, groups.n_roles, logit, expit),
        n_swapped / replicates,
    )


def _axis_share(means: Array, axis: Array, component: Array, weight: Array) -> float:
    """Variance of the roles' means along the axis over that along PC1."""
    rows = means[1:] - weight @ means[1:] / weight.sum()
    along, pc1 = (weight @ (rows @ (vector / np.linalg.norm(vector))) ** 2 for vector in (axis, component))
    return float(along / pc1)


def _corrected_interval(
    value: float, draws: Sequence[float], n: int, scale: Callable[..., Array], back: Callable[..., Array]
) -> Interval:
    """Value less the bootstrap's bias ± t × the bootstrap's standard error, on a scale without bounds; n
    units were resampled. It holds the value itself, which the bias may put beyond an end."""
    # a cosine that rounds to 1 has no place on the scale
    estimate, *drawn = scale(np.clip([value, *draws], -1 + 1e-9 if scale is np.arctanh else 1e-9, 1 - 1e-9))
    centre, reach = 2 * estimate - np.mean(drawn), t.ppf(TAILS[1], n - 1) * np.std(drawn, ddof=1)
    low, high = back(np.array([centre - reach, centre + reach])).tolist()
    return Interval(value, min(low, value), max(high, value), len(drawn))


def shuffled_null(x: Array, groups: Groups, generator: Generator, replicates: int = 100) -> ShuffledNull:
    """Fits role labels that are shuffled among the answers to each question, which every role answers.

    p = (1 + shuffles at least as large) / (1 + shuffles).
    """
    means, _ = groups.means(x)
    axis = direction(means)
    norm, cos_pc1 = float(np.linalg.norm(axis)), cosine(first_component(means)[0], axis)
    question = np.zeros(len(x), dtype=np.int64) if groups.question is None else groups.question
    order = np.argsort(question, kind="stable")
    norms, cosines = [], []
    for _ in range(replicates):
        index = np.empty_like(groups.index)
        index[order] = groups.index[np.lexsort((generator.random(len(x)), question))]
        shuffled, _ = Groups(index, groups.names).means(x)
        replicate = direction(shuffled)
        norms.append(float(np.linalg.norm(replicate)))
        cosines.append(cosine(first_component(shuffled)[0], replicate))
    return ShuffledNull(
        norm=float(np.mean(norms)),
        norm_95=float(np.percentile(norms, 95)),
        p_norm=(1 + sum(value >= norm for value in norms)) / (1 + replicates),
        cos_pc1=float(np.mean(cosines)),
        cos_pc1_95=float(np.percentile(cosines, 95)),
        p_cos_pc1=(1 + sum(value >= cos_pc1 for value in cosines)) / (1 + replicates),
        n=replicates,
    )


def pole_null(x: Array, groups: Groups, generator: Generator, splits: int = 100) -> PoleNull:
    """Compares the positive pole with every other role as the pole.

    An axis from any role leans toward PC1 where PC1 holds most of the variance, so cos(PC1, axis) says little
    beside 0: the null is the same cosine with each other role as the pole (and the positive pole among the
    others). `z` and `rank` are the pole's among the roles, along axes of half of the questions, on the other
    half.
    """
    means, _ = groups.means(x)
    cosines = []
    for pole in range(len(means)):
        order = [pole, *(row for row in range(len(means)) if row != pole)]
        own = means[order]
        cosines.append(cosine(first_component(own)[0], direction(own)))
    z, ranks, n = [], [], groups.n_questions
    for _ in range(splits if n > 1 and groups.question is not None else 0):
        selected = (generator.permutation(n) < n // 2)[groups.question]
        fitted, tested = (groups.means(x, side.astype(float)) for side in (selected, ~selected))
        present = (fitted[1] > 0) & (tested[1] > 0)
        if present[0] and present[1:].sum() > 1:
            axis = direction(np.nan_to_num(fitted[0]), present[1:].astype(float))
            projections = tested[0][present] @ (axis / np.linalg.norm(axis))
            others = projections[1:]
            z.append(float((projections[0] - others.mean()) / others.std(ddof=1)))
            ranks.append(1 + int((others > projections[0]).sum()))
    return PoleNull(
        cos_pc1=float(np.mean(cosines[1:])),
        cos_pc1_90=float(np.percentile(cosines[1:], 90)),
        percentile=float(np.mean(np.array(cosines[1:]) < cosines[0])),
        z=float(np.mean(z)) if z else None,
        rank=float(np.mean(ranks)) if ranks else None,
        n=groups.n_roles,
    )


def role_intervals(projections: Array, groups: Groups) -> list[Interval]:
    """Returns each group's mean of projections (N,) with its interval, clustered by question.

    Answers of a role's several prompts to one question are not independent.
    """
    intervals = []
    for group in range(len(groups.names)):
        own = groups.index == group
        clusters = [] if groups.question is None else [groups.question[own].tolist()]
        intervals.append(mean_interval(projections[own], *clusters))
    return intervals


def pole_gap(projections: Array, groups: Groups) -> Interval | None:
    """Returns the positive pole less the mean of the other roles, paired by question; n questions.

    Two thirds of the variance of the default's answers are between questions, which every role answers: the
    difference by question has half the standard error of the pole alone. None without two common questions.
    """
    if groups.question is None:
        return None
    size = (len(groups.names), groups.n_questions)
    cell = groups.index * groups.n_questions + groups.question
    counts = np.bincount(cell, minlength=size[0] * size[1]).reshape(size)
    sums = np.bincount(cell, projections, minlength=size[0] * size[1]).reshape(size)
    asked = (counts[0] > 0) & (counts[1:] > 0).any(0)
    if asked.sum() < 2:
        return None
    means = np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)[:, asked]
    return mean_interval(means[0] - np.nanmean(means[1:], axis=0))


def random_ranks(groups: Groups, generator: Generator) -> NDArray[np.int64]:
    """Returns each rollout's rank (N,), from 0, in a random order of its role's rollouts.

    The order is question by question, with the questions in the same order for all roles.
    """
    index, noise = groups.index, generator.random(len(groups.index))
    if groups.question is None:
        order = np.lexsort((noise, index))
    else:
        rank = generator.permutation(groups.n_questions)[groups.question]
        order = np.lexsort((noise, rank, index))
    ranks = np.empty(len(index), dtype=np.int64)
    ranks[order] = np.arange(len(index)) - np.searchsorted(index[order], index[order])
    return ranks


def _question_weights(groups: Groups, side: NDArray[np.int64]) -> Array:
    """Weights (N,) that make each question of a role count once on either side, however many answers it has
    there."""
    if groups.question is None:
        return np.ones(len(groups.index))
    cell = (groups.index * groups.n_questions + groups.question) * 2 + side
    return 1.0 / np.bincount(cell)[cell]


def resampled_weights(groups: Groups, generator: Generator) -> Array:
    """Returns how often each rollout counts (N,) when the questions are resampled, for all roles alike."""
    n = groups.n_questions
    if groups.question is not None and n > 1:
        for _ in range(MAX_TRIES):
            weight = np.bincount(resample(n, generator), minlength=n)[groups.question].astype(np.float64)
            present = np.bincount(groups.index, weight, minlength=len(groups.names)) > 0
            if present[0] and present[1:].sum() > 1:
                return weight
    index = groups.index  # each role's rollouts instead
    order = np.argsort(index, kind="stable")
    counts = np.bincount(index)
    first = (np.cumsum(counts) - counts)[index[order]]
    drawn = first + (generator.random(len(index)) * counts[index[order]]).astype(np.int64)
    return np.bincount(order[drawn], minlength=len(index)).astype(np.float64)
