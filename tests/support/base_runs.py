"""Small runs of pretraining on texts made here, for the tests of what training does and how it resumes."""

import os

import pytest
import torch

from personatlas.training.chat import samples as reply_samples
from personatlas.training.loop import samples
from personatlas.training.loop.run_log import read_metrics
from personatlas.training.options import CorpusOptions, PretrainOptions
from personatlas.training.pretrain import train_base


@pytest.fixture(scope="session", autouse=True)
def short_samples():
    """Samples of few tokens: they are more than half of the time that so small a run takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "LENGTH", 4)
        patch.setattr(reply_samples, "LENGTH", 4)
        yield


WORDS = "the old clock in the hall struck seven and nobody in the house was awake to hear it but the cat"
STEPS = 39  # of a run of 20,000 tokens


def book(number, words=400):
    generator = torch.Generator().manual_seed(number)
    known = WORDS.split()
    drawn = torch.randint(len(known), (words,), generator=generator)
    return " ".join(known[i] for i in drawn.tolist())


def train(books, out, *, like=None, texts=None, depth=1, **options):
    """A run on books; `like` is the folder of a run whose tokenizer and tokens are taken."""
    if like is not None:
        texts = {"tokenizer": like / "tokenizer", "token_folder": like / "tokens", **(texts or {})}
    known = {"corpus": books, "held_share": 0.1, "vocabulary": 300, **(texts or {})}
    if "tokenizer" in known:
        known["vocabulary"] = None
    length = {} if "minutes" in options else {"tokens": 20_000}
    chosen = PretrainOptions(**{"context": 64, "batch": 512, "device": "cpu", **length, **options})
    return train_base(CorpusOptions(**known), depth=depth, out=out, options=chosen)


def losses(folder):
    """Loss and norm of the gradient by step."""
    rows = (row for row in read_metrics(folder) if row["kind"] == "step")
    return {row["step"]: (row["loss"], row["gradient_norm"]) for row in rows}


def command(like, out, tokens=20_000):
    """`train base` of a run with another one's tokens, as arguments."""
    texts = ["--token-folder", str(like / "tokens"), "--tokenizer", str(like / "tokenizer")]
    options = {"--depth": 1, "--context": 64, "--batch": 512, "--tokens": tokens, "--device": "cpu"}
    return [
        "train",
        "base",
        *(str(part) for pair in options.items() for part in pair),
        *texts,
        "--out",
        str(out),
    ]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}
