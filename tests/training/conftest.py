"""What several files' tests of training need."""

import pytest
from test_tokenizer import write_corpus

from personatlas.training.chat.packing import ChatEncoder
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.tokenizer import make_tokenizer


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
