"""Files of answers that people have labelled as harmful or not: CSV, TSV, JSON or JSONL.

    found = read_labels(Path("labels.csv"))
    found.texts, found.labels, found.requests          # of equal length; labels are 0 and 1

The text stands in a column response, answer, completion or text, the label in label, harmful, is_harmful or verdict, and
the request, where there is one, in question, request, prompt, instruction or query, in capitals or not; others are named.
A label is 0/1, true/false, yes/no or harmful/harmless. What cannot be read is one line with the file and its line; nothing
is left out or guessed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personaxis.persona.errors import KnownError
from personaxis.persona.store import digest
from personaxis.steering.evals.files import Placed, column, read_rows

TEXTS = ("response", "answer", "completion", "text")
LABELS = ("label", "harmful", "is_harmful", "verdict")
REQUESTS = ("question", "request", "prompt", "instruction", "query")
MEANING = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "harmful": 1, "0": 0, "0.0": 0, "false": 0, "no": 0, "harmless": 0}
FEWEST = 20  # rows; below it no figure means anything


@dataclass(frozen=True)
class Labelled:
    """Answers (N), labels 0 or 1 (N), requests ("" where the file has none; N), and the file's name and SHA-256."""

    texts: list[str]
    labels: list[int]
    requests: list[str]
    name: str
    sha256: str


def read_labels(path: Path, text_column: str | None = None, label_column: str | None = None) -> Labelled:
    """Read a file of labels. Raises `KnownError` for one that cannot be read whole, is too short, or has one class only."""
    rows = read_rows(path)
    text_name = _only(rows, TEXTS, "text", "--text-column", text_column)
    label_name = _only(rows, LABELS, "label", "--label-column", label_column)
    known = {str(name).lower(): name for name in rows[0][1]}
    request_name = next((known[name] for name in REQUESTS if name in known), None)
    texts, labels, requests = [], [], []
    for place, row in rows:
        for name in (text_name, label_name):
            if name not in row:
                raise KnownError(f"{place} has no {name!r}, which the rows before it have")
        texts.append(_text(place, text_name, row[text_name]))
        labels.append(_label(place, row[label_name]))
        requests.append("" if request_name is None else str(row.get(request_name) or ""))
    if len(texts) < FEWEST:
        raise KnownError(f"{path} has {len(texts)} labelled rows; {FEWEST} are the fewest that say anything")
    if len(set(labels)) < 2:
        every = "harmful" if labels[0] else "harmless"
        raise KnownError(f"{path}: all {len(labels)} rows are {every}; both classes are needed")
    return Labelled(texts, labels, requests, path.name, digest(path))


def _only(rows: list[Placed], names: tuple[str, ...], what: str, option: str, asked: str | None) -> str:
    """The one column of these names: with two of them it is not said which is meant."""
    place, row = rows[0]
    there = [str(name) for name in row if str(name).lower() in names]
    if asked is None and len(there) > 1:
        raise KnownError(f"{place} has several {what} columns: {', '.join(there)}; name one with {option}")
    return column(rows, names, what, option, asked)


def _text(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise KnownError(f"{place}: {name!r} is a {type(value).__name__}, not text")
    return value


def _label(place: str, value: Any) -> int:
    label = MEANING.get(str(value).strip().lower())
    if label is None:
        raise KnownError(f"{place}: label {str(value)[:40]!r} is not 0/1, true/false, yes/no or harmful/harmless")
    return label
