"""Requests to put to a model, from a user's file, in the forms that the field's sets have.

    requests = read_requests(Path("harmbench_behaviors_text_test.csv"))
    requests[0].id, requests[0].text, requests[0].category

Known are HarmBench (Behavior, BehaviorID, SemanticCategory, FunctionalCategory, ContextString), AdvBench
(goal), JailbreakBench (Goal; its Behavior is a title), StrongREJECT (forbidden_prompt), XSTest (prompt, type,
label safe or unsafe), and any CSV, JSON, JSONL or Parquet with a column prompt, request, instruction,
question or text; of stored conversations it is the user's first message. Nothing of such a file is shipped
here.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from personatlas.persona.errors import UserError
from personatlas.persona.formats import find_column, read_conversations, read_table

# in this order: JailbreakBench has both Goal and Behavior, and only the first is a request
TEXT = ("forbidden_prompt", "goal", "behavior", "prompt", "request", "instruction", "question", "text")
IDS = ("behaviorid", "id", "index", "key", "question_id")
CATEGORIES = ("semanticcategory", "functionalcategory", "category", "type")
PLACEHOLDERS = ("[INSERT PROMPT HERE]", "{request}", "{prompt}", "[PROMPT]")
LABELS = ("", "safe", "unsafe")


@dataclass(frozen=True)
class FileRequest:
    """One request. `label` is "safe" or "unsafe" where the file says so, else "". `kind` is HarmBench's: a
    "standard" request, one with a "contextual" text before it, or one about "copyright"; "" in other files.
    """

    id: str
    text: str
    category: str
    label: str
    kind: str = ""


def read_requests(path: Path, text_column: str | None = None) -> list[FileRequest]:
    """The file's requests in its order. A text that stands there twice is kept once.

    Raises `UserError` for a missing column, an id that stands for two texts, an empty request, or an unknown
    label.
    """
    rows = read_table(path)
    if text_column is None and not {str(name).lower() for name in rows[0][1]} & {*TEXT}:
        with contextlib.suppress(UserError):  # no conversations either: the column is missed
            chats, first = read_conversations(path), dict[str, FileRequest]()
            for chat, messages, domain in chats:
                question = next(own["content"] for own in messages if own["role"] == "user").strip()
                first.setdefault(question, FileRequest(chat, question, domain, ""))
            return list(first.values())
    text_name = find_column(rows, TEXT, "request", "--column", text_column)
    names = {str(name).strip().lower(): str(name) for name in rows[0][1]}
    positions: dict[str, str] = {}
    requests: dict[str, FileRequest] = {}
    for number, (position, row) in enumerate(rows):
        cells = {key: str(row.get(name) or "").strip() for key, name in names.items()}
        text = row.get(text_name)
        if isinstance(text, list):  # turns, of which the first is asked
            text = text[0] if text else ""
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{position} has no request in its column {text_name!r}")
        if context := cells.get("contextstring"):
            text = f"{context}\n\n---\n\n{text.strip()}"
        id = next((cells[name] for name in IDS if name in names), "") or f"{path.stem}-{number}"
        id = id.replace("/", "_")
        if id in positions:
            raise UserError(f"{position} has the id {id!r} of {positions[id]}: ids must differ")
        positions[id] = position
        label = cells.get("label", "").lower()
        if label not in LABELS:
            raise UserError(f"{position} has the label {label!r}; safe and unsafe are known")
        category = next((cells[name] for name in CATEGORIES if cells.get(name)), "")
        kind = cells.get("functionalcategory", "").lower()
        requests.setdefault(text.strip(), FileRequest(id, text.strip(), category, label, kind))
    return list(requests.values())


def read_templates(path: Path) -> list[str]:
    """Jailbreak templates, each with a placeholder for the request. Raises `UserError` for one without."""
    rows = read_table(path)
    name = find_column(rows, ("text", "template", "prompt"), "template")
    templates = [(position, str(row.get(name) or "")) for position, row in rows]
    for position, template in templates:
        if not any(placeholder in template for placeholder in PLACEHOLDERS):
            raise UserError(
                f"{position} has no placeholder for the request: write {' or '.join(PLACEHOLDERS[:2])}"
            )
    return [template for _, template in templates]


def fill_template(template: str, request: str) -> str:
    """The template with the request in place of its placeholders."""
    for placeholder in PLACEHOLDERS:
        template = template.replace(placeholder, request)
    return template
