"""TextSamples are begun by held-out documents and continued by the model, the same draws at every step."""

import numpy as np
import pytest
import torch
from corpora import write_corpus
from tiny_gpt import lively

from personatlas.persona.logs import read_lines
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.token_shards import Stream, make_tokens
from personatlas.training.data.tokenizer import load_corpus_tokenizer, make_tokenizer
from personatlas.training.loop.samples import TextSamples, document_beginnings, sample_texts
from personatlas.training.model.config import Shape
from personatlas.training.model.gpt import GPT

SHAPE = Shape(vocabulary=310, depth=2, width=32, heads=4, kv_heads=2, head_width=8, inner=48, context=24)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    texts = Corpus.open(write_corpus(folder / "texts"), held_share=0.2)
    make_tokenizer(texts, folder / "tokenizer", vocabulary=310, quiet=True)
    return make_tokens(texts, folder / "tokenizer", folder / "tokens", quiet=True), load_corpus_tokenizer(
        folder / "tokenizer"
    )


def a_stream(*lengths):
    """Documents of 0 (the mark) and then 1, 2, 3, ... each."""
    ids = np.concatenate([np.arange(length, dtype=np.uint16) for length in lengths])
    return Stream((ids,), bos=0, documents=len(lengths), bytes=len(ids))


def test_prompts_are_the_beginnings_of_long_documents_spread_evenly():
    stream = a_stream(50, 10, 60, 70, 40, 80)
    assert document_beginnings(stream, 10, length=3) == [[0, 1, 2, 3]] * 6
    assert document_beginnings(stream, 2, length=30) == [[*range(31)]] * 2  # two longer than 60: of 70 and 80
    assert document_beginnings(stream, 2, length=40) == []


def test_samples_are_written_once_a_step_and_begin_as_held_out_documents_do(corpus, tmp_path):
    tokens, tokenizer = corpus
    model = lively(SHAPE)
    for steps in ([0, 4], [4]):  # resumed: step 4 is there
        samples = TextSamples(tmp_path, tokenizer, tokens.held_out, count=3, length=8)
        for step in steps:
            samples.write(model, step)
    rows = read_lines(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [0] * 3 + [4] * 3
    text = tokenizer.decode(tokens.held_out.read(0, len(tokens.held_out)).tolist())
    assert all(row["prompt"] in text and len(row["prompt"]) > 10 for row in rows)
    assert "<|bos|>" not in rows[0]["prompt"]
    assert [row["text"] for row in rows[:3]] == [row["text"] for row in rows[3:]]  # one model: one text


def test_later_samples_are_forgotten_when_a_run_goes_on(corpus, tmp_path):
    tokens, tokenizer = corpus
    samples = TextSamples(tmp_path, tokenizer, tokens.held_out, count=1, length=3)
    for step in (0, 4, 8):
        samples.write(lively(SHAPE), step)
    samples.cut_after(4)
    samples.write(lively(SHAPE), 8)
    assert [row["step"] for row in read_lines(tmp_path / "samples.jsonl")] == [0, 4, 8]


def test_at_a_low_temperature_it_writes_what_the_model_itself_continues(corpus):
    _, tokenizer = corpus
    model, prompts = lively(SHAPE), [[0, *range(60, 76)], [0, *range(90, 106)]]
    ids = model.generate(torch.tensor(prompts), 30)[:, 17:]  # beyond the context of 24
    ends = [next((i for i, id in enumerate(row) if id < 4), 30) for row in ids.tolist()]
    assert max(ends) > 10
    wanted = [tokenizer.decode(row[:end]) for row, end in zip(ids.tolist(), ends, strict=True)]
    found = sample_texts(model, tokenizer, prompts, 30, torch.Generator(), temperature=1e-4)
    assert [text for _, text in found] == wanted
    assert [prompt for prompt, _ in found] == [tokenizer.decode(prompt) for prompt in prompts]


def test_a_text_ends_where_the_model_ends_it(corpus):
    _, tokenizer = corpus
    model = GPT(SHAPE).initialise(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely: one in 320 ends
    generator = torch.Generator().manual_seed(0)
    found = sample_texts(model, tokenizer, [[0] * 17] * 8, 400, generator)
    assert all("<|" not in text for _, text in found)
    assert min(len(tokenizer.encode(text).ids) for _, text in found) < 300
