"""What is measured on held-out conversations: the loss of each alone, styles told apart, and what chance would give."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_conversations import turns
from test_gpt import SHAPE, lively
from test_packing import conversation, encoder, folder  # noqa: F401 (fixtures)

from personatlas.training.chat import heldout_loss as held_out_module
from personatlas.training.chat import style as style_module
from personatlas.training.chat.conversations import Conversation, Faults
from personatlas.training.chat.heldout_loss import HeldOut, interval
from personatlas.training.chat.packing import encoded
from personatlas.training.chat.samples import before_answer, dealt, of_every_group, one_of_each, replied
from personatlas.training.chat.style import Answer, compare, measures, recogniser_of

WORDS = {
    "pirate": [
        "arr",
        "matey",
        "the",
        "briny",
        "deep",
        "be",
        "calling",
        "ye",
        "scurvy",
        "dog",
        "avast",
        "hoist",
        "yon",
        "sail",
    ],
    "butler": [
        "very",
        "good",
        "sir",
        "might",
        "one",
        "suggest",
        "a",
        "pot",
        "of",
        "tea",
        "before",
        "the",
        "motor",
        "car",
        "arrives",
    ],
}


def said(style, number):
    return " ".join(np.random.default_rng([number, len(style)]).permutation(WORDS[style]))


def speaker(style, number, source="house"):
    messages = tuple(turns(f"Question {number}?", said(style, number), system=f"You are a {style}."))
    return Conversation(messages, f"{source}: {style}/{number}", source, style)


TRAIN = [speaker(style, number) for style in WORDS for number in range(40)]
HELD = [speaker(style, number) for style in WORDS for number in range(100, 130)]


def role(style, number, source="house"):
    """Some style of many, in a pirate's words."""
    return replace(speaker("pirate", number, source), style=style, where=f"{source}: {style}/{number}")


def answers(conversations, texts):
    return [
        Answer(text, one.label, one.source, one.question)
        for one, text in zip(conversations, texts, strict=True)
    ]


def teachers():
    return answers(HELD, [one.answers[-1] for one in HELD])


# Loss


def of_two_sources(encoder):
    listed = [
        replace(conversation(turns(f"{i}?", "sea " * (i % 4 + 1), "more?", "no.")), source=("a", "b")[i % 2])
        for i in range(20)
    ]
    tokens, kept = encoded(listed, encoder, 64, Faults())
    return HeldOut(kept, tokens)


def test_the_loss_is_that_of_each_conversation_alone_whatever_is_read_with_it(encoder, monkeypatch):
    model, held = lively(replace(SHAPE, vocabulary=320)), of_two_sources(encoder)
    with torch.no_grad():
        alone = [
            float(model(*(torch.from_numpy(part)[None] for part in held.tokens.one(i)))) for i in range(20)
        ]
    assert np.allclose(held.nats(model, np.arange(20)), alone, rtol=1e-5)
    monkeypatch.setattr(held_out_module, "TOKENS", 100)
    monkeypatch.setattr(held_out_module, "PIECE", 3)
    assert np.allclose(held.nats(model, np.array([7, 3])), [alone[7], alone[3]], rtol=1e-5)


def test_every_source_has_its_own_loss_and_all_is_their_mean_over_tokens(encoder):
    held = of_two_sources(encoder)
    row = held.row(lively(replace(SHAPE, vocabulary=320)), 0, whole=True, most=0)
    found = row["sources"]
    assert list(found) == ["all", "a", "b"]
    total = sum(found[name]["loss"] * found[name]["tokens"] for name in "ab")
    assert found["all"]["loss"] == pytest.approx(total / found["all"]["tokens"])
    assert found["all"]["perplexity"] == pytest.approx(np.exp(found["all"]["loss"]))
    assert all(one["low"] < one["loss"] < one["high"] for one in found.values())
    assert (row["loss"], row["tokens"]) == (pytest.approx(found["all"]["loss"]), found["all"]["tokens"])


def test_held_out_answers_that_training_gives_too_are_counted(encoder):
    held = of_two_sources(encoder)
    known = frozenset(["sea ", "sea sea ", "no."])  # of answers with one to four seas
    again = HeldOut(held.conversations, held.tokens, known=known)
    found = again.fits(np.ones(20))
    assert {name: one["met"] for name, one in found.items()} == {"all": 10, "a": 5, "b": 5}
    assert held.fits(np.ones(20))["all"]["met"] == 0


def test_an_evaluation_in_between_reads_a_part_that_is_always_the_same(encoder, monkeypatch):
    monkeypatch.setattr(held_out_module, "FEWEST", 5)
    held, model = of_two_sources(encoder), lively(replace(SHAPE, vocabulary=320))
    between, whole = (held.row(model, 1, whole=one, most=0) for one in (False, True))
    assert between["tokens"] < whole["sources"]["all"]["tokens"]
    assert between.pop("loss") == pytest.approx(
        whole.pop("loss"), rel=1e-6
    )  # read beside others, the sums are rounded anew
    assert between == {name: value for name, value in whole.items() if name != "sources"}


def test_held_out_roles_are_a_source_of_their_own_and_not_in_all(encoder):
    held = of_two_sources(encoder)
    held.conversations = [replace(one, apart=one.source == "b") for one in held.conversations]
    row = held.row(lively(replace(SHAPE, vocabulary=320)), 0, whole=True, most=0)
    assert list(row["sources"]) == ["all", "a", "b, held-out roles"]
    assert row["sources"]["all"] == row["sources"]["a"]
    assert row["tokens"] == row["sources"]["a"]["tokens"]


def test_an_interval_draws_whole_groups():
    values = np.repeat([0.0, 1.0], 50)
    low, high = interval(values, np.ones(100), ["a"] * 50 + ["b"] * 50)
    assert (low, high) == (0.0, 1.0)
    low, high = interval(values, np.ones(100), [str(i) for i in range(100)])
    assert 0.38 < low < 0.45 < 0.55 < high < 0.62
    assert interval(values, np.ones(100), ["a"] * 100) is None


# Style


def test_styles_are_recognised_in_answers_that_were_not_learned_from():
    recogniser = recogniser_of(TRAIN)
    found = compare({"teacher": teachers()}, recogniser, frozenset())["teacher"]["all"]
    assert found["recognised"]["value"] > 0.95
    assert found["recognised"]["n"] == 60
    assert found["chance"] == pytest.approx(0.5, abs=0.05)


def test_answers_in_the_wrong_style_or_always_in_one_are_not_above_chance():
    recogniser = recogniser_of(TRAIN)
    swapped = answers(HELD, [one.answers[-1] for one in [*HELD[30:], *HELD[:30]]])
    single = answers(HELD, [one.answers[-1] for one in [*HELD[:30], *HELD[:30]]])
    found = compare({"swapped": swapped, "single": single}, recogniser, frozenset())
    assert found["swapped"]["all"]["recognised"]["value"] < 0.05
    assert found["single"]["all"]["recognised"]["value"] == pytest.approx(0.5, abs=0.03)
    assert found["single"]["all"]["chance"] == pytest.approx(0.5, abs=0.01)


def test_chance_is_dealt_within_a_source():
    """Two sources of one style each: whoever knows the source knows the style, so chance is all there is."""
    one = [speaker("pirate", number, "ship") for number in range(40)] + [speaker("butler", number, "house") for number in range(40)]  # fmt: skip
    recogniser = recogniser_of(one)
    held = [Answer(said(s, i), f"{where}/{s}", where, str(i)) for s, where in (("pirate", "ship"), ("butler", "house")) for i in range(100, 120)]  # fmt: skip
    found = compare({"teacher": held}, recogniser, frozenset())["teacher"]["all"]
    assert found["recognised"]["value"] > 0.9
    assert found["chance"] == pytest.approx(found["recognised"]["value"])


def test_held_out_roles_are_apart_and_chance_is_dealt_among_all_roles_of_the_source():
    recogniser = recogniser_of(TRAIN)
    made = [replace(one, apart="pirate" in one.label) for one in teachers()]
    found = compare({"teacher": made}, recogniser, frozenset())["teacher"]
    assert list(found) == ["all", "house", "house, held-out roles"]
    assert [found[group]["recognised"]["n"] for group in found] == [30, 30, 30]
    assert found["house, held-out roles"]["chance"] == pytest.approx(0.5, abs=0.05)
    assert found["all"] == found["house"]


def test_one_style_or_none_has_nothing_to_recognise():
    assert recogniser_of([speaker("pirate", number) for number in range(5)]) is None
    assert recogniser_of([replace(one, style="") for one in TRAIN]) is None
    found = compare({"teacher": teachers()}, None, frozenset())["teacher"]["all"]
    assert "recognised" not in found
    assert found["words"]["value"] == pytest.approx(np.mean([len(one.answers[-1].split()) for one in HELD]))


def test_answers_that_were_tuned_on_word_for_word_are_recited():
    known = frozenset(one.answers[-1] for one in HELD[:15])
    found = compare({"teacher": teachers()}, None, known)["teacher"]["all"]
    assert found["recited"]["value"] == 0.25


def test_measures_tell_repeats_and_shared_openings():
    found = measures(["a b c d a b c d", "a b c d e", "one two", ""])
    assert found["words"].tolist() == [8, 5, 2, 0]
    assert found["distinct pairs"].tolist() == [4 / 7, 1, 1, 1]
    assert found["repeats"].tolist() == [pytest.approx(0.2), 0, 0, 0]
    assert found["shared opening"].tolist() == [1, 1, 0, 0]


def test_questions_are_shared_out_evenly_over_the_styles():
    chosen = one_of_each(HELD, 10)
    assert [sum(one.style == style for one in chosen) for style in WORDS] == [5, 5]
    assert len({one.question for one in one_of_each(HELD, 2)}) == 2  # both are asked the same ones
    assert one_of_each(HELD[::-1], 10) == chosen
    assert len(one_of_each(HELD, 1000)) == 60
    assert len(one_of_each(HELD, 1)) == 1


def test_a_large_source_does_not_crowd_out_small_ones_and_held_out_roles():
    many = [role(f"role{style}", number, "large") for style in range(60) for number in range(3)]
    apart = [replace(role("ghost", number, "large"), apart=True) for number in range(30)]
    few = [role("", number, "small") for number in range(4)]
    chosen = of_every_group([*many, *apart, *few], 40, 10)
    counted = Counter(one.group for one in chosen)
    assert counted == {"large": 18, "large, held-out roles": 18, "small": 4}
    assert (
        len({one.label for one in chosen if one.group == "large"}) == 8
    )  # ten labels less one for each other group
    assert of_every_group([*few, *apart, *many], 40, 10) == chosen
    assert len(of_every_group(many, 100, 10)) == 100  # ten labels have thirty: others fill up
    assert dealt([5, 1, 0, 9], 100) == [5, 1, 0, 9]


def test_the_classifier_knows_the_styles_that_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(style_module, "STYLES", 3)
    listed = [role(f"role{style}", number) for style in range(9) for number in range(3)]
    wanted = ["house/role4", "house/role7", "house/nobody"]
    found = recogniser_of(listed, wanted).labels
    assert len(found) == 3
    assert {"house/role4", "house/role7"} < set(found)


def test_the_last_answer_is_what_is_asked_for():
    one = conversation(turns("a?", "b", "c?", "d", "e?", system="s"))
    assert before_answer(one) == list(one.messages[:4])


def test_samples_are_what_each_prompt_alone_would_be_given(encoder):
    """The likeliest tokens, to compare: at a low temperature draws are no draws."""
    model = lively(replace(SHAPE, vocabulary=320))
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    prompts = [list(range(5, 5 + length)) for length in (3, 9, 5)]
    found = replied(model, prompts, 12, end=-1)
    for prompt, ids in zip(prompts, found, strict=True):
        assert ids == model.continued(torch.tensor([prompt]), 12)[0, len(prompt) :].tolist()
    cut = replied(model, prompts, 12, end=found[1][4])
    assert cut[1] == found[1][: found[1].index(found[1][4])]
    assert len(replied(model, [list(range(100))], 12, end=-1)[0]) == 12
    assert replied(model, [], 12, end=-1) == []
