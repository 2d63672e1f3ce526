"""The role bank: which characters a model is asked to play, and the questions that it answers as each of them.

A bank is a folder (or the packaged one) with two JSON-lines files:

    roles.jsonl      {"name", "prompts": [...], "is_default", "rubric", "tags": [...]}
    questions.jsonl  {"id", "question", "tags": [...]}

Exactly one role is the default: the model as it speaks when nobody asks it to be someone. An empty prompt means that no
system message is sent at all (arXiv 2601.10387, appendix on data: the default is never filtered by a judge).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from personaxis.persona.errors import KnownError

PACKAGED = Path(__file__).parent


@dataclass(frozen=True)
class Role:
    """A character: system prompts (any one of them makes the model play it) and a rubric for a judge."""

    name: str
    prompts: tuple[str, ...]
    is_default: bool = False
    rubric: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """Something that every role can answer, asked as the user's message."""

    id: str
    question: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bank:
    """Roles and questions, in file order; `digest` is a hash of their content, independent of file layout."""

    roles: tuple[Role, ...]
    questions: tuple[Question, ...]

    @property
    def default(self) -> Role:
        """The role that stands for the model itself."""
        return next(role for role in self.roles if role.is_default)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all roles and questions."""
        content = [[asdict(role) for role in self.roles], [asdict(question) for question in self.questions]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def role(self, name: str) -> Role:
        """The role of that name, or `KnownError` with the closest names."""
        for role in self.roles:
            if role.name == name:
                return role
        raise KnownError(f"no role {name!r} in the bank{_closest(name, [role.name for role in self.roles])}")


def load_bank(folder: Path | None = None) -> Bank:
    """Read and validate a bank; None is the packaged one. Every mistake is a `KnownError` with file and line."""
    folder = PACKAGED if folder is None else folder
    roles = tuple(_roles(folder / "roles.jsonl"))
    questions = tuple(_questions(folder / "questions.jsonl"))
    defaults = [role.name for role in roles if role.is_default]
    if len(defaults) != 1:
        raise KnownError(
            f"{folder / 'roles.jsonl'} needs exactly one role with is_default true, it has {len(defaults)}"
        )
    if not questions:
        raise KnownError(f"{folder / 'questions.jsonl'} holds no question")
    return Bank(roles, questions)


def _roles(path: Path) -> list[Role]:
    roles: dict[str, Role] = {}
    for number, row in _rows(path):
        where = f"{path}:{number}"
        name = _text(row, "name", where)
        if "/" in name or name != name.strip():
            raise KnownError(
                f"{where}: role name {name!r} may not hold '/' or outer spaces (it is part of rollout keys)"
            )
        if name in roles:
            raise KnownError(f"{where}: role {name!r} is in the bank twice; rename or remove one")
        prompts = row.get("prompts")
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise KnownError(f"{where}: role {name!r} needs `prompts`, a list of at least one string")
        is_default, rubric = row.get("is_default", False), row.get("rubric", "")
        if not isinstance(is_default, bool) or not isinstance(rubric, str):
            raise KnownError(f"{where}: role {name!r} needs `is_default` true or false, a string as `rubric`")
        if not is_default and not all(prompt.strip() for prompt in prompts):
            raise KnownError(f"{where}: role {name!r} has an empty prompt; only the default role may")
        roles[name] = Role(name, tuple(prompts), is_default, rubric, _tags(row, where))
    return list(roles.values())


def _questions(path: Path) -> list[Question]:
    questions: dict[str, Question] = {}
    for number, row in _rows(path):
        where = f"{path}:{number}"
        id = str(row.get("id", "")) if isinstance(row.get("id"), str | int) else ""
        if not id or "/" in id:
            raise KnownError(f"{where}: a question needs an `id` without '/'")
        if id in questions:
            raise KnownError(f"{where}: question id {id!r} is in the bank twice; rename or remove one")
        questions[id] = Question(id, _text(row, "question", where), _tags(row, where))
    return list(questions.values())


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        raise KnownError(f"{path} does not exist; a bank is a folder with roles.jsonl and questions.jsonl") from None
    except UnicodeDecodeError as error:
        raise KnownError(f"{path} is not UTF-8: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise KnownError(f"{path}:{number} is not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise KnownError(f"{path}:{number} is not a JSON object")
        rows.append((number, row))
    return rows


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise KnownError(f"{where}: `{field}` must be a string that is not empty")
    return value


def _tags(row: dict[str, Any], where: str) -> tuple[str, ...]:
    tags = row.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise KnownError(f"{where}: `tags` must be a list of strings")
    return tuple(tags)


def _closest(name: str, names: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {', '.join(close)}?" if close else f" (it has {len(names)})"
