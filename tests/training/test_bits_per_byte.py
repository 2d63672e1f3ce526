"""Bits per byte of texts under any model."""

import math

import pytest
import torch
from test_export import exported  # noqa: F401

from personatlas.cli.app import main
from personatlas.persona.errors import UserError
from personatlas.persona.models.load import load_model
from personatlas.training.bits_per_byte import text_bits_per_byte

TEXTS = [
    "the old clock struck seven",
    "and the cat, of course, heard it; nobody else was awake to hear a thing",
    "é",
]


@pytest.fixture(scope="module")
def model(exported):
    return load_model(str(exported[1] / "model"), device="cpu", dtype="float32")


def plain_nats(model, text, window):
    """Token by token, each with what its window shows it."""
    ids, nats = (
        [model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]],
        0.0,
    )
    for place in range(1, len(ids)):
        start = (place - 1) // (window - 1) * (window - 1)
        logits = model.hf(torch.tensor([ids[start:place]])).logits[0, -1]
        nats -= logits.double().log_softmax(-1)[ids[place]].item()
    return nats, len(ids) - 1


@pytest.mark.parametrize("window", [8, 64])
def test_bits_per_byte_are_those_of_predicting_token_by_token(model, window):
    fit = text_bits_per_byte(model, TEXTS, window)
    nats, counts = zip(*(plain_nats(model, text, window) for text in TEXTS), strict=True)
    size = sum(len(text.encode()) for text in TEXTS)
    assert fit.bits_per_byte == pytest.approx(sum(nats) / size / math.log(2), rel=1e-5)
    assert (fit.tokens, fit.bytes, fit.documents) == (sum(counts), size, 3)
    assert fit.interval[0] < fit.bits_per_byte < fit.interval[1]


def test_one_document_has_no_interval_and_nothing_is_refused(model):
    assert text_bits_per_byte(model, TEXTS[:1]).interval is None
    with pytest.raises(UserError, match="no text to predict"):
        text_bits_per_byte(model, [""])
    with pytest.raises(UserError, match="--context 1"):
        text_bits_per_byte(model, TEXTS, 1)


def test_the_verb_reads_a_folder_and_says_what_it_read(exported, tmp_path, capsys):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    main(
        [
            "train",
            "eval",
            str(exported[1] / "model"),
            "--text",
            str(tmp_path),
            "--device",
            "cpu",
            "--most",
            "50",
        ]
    )
    said = capsys.readouterr()
    assert "bits per byte" in said.out
    assert "of 3 documents are read (--most 50 bytes)" in said.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "nowhere"], "--text nowhere does not exist"),
        (["--text", "EMPTY"], "has nothing"),
        (["--text", "BLANK"], "has no text"),
        (["--text", "BLANK", "--most", "0"], "--most 0"),
    ],
)
def test_what_cannot_be_read_is_one_line(exported, tmp_path, capsys, options, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    names = {"EMPTY": str(tmp_path / "empty"), "BLANK": str(tmp_path / "blank.txt")}
    with pytest.raises(SystemExit) as ended:
        main(["train", "eval", str(exported[1] / "model"), *(names.get(one, one) for one in options)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
