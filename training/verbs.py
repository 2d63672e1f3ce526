"""The verb `train` and its commands. What they do is imported when one of them runs."""

from pathlib import Path
from typing import Any

import cyclopts
from rich.table import Table

from personaxis.persona.progress import say
from personaxis.persona.verbs import console, print_json
from personaxis.training.base_verb import base
from personaxis.training.chat_tune_verb import chat
from personaxis.training.evaluate_verb import evaluate

app = cyclopts.App(name="train", help="Make a model: its tokenizer from a corpus, the base model, the chat model.")
app.command(base)
app.command(chat)
app.command(evaluate)


@app.command
def tokenizer(
    *,
    corpus: Path,
    out: Path,
    vocabulary: int = 32_768,
    held_out: Path | None = None,
    held_share: float = 0.01,
    text_column: str = "text",
    sample: int = 1_000_000_000,
    json: bool = False,
) -> None:
    """Train a byte-level BPE tokenizer on a corpus and check it on text that is held out.

    Parameters
    ----------
    corpus
        a folder or file: .txt, .jsonl, .parquet, tar archives of .txt; each plain or .gz, .xz, .zst, .bz2; or a data set
        of the hub, hub:OWNER/NAME[/FOLDER][@REVISION]
    out
        the folder to make; `AutoTokenizer.from_pretrained` reads it
    vocabulary
        how many tokens: the 256 bytes, four special tokens, and the rest learned
    held_out
        texts to check it on instead of a share of the corpus; taken out of the corpus if they are in it
    held_share
        the share of documents that are held out, by the hash of their names
    text_column
        the key or column with the text in .jsonl and .parquet
    sample
        the most bytes of text to train on, spread evenly over the corpus
    json
        print the record as JSON
    """
    from personaxis.training.hub import corpus_of
    from personaxis.training.tokenizer import make_tokenizer, require_vocabulary

    require_vocabulary(vocabulary)
    texts = corpus_of(corpus, held_out=held_out, held_share=held_share, column=text_column)
    record = make_tokenizer(texts, out, vocabulary=vocabulary, sample=sample)
    if json:
        print_json(record)
    else:
        _say_tokenizer(record, out)


def _say_tokenizer(record: dict[str, Any], out: Path) -> None:
    from personaxis.training.corpus import Amount, Scan

    scan, held = record["scan"], record["held_out"]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("corpus", _amount(scan["train"]))
    table.add_row("held out", _amount(scan["held_out"]))
    interval = held["interval"]
    known = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    exact = f"n {held['documents']:,} documents, {held['bytes'] / 1e6:,.2f} MB, each read back exactly"
    table.add_row("bytes per token", f"{held['bytes_per_token']:.2f}{known}  ({exact})")
    table.add_row("vocabulary", f"{record['asked']['vocabulary']:,}")
    table.add_row("folder", str(out))
    console().print(table)
    sides = {name: Amount(**scan[name]) for name in ("train", "held_out")}
    if notes := Scan(**{**scan, **sides}).notes():
        say(f"note: {notes}")


def _amount(side: dict[str, int]) -> str:
    return f"{side['documents']:,} documents, {side['bytes'] / 1e6:,.2f} MB"
