"""Trajectories by turn, their slopes and alarms, and what the user's message says about the next answer."""

import numpy as np
import pytest

from personatlas.analysis.drift_alarm import MOfN, ReferenceDistribution, alarm_states
from personatlas.analysis.next_message import FOLDS, UserMessage, fold_numbers, predict_from_messages
from personatlas.analysis.trajectories import alarm_rate, clustered_mean, slope, turn_means

SCRIPTS = [f"s{n // 3}" for n in range(30)]  # ten scripts, three samples each


def falling(rate=-2.0, turns=8, seed=0):
    """Conversations that fall at that rate; what a script says moves all of its samples."""
    draw = np.random.default_rng(seed)
    level = np.repeat(draw.normal(0, 5, 10), 3)[:, None]
    return level + rate * np.arange(turns) + draw.normal(0, 1, (30, turns))


def test_a_band_is_wide_for_few_scripts_however_many_samples_they_have():
    values = falling()
    rows = turn_means(values, SCRIPTS)
    assert [row.turn for row in rows] == list(range(1, 9))
    assert [row.mean for row in rows] == pytest.approx(values.mean(0))
    alone = turn_means(values, [str(n) for n in range(30)])
    for row, other in zip(rows, alone, strict=True):
        assert row.low < row.mean < row.high
        assert row.high - row.low > 1.3 * (other.high - other.low)
    assert turn_means(values[:3], SCRIPTS[:3])[0].low is None


def test_turns_after_a_conversations_end_count_nowhere():
    values = falling()
    values[:15, 5:] = np.nan
    values[:, 7] = np.nan
    rows = turn_means(values, SCRIPTS)
    assert [row.n for row in rows] == [30] * 5 + [15] * 2
    assert rows[6].mean == pytest.approx(values[15:, 6].mean())
    whole = clustered_mean(values, SCRIPTS)
    assert (whole.value, whole.n) == (pytest.approx(np.nanmean(values)), 30 * 5 + 15 * 2)
    empty = clustered_mean(np.full((2, 2), np.nan), ["a", "b"])
    assert empty.to_json() == {"value": None, "low": None, "high": None, "n": 0}


def test_a_slope_is_the_mean_of_least_squares_slopes_and_chance_is_small_beside_it():
    values = falling()
    values[0, 3:] = np.nan
    found = slope(values, SCRIPTS)
    own = [np.polyfit(np.flatnonzero(np.isfinite(row)), row[np.isfinite(row)], 1)[0] for row in values]
    assert found.value == pytest.approx(np.mean(own))
    assert found.low < found.value < found.high < -found.chance
    assert (found.n, found.scripts) == (30, 10)
    still = slope(falling(rate=0.0), SCRIPTS)
    assert abs(still.value) < 2 * still.chance
    assert slope(values[:, :1], SCRIPTS) is None


def test_alarms_are_counted_with_their_first_turn_and_how_long_they_stay_on():
    rule, plain = MOfN(2.0, 1, 1), ReferenceDistribution(0.0, 1.0, 9)
    conversations = [[0.0, -3.0, -3.0], [0.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    states = [alarm_states(rule, plain, one) for one in conversations]
    found = alarm_rate(states, list("aabb"))
    assert (found.share, found.raised, found.n, found.first) == (0.5, 2, 4, 1.5)
    assert found.on == (0.25, 0.25, pytest.approx(1 / 3))
    assert found.interval[0] < 0.5 < found.interval[1]
    assert alarm_rate([], []).share is None


def said(signal, scripts=24, samples=3, seed=0):
    """Turns whose messages hold one of two words; `signal` is how far these move the answer."""
    draw = np.random.default_rng(seed)
    turns = []
    for script in range(scripts):
        for turn in range(6):
            word = draw.integers(2)
            noise = " ".join(draw.choice(["lamp", "chair", "river", "stone", "cloud"], 4))
            text = f"{noise} {'grief' if word else 'code'} {script} {turn}"
            for _ in range(samples):
                y = signal * word + draw.normal(0, 1)
                turns.append(UserMessage(text, y, y if turn else None, f"s{script}", f"d{script % 4}"))
    return turns


def test_a_message_that_moves_the_answer_is_found_up_to_the_ceiling_and_noise_is_not():
    row = predict_from_messages(said(4.0))["projection"]
    assert 0.6 < row.r2 <= row.ceiling + 0.02
    assert row.low < row.r2 < row.high
    assert abs(row.domain.r2) < 0.15
    assert row.beyond_domain.r2 > 0.6
    assert row.shuffled.highest < 0.1
    assert (row.answers, row.messages, row.scripts, len(row.alphas)) == (24 * 18, 24 * 6, 24, FOLDS)
    nothing = predict_from_messages(said(0.0))
    assert set(nothing) == {"projection", "change"}
    assert all(nothing[name].r2 < 0.1 for name in nothing)


def test_what_only_the_domain_says_is_not_counted_as_the_messages():
    turns = [
        UserMessage(turn.text, turn.projection + 6 * int(turn.domain[1]), None, turn.script, turn.domain)
        for turn in said(0.0)
    ]
    row = predict_from_messages(turns)["projection"]
    assert row.domain.r2 > 0.9
    assert abs(row.beyond_domain.r2) < 0.1
    assert set(predict_from_messages(turns)) == {"projection"}


def test_embeddings_that_are_given_are_used_and_no_script_is_in_two_folds():
    turns = said(4.0)
    row = predict_from_messages(
        turns, lambda texts: np.array([[float("grief" in text), 1.0] for text in texts])
    )["projection"]
    assert row.r2 > 0.7
    scripts = [turn.script for turn in turns]
    fold = fold_numbers(scripts, [turn.domain for turn in turns], FOLDS)
    assert set(fold) == set(range(FOLDS))
    assert len({(script, number) for script, number in zip(scripts, fold.tolist(), strict=True)}) == 24
    assert predict_from_messages([turn for turn in turns if turn.script in ("s0", "s1")]) is None
