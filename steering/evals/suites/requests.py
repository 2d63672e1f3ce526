"""Requests to put to a model, from a user's file, in the forms that the field's sets have.

    asks = read_requests(Path("harmbench_behaviors_text_test.csv"))
    asks[0].id, asks[0].text, asks[0].category

Known are HarmBench (Behavior, BehaviorID, SemanticCategory, ContextString), AdvBench (goal), JailbreakBench (Goal; its Behavior is a
title), StrongREJECT (forbidden_prompt), XSTest (prompt, type, label safe or unsafe), and any CSV, JSON or JSONL with a column
named prompt, request, instruction, question or text. Nothing of such a file is shipped here.
"""

from dataclasses import dataclass
from pathlib import Path

from personatlas.persona.errors import UserError
from personatlas.persona.formats import Row, find_column, read_table

# in this order: JailbreakBench has both Goal and Behavior, and only the first is a request
TEXT = ("forbidden_prompt", "goal", "behavior", "prompt", "request", "instruction", "question", "text")
IDS = ("behaviorid", "id", "index", "key", "question_id")
CATEGORIES = ("semanticcategory", "functionalcategory", "category", "type")
HOLE = ("[INSERT PROMPT HERE]", "{request}", "{prompt}", "[PROMPT]")


@dataclass(frozen=True)
class Ask:
    """One request. `label` is "safe" or "unsafe" where the file says so, else ""."""

    id: str
    text: str
    category: str
    label: str


def read_requests(path: Path, text_column: str | None = None) -> list[Ask]:
    """The file's requests in its order. A text that stands there twice is kept once.

    Raises `UserError` for a missing column, an id that stands for two texts, an empty request, or an unknown label.
    """
    rows = read_table(path)
    text_name = find_column(rows, TEXT, "request", "--column", text_column)
    names = {str(name).strip().lower(): str(name) for name in rows[0][1]}
    id_name = next((names[name] for name in IDS if name in names), None)
    places: dict[str, str] = {}
    found: dict[str, Ask] = {}
    for number, (place, row) in enumerate(rows):
        text = _text(row, text_name, names.get("contextstring"), place)
        name = str(row.get(id_name) or "").strip() if id_name else ""
        name = (name or f"{path.stem}-{number}").replace("/", "_")
        if name in places:
            raise UserError(f"{place} has the id {name!r} of {places[name]}: ids must differ")
        places[name] = place
        found.setdefault(text, Ask(name, text, _category(row, names), _label(row, names, place)))
    return list(found.values())


def read_templates(path: Path) -> list[str]:
    """Jailbreak templates, each with a hole for the request (`[INSERT PROMPT HERE]`, `{request}`). Raises `UserError` for one without."""
    rows = read_table(path)
    name = find_column(rows, ("text", "template", "prompt"), "template")
    templates = [(place, str(row.get(name) or "")) for place, row in rows]
    for place, template in templates:
        if not any(hole in template for hole in HOLE):
            raise UserError(f"{place} has no hole for the request: write {' or '.join(HOLE[:2])}")
    return [template for _, template in templates]


def filled(template: str, request: str) -> str:
    """The template with the request in its holes."""
    for hole in HOLE:
        template = template.replace(hole, request)
    return template


def _text(row: Row, name: str, context_name: str | None, place: str) -> str:
    text = row.get(name)
    if isinstance(text, list):  # turns, of which the first is asked
        text = text[0] if text else ""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place} has no request in its column {name!r}")
    context = str(row.get(context_name) or "").strip() if context_name else ""
    return f"{context}\n\n---\n\n{text.strip()}" if context else text.strip()


def _category(row: Row, names: dict[str, str]) -> str:
    for name in CATEGORIES:
        value = str(row.get(names[name]) or "").strip() if name in names else ""
        if value:
            return value
    return ""


def _label(row: Row, names: dict[str, str], place: str) -> str:
    value = str(row.get(names["label"], "")).strip().lower() if "label" in names else ""
    if value not in ("", "safe", "unsafe"):
        raise UserError(f"{place} has the label {value!r}; safe and unsafe are known")
    return value
