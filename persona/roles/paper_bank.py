"""Role banks in the paper repository's form, read and written: one JSON a role or trait, and a JSONL of
questions.

    role      NAME.json  {"instruction": [{"pos": prompt}, ...], "eval_prompt": rubric}
    trait     NAME.json  {"instruction": [{"pos": prompt, "neg": prompt}, ...], "eval_prompt": rubric}
    question  {"question", "id"}

    bank = import_bank(Path("assistant-axis/data"))
    export_bank(bank, Path("out"))

Roles lie in the folder itself, in `roles` or in `roles/instructions`, traits likewise in `traits`; questions
in `questions.jsonl` or `extraction_questions.jsonl`, beside them or above.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from personatlas.persona.artifacts import atomic, atomic_folder, require_file_names
from personatlas.persona.errors import UserError, describe_value
from personatlas.persona.formats import read_json_value, read_records, require_unicode
from personatlas.persona.roles.bank import Bank, Question, Role, Trait, load_bank

DEFAULT = "default"  # the file name that makes a role the default
QUESTIONS = ("questions.jsonl", "extraction_questions.jsonl")


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds roles in that form."""
    return bool(_json_files(folder, "roles")) or next(folder.glob("*.json"), None) is not None


def import_bank(folder: Path, questions: Path | None = None) -> Bank:
    """A bank from the paper repository's form. The role "default" is the default; its "{model_name}" becomes
    "{model}".

    Without it, the packaged bank's default is taken. `questions` is looked for unless given. Raises
    `UserError`, naming file and place, for anything else.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of roles, one JSON file each")
    paths = _json_files(folder, "roles") or sorted(folder.glob("*.json"))
    if not paths:
        raise UserError(f"{folder} holds no .json file; a role is one JSON file")
    roles = [_role(path) for path in paths]
    if not any(role.is_default for role in roles):
        roles.insert(0, load_bank().default)
    traits = tuple(_trait(path) for path in _json_files(folder, "traits"))
    return Bank(tuple(roles), tuple(_questions(questions or _questions_beside(folder))), traits)


def export_bank(bank: Bank, folder: Path) -> None:
    """Writes the paper repository's form, whole or not at all: `roles/NAME.json`, `traits/NAME.json` and
    `questions.jsonl`, into a folder that does not exist or is empty. Controls have no place in it.
    """
    unlike = next((trait for trait in bank.traits if len(trait.positive) != len(trait.negative)), None)
    if unlike is not None:
        raise UserError(
            f"trait {unlike.name!r} has {len(unlike.positive)} positive and {len(unlike.negative)} negative prompts: "
            "that form wants pairs"
        )
    if bank.default.name != DEFAULT and any(role.name == DEFAULT for role in bank.roles):
        raise UserError(
            f"a role is named {DEFAULT!r} and is not the default; in that form the name makes it so"
        )
    for kind, names in (
        ("role", [DEFAULT if role.is_default else role.name for role in bank.roles]),
        ("trait", [trait.name for trait in bank.traits]),
    ):
        require_file_names(names, f"a {kind}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as temporary:
        for role in bank.roles:
            prompts = [
                prompt.replace("{model}", "{model_name}") if role.is_default else prompt
                for prompt in role.prompts
            ]
            steps = [{"pos": prompt} for prompt in prompts]
            name = DEFAULT if role.is_default else role.name
            _write(temporary / "roles" / f"{name}.json", {"instruction": steps, "eval_prompt": role.rubric})
        for trait in bank.traits:
            steps = [
                {"pos": pos, "neg": neg} for pos, neg in zip(trait.positive, trait.negative, strict=True)
            ]
            _write(
                temporary / "traits" / f"{trait.name}.json",
                {"instruction": steps, "eval_prompt": trait.rubric},
            )
        lines = [json.dumps({"question": q.question, "id": q.id}, ensure_ascii=False) for q in bank.questions]
        _write_text(temporary / "questions.jsonl", "".join(line + "\n" for line in lines))


def write_bank(bank: Bank, folder: Path) -> None:
    """Write this project's files, so that `load_bank(folder)` is `bank`; the folder is made if need be."""
    files: dict[str, Any] = {"roles": bank.roles, "questions": bank.questions, "traits": bank.traits}
    for name, rows in {**files, "controls": bank.controls}.items():
        if not rows:
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
        else:
            text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
            _write_text(folder / f"{name}.jsonl", text)


def _write(path: Path, content: Any) -> None:
    _write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _json_files(folder: Path, kind: str) -> list[Path]:
    for place in (folder / kind / "instructions", folder / kind):
        if found := sorted(place.glob("*.json")):
            return found
    return []


def _questions_beside(folder: Path) -> Path:
    places = [place / name for place in (folder, folder.parent, folder.parent.parent) for name in QUESTIONS]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no {' or '.join(QUESTIONS)} beside its roles")
    return found


def _questions(path: Path) -> list[Question]:
    questions: dict[str, Question] = {}
    for where, row in read_records(path):
        id, question = (row.get("id"), row.get("question")) if isinstance(row, dict) else (None, None)
        if isinstance(id, bool) or not isinstance(id, (str, int)) or not str(id) or "/" in str(id):
            raise UserError(f"{where}: a question needs an `id` without '/'")
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{where}: `question` must be a string that is not empty")
        require_unicode(where, row)
        if str(id) in questions:
            raise UserError(f"{where}: question id {str(id)!r} is there twice; rename or remove one")
        questions[str(id)] = Question(str(id), question)
    if not questions:
        raise UserError(f"{path} holds no question")
    return list(questions.values())


def _role(path: Path) -> Role:
    steps, rubric = _steps(path, "role")
    is_default = path.stem == DEFAULT
    prompts = [_prompt(step, "pos", path, number, empty=is_default) for number, step in enumerate(steps, 1)]
    if is_default:
        prompts = [prompt.replace("{model_name}", "{model}") for prompt in prompts]
    return Role(path.stem, tuple(prompts), is_default, rubric)


def _trait(path: Path) -> Trait:
    steps, rubric = _steps(path, "trait")
    positive, negative = (
        tuple(_prompt(step, side, path, number) for number, step in enumerate(steps, 1))
        for side in ("pos", "neg")
    )
    if set(positive) & set(negative):
        raise UserError(f"{path}: trait {path.stem!r} has the same prompt on both sides")
    return Trait(path.stem, positive, negative, rubric)


def _steps(path: Path, kind: str) -> tuple[list[Any], str]:
    held = read_json_value(path)
    steps = held.get("instruction") if isinstance(held, dict) else None
    if not isinstance(held, dict) or not isinstance(steps, list) or not steps:
        raise UserError(
            f"{path} is {describe_value(held)}, not a {kind}: it needs `instruction`, a list of {{'pos': prompt}}"
        )
    if path.stem != path.stem.strip() or path.stem[0] in "+-":
        raise UserError(
            f"{path}: a {kind}'s name may not have outer spaces or begin with + or -: it is part of rollout keys"
        )
    require_unicode(str(path), held)
    rubric = held.get("eval_prompt", "")
    if not isinstance(rubric, str):
        raise UserError(f"{path}: `eval_prompt` is {describe_value(rubric)}, not text")
    return steps, rubric


def _prompt(step: Any, side: str, path: Path, number: int, *, empty: bool = False) -> str:
    prompt = step.get(side) if isinstance(step, dict) else None
    if not isinstance(prompt, str) or not (prompt.strip() or empty):
        raise UserError(
            f"{path}: instruction {number} needs `{side}`, a string (empty only for the default role)"
        )
    return prompt
