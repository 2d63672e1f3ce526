"""The verb `train evaluate`: bits per byte of texts under any model."""

from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from personaxis.persona.errors import KnownError
from personaxis.persona.options import ModelOptions
from personaxis.persona.progress import say
from personaxis.persona.verbs import Model, console, print_json


def evaluate(
    model: Model,
    /,
    *,
    text: Path,
    text_column: str = "text",
    most: int = 4_000_000,
    context: int | None = None,
    how: ModelOptions = ModelOptions(),
    json: bool = False,
) -> None:
    """Bits per byte of a text under any model, so that models with different tokenizers can be compared.

    Parameters
    ----------
    text
        a folder or file, as a corpus; documents are cut at 65,536 characters
    text_column
        the key or column with the text in .jsonl and .parquet
    most
        bytes to read, whole documents spread over all of them
    context
        tokens that the model sees at once; its own context, at most 2,048, unless given
    json
        print the result as JSON
    """
    from personaxis.persona.subject import load_subject
    from personaxis.training.hub import located
    from personaxis.training.texts_fit import fit_of_texts

    if most < 1:
        raise KnownError(f"--most {most}: give how many bytes to read, 1 or more")
    texts = _texts(located(text, "--text"), text_column, most)
    subject = load_subject(model, device=how.device, dtype=how.dtype, chat_template=how.chat_template)
    fit = fit_of_texts(subject, texts, context)
    if json:
        print_json({"model": subject.describe(), "text": str(text), **asdict(fit)})
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    known = f" [{fit.interval[0]:.4f}, {fit.interval[1]:.4f}]" if fit.interval else ""
    table.add_row("bits per byte", f"{fit.bits_per_byte:.4f}{known}")
    table.add_row("nats a token", f"{fit.loss:.4f}, {fit.bytes / fit.tokens:.2f} bytes a token")
    table.add_row("read", f"{fit.documents:,} documents, {fit.bytes / 1e6:,.2f} MB, {fit.tokens:,} tokens")
    console().print(table)


def _texts(path: Path, column: str, most: int) -> list[str]:
    """Documents, or pieces of long ones, evenly taken where there are more bytes than wanted."""
    from personaxis.training.corpus import PIECE, sources_of
    from personaxis.training.documents import read_pieces

    found = [
        piece.text
        for source in sources_of(path, "--text")
        for piece in read_pieces(source, column=column, size=PIECE)
        if piece.text.strip() and "\0" not in piece.text
    ]
    if not found:
        raise KnownError(f"--text {path} has no text")
    size = sum(len(text.encode()) for text in found)
    kept = found[:: max(1, round(size / most))]
    if len(kept) < len(found):
        say(f"{len(kept):,} of {len(found):,} documents are read (--most {most:,} bytes)")
    return kept
