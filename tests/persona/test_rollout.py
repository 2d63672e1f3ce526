"""Choosing some of many rollouts."""

from collections import Counter

from personatlas.persona.rollout import spread_evenly


def test_an_even_choice_of_a_product_takes_every_group_and_every_place_in_turn():
    items = [f"{role}/{question}" for role in "abcdefgh" for question in range(6)]
    some = spread_evenly(items, 24, lambda item: item[0])
    assert some == sorted(some)
    assert set(Counter(item[0] for item in some).values()) == {3}
    places = Counter(item[2] for item in some).values()
    assert len(places) == 6
    assert max(places) - min(places) <= 2
    assert len({item[2] for item in spread_evenly(items, 8, lambda item: item[0])}) == 6
    assert len({item[0] for item in spread_evenly(items, 4, lambda item: item[0])}) == 4
    assert spread_evenly(items, 1000, lambda item: item[0]) == items
    assert spread_evenly([], 3, str) == []
