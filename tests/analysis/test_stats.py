"""Intervals and tests against published worked examples, and by simulation: do they hold what they say?"""

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.special import expit, logit

from personatlas.analysis.stats import (
    clustered_error,
    holm,
    mean_interval,
    p_text,
    paired_change,
    ratio_interval,
    share_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_those_of_newcombe_1998(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_holm_adjusts_as_in_the_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_without_clusters_the_interval_is_that_of_the_t_test():
    values = np.random.default_rng(0).normal(2, 3, 14)
    found = mean_interval(values)
    expected = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.value, found.n) == (pytest.approx(values.mean()), 14)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_clusters_of_equal_size_give_the_t_test_of_their_means():
    values = np.random.default_rng(1).normal(0, 1, 6).repeat(5)
    found = mean_interval(values, np.arange(6).repeat(5).tolist())
    expected = scipy_stats.ttest_1samp(values[::5], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_two_way_error_is_the_sum_of_both_clusterings_less_their_cells():
    generator = np.random.default_rng(2)
    parts, rows, columns = (
        generator.normal(0, 1, 60),
        generator.integers(0, 6, 60),
        generator.integers(0, 9, 60),
    )
    parts += rows + columns
    parts -= parts.mean()

    def variance(labels):
        names = sorted(set(labels))
        sums = [sum(part for part, own in zip(parts, labels, strict=True) if own == name) for name in names]
        return sum(value**2 for value in sums) * len(names) / (len(names) - 1)

    cells = list(zip(rows.tolist(), columns.tolist(), strict=True))
    expected = variance(rows.tolist()) + variance(columns.tolist()) - variance(cells)
    found = clustered_error(parts, rows.tolist(), columns.tolist())
    assert found.value == pytest.approx(expected**0.5)
    assert found.df == 5


def test_a_ratio_weighs_rows_by_their_denominator_and_a_single_cluster_has_no_interval():
    numerator, denominator = np.array([2.0, 30.0, 8.0, 50.0]), np.array([1.0, 10.0, 4.0, 20.0])
    found = ratio_interval(numerator, denominator)
    assert found.value == pytest.approx(90 / 35)
    error = np.sqrt(((numerator - found.value * denominator) ** 2).sum() * 4 / 3) / 35
    assert found.high - found.value == pytest.approx(scipy_stats.t.ppf(0.975, 3) * error)
    one = ratio_interval(numerator, denominator, ["a"] * 4)
    assert (one.value, one.low, one.high) == (found.value, None, None)


def outcomes(generator, n_roles, n_requests, *, dense, rates, effect):
    """Whether each answer counts, before and after, of roles and requests that differ in rate and in change."""
    roles, requests = np.arange(n_requests) % n_roles, np.arange(n_requests)
    if dense:
        roles, requests = np.repeat(np.arange(n_roles), n_requests), np.tile(np.arange(n_requests), n_roles)
    common = generator.normal(0, 1, n_roles)[roles] + generator.normal(0, 1, n_requests)[requests]
    moved = generator.normal(0, effect, n_roles)[roles] + generator.normal(0, effect, n_requests)[requests]
    before = generator.random(len(roles)) < expit(logit(rates[0]) + common)
    after = generator.random(len(roles)) < expit(logit(rates[1]) + common + moved)
    return before.astype(float), after.astype(float), roles.tolist(), requests.tolist()


SIZES = [  # of the suites: a request a role, or every role asked everything
    (50, 320, False),
    (25, 100, False),
    (50, 5, True),
    (25, 10, True),
]


@pytest.mark.parametrize(("n_roles", "n_requests", "dense"), SIZES)
@pytest.mark.parametrize(("rates", "effect"), [((0.35, 0.26), 0.7), ((0.35, 0.35), 0.0), ((0.1, 0.03), 0.7)])
def test_the_interval_of_a_change_covers_it(n_roles, n_requests, dense, rates, effect):
    design = {"dense": dense, "rates": rates, "effect": effect}
    generator, trials = np.random.default_rng(0), 300
    sample = [outcomes(generator, n_roles, n_requests, **design) for _ in range(2000)]
    truth = np.mean([(after - before).mean() for before, after, _, _ in sample])
    covered = 0
    for before, after, roles, requests in sample[:trials]:
        change = paired_change(before, after, roles, requests)
        covered += change.low <= truth <= change.high
    assert 0.92 <= covered / trials <= 0.99  # 0.95 ± 2.4 standard errors, and what few requests cost


def test_clusters_that_differ_make_no_false_changes_as_pairs_alone_would():
    generator, rejected, naive = np.random.default_rng(1), 0, 0
    for _ in range(300):
        before, after, roles, requests = outcomes(generator, 50, 5, dense=True, rates=(0.5, 0.5), effect=1.5)
        rejected += paired_change(before, after, roles, requests).p < 0.05
        discordant = int((before != after).sum())
        naive += scipy_stats.binomtest(int((before > after).sum()), discordant).pvalue < 0.05
    assert 0.02 <= rejected / 300 <= 0.08
    assert naive / 300 > 0.3  # McNemar's test


def test_a_change_of_nothing_is_rarely_significant_and_a_change_of_pairs_as_often_as_by_mcnemar():
    generator, false, shown, exact = np.random.default_rng(2), 0, 0, 0
    labels = [str(index) for index in range(200)]
    for _ in range(400):
        before, after = (generator.random((2, 200)) < 0.3).astype(float)
        false += paired_change(before, after, labels, labels).p < 0.05
        after = (generator.random(200) < 0.18).astype(float)
        shown += paired_change(before, after, labels, labels).p < 0.05
        discordant = int((before != after).sum())
        exact += scipy_stats.binomtest(int((before > after).sum()), discordant).pvalue < 0.05
    assert 0.025 <= false / 400 <= 0.075
    assert exact <= shown


@pytest.mark.parametrize(("share", "correlation"), [(0.2, 0.0), (0.2, 0.3), (0.5, 0.1), (0.05, 0.1)])
@pytest.mark.parametrize("scripts", [25, 50])
def test_the_interval_of_a_share_covers_it_however_alike_the_samples_of_a_script_are(
    scripts, share, correlation
):
    generator, covered, naive, trials = np.random.default_rng(3), 0, 0, 400
    labels = np.arange(scripts).repeat(5).tolist()
    for _ in range(trials):
        rates = np.full(scripts, share)
        if correlation:
            scale = (1 - correlation) / correlation
            rates = generator.beta(share * scale, (1 - share) * scale, scripts)
        values = (generator.random(scripts * 5) < rates.repeat(5)).astype(float)
        low, high = share_interval(values, labels)
        covered += low <= share <= high
        low, high = wilson_interval(values.sum(), len(values))
        naive += low <= share <= high
    assert 0.92 <= covered / trials <= 0.985
    if correlation == 0.3:
        assert naive < covered - 0.04 * trials


@pytest.mark.parametrize("scripts", [5, 10, 16, 25])
def test_the_interval_of_a_mean_over_few_scripts_covers_it(scripts):
    generator, covered, trials = np.random.default_rng(4), 0, 600
    labels = np.arange(scripts).repeat(3).tolist()
    for _ in range(trials):
        values = generator.normal(0, 1, scripts).repeat(3) + generator.normal(0, 1, 3 * scripts)
        found = mean_interval(values, labels)
        covered += found.low <= 0 <= found.high
    assert 0.93 <= covered / trials <= 0.97


def test_outcomes_that_are_all_alike_count_scripts_and_not_samples():
    low, high = share_interval(np.zeros(100), np.arange(20).repeat(5).tolist())
    assert (low, high) == wilson_interval(0, 20, 19)
    assert share_interval(np.zeros(100))[1] < high
    with pytest.raises(ValueError, match="no outcome"):
        share_interval(np.zeros(0))


def test_no_loss_is_shown_by_many_pairs_and_never_where_there_is_one():
    generator = np.random.default_rng(1)
    before = generator.normal(0.5, 0.3, 2000)
    after, labels = before + generator.normal(0.0, 0.3, 2000), [str(i) for i in range(2000)]
    assert paired_change(before, after, labels, labels, 0.05).no_loss < 1e-6
    assert paired_change(before, after - 0.1, labels, labels, 0.05).no_loss > 0.99
    assert paired_change(before[:20], after[:20], labels[:20], labels[:20], 0.05).no_loss > 0.05
    assert paired_change([1.0] * 100, [1.0] * 100, labels[:100], labels[:100], 0.05).no_loss == 0.95**100


def test_the_smallest_detectable_change_is_detected_four_times_in_five():
    generator, labels, found = np.random.default_rng(5), [str(i) for i in range(150)], 0
    smallest = paired_change(np.zeros(150), generator.normal(0, 1, 150), labels, labels).smallest
    for _ in range(400):
        found += paired_change(np.zeros(150), generator.normal(smallest, 1, 150), labels, labels).p < 0.05
    assert 0.72 <= found / 400 <= 0.88


def test_outcomes_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="2 and 1 outcomes"):
        paired_change([0.0, 1.0], [1.0], ["a", "b"], ["x", "y"])
    with pytest.raises(ValueError, match="0 and 0 outcomes"):
        paired_change([], [], [], [])
    with pytest.raises(ValueError, match="not finite"):
        paired_change([0.0, float("nan")], [1.0, 1.0], ["a", "b"], ["x", "y"])


def test_a_change_of_scores_is_tested_with_its_own_error_and_one_pair_is_not():
    found = paired_change([0.2, 0.4, 0.5, 0.1], [0.3, 0.5, 0.5, 0.3], list("aabb"), list("xyxy"))
    assert found.value == pytest.approx(0.1)
    assert 0 < found.p < 1
    assert found.clusters == 2
    one = paired_change([0.2], [0.3], ["a"], ["x"], 0.05)
    assert one.value == pytest.approx(0.1)
    assert one.to_json()["low"] is one.to_json()["p"] is None
    assert one.no_loss == 1


def test_a_share_changes_by_no_more_than_one():
    found = paired_change([1.0, 0.0, 0.0], [0.0, 1.0, 1.0], list("aab"), list("xyx"))
    assert (found.low, found.high, found.smallest) == (-1, 1, 1)


def test_pairs_of_which_none_differs_do_not_prove_that_none_would():
    labels = [str(n) for n in range(60)]
    found = paired_change([1.0] * 60, [1.0] * 60, labels, labels)
    assert found.value == 0
    assert (1 - found.high) ** 60 == pytest.approx(0.05)  # so many pairs show none once in twenty
    assert (found.low, found.smallest, found.p) == (-found.high, found.high, 1)


def test_a_p_that_no_shuffle_reached_is_bounded_and_none_is_zero():
    assert [p_text(1 / 101, 100), p_text(2 / 101, 100)] == ["p ≤ 0.0099", "p = 0.02"]
    assert [p_text(0.0), p_text(0.0312)] == ["p < 0.001", "p = 0.031"]
