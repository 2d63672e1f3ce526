"""Paired statistics against published worked examples, and by simulation: do the intervals hold what they say?"""

import numpy as np
import pytest

from personatlas.analysis.stats import (
    cluster_bootstrap,
    equivalence_p,
    holm,
    mcnemar_p,
    minimum_detectable_change,
    paired_change,
    ratio_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_those_of_newcombe_1998(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_mcnemars_exact_test_is_the_binomial_one():
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(0, 5) == pytest.approx(2 * 0.5**5)
    assert mcnemar_p(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar_p(9, 1) == mcnemar_p(1, 9)
    # Agresti's approval ratings: 150 and 86 of 1,600 changed their mind; z = 4.17
    assert 1e-5 < mcnemar_p(150, 86) < 1e-4


def test_holm_adjusts_as_in_the_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("n", "points"), [(171, 6.7), (541, 3.8), (1000, 2.8), (1400, 2.4)])
def test_the_smallest_difference_at_a_tenth_of_differing_pairs(n, points):
    change = np.zeros(n)
    change[: n // 20] = 1
    change[n // 20 : n // 10] = -1
    assert 100 * minimum_detectable_change(change) == pytest.approx(points, abs=0.11)


def made(generator, n_roles=20, n_requests=25, shift=0.1):
    """Outcomes of every role with every request whose change depends on both: (before, after, roles, requests)."""
    role, request = generator.normal(0, 0.3, n_roles), generator.normal(0, 0.3, n_requests)
    change = shift + role[:, None] + request[None] + generator.normal(0, 0.5, (n_roles, n_requests))
    names = np.array([[f"r{i}", f"q{k}"] for i in range(n_roles) for k in range(n_requests)])
    return [0.0] * change.size, change.ravel().tolist(), names[:, 0].tolist(), names[:, 1].tolist()


def test_intervals_hold_the_truth_as_often_as_they_say():
    held, naive = 0, 0
    for seed in range(120):
        before, after, roles, requests = made(np.random.default_rng(seed))
        found = paired_change(before, after, roles, requests, seed)
        held += found.low <= 0.1 <= found.high
        error = np.std(after, ddof=1) / np.sqrt(len(after))
        naive += abs(np.mean(after) - 0.1) <= 1.96 * error
    assert 0.90 <= held / 120 <= 0.995
    assert naive / 120 < 0.7  # what it would say if pairs were independent


def test_without_a_difference_the_tests_are_rarely_significant():
    generator = np.random.default_rng(0)
    rejected = 0
    for _ in range(1000):
        before, after = generator.random((2, 200)) < 0.3
        rejected += mcnemar_p(int((before & ~after).sum()), int((after & ~before).sum())) < 0.05
    assert 0.01 < rejected / 1000 < 0.06
    labels = [str(i) for i in range(200)]
    for _ in range(10):  # too few pairs to show that nothing is lost
        change = (generator.random(200) < 0.3).astype(float) - (generator.random(200) < 0.3)
        assert (
            equivalence_p(cluster_bootstrap(change, labels, labels), float(change.mean()), 0.02, len(change))
            > 0.05
        )


def test_no_loss_is_shown_by_many_pairs_and_never_where_there_is_one():
    generator = np.random.default_rng(1)
    small = generator.normal(0.0, 0.3, 2000)
    labels = [str(i) for i in range(2000)]
    assert (
        equivalence_p(cluster_bootstrap(small, labels, labels), float(small.mean()), 0.05, len(small)) < 1e-6
    )
    lost = small - 0.1
    assert equivalence_p(cluster_bootstrap(lost, labels, labels), float(lost.mean()), 0.05, len(lost)) > 0.99
    assert equivalence_p(np.zeros(10), 0.0, 0.05, 100) == pytest.approx(0.95**100)
    assert equivalence_p(np.zeros(10), 0.06, 0.05, 100) == 1


def test_outcomes_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="2 and 1 outcomes"):
        paired_change([0.0, 1.0], [1.0], ["a", "b"], ["x", "y"])
    with pytest.raises(ValueError, match="0 and 0 outcomes"):
        paired_change([], [], [], [])
    with pytest.raises(ValueError, match="not finite"):
        paired_change([0.0, float("nan")], [1.0, 1.0], ["a", "b"], ["x", "y"])


def test_a_change_of_scores_has_no_mcnemar_p():
    found = paired_change([0.2, 0.4, 0.5, 0.1], [0.3, 0.5, 0.5, 0.3], list("aabb"), list("xyxy"))
    assert found.value == pytest.approx(0.1)
    assert found.to_json()["p"] is None
    assert found.clusters == 2


def test_pairs_of_which_none_differs_do_not_prove_that_none_would():
    labels = [str(n) for n in range(60)]
    found = paired_change([1.0] * 60, [1.0] * 60, labels, labels)
    assert found.value == 0
    assert (1 - found.high) ** 60 == pytest.approx(
        0.05
    )  # of so many pairs none differs by chance once in twenty
    assert (found.low, found.smallest, found.p) == (-found.high, found.high, 1)


def test_a_ratios_interval_resamples_whole_groups():
    values = np.repeat([0.0, 1.0], 50)
    low, high = ratio_interval(values, np.ones(100), ["a"] * 50 + ["b"] * 50, 1000)
    assert (low, high) == (0.0, 1.0)
    low, high = ratio_interval(values, np.ones(100), [str(i) for i in range(100)], 1000)
    assert 0.38 < low < 0.45 < 0.55 < high < 0.62
    assert ratio_interval(values, np.ones(100), ["a"] * 100, 1000) is None
