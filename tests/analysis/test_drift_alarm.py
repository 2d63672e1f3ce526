"""Drift: rules over the turns of a conversation, what raises them, what ends them, and how often they are wrong."""

import numpy as np
import pytest

from personatlas.analysis.drift_alarm import (
    ConversationAlarm,
    Cusum,
    MOfN,
    ReferenceDistribution,
    alarm_states,
    calibrate_rule,
    false_alarms,
    first_alarm,
    fit_reference,
    highest_statistic,
)
from personatlas.persona.errors import UserError

PLAIN = ReferenceDistribution(0.0, 1.0, 100)


def reference_conversations(n, turns=8, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (n, turns)).tolist()


def raised(rule, z):
    return [state.raised for state in alarm_states(rule, PLAIN, z)]


def scripts_of(conversations, samples=1):
    return [f"s{number // samples}" for number in range(len(conversations))]


def share_of_alarms(rule, reference, conversations):
    return np.mean([first_alarm(rule, reference, one) is not None for one in conversations])


def test_a_reference_has_a_mean_by_turn_and_a_spread_around_them():
    found = fit_reference([[1.0, 11.0], [2.0, 12.0], [3.0, 13.0]])
    assert (found.mean, found.n, found.by_turn) == (7.0, 6, (2.0, 12.0))
    assert found.std == pytest.approx(1.0)  # and not the 5.5 of all turns
    assert found.z(12.0 - found.std, 1) == pytest.approx(-1)
    assert found.z(12.0 - found.std, 9) == pytest.approx(-1)  # turns beyond are like the last
    assert found.z(7.0) == 0
    late = fit_reference([[1.0, 2.0], [2.0], [3.0], [4.0]])  # one of four says nothing about a second turn
    assert len(late.by_turn) == 1
    for turns in ([[1.0]], [[2.0, 2.0]] * 3, [[1.0, float("nan")]] * 3):
        with pytest.raises(UserError, match="give no standard deviation"):
            fit_reference(turns)


def test_two_low_turns_of_three_raise_an_alarm_and_one_does_not():
    rule = MOfN(limit=2.0, m=2, n=3)
    assert not any(raised(rule, [-3.0, 0.0, 0.0, -3.0, 0.0, 0.0]))
    assert raised(rule, [0.0, -3.0, 0.0, -2.5, 0.0]) == [False, False, False, True, False]
    with pytest.raises(ValueError, match="not 3 of 2"):
        MOfN(m=3, n=2)


def test_a_small_drift_that_lasts_is_seen_by_the_sum_and_not_by_single_turns():
    z = [-1.2] * 10
    assert not any(raised(MOfN(), z))
    assert raised(Cusum(limit=4.0, slack=0.5), z).index(True) == 5  # 0.7 a turn: above 4 at the sixth
    assert not any(raised(Cusum(), [0.3, -0.4] * 20))


def test_an_alarm_ends_only_after_calm_turns_in_a_row():
    states = alarm_states(MOfN(), PLAIN, [-3.0, -3.0, 0.0, -1.0, 0.0, 0.0, 0.0])
    assert [state.alarm for state in states] == [False, True, True, True, True, False, False]
    assert sum(state.raised for state in states) == 1
    again = alarm_states(MOfN(), PLAIN, [-3.0, -3.0, 0.0, 0.0, -3.0, 0.0, -3.0])
    assert [state.raised for state in again] == [False, True, False, False, False, False, True]


def test_a_conversation_watched_turn_by_turn_is_the_same():
    z = [0.0, -2.5, -3.0, 0.2, 0.1, -0.7]
    alarm = ConversationAlarm(MOfN(), PLAIN)
    assert [alarm.update(value) for value in z] == alarm_states(MOfN(), PLAIN, z)


@pytest.mark.parametrize("rule", [MOfN(), MOfN(m=1, n=1), Cusum()])
def test_a_calibrated_rule_keeps_its_rate_on_conversations_that_it_has_not_seen(rule):
    conversations = reference_conversations(2000)
    found = calibrate_rule(rule, conversations, scripts_of(conversations), PLAIN, 0.05)
    assert share_of_alarms(found, PLAIN, conversations) <= 0.05
    assert 0.03 < share_of_alarms(found, PLAIN, reference_conversations(2000, seed=1)) < 0.07
    drifting = (np.array(reference_conversations(200, seed=2)) - np.linspace(0, 4, 8)).tolist()
    assert share_of_alarms(found, PLAIN, drifting) > 0.8


@pytest.mark.parametrize(("n_scripts", "rate"), [(20, 0.05), (40, 0.05), (50, 0.05), (20, 0.2)])
def test_the_expected_rate_in_new_scripts_is_at_most_the_one_asked_for(n_scripts, rate):
    """Scripts differ, and five samples of one are alike: counting samples gave 9.5% at 20 scripts and 7.3% at 40."""
    generator = np.random.default_rng(0)

    def sample(n):
        return (generator.normal(0, 1, (n, 1, 1)) + generator.normal(0, 1, (n, 5, 8))).reshape(n * 5, 8)

    highest = np.array([highest_statistic(Cusum(), PLAIN, one) for one in sample(80).tolist()])
    rates = []
    for _ in range(25):
        conversations = sample(n_scripts).tolist()
        scripts = scripts_of(conversations, 5)
        found = calibrate_rule(Cusum(), conversations, scripts, PLAIN, rate)
        rates.append((highest > found.limit).mean())
    assert np.mean(rates) <= rate + 2 * np.std(rates) / 25**0.5
    assert np.mean(rates) > rate / 8


def test_a_lower_limit_would_raise_more_than_the_rate():
    conversations = reference_conversations(200)
    for rule in (MOfN(), Cusum()):
        found = calibrate_rule(rule, conversations, scripts_of(conversations), PLAIN, 0.05)
        lower = type(found)(limit=found.limit - 1e-6)
        allowed = (0.05 * 201 - 1) / 200
        assert share_of_alarms(found, PLAIN, conversations) <= allowed
        assert share_of_alarms(lower, PLAIN, conversations) > allowed


def test_false_alarms_are_counted_by_conversation_and_by_turn():
    found = false_alarms([None, 3, None, 5], [8, 8, 6, 8], list("abcd"))
    assert (found.share, found.n) == (0.5, 4)
    assert found.per_turn == 2 / (8 + 3 + 6 + 5)
    assert found.interval[0] < 0.5 < found.interval[1]


def test_too_few_scripts_and_rates_that_cannot_be_are_refused():
    conversations = reference_conversations(90)
    with pytest.raises(UserError, match=r"of 18 scripts; a rate of 0\.05 needs 19"):
        calibrate_rule(Cusum(), conversations, scripts_of(conversations, 5), PLAIN, 0.05)
    with pytest.raises(UserError, match="outside"):
        calibrate_rule(Cusum(), conversations, scripts_of(conversations), PLAIN, 1.5)
    with pytest.raises(UserError, match="no reference conversations"):
        false_alarms([], [], [])
