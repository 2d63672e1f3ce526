"""Losses of held-out conversations: each as if it were read alone, by source, with intervals over questions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from chats import conversation, turns
from tiny_gpt import SHAPE, lively

from personatlas.training.chat import heldout_loss
from personatlas.training.chat.conversations import Exclusions
from personatlas.training.chat.heldout_loss import HeldOutAnswers
from personatlas.training.chat.packing import encode_examples


def of_two_sources(encoder):
    listed = [
        replace(conversation(turns(f"{i}?", "sea " * (i % 4 + 1), "more?", "no.")), source=("a", "b")[i % 2])
        for i in range(20)
    ]
    tokens, kept = encode_examples(listed, encoder, 64, Exclusions())
    return HeldOutAnswers(kept, tokens)


def test_the_loss_is_that_of_each_conversation_alone_whatever_is_read_with_it(encoder, monkeypatch):
    model, held = lively(replace(SHAPE, vocabulary=320)), of_two_sources(encoder)
    with torch.no_grad():
        alone = [
            float(model(*(torch.from_numpy(part)[None] for part in held.encoded.inputs_and_targets(i))))
            for i in range(20)
        ]
    assert np.allclose(held.nats(model, np.arange(20)), alone, rtol=1e-5)
    monkeypatch.setattr(heldout_loss, "BATCH_TOKENS", 100)
    monkeypatch.setattr(heldout_loss, "PIECE", 3)
    assert np.allclose(held.nats(model, np.array([7, 3])), [alone[7], alone[3]], rtol=1e-5)


def test_every_source_has_its_own_loss_and_all_is_their_mean_over_tokens(encoder):
    held = of_two_sources(encoder)
    row = held.row(lively(replace(SHAPE, vocabulary=320)), 0, whole=True, max_tokens=0)
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
    again = HeldOutAnswers(held.examples, held.encoded, known=known)
    found = again.losses(np.ones(20))
    assert {name: one.met for name, one in found.items()} == {"all": 10, "a": 5, "b": 5}
    assert held.losses(np.ones(20))["all"].met == 0


def test_an_evaluation_in_between_reads_a_part_that_is_always_the_same(encoder, monkeypatch):
    monkeypatch.setattr(heldout_loss, "MIN_EXAMPLES", 5)
    held, model = of_two_sources(encoder), lively(replace(SHAPE, vocabulary=320))
    between, whole = (held.row(model, 1, whole=one, max_tokens=0) for one in (False, True))
    assert between["tokens"] < whole["sources"]["all"]["tokens"]
    assert between.pop("loss") == pytest.approx(
        whole.pop("loss"), rel=1e-6
    )  # read beside others, the sums are rounded anew
    assert between == {name: value for name, value in whole.items() if name != "sources"}


def test_held_out_roles_are_a_source_of_their_own_and_not_in_all(encoder):
    held = of_two_sources(encoder)
    held.examples = [replace(one, is_role_held_out=one.source == "b") for one in held.examples]
    row = held.row(lively(replace(SHAPE, vocabulary=320)), 0, whole=True, max_tokens=0)
    assert list(row["sources"]) == ["all", "a", "b, held-out roles"]
    assert row["sources"]["all"] == row["sources"]["a"]
    assert row["tokens"] == row["sources"]["a"]["tokens"]
