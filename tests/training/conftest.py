"""What several files' tests of training need."""

import pytest
from base_runs import book, short_samples, train  # noqa: F401 (a fixture)
from corpora import write_corpus

from personatlas.training.chat.packing import ChatEncoder
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def books(tmp_path_factory):
    """A folder with forty short texts."""
    folder = tmp_path_factory.mktemp("books")
    for number in range(40):
        (folder / f"{number}.txt").write_text(book(number))
    return folder


@pytest.fixture(scope="session")
def base_result(books, tmp_path_factory):
    """The result of a finished run on the books."""
    return train(books, tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="session")
def base_run(base_result):
    """Its folder, which tests leave as it is but for events in its log."""
    return base_result.folder


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory):
    """The folder of a tokenizer trained here."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = Corpus.open(write_corpus(folder / "texts"), held_share=0.2)
    make_tokenizer(corpus, folder / "tokenizer", vocabulary=310, quiet=True)
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def encoder(chat_tokenizer):
    return ChatEncoder.load(chat_tokenizer)
