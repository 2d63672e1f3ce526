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
    count_false_alarms,
    fit_reference,
)
from personatlas.persona.errors import UserError

PLAIN = ReferenceDistribution(0.0, 1.0, 100)


def reference_conversations(n, turns=8, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (n, turns)).tolist()


def raised(rule, z):
    return [state.raised for state in alarm_states(rule, PLAIN, z)]


def test_a_baseline_is_mean_and_spread_of_default_turns():
    found = fit_reference([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.n) == (2.5, 4)
    assert found.std == pytest.approx(np.std([1, 2, 3, 4], ddof=1))
    assert found.z(2.5 - found.std) == pytest.approx(-1)
    for turns in ([1.0], [2.0, 2.0], [1.0, float("nan")]):
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
    found = calibrate_rule(rule, reference_conversations(2000), PLAIN, 0.05)
    seen = count_false_alarms(found, PLAIN, reference_conversations(2000))
    assert seen.share <= 0.05
    fresh = count_false_alarms(found, PLAIN, reference_conversations(2000, seed=1))
    assert 0.03 < fresh.share < 0.07
    assert fresh.interval[0] < fresh.share < fresh.interval[1]
    drifting = (np.array(reference_conversations(200, seed=2)) - np.linspace(0, 4, 8)).tolist()
    assert count_false_alarms(found, PLAIN, drifting).share > 0.8


def test_a_lower_limit_would_raise_more_than_the_rate():
    conversations = reference_conversations(200)
    for rule in (MOfN(), Cusum()):
        found = calibrate_rule(rule, conversations, PLAIN, 0.05)
        lower = type(found)(limit=found.limit - 1e-6)
        assert count_false_alarms(found, PLAIN, conversations).share <= 0.05
        assert count_false_alarms(lower, PLAIN, conversations).share > 0.05


def test_too_few_conversations_and_rates_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="19 reference conversations; an alarm needs 20"):
        calibrate_rule(Cusum(), reference_conversations(19), PLAIN, 0.05)
    with pytest.raises(UserError, match="outside"):
        calibrate_rule(Cusum(), reference_conversations(30), PLAIN, 1.5)
    with pytest.raises(UserError, match="no reference conversations"):
        count_false_alarms(Cusum(), PLAIN, [])
