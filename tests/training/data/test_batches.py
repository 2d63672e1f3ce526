"""Tokens on disk and the batches drawn from them: the same after any interruption, over any number of ranks."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from corpora import write_corpus

from personatlas.persona.errors import UserError
from personatlas.training.data import token_shards as tokens_module
from personatlas.training.data.batches import CorpusBatches, held_out_rows
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.token_shards import Stream, make_tokens, open_tokens
from personatlas.training.data.tokenizer import encode, load_corpus_tokenizer, make_tokenizer, token_sizes

SMALL = 2000  # bytes of text in a shard


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with texts ("texts"), two tokenizers ("tokenizer", "other") and the texts' tokens ("tokens")."""
    folder = tmp_path_factory.mktemp("made")
    corpus = Corpus.open(write_corpus(folder / "texts"), held_share=0.2)
    for name, vocabulary in (("tokenizer", 310), ("other", 300)):
        make_tokenizer(corpus, folder / name, vocabulary=vocabulary, quiet=True)
    make_tokens(corpus, folder / "tokenizer", folder / "tokens", shard=SMALL, quiet=True)
    return folder


def corpus_in(folder):
    return Corpus.open(folder / "texts", held_share=0.2)


def stream_of(*sizes, documents=1):
    """A stream that counts up from 1, in shards, with a mark at its start."""
    ids = np.arange(sum(sizes), dtype=np.uint16)
    return Stream(tuple(np.split(ids, np.cumsum(sizes)[:-1])), 0, documents, sum(sizes))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tokens_are_every_piece_after_its_mark(made):
    tokens, corpus = open_tokens(made / "tokens"), corpus_in(made)
    tokenizer = load_corpus_tokenizer(made / "tokenizer")
    for stream, held in ((tokens.train, False), (tokens.held_out, True)):
        texts = [piece.text for piece in corpus.pieces() if corpus.holds_out(piece) == held]
        expected = [[0, *ids] for ids in encode(tokenizer, texts)]
        assert stream.read(0, len(stream)).tolist() == [id for ids in expected for id in ids]
        assert stream.starts().tolist() == np.cumsum([0, *map(len, expected[:-1])]).tolist()
        assert token_sizes(tokenizer)[stream.read(0, len(stream))].sum() == stream.bytes
        assert (stream.documents, stream.bytes) == (len(texts), sum(len(text.encode()) for text in texts))
    assert len(tokens.train.shards) > 2
    assert tokens.train.shards[0].dtype == np.uint16


def test_a_stream_reads_across_its_shards_and_not_beyond():
    stream = stream_of(5, 1, 7)
    for start in range(14):
        for stop in range(start, 14):
            assert stream.read(start, stop).tolist() == list(range(start, stop))
    assert stream.read(3, 4).dtype == np.int64
    with pytest.raises(ValueError, match="of a stream of 13"):
        stream.read(0, 14)


def test_an_interrupted_run_goes_on_and_gives_the_same_files(made, tmp_path, monkeypatch):
    calls = []

    def stop_at_the_third(tokenizer, texts):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(tokenizer, texts)

    monkeypatch.setattr(tokens_module, "encode", stop_at_the_third)
    arguments = (corpus_in(made), made / "tokenizer", tmp_path / "tokens")
    with pytest.raises(KeyboardInterrupt):
        make_tokens(*arguments, shard=SMALL, quiet=True)
    with pytest.raises(UserError, match="no finished tokens"):
        open_tokens(tmp_path / "tokens")
    (tmp_path / "tokens" / "train-00000.npy").write_bytes(b"half")  # as if the disk had lost it
    make_tokens(*arguments, shard=SMALL, quiet=True)
    assert contents(tmp_path / "tokens") == contents(made / "tokens")
    whole = sum(
        len(record)
        for record in json.loads((tmp_path / "tokens" / "tokens.json").read_text()).values()
        if isinstance(record, list)
    )
    assert len(calls) == 3 + whole - 1  # only the lost one was made again


def test_finished_tokens_are_not_made_again(made, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in (made / "tokens").iterdir()}
    monkeypatch.setattr(tokens_module, "encode", None)
    make_tokens(corpus_in(made), made / "tokenizer", made / "tokens", shard=SMALL, quiet=True)
    assert {
        path.name: path.stat().st_mtime_ns for path in (made / "tokens").iterdir() if path.suffix == ".npy"
    }.items() <= before.items()


def test_tokens_of_another_tokenizer_or_corpus_are_found_out(made, tmp_path):
    with pytest.raises(UserError, match="tokens of another tokenizer; choose another folder"):
        make_tokens(corpus_in(made), made / "other", made / "tokens", shard=SMALL, quiet=True)
    with pytest.raises(UserError, match="another tokenizer than"):
        open_tokens(made / "tokens", made / "other")
    path = made / "texts" / "3.txt"
    before = path.read_text()
    path.write_text(before + "One more line.\n")
    with pytest.raises(UserError, match="another corpus, or files of it have changed"):
        make_tokens(corpus_in(made), made / "tokenizer", made / "tokens", shard=SMALL, quiet=True)
    path.write_text(before)
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UserError, match="is there and holds no tokens"):
        make_tokens(corpus_in(made), made / "tokenizer", tmp_path, shard=SMALL, quiet=True)


def test_damaged_shards_are_found_out(made, tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    for name, content in contents(made / "tokens").items():
        (folder / name).write_bytes(content)
    shard = folder / "train-00001.npy"
    whole = bytearray(shard.read_bytes())
    whole[-1] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(UserError, match=r"train-00001\.npy is damaged or was changed; remove"):
        open_tokens(folder)
    shard.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"train-00001\.npy cannot be read"):
        open_tokens(folder)
    np.save(shard, np.arange(3))
    with pytest.raises(UserError, match=r"not as tokens\.json says"):
        open_tokens(folder)


@pytest.mark.parametrize(("size", "context"), [(101, 10), (100, 10), (11, 10), (40, 39), (64, 1)])
def test_an_epoch_makes_every_token_a_target_once_but_for_less_than_a_row(size, context):
    batches = CorpusBatches(stream_of(size), context, rows=1, seed=3)
    for epoch in range(3):
        rows = [batches.window(epoch * batches.windows + i) for i in range(batches.windows)]
        targets = Counter(torch.cat([row[1:] for row in rows]).tolist())
        assert set(targets.values()) == {1}
        assert size - len(targets) == size % context
        for row in rows:
            assert [(int(a) + 1) % size for a in row[:-1]] == row[1:].tolist()  # a ring


def test_epochs_differ_and_seeds_differ_and_steps_are_repeatable():
    stream = stream_of(40, 60)

    def rows(seed, epoch):
        batches = CorpusBatches(stream, 5, 1, seed)
        return [batches.window(epoch * 20 + i).tolist() for i in range(20)]

    assert rows(0, 0) == rows(0, 0)
    assert len({str(rows(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_a_step_has_the_same_rows_over_any_number_of_ranks_and_micro_batches(world):
    batches = CorpusBatches(stream_of(50, 51), context=7, rows=6)
    for step in (0, 1, 5):
        whole = batches.rows_at(step, 0, 6)
        assert whole.ids.shape == whole.targets.shape == (6, 7)
        assert whole.ids.dtype == torch.int64
        assert torch.equal(whole.ids[:, 1:], whole.targets[:, :-1])
        share = 6 // world
        parts = [batches.rows_at(step, rank * share, share) for rank in range(world)]
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert batches.counted(step) == 42


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="has 10 tokens, fewer than one row of 11"):
        CorpusBatches(stream_of(10), context=10, rows=1)
    with pytest.raises(ValueError, match="must be 1 or more"):
        CorpusBatches(stream_of(100), context=0, rows=6)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 10, 11, 12, 57])
def test_every_held_out_token_but_the_first_counts_once_over_all_ranks(size, world):
    stream = stream_of(size)
    batches = [list(held_out_rows(stream, 5, 2, rank, world)) for rank in range(world)]
    assert len({len(found) for found in batches}) == 1
    counted = [t for found in batches for ids, counts in found for t in ids[:, 1:][counts].tolist()]
    assert sorted(counted) == list(range(1, size))
    assert all(ids.shape == (2, 6) and counts.shape == (2, 5) for found in batches for ids, counts in found)


def test_a_part_of_a_held_out_text_is_spread_over_all_of_it():
    stream = stream_of(100)
    rows = [
        (ids[row], counts[row]) for ids, counts in held_out_rows(stream, 10, 2, every=3) for row in range(2)
    ]
    assert [int(ids[0]) for ids, counts in rows if counts.any()] == [
        int(stream.read(i, i + 1)[0]) for i in (0, 30, 60, 90)
    ]
    with pytest.raises(ValueError, match="every 0"):
        next(iter(held_out_rows(stream, 10, 2, every=0)))
