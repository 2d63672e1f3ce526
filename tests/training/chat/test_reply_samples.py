"""Samples while a model is tuned: which questions are asked, and what is answered."""

from dataclasses import replace

import torch
from chats import WORDS, conversation, in_character, turns
from tiny_gpt import SHAPE, lively

from personatlas.training.chat.conversations import ChatExample
from personatlas.training.chat.samples import prompt_messages, sample_replies, select_per_label


def in_role(role, number):
    messages = tuple(turns(f"Question {number}?", in_character(role, number), system=f"You are a {role}."))
    return ChatExample(messages, f"house: {role}/{number}", "house", role)


HELD_OUT = [in_role(role, number) for role in WORDS for number in range(100, 130)]


def test_questions_are_shared_out_evenly_over_the_styles():
    chosen = select_per_label(HELD_OUT, 10)
    assert [sum(one.role == role for one in chosen) for role in WORDS] == [5, 5]
    assert len({one.question for one in select_per_label(HELD_OUT, 2)}) == 2  # both are asked the same ones
    assert select_per_label(HELD_OUT[::-1], 10) == chosen
    assert len(select_per_label(HELD_OUT, 1000)) == 60
    assert len(select_per_label(HELD_OUT, 1)) == 1


def test_the_last_answer_is_what_is_asked_for():
    one = conversation(turns("a?", "b", "c?", "d", "e?", system="s"))
    assert prompt_messages(one) == list(one.messages[:4])


def test_samples_are_what_each_prompt_alone_would_be_given(encoder):
    """The likeliest tokens, to compare: at a low temperature draws are no draws."""
    model = lively(replace(SHAPE, vocabulary=320))
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    prompts = [list(range(5, 5 + length)) for length in (3, 9, 5)]
    found = sample_replies(model, prompts, 12, end=-1)
    for prompt, ids in zip(prompts, found, strict=True):
        assert ids == model.generate(torch.tensor([prompt]), 12)[0, len(prompt) :].tolist()
    cut = sample_replies(model, prompts, 12, end=found[1][4])
    assert cut[1] == found[1][: found[1].index(found[1][4])]
    assert len(sample_replies(model, [list(range(100))], 12, end=-1)[0]) == 12
    assert sample_replies(model, [], 12, end=-1) == []
