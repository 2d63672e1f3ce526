"""Tokenizers of one's own: exact, known to everything else here, and refused where they do not fit."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import regex
from corpora import CHAT, write_corpus
from tokenizers import decoders

from personatlas.cli.app import main
from personatlas.persona.errors import UserError
from personatlas.persona.models.chat_template import chat_format
from personatlas.persona.models.token_spans import conversation_spans
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.documents import Piece
from personatlas.training.data.tokenizer import (
    BOS,
    END,
    PATTERN,
    SPECIAL,
    compression,
    encode,
    load_corpus_tokenizer,
    make_tokenizer,
    short_words,
    token_sizes,
    train_tokenizer,
)

VOCABULARY = 310
STRANGE = "don't DON'T we’ll naïve Ünïcödé 日本語 😀👩‍👧 \t\r\n\n  x  12345 -- <|im_end|> <|bos|> \u0301a \x7f\u2028 ..."


def document(piece):
    return piece.document


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with texts ("texts") and a tokenizer made of them ("tokenizer")."""
    folder = tmp_path_factory.mktemp("made")
    corpus = Corpus.open(write_corpus(folder / "texts"), held_share=0.2)
    make_tokenizer(corpus, folder / "tokenizer", vocabulary=VOCABULARY, quiet=True)
    return folder


@pytest.fixture(scope="module")
def auto(made):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made / "tokenizer")


def test_any_text_comes_back_exactly(made, auto):
    tokenizer = load_corpus_tokenizer(made / "tokenizer")
    for text in (STRANGE, "", " ", "\n", "a" * 3000, "".join(map(chr, range(0x20, 0x3000)))):
        (ids,) = encode(tokenizer, [text])
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert not set(ids) & set(range(len(SPECIAL)))  # markup in a text is text
    plain = STRANGE.replace(END, "").replace(BOS, "")
    assert auto(plain, add_special_tokens=False)["input_ids"] == encode(tokenizer, [plain])[0]
    assert auto.decode(auto(plain)["input_ids"]) == BOS + plain


def test_the_special_tokens_come_first_and_every_byte_is_there(made, auto):
    tokenizer = load_corpus_tokenizer(made / "tokenizer")
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() == len(auto) == VOCABULARY
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == (BOS, END, "<|pad|>")
    assert json.loads(tokenizer.to_str())["model"]["ignore_merges"]
    sizes = token_sizes(tokenizer)
    assert sizes[:4].tolist() == [0, 0, 0, 0]
    assert (sizes == 1).sum() == 256
    assert sizes[encode(tokenizer, [STRANGE])[0]].sum() == len(STRANGE.encode())


def test_the_pattern_parts_text_without_losing_any_and_as_it_is_meant_to():
    parted = regex.compile(PATTERN)
    assert "".join(parted.findall(STRANGE)) == STRANGE
    assert parted.findall("He'll say: it's  12345 \n\n ok-ay!!\n") == [
        *("He", "'ll", " say", ":", " it", "'s", " ", " ", "123", "45", " \n\n", " ok", "-ay", "!!\n")
    ]


def test_the_chat_template_is_native_adds_nothing_and_ends_with_its_mark(auto):
    format = chat_format(auto)
    assert (format.system, format.injected, format.prompt_is_prefix) == ("native", None, True)
    assert format.end_ids == {auto.convert_tokens_to_ids(END)}
    ids = format.prompt_ids(CHAT[:2])
    assert ids.count(0) == 1
    assert ids[0] == 0
    assert (
        format.prompt_text(CHAT[1:2])
        == "<|bos|><|im_start|>user\nWho are you?\n<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(UserError, match="the roles are system, user and assistant, not tool"):
        format.render([{"role": "tool", "content": "x"}], generation=False)


def test_spans_find_every_speaker_and_the_marked_tokens_are_the_assistants(auto):
    chat = [message | {"content": message["content"].replace(END, "")} for message in CHAT]
    spans = conversation_spans(chat_format(auto), chat)
    assert [span.speaker for span in spans.spans] == [message["role"] for message in chat]
    marked = auto.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert marked["input_ids"] == list(spans.ids)
    learned = set(np.flatnonzero(marked["assistant_masks"]).tolist())
    answers = [span for span in spans.spans if span.speaker == "assistant"]
    assert learned == {
        i for span in answers for i in range(span.start, span.stop + 1)
    }  # with the end of turn
    assert {spans.ids[span.stop] for span in answers} == {auto.convert_tokens_to_ids(END)}


def test_a_checkpoint_of_qwen3_keeps_this_tokenizer(made, auto, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(made / "tokenizer", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "vocab_size": VOCABULARY})
    )
    beside = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert beside(STRANGE)["input_ids"] == auto(STRANGE)["input_ids"]
    assert beside.get_chat_template() == auto.get_chat_template()


def test_the_same_texts_give_the_same_tokenizer(made, tmp_path):
    corpus = Corpus.open(made / "texts", held_share=0.2)
    again = make_tokenizer(corpus, tmp_path / "again", vocabulary=VOCABULARY, quiet=True)
    assert again == json.loads((made / "tokenizer" / "training.json").read_text())
    before = (made / "tokenizer" / "tokenizer.json").read_bytes()
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == before


def test_compression_is_bytes_over_tokens_with_its_interval(made):
    tokenizer = load_corpus_tokenizer(made / "tokenizer")
    pieces = [Piece("a", 0, "The sailor. "), Piece("a", 1, "é"), Piece("b", 0, "The storm saw the captain.")]
    found = compression(tokenizer, pieces, document)
    tokens = sum(len(ids) for ids in encode(tokenizer, [piece.text for piece in pieces]))
    assert (found.documents, found.bytes, found.tokens) == (2, 40, tokens)
    assert found.bytes_per_token == pytest.approx(40 / tokens, abs=1e-4)
    low, high = found.interval
    assert low < found.bytes_per_token < high
    assert compression(tokenizer, pieces[:1], document).interval is None
    assert compression(tokenizer, pieces, document, most=1).documents == 2  # batches are not cut


def test_a_tokenizer_that_loses_text_is_refused(made):
    tokenizer = load_corpus_tokenizer(made / "tokenizer")
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    with pytest.raises(
        UserError, match=r"does not give back x\.txt \(piece 3\): at character 0 ' the' became 'the'"
    ):
        compression(tokenizer, [Piece("x.txt", 3, " the")], document)


def test_too_little_text_for_a_vocabulary_says_how_much_it_is_enough_for():
    with pytest.raises(
        UserError, match=r"for (\d+) tokens only, not for 5000; give --vocabulary \d+ or more text"
    ):
        train_tokenizer(["the sailor saw the sailor"] * 3, 5000)


def test_text_without_blanks_is_cut_for_the_trainer_and_other_text_is_not():
    """The trainer took 20 s for one megabyte of letters: its time grows with the square of a word's length."""
    words, letters, left_out = "some words\n" * 300, "acgt" * 500, Counter()
    assert list(short_words([words, letters, ""], left_out)) == [
        words,
        *([letters[:256]] * 7),
        letters[1792:],
        "",
    ]
    parted = list(short_words([words + letters + words], left_out))
    assert "".join(parted) == words + letters + words
    assert max(len(word) for part in parted for word in part.split()) < 512
    assert not left_out
    some = list(short_words([words, letters, words], left_out, most=600))
    assert some == [words, letters[:256], letters[256:512], "", "", "", "", "", letters[1792:], words]
    assert left_out == {"characters": 5 * 256}


def test_the_verb_makes_a_tokenizer_once_and_refuses_what_does_not_fit(made, tmp_path, capsys):
    out = tmp_path / "out"
    asked = ["train", "tokenizer", "--corpus", str(made / "texts"), "--held-share", "0.2", "--out", str(out)]
    main([*asked, "--vocabulary", "300", "--json"])
    first = json.loads(capsys.readouterr().out)
    assert first["held_out"]["documents"] == first["scan"]["held_out"]["documents"] > 0
    made_at = (out / "tokenizer.json").stat().st_mtime_ns
    main([*asked, "--vocabulary", "300"])
    assert "each read back exactly" in " ".join(capsys.readouterr().out.split())
    assert (out / "tokenizer.json").stat().st_mtime_ns == made_at
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def refused(*changed):
        with pytest.raises(SystemExit) as stopped:
            main([*asked, *changed])
        assert stopped.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    assert "has a tokenizer of another vocabulary" in refused("--vocabulary", "301")
    assert "--vocabulary 260 is not in 261..1048576" in refused("--vocabulary", "260")
    assert "is not in 261..1048576" in refused("--vocabulary", "2000000")
    assert "--sample 0" in refused("--vocabulary", "300", "--sample", "0")
    (out / "tokenizer.json").write_text("{}")
    assert "damaged or replaced" in refused("--vocabulary", "300")
    (out / "training.json").unlink()
    assert "was not made here" in refused("--vocabulary", "300")


def test_a_folder_that_holds_no_tokenizer_of_ours_is_named(made, tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json; make it"):
        load_corpus_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_corpus_tokenizer(tmp_path)
    text = (made / "tokenizer" / "tokenizer.json").read_text().replace(BOS, "<|first|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"has no token <\|bos\|>"):
        load_corpus_tokenizer(tmp_path)
    content = json.loads((made / "tokenizer" / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] += 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has no token with id \d+, but ids up to"):
        load_corpus_tokenizer(tmp_path)
