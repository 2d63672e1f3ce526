"""Results on stdout: lines, tables, JSON. Progress and notes go to stderr (`persona.progress`).

A table never cuts a cell: columns that do not fit into the terminal follow in another block below, and
through a pipe a table is as wide as it needs.
"""

import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

GAP = 2  # blanks between columns
NARROWEST = 20  # columns of text that wraps
PIPE = 100_000  # columns: nothing wraps where another program reads

Cell = str | Text


def console() -> Console:
    """Standard output, as wide as the terminal; through a pipe as wide as the text unless COLUMNS is set."""
    is_pipe = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPE if is_pipe else None, soft_wrap=False)


def print_line(text: Cell, *, style: str = "") -> None:
    """Prints text without markup, wrapped at words in a terminal."""
    out = console()
    for line in (Text(text, style=style) if isinstance(text, str) else text).wrap(out, out.width):
        line.rstrip()
        out.print(line, soft_wrap=True)


def print_path(name: str, path: Path | str) -> None:
    """Prints where something lies in one unwrapped line, to click or copy."""
    console().print(Text(f"{name}: {path}"), soft_wrap=True)


def print_warning(text: str) -> None:
    """Prints a remark on a result."""
    print_line(f"note: {text}", style="yellow")


def print_json(content: object) -> None:
    """Prints a result for machines."""
    print(json.dumps(content, indent=1, ensure_ascii=False))  # noqa: T201 (a command's result)


def print_fields(rows: Sequence[tuple[str, Cell]]) -> None:
    """Prints names and values, the values aligned and wrapped at words."""
    print_table(("", ""), rows, left=(0, 1))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, title: str = "", left: Collection[int] = (0,)
) -> None:
    """Prints a table. Where the columns do not fit beside each other, blocks below repeat the first one.

    Parameters
    ----------
    columns
        the column titles; there is no header where all are empty
    rows
        a cell for every column
    title
        a line above the table
    left
        the columns aligned to the left; the others are numbers. A last column of text wraps at words
    """
    out = console()
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    widths = [
        max([cell_len(name), *(row[index].cell_len for row in cells)]) for index, name in enumerate(columns)
    ]
    last = len(columns) - 1
    if last in left and last:
        room = out.width - sum(widths[:last]) - GAP * last
        room = room if room >= NARROWEST else out.width - widths[0] - GAP  # a block of its own
        widths[last] = min(widths[last], max(room, NARROWEST))
    if title:
        print_line(title, style="bold")
    for number, block in enumerate(_blocks(widths, out.width)):
        if number:
            out.print()
        header = [[Text(name, style="dim") for name in columns]] if any(columns) else []
        for row in [*header, *cells]:
            lines = [row[index].wrap(out, widths[index]) for index in block]
            for line in range(max(map(len, lines))):
                parts = [wrapped[line] if line < len(wrapped) else Text() for wrapped in lines]
                text = Text(" " * GAP).join(
                    _padded(part, widths[index], index in left)
                    for part, index in zip(parts, block, strict=True)
                )
                text.rstrip()
                out.print(text, soft_wrap=True)
    out.print()


def _blocks(widths: Sequence[int], width: int) -> Iterator[list[int]]:
    """Column indices that fit beside each other, each block with the first column."""
    block, used = [0], widths[0]
    for index in range(1, len(widths)):
        if used + GAP + widths[index] > width and len(block) > 1:
            yield block
            block, used = [0], widths[0]
        block.append(index)
        used += GAP + widths[index]
    yield block


def _padded(cell: Text, width: int, left: bool) -> Text:
    blank = " " * (width - cell.cell_len)
    return cell + blank if left else Text(blank) + cell


def with_interval(value: float | None, low: float | None, high: float | None, form: str = ".2f") -> str:
    """Formats a value with its interval, where it has one: `0.61 [0.50, 0.70]`; `-` for no value, no -0.0."""
    if value is None:
        return "-"
    form = f"{form[: form.startswith('+')]}z{form.removeprefix('+')}"
    return f"{value:{form}}" + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")


def count_of(n: int, noun: str) -> str:
    """Formats a number of things: `1 case`, `2,000 cases`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
