"""The role bank: which characters a model is asked to play, and the questions that it answers as each of
them.

A bank is a folder (or the packaged one) with JSON-lines files, of which the last two may be missing:

    roles.jsonl      {"name", "prompts": [...], "is_default", "rubric", "tags": [...]}
    questions.jsonl  {"id", "question", "tags": [...]}
    traits.jsonl     {"name", "positive": [...], "negative": [...], "rubric", "tags": [...]}
    controls.jsonl   {"name", "prompts": [...], "about"}

A folder in the paper repository's form (one JSON a role, a JSONL of questions) is read as well. Exactly one
role is the default: the model as it speaks when nobody asks it to be someone. An empty prompt means that no
system message is sent at all (arXiv 2601.10387, appendix on data: the default is never filtered by a judge).
"""

import hashlib
import json
from collections.abc import Callable, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.formats import Placed, read_records, require_unicode

PACKAGED = Path(__file__).parent
POSITIVE, NEGATIVE = "+", "-"  # how the names of poles begin; no role may have such a name
CONTROL = "="  # how the names of controls begin
RoleKind = Literal["role", "trait", "control"]


@dataclass(frozen=True)
class Role:
    """A character: system prompts (any one of them makes the model play it) and a rubric for a judge."""

    name: str
    prompts: tuple[str, ...]
    is_default: bool = False
    rubric: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trait:
    """A way of answering: prompts that call for it, prompts that call for its opposite, and a rubric from 0
    to 100.
    """

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    rubric: str = ""
    tags: tuple[str, ...] = ()

    @property
    def poles(self) -> tuple[Role, Role]:
        """The positive and the negative pole, as roles that can be rolled out."""
        return (
            Role(POSITIVE + self.name, self.positive, rubric=self.rubric, tags=self.tags),
            Role(NEGATIVE + self.name, self.negative, rubric=self.rubric, tags=self.tags),
        )


@dataclass(frozen=True)
class Control:
    """Prompts that ask for no character, as long as a role's, and what they are about.

    Where they lie between the mean role and the default says what the axis measures besides characters.
    """

    name: str
    prompts: tuple[str, ...]
    about: str = ""

    @property
    def role(self) -> Role:
        """The control as a role that can be rolled out."""
        return Role(CONTROL + self.name, self.prompts)


def role_kind(role: str) -> RoleKind:
    """What a rollout's role is: a role of the bank, a trait's pole, or a control."""
    first = role[:1]
    return "trait" if first in (POSITIVE, NEGATIVE) else "control" if first == CONTROL else "role"


@dataclass(frozen=True)
class Question:
    """Something that every role can answer, asked as the user's message."""

    id: str
    question: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bank:
    """Roles, questions, traits and controls, in file order. The digests are hashes of content, independent of
    file layout.
    """

    roles: tuple[Role, ...]
    questions: tuple[Question, ...]
    traits: tuple[Trait, ...] = ()
    controls: tuple[Control, ...] = ()

    @property
    def default(self) -> Role:
        """The role that stands for the model itself."""
        return next(role for role in self.roles if role.is_default)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all roles and questions."""
        return _digest(
            [[asdict(role) for role in self.roles], [asdict(question) for question in self.questions]]
        )

    @property
    def traits_digest(self) -> str:
        """SHA-256 of the canonical JSON of all traits: traits may be added to a run without changing its
        roles.
        """
        return _digest([asdict(trait) for trait in self.traits])

    @property
    def controls_digest(self) -> str:
        """SHA-256 of the canonical JSON of all controls, which may be added to a run as well."""
        return _digest([asdict(control) for control in self.controls])

    def trait(self, name: str) -> Trait:
        """The trait of that name, or `UserError` with the closest names."""
        for trait in self.traits:
            if trait.name == name:
                return trait
        raise UserError(f"trait {not_one_of(name, [trait.name for trait in self.traits])}")

    def role(self, name: str) -> Role:
        """The role of that name, or `UserError` with the closest names."""
        for role in self.roles:
            if role.name == name:
                return role
        raise UserError(f"role {not_one_of(name, [role.name for role in self.roles])}")


def load_bank(folder: Path | None = None) -> Bank:
    """Read and validate a bank; None is the packaged one. Every mistake is a `UserError` with file and line."""
    folder = PACKAGED if folder is None else folder
    if folder.is_dir() and not (folder / "roles.jsonl").exists():
        from personatlas.persona.roles.paper_bank import import_bank, is_foreign

        if is_foreign(folder):
            return import_bank(folder)
    roles = tuple(_roles(folder / "roles.jsonl"))
    questions = tuple(_questions(folder / "questions.jsonl"))
    defaults = [role.name for role in roles if role.is_default]
    if len(defaults) != 1:
        raise UserError(
            f"{folder / 'roles.jsonl'} needs exactly one role with is_default true, it has {len(defaults)}"
        )
    if not questions:
        raise UserError(f"{folder / 'questions.jsonl'} holds no question")
    traits = tuple(_traits(folder / "traits.jsonl")) if (folder / "traits.jsonl").exists() else ()
    path = folder / "controls.jsonl"
    return Bank(roles, questions, traits, tuple(_controls(path)) if path.exists() else ())


def check_file(path: Path) -> int:
    """Validate one file of a bank, told by its name; returns how many rows it has. `UserError` for any
    mistake.
    """
    readers: dict[str, Callable[[Path], Sized]] = {
        "roles": _roles,
        "questions": _questions,
        "traits": _traits,
        "controls": _controls,
    }
    if path.stem not in readers or path.suffix != ".jsonl":
        raise UserError(
            f"{path} is not named roles.jsonl, questions.jsonl, traits.jsonl or controls.jsonl: what it holds is not known"
        )
    return len(readers[path.stem](path))


def _roles(path: Path) -> list[Role]:
    roles: dict[str, Role] = {}
    for where, row in _rows(path):
        name = _text(row, "name", where)
        _require_name(name, where, "role")
        if name in roles:
            raise UserError(f"{where}: role {name!r} is in the bank twice; rename or remove one")
        prompts = _prompts(row, "prompts", f"{where}: role {name!r}")
        is_default, rubric = row.get("is_default", False), row.get("rubric", "")
        if not isinstance(is_default, bool) or not isinstance(rubric, str):
            raise UserError(f"{where}: role {name!r} needs `is_default` true or false, a string as `rubric`")
        if not is_default and not all(prompt.strip() for prompt in prompts):
            raise UserError(f"{where}: role {name!r} has an empty prompt; only the default role may")
        roles[name] = Role(name, prompts, is_default, rubric, _tags(row, where))
    return list(roles.values())


def _traits(path: Path) -> list[Trait]:
    traits: dict[str, Trait] = {}
    for where, row in _rows(path):
        name = _text(row, "name", where)
        _require_name(name, where, "trait")
        if name in traits:
            raise UserError(f"{where}: trait {name!r} is in the bank twice; rename or remove one")
        sides = [_prompts(row, side, f"{where}: trait {name!r}") for side in ("positive", "negative")]
        if not all(prompt.strip() for side in sides for prompt in side):
            raise UserError(f"{where}: trait {name!r} has an empty prompt")
        if set(sides[0]) & set(sides[1]):
            raise UserError(f"{where}: trait {name!r} has the same prompt on both sides")
        rubric = row.get("rubric", "")
        if not isinstance(rubric, str):
            raise UserError(f"{where}: trait {name!r} needs a string as `rubric`")
        traits[name] = Trait(name, sides[0], sides[1], rubric, _tags(row, where))
    return list(traits.values())


def _controls(path: Path) -> list[Control]:
    controls: dict[str, Control] = {}
    for where, row in _rows(path):
        name, about = _text(row, "name", where), row.get("about", "")
        _require_name(name, where, "control")
        if name in controls:
            raise UserError(f"{where}: control {name!r} is in the bank twice; rename or remove one")
        prompts = _prompts(row, "prompts", f"{where}: control {name!r}")
        if not all(prompt.strip() for prompt in prompts) or not isinstance(about, str):
            raise UserError(
                f"{where}: control {name!r} needs prompts that are not empty, a string as `about`"
            )
        controls[name] = Control(name, prompts, about)
    return list(controls.values())


def _require_name(name: str, where: str, kind: str) -> None:
    if "/" in name or name != name.strip() or role_kind(name) != "role":
        raise UserError(
            f"{where}: {kind} name {name!r} may not hold '/' or outer spaces, or begin with +, - or =: "
            "it is part of rollout keys"
        )


def _prompts(row: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    prompts = row.get(field)
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"{where} needs `{field}`, a list of at least one string")
    return tuple(prompts)


def _questions(path: Path) -> list[Question]:
    questions: dict[str, Question] = {}
    for where, row in _rows(path):
        id = str(row.get("id", "")) if isinstance(row.get("id"), str | int) else ""
        if not id or "/" in id:
            raise UserError(f"{where}: a question needs an `id` without '/'")
        if id in questions:
            raise UserError(f"{where}: question id {id!r} is in the bank twice; rename or remove one")
        questions[id] = Question(id, _text(row, "question", where), _tags(row, where))
    return list(questions.values())


def _rows(path: Path) -> list[Placed]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; a bank is a folder with roles.jsonl and questions.jsonl")
    rows = []
    for where, row in read_records(path):
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object")
        require_unicode(where, row)
        rows.append((where, row))
    return rows


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: `{field}` must be a string that is not empty")
    return value


def _tags(row: dict[str, Any], where: str) -> tuple[str, ...]:
    tags = row.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise UserError(f"{where}: `tags` must be a list of strings")
    return tuple(tags)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
