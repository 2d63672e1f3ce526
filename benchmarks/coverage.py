"""Simulated coverage of every kind of 95% interval, and type I error of every kind of test, at default sizes.

python benchmarks/coverage.py [--trials 2000] [--out coverage.json]

Data are drawn from models with known truths; each line says how often the interval held it. A method that
covers 0.95 is measured within ±0.01 by 2,000 trials. docs/methods.md has the table.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from numpy.random import Generator
from scipy.special import expit, logit

from personatlas.analysis.drift_alarm import Cusum, ReferenceDistribution, calibrate_rule, highest_statistic
from personatlas.analysis.fit.geometry import Groups
from personatlas.analysis.fit.traits import _corrected_cosine
from personatlas.analysis.fit.uncertainty import pc1_agreement, pole_gap, shuffled_null
from personatlas.analysis.stats import Interval, mean_interval, paired_change, ratio_interval, share_interval

Trial = Callable[
    [Generator], tuple[bool, bool | None]
]  # the interval holds the truth; a test of a true null rejects
TRUTH = 4000  # draws that make the truth of a change


def holds(interval: Interval, truth: float) -> bool:
    """Whether an interval with both bounds holds the truth."""
    assert interval.low is not None
    assert interval.high is not None
    return interval.low <= truth <= interval.high


def change(n_roles: int, n_requests: int, *, dense: bool, rates: tuple[float, float], effect: float) -> Trial:
    """Pairs of a suite: roles and requests differ in their rate and, by `effect` (logits), in their change."""
    roles, requests = np.arange(n_requests) % n_roles, np.arange(n_requests)
    if dense:
        roles, requests = np.repeat(np.arange(n_roles), n_requests), np.tile(np.arange(n_requests), n_roles)

    def draw(generator: Generator) -> tuple[np.ndarray, np.ndarray]:
        common = generator.normal(0, 1, n_roles)[roles] + generator.normal(0, 1, n_requests)[requests]
        moved = (
            generator.normal(0, effect, n_roles)[roles] + generator.normal(0, effect, n_requests)[requests]
        )
        before = generator.random(len(roles)) < expit(logit(rates[0]) + common)
        after = generator.random(len(roles)) < expit(logit(rates[1]) + common + moved)
        return before.astype(float), after.astype(float)

    draws = (draw(np.random.default_rng(seed)) for seed in range(TRUTH))
    truth = float(np.mean([(after - before).mean() for before, after in draws]))

    def trial(generator: Generator) -> tuple[bool, bool | None]:
        found = paired_change(*draw(generator), roles.tolist(), requests.tolist())
        rejects = found.p < 0.05 if rates[0] == rates[1] and not effect else None
        return found.low <= truth <= found.high, rejects

    return trial


def share(scripts: int, samples: int, rate: float, correlation: float) -> Trial:
    """A share of answers, alike within a script by the correlation."""

    def trial(generator: Generator) -> tuple[bool, bool | None]:
        rates = np.full(scripts, rate)
        if correlation:
            scale = (1 - correlation) / correlation
            rates = generator.beta(rate * scale, (1 - rate) * scale, scripts)
        values = (generator.random(scripts * samples) < rates.repeat(samples)).astype(float)
        low, high = share_interval(values, np.arange(scripts).repeat(samples).tolist())
        return low <= rate <= high, None

    return trial


def mean(scripts: int, samples: int, between: float) -> Trial:
    """A mean projection over scripts with samples each, `between` times as scattered between as within."""

    def trial(generator: Generator) -> tuple[bool, bool | None]:
        values = between * generator.normal(0, 1, scripts).repeat(samples) + generator.normal(
            0, 1, scripts * samples
        )
        found = mean_interval(values, np.arange(scripts).repeat(samples).tolist())
        return holds(found, 0), not holds(found, 0)

    return trial


def loss_ratio(texts: int) -> Trial:
    """More loss: the ratio of two losses over texts of very different lengths; truth 1.05."""

    def trial(generator: Generator) -> tuple[bool, bool | None]:
        before = generator.lognormal(3, 0.8, texts)
        after = before * generator.normal(1.05, 0.1, texts)
        found = ratio_interval(after, before)
        return holds(found, 1.05), None

    return trial


def persona_space(n_roles: int, n_questions: int, what: str) -> Trial:
    """Roles around one main direction that the pole lies along, with noise by question and by answer."""
    dimensions = 24
    spread = np.full(dimensions, 0.6)
    spread[:2] = 3.0, 1.2
    pole = np.full(dimensions, 0.4)
    pole[0] = 5.0

    axis = pole / np.linalg.norm(pole)

    def trial(generator: Generator) -> tuple[bool, bool | None]:
        means = np.vstack([pole, generator.normal(0, 1, (n_roles, dimensions)) * spread])
        questions = generator.normal(0, 1, (n_questions, dimensions))
        index = np.repeat(np.arange(n_roles + 1), n_questions)
        question = np.tile(np.arange(n_questions), n_roles + 1)
        x = means[index] + questions[question] + generator.normal(0, 0.5, (len(index), dimensions))
        groups = Groups(index, tuple(map(str, range(n_roles + 1))), question)
        if what == "gap":
            found, truth = pole_gap(x @ axis, groups), float((means[0] - means[1:].mean(0)) @ axis)
        elif what == "cosine":
            found, truth = pc1_agreement(x, groups, generator, 100).by_roles, abs(axis[0])
        else:
            found, truth = (
                pc1_agreement(x, groups, generator, 100).axis_share,
                float(((axis * spread) ** 2).sum() / 9),
            )
        assert found is not None
        return holds(found, truth), None

    return trial


def trait(n_questions: int, cosine: float) -> Trial:
    """A trait's cosine from the poles' differences by question, whose noise is as long as the trait."""
    dimensions = 48
    unit = np.eye(dimensions)[0]
    vector = 2 * (cosine * unit + np.sqrt(1 - cosine**2) * np.eye(dimensions)[1])

    def trial(generator: Generator) -> tuple[bool, bool | None]:
        found = _corrected_cosine(vector + generator.normal(0, 0.5, (n_questions, dimensions)), unit)
        assert found is not None
        return holds(found, cosine), None

    return trial


def shuffled_labels(n_roles: int, n_questions: int) -> Trial:
    """The null of shuffled labels where no role differs but questions do."""

    def trial(generator: Generator) -> tuple[bool, bool | None]:
        index = np.repeat(np.arange(n_roles + 1), n_questions)
        question = np.tile(np.arange(n_questions), n_roles + 1)
        x = generator.normal(0, 2, (n_questions, 12))[question] + generator.normal(0, 1, (len(index), 12))
        null = shuffled_null(x, Groups(index, tuple(map(str, range(n_roles + 1))), question), generator, 99)
        return True, null.p_norm <= 0.05

    return trial


def alarm(n_scripts: int) -> Trial:
    """Whether a new conversation raises an alarm whose limit was set at a rate of 5%: counted as a rejection."""

    def trial(generator: Generator) -> tuple[bool, bool | None]:
        z = generator.normal(0, 1, (n_scripts + 1, 1, 1)) + generator.normal(0, 1, (n_scripts + 1, 5, 8))
        known, new = z[:-1].reshape(-1, 8).tolist(), z[-1, 0].tolist()
        scripts = [str(number // 5) for number in range(len(known))]
        reference = ReferenceDistribution(0.0, 1.0, 9)
        rule = calibrate_rule(Cusum(), known, scripts, reference, 0.05)
        return True, highest_statistic(rule, reference, new) > rule.limit

    return trial


HARM, RARE, NONE = (0.35, 0.26), (0.10, 0.03), (0.35, 0.35)
KINDS: dict[str, Callable[[], Trial]] = {
    "change, 50 roles x 320 requests, one role a request": partial(
        change, 50, 320, dense=False, rates=HARM, effect=0.7
    ),
    "the same, rare": partial(change, 50, 320, dense=False, rates=RARE, effect=0.7),
    "the same, no change": partial(change, 50, 320, dense=False, rates=NONE, effect=0),
    "change, 25 roles x 100 requests, one role a request": partial(
        change, 25, 100, dense=False, rates=HARM, effect=0.7
    ),
    "change, 50 roles x 5 questions, all with all": partial(
        change, 50, 5, dense=True, rates=HARM, effect=0.7
    ),
    "the same without change": partial(change, 50, 5, dense=True, rates=NONE, effect=0),
    "change, 300 prompts": partial(change, 300, 300, dense=False, rates=HARM, effect=0.7),
    "share, 25 scripts x 5, rate 0.05, correlation 0.1": partial(share, 25, 5, 0.05, 0.1),
    "share, 50 scripts x 5, rate 0.2, correlation 0.3": partial(share, 50, 5, 0.2, 0.3),
    "share, 300 answers, rate 0.1": partial(share, 300, 1, 0.1, 0),
    "mean, 5 scripts x 3": partial(mean, 5, 3, 1),
    "mean, 10 scripts x 3": partial(mean, 10, 3, 1),
    "mean, 25 scripts x 5": partial(mean, 25, 5, 1),
    "more loss, 24 texts": partial(loss_ratio, 24),
    "more loss, 300 texts": partial(loss_ratio, 300),
    "cos(PC1, axis), 24 roles": partial(persona_space, 24, 12, "cosine"),
    "cos(PC1, axis), 48 roles": partial(persona_space, 48, 12, "cosine"),
    "cos(PC1, axis), 104 roles": partial(persona_space, 104, 12, "cosine"),
    "variance along the axis over PC1's, 48 roles": partial(persona_space, 48, 12, "variance"),
    "default less mean role, 12 questions": partial(persona_space, 48, 12, "gap"),
    "trait's cosine 0.4, 12 questions": partial(trait, 12, 0.4),
    "trait's cosine 0.9, 12 questions": partial(trait, 12, 0.9),
    "trait's cosine 0.4, 5 questions": partial(trait, 5, 0.4),
    "|axis| of shuffled labels, 24 roles x 12 questions": partial(shuffled_labels, 24, 12),
    "alarm at 5%, 20 scripts": partial(alarm, 20),
    "alarm at 5%, 50 scripts": partial(alarm, 50),
}


def run(name: str, trials: int) -> dict[str, float | int | str | None]:
    """Coverage and share of rejections of a kind."""
    trial = KINDS[name]()
    found = [trial(np.random.default_rng([7, number])) for number in range(trials)]
    rejected = [rejects for _, rejects in found if rejects is not None]
    return {
        "kind": name,
        "coverage": sum(covers for covers, _ in found) / trials,
        "rejected": sum(rejected) / len(rejected) if rejected else None,
        "trials": trials,
    }


def main() -> None:
    """Prints a line per kind, and the machine-readable table where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = Parallel(n_jobs=-1, backend="multiprocessing")(
        delayed(run)(name, options.trials) for name in KINDS
    )
    for row in rows:
        rejected = "" if row["rejected"] is None else f"{row['rejected']:.3f}"
        print(f"{row['kind']:56} {row['coverage']:.3f} {rejected}")
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
