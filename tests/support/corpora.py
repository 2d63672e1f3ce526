"""Small corpora made here, and tables of texts, for the tests of training."""

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


def write_parquet(path, texts, column="text"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({column: texts, "n": list(range(len(texts)))}), path)
