"""Sampling: the cached decoders give what reading the whole text gives, on every family, whatever the batch."""

import pytest
import torch
from families import FAMILIES, tiny_model

from personatlas.persona.sampling import sampler as sampler_module
from personatlas.persona.sampling.cuda_graph import GraphSampler
from personatlas.persona.sampling.sampler import (
    Decoder,
    PlainDecoder,
    Prompt,
    Sampler,
    Sampling,
    decoding_error,
)

PROMPTS = [Prompt(tuple((7 * i + 3 * j + 1) % 320 for j in range(2 + 5 * i)), seed=100 + i) for i in range(7)]
SAMPLING = Sampling(max_new_tokens=14)
ENDS = frozenset(range(0, 320, 12))


def answers(sampler, prompts=PROMPTS):
    found = {answer.index: answer for answer in sampler.answers(prompts)}
    assert sorted(found) == list(range(len(prompts)))
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_reading_the_whole_text(family):
    assert decoding_error(tiny_model(family), Decoder) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2", "falcon", "mixtral"])
def test_answers_do_not_depend_on_the_decoder(family):
    model = tiny_model(family)
    cached = Sampler(model, ENDS, SAMPLING)
    plain = Sampler(model, ENDS, SAMPLING)
    plain.decoder = PlainDecoder
    refilled = GraphSampler(model, ENDS, SAMPLING, slots=3)
    assert answers(cached) == answers(plain) == answers(refilled)


def test_answers_do_not_depend_on_the_batch():
    sampler = Sampler(tiny_model(), ENDS, SAMPLING)
    together = answers(sampler)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = answers(sampler, [prompt])
        assert (alone.ids, alone.stopped) == (together[i].ids, together[i].stopped)


def test_an_answer_ends_before_its_end_token_or_at_the_limit():
    found = answers(Sampler(tiny_model(), ENDS, SAMPLING))
    assert {answer.stopped for answer in found} == {"end", "length"}
    for answer in found:
        assert not set(answer.ids) & ENDS
        assert (len(answer.ids) == 14) if answer.stopped == "length" else (len(answer.ids) < 14)


def test_greedy_answers_equal_those_of_generate():
    model = tiny_model()
    found = answers(Sampler(model, frozenset(), Sampling(max_new_tokens=10, temperature=0.0)))
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt.ids])
        made = model.hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            min_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
        )
        assert tuple(made[0, len(prompt.ids) :].tolist()) == answer.ids


def test_a_model_that_takes_no_cache_falls_back_to_reading_the_whole_text(monkeypatch):
    model = tiny_model()
    expected = answers(Sampler(model, ENDS, SAMPLING))
    monkeypatch.setattr(sampler_module, "decoding_error", lambda *_: float("inf"))
    fallen = Sampler(model, ENDS, SAMPLING)
    assert fallen.decoder is PlainDecoder
    assert answers(fallen) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "below 1"),
        ({"temperature": -1.0}, "outside"),
        ({"temperature": float("nan")}, "outside"),
        ({"top_p": 0.0}, "outside"),
    ],
)
def test_impossible_sampling_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
