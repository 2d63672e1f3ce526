"""Small corpora made here, and tables of texts, for the tests of training."""

import random

import pytest

CHAT = [
    {"role": "system", "content": "You are a sailor."},
    {"role": "user", "content": "Who are you?\n"},
    {"role": "assistant", "content": "A sailor <|im_end|> of the sea."},
    {"role": "user", "content": "\nAnd 2 more?"},
    {"role": "assistant", "content": " Yes."},
]


def write_corpus(folder):
    """Thirty small documents."""
    folder.mkdir()
    nouns = ["sailor", "harbour", "lighthouse", "storm", "captain", "island"]
    for number in range(30):
        lines = [
            f"The {nouns[(number + i) % 6]} saw the {nouns[(number * i) % 6]}, and it's {i} miles away.\n"
            for i in range(8 + number % 5)
        ]
        (folder / f"{number}.txt").write_text("".join(lines))
    return folder


def write_book(path, size, *, seed):
    """A text of about `size` bytes in paragraphs of several lines, none of which stands in it twice."""
    generator = random.Random(seed)
    words = [
        "the",
        "old",
        "harbour",
        "lay",
        "grey",
        "and",
        "still",
        "while",
        "we",
        "went",
        "down",
        "to",
        "see",
        "if",
        "any",
        "ship",
        "had",
        "come",
        "in",
    ]
    paragraphs, length = [], 0
    while length < size:
        lines = [" ".join(generator.choices(words, k=10)) for _ in range(generator.randint(2, 5))]
        paragraphs.append("\n".join(lines) + ".\n\n")
        length += len(paragraphs[-1])
    path.write_text("".join(paragraphs))
    return path


def write_parquet(path, texts, column="text"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({column: texts, "n": list(range(len(texts)))}), path)
