"""Chat tuning's batches: the template's ids, loss on what the assistant says alone, rows without cross-talk or loss of text."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from chats import conversation, turns, write_rows
from tiny_gpt import SHAPE, lively
from transformers import AutoTokenizer

from personatlas.persona.errors import UserError
from personatlas.persona.models.chat_template import chat_format
from personatlas.training.chat.conversations import Exclusions
from personatlas.training.chat.mixture import prepare_chat_data
from personatlas.training.chat.packing import ChatBatches, ChatEncoder, encode_examples, pack
from personatlas.training.data.batches import BatchSource
from personatlas.training.options import ChatDataOptions

PLAIN = [
    turns("Who are you?", "A sailor."),
    turns("Who are you?\n", " Yes, and 12,345 more...", "\n\nAnd  then?", "The storm's   end.\n", system="You are a captain. "),
    turns("It's 3 miles", "日本語 naïve 😀\t\r\n x", "so?", "done", "why"),
]  # fmt: skip


def many(encoder, count, context=64):
    """Conversations of many lengths, no two alike."""
    listed = [turns(f"{i}?", "sea " * (i % 9 + 1) + f"{i}.") for i in range(count)]
    return encode_examples([conversation(one) for one in listed], encoder, context, Exclusions())[0]


@pytest.mark.parametrize("messages", PLAIN)
def test_ids_and_marks_are_those_of_the_template(messages, chat_tokenizer, encoder):
    theirs = AutoTokenizer.from_pretrained(chat_tokenizer).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marked = encoder.encode([messages])[0]
    assert ids == theirs["input_ids"]
    assert [int(mark) for mark in marked] == theirs["assistant_masks"]


def test_a_prompt_is_what_the_model_reads_before_it_answers(chat_tokenizer, encoder):
    chat = chat_format(AutoTokenizer.from_pretrained(chat_tokenizer))
    for messages in PLAIN[:2]:
        assert encoder.prompt(messages[:-1]) == chat.prompt_ids(messages[:-1])


def test_text_that_spells_a_special_token_stays_text(encoder):
    spelt = turns("<|im_end|>", "<|im_start|>assistant\n<|im_end|> <|bos|>", system="<|pad|>")
    ids, marked = encoder.encode([spelt])[0]
    counts = Counter(ids)
    assert [counts[encoder.marks[mark]] for mark in encoder.marks] == [1, 3, 3, 0]
    answer = [id for id, mark in zip(ids, marked, strict=True) if mark]
    assert answer.pop() == encoder.marks["<|im_end|>"]
    assert encoder.tokenizer.decode(answer, skip_special_tokens=False) == spelt[-1]["content"]


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>", "<|bos|>", "<|pad|>"])
def test_text_that_spells_a_special_token_is_the_same_to_training_and_to_the_server(
    mark, chat_tokenizer, encoder
):
    chat = chat_format(AutoTokenizer.from_pretrained(chat_tokenizer))
    for messages in (turns(f"a {mark}b{mark}"), turns("Who?", f"{mark}I.", "Why?", system=f"é{mark}\n")):
        assert encoder.prompt(messages) == chat.prompt_ids(messages)


def test_an_answer_begins_after_the_prompts_own_newline(encoder):
    messages = turns("Who?", "\n\nI.")
    ids, marked = encoder.encode([messages])[0]
    prompt = encoder.prompt(messages[:1])
    assert ids[: len(prompt)] == prompt
    assert marked.index(True) == len(prompt)


def test_targets_are_what_the_assistant_says_and_its_end(encoder):
    made, _ = encode_examples([conversation(PLAIN[2])], encoder, 200, Exclusions())
    inputs, targets = made.inputs_and_targets(0)
    said = targets[targets != -100]
    text = encoder.tokenizer.decode(said.tolist(), skip_special_tokens=False)
    assert text == "日本語 naïve 😀\t\r\n x<|im_end|>done<|im_end|>"
    assert targets[-1] == encoder.marks["<|im_end|>"]
    assert len(said) == made.counted[0]
    assert len(inputs) == made.lengths[0]
    place = int(np.flatnonzero(targets == said[0])[0])
    assert inputs[: place + 1].tolist() == encoder.prompt(PLAIN[2][:1])


def test_what_is_longer_than_the_context_is_counted_and_named(encoder):
    faults = Exclusions()
    listed = [conversation(turns("Who?", "sea " * n), f"a:{n}") for n in (2, 50, 3)]
    made, kept = encode_examples(listed, encoder, 40, faults)
    assert [one.place for one in kept] == ["a:2", "a:3"]
    assert faults.lines() == ["1 longer than the context of 40 tokens (a:50)"]
    exact = int(made.lengths.max())
    assert len(encode_examples(listed, encoder, exact, Exclusions())[1]) == 2
    assert len(encode_examples(listed, encoder, exact - 1, Exclusions())[1]) == 1


def test_another_tokenizer_or_template_is_refused(chat_tokenizer, tmp_path, encoder):
    import shutil

    shutil.copytree(chat_tokenizer, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match="another chat template"):
        ChatEncoder.load(tmp_path / "other")


# Rows


def test_packing_loses_and_overfills_nothing():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    rows = pack(lengths, range(500), 100)
    assert sorted(number for row in rows for number in row) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= 100
    assert lengths.sum() / (100 * len(rows)) > 0.93


def test_a_conversation_goes_where_it_leaves_the_least_room():
    assert pack([60, 70, 30, 40, 99], range(5), 100) == [[0, 3], [1, 2], [4]]


def test_a_step_is_the_same_rows_however_it_is_cut(encoder):
    source = ChatBatches(many(encoder, 60), context=64, rows=8, pad=3, seed=1)
    assert isinstance(source, BatchSource)
    for step in (0, 3, 40):
        whole = source.rows_at(step, 0, 8)
        again = ChatBatches(many(encoder, 60), context=64, rows=8, pad=3, seed=1)
        parts = [again.rows_at(step, first, 2) for first in (6, 0, 2, 4)]
        order = [parts[1], parts[2], parts[3], parts[0]]
        for name in ("ids", "targets", "documents"):
            joined = torch.cat([getattr(part, name) for part in order])
            assert torch.equal(getattr(whole, name), joined)
            assert joined.dtype == torch.int64
        assert source.counted(step) == int((whole.targets != -100).sum())


def conversations_in(source, rows):
    """The inputs of every conversation in the first rows of a source."""
    found = []
    for row in range(rows):
        made = source.rows_at(row, 0, 1)
        for document in made.documents[0].unique():
            ids = made.ids[0][made.documents[0] == document].tolist()
            if ids[0] != source.pad:
                found.append(tuple(ids))
    return Counter(found)


def test_an_epoch_reads_every_conversation_once_and_the_next_in_another_order(encoder):
    train = many(encoder, 60)
    source = ChatBatches(train, context=64, rows=1, pad=3, seed=0)
    expected = Counter(tuple(train.inputs_and_targets(number)[0].tolist()) for number in range(60))
    assert conversations_in(source, source.rows_in(1)) == expected
    twice = conversations_in(source, source.rows_in(2))
    assert twice == expected + expected
    first, second = source.rows_at(0, 0, 1), source.rows_at(source.rows_in(1), 0, 1)
    assert not torch.equal(first.ids, second.ids)
    other = ChatBatches(train, context=64, rows=1, pad=3, seed=1)
    assert not torch.equal(other.rows_at(0, 0, 1).ids, first.ids)


def test_times_repeat_and_cut_evenly_over_epochs(encoder):
    train = many(encoder, 60)
    times = np.array([0.3] * 20 + [1.0] * 20 + [2.5] * 20)
    source = ChatBatches(train, context=64, rows=1, pad=3, seed=0, times=times)
    for epochs, within in ((1, 1), (10, 0)):
        found = conversations_in(source, source.rows_in(epochs))
        counts = np.array(
            [found[tuple(train.inputs_and_targets(number)[0].tolist())] for number in range(60)]
        )
        assert np.abs(counts - times * epochs).max() <= 1
        for part, time in ((slice(0, 20), 0.3), (slice(20, 40), 1.0), (slice(40, 60), 2.5)):
            assert abs(counts[part].sum() - 20 * time * epochs) <= within


def test_epochs_and_rows_convert_both_ways(encoder):
    source = ChatBatches(many(encoder, 60), context=64, rows=4, pad=3, seed=0)
    rows = source.rows_in(2)
    assert source.rows_in(1) < rows
    assert source.rows_in(0) == 0
    assert source.rows_in(1.5) == source.rows_in(1) + round(0.5 * (rows - source.rows_in(1)))
    assert source.epochs_in(0) == 0.0
    assert 1.9 < source.epochs_in(rows // 4) <= 2.0


def test_a_row_is_padded_with_what_does_not_count(encoder):
    train = many(encoder, 3)
    source = ChatBatches(train, context=64, rows=1, pad=3, seed=0)
    made = source.rows_at(0, 0, 1)
    last = made.documents[0] == made.documents[0, -1]
    assert (made.ids[0][last] == 3).all()
    assert (made.targets[0][last] == -100).all()
    told = source.describe()
    assert told["conversations"] == 3
    assert told["fill"] == pytest.approx(train.lengths.sum() / (64 * told["rows"]))


def test_packed_conversations_have_the_loss_that_each_has_alone(encoder):
    model = lively(replace(SHAPE, vocabulary=320))
    context = model.shape.context
    train = many(encoder, 12, context)
    source = ChatBatches(train, context=context, rows=1, pad=3, seed=0)
    rows = source.rows_at(0, 0, source.rows_in(1))
    assert rows.documents.max() > 1
    with torch.no_grad():
        together = model(rows.ids, rows.targets, documents=rows.documents)
        alone = [
            model(*(torch.from_numpy(part)[None] for part in train.inputs_and_targets(number)))
            for number in range(12)
        ]
    assert torch.allclose(together, sum(alone), rtol=1e-5)


def test_a_source_of_nothing_is_refused(encoder):
    with pytest.raises(UserError, match="no conversation is left"):
        ChatBatches(encode_examples([], encoder, 64, Exclusions())[0], context=64, rows=1, pad=3)
    with pytest.raises(ValueError, match="does not fit into a row of 10"):
        ChatBatches(many(encoder, 3), context=10, rows=1, pad=3)


def test_data_that_mostly_does_not_fit_into_the_context_is_refused(tmp_path, encoder):
    def write(n_long):
        rows = [
            {"question": f"Question {n}?", "answer": "Sea. " * (200 if n < n_long else 2)} for n in range(20)
        ]
        return write_rows(tmp_path / f"{n_long}.jsonl", rows)

    data = prepare_chat_data(ChatDataOptions((str(write(5)),)), encoder, context=64, seed=0)
    assert any("longer than the context of 64 tokens" in line for line in data.lines())
    with pytest.raises(
        UserError, match=r"1\d of 1\d conversations are longer than the base's context of 64 .*--context"
    ):
        prepare_chat_data(ChatDataOptions((str(write(15)),)), encoder, context=64, seed=0)
