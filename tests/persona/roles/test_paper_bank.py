"""Banks in the paper repository's form are read and written, and what is wrong with one is said with its place."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from test_paper_files import put, refused, rejects

from personatlas.persona.errors import UserError
from personatlas.persona.roles.bank import Bank, Question, Role, Trait, load_bank
from personatlas.persona.roles.paper_bank import export_bank, import_bank, write_bank


def role(*prompts: str, **more: Any) -> dict[str, Any]:
    return {"instruction": [{"pos": prompt} for prompt in prompts], **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(
        tmp_path / "roles" / "ghost.json",
        role("You are a ghost.", "Haunt.", eval_prompt="Is {answer} a ghost's?"),
    )
    put(tmp_path / "roles" / "bard.json", role("You are a bard."))
    put(
        tmp_path / "questions.jsonl",
        '{"question": "Who are you?", "id": 0}\n\n{"question": "Why?", "id": "q1"}',
    )
    return tmp_path


def imported(folder: Path) -> Bank:
    return import_bank(folder / "roles", folder / "questions.jsonl")


def test_a_bank_of_json_files_becomes_ours_with_the_packaged_default_if_it_has_none(folder):
    assert imported(folder).roles[0] == load_bank().default
    put(folder / "roles" / "default.json", role("", "You are {model_name}.", "Respond as yourself."))
    assert imported(folder).roles == (
        Role("bard", ("You are a bard.",)),
        Role("default", ("", "You are {model}.", "Respond as yourself."), is_default=True),
        Role("ghost", ("You are a ghost.", "Haunt."), rubric="Is {answer} a ghost's?"),
    )
    assert imported(folder).questions == (Question("0", "Who are you?"), Question("q1", "Why?"))


def test_a_bank_that_was_written_is_read_as_it_was(folder):
    odd = Bank((load_bank().default, Role("o", ("line\nbreak \u2028 “☃”\t\\",))), (Question("q", "…\r\n?"),))
    for bank in (imported(folder), load_bank(), odd):
        write_bank(bank, folder / "new" / "bank")
        names = ["questions.jsonl", "roles.jsonl", *["traits.jsonl"] * bool(bank.traits)]
        names = ["controls.jsonl"] * bool(bank.controls) + names
        assert sorted(path.name for path in (folder / "new" / "bank").iterdir()) == names
        assert load_bank(folder / "new" / "bank") == bank
        shutil.rmtree(folder / "new")


@rejects(
    ({"prompts": ["x"]}, "imp.json is a dict of 'prompts', not a role: it needs `instruction`"),
    (role("You are an imp.", " "), "imp.json: instruction 2 needs `pos`"),
    (role("You are an imp.", eval_prompt=None), "imp.json: `eval_prompt` is None, not text"),
    ("{", "imp.json:1 is not valid JSON"),
    ('{"question": "Again?", "id": "0"}', "questions.jsonl:4: question id '0' is there twice"),
    ('{"question": "Again?", "id": true}', "questions.jsonl:4: a question needs an `id`"),
    ('{"question": "Again?", "id": "a/b"}', "questions.jsonl:4: a question needs an `id` without '/'"),
    ('{"question": "", "id": 5}', "questions.jsonl:4: `question` must be a string"),
    ("{", "questions.jsonl:4 is not valid JSON"),
)
def test_a_role_or_question_that_is_none_is_refused_with_its_place(folder, content, reason):
    path = folder / ("questions.jsonl" if "questions" in reason else "roles/imp.json")
    put(path, path.read_text() + "\n" + content if path.exists() else content)
    with refused(reason):
        imported(folder)


def test_an_empty_or_missing_place_is_refused(folder):
    empty = put(folder / "none.jsonl", "\n").parent / "empty"
    empty.mkdir()
    for read, reason in [
        (lambda: import_bank(folder / "missing", folder / "questions.jsonl"), "is not a folder of roles"),
        (lambda: import_bank(empty, folder / "questions.jsonl"), "holds no .json file"),
        (lambda: import_bank(folder / "roles", folder / "missing.jsonl"), "does not exist"),
        (lambda: import_bank(folder / "roles", folder / "none.jsonl"), "holds no question"),
    ]:
        with refused(reason):
            read()
    put(folder / "roles" / "imp .json", role("You are an imp."))
    with refused("a role's name may not have outer spaces"):
        imported(folder)


def test_traits_are_read_beside_roles_and_the_whole_repository_is_found(tmp_path):
    steps = [{"pos": "Be calm.", "neg": "Be frantic."}, {"pos": "Slow.", "neg": "Fast."}]
    put(tmp_path / "roles" / "instructions" / "bard.json", role("You are a bard."))
    put(tmp_path / "traits" / "instructions" / "calm.json", {"instruction": steps, "eval_prompt": "0 to 100"})
    put(tmp_path / "extraction_questions.jsonl", '{"question": "Who are you?", "id": 0}')
    bank = load_bank(tmp_path)  # what --bank reads
    assert [role.name for role in bank.roles] == ["default", "bard"]
    assert bank.traits == (Trait("calm", ("Be calm.", "Slow."), ("Be frantic.", "Fast."), "0 to 100"),)
    put(tmp_path / "traits" / "instructions" / "calm.json", {"instruction": [{"pos": "Be calm."}]})
    with refused("calm.json: instruction 1 needs `neg`, a string"):
        load_bank(tmp_path)


def test_the_packaged_bank_is_exported_and_read_back_but_for_its_tags(tmp_path):
    ours = load_bank()
    export_bank(ours, tmp_path / "theirs")
    back = load_bank(tmp_path / "theirs")
    key = lambda held: held.name  # noqa: E731
    for mine, read in ((ours.roles, back.roles), (ours.traits, back.traits)):
        for a, b in zip(sorted(mine, key=key), sorted(read, key=key), strict=True):
            assert {**a.__dict__, "tags": ()} == b.__dict__
    assert [(q.id, q.question) for q in back.questions] == [(q.id, q.question) for q in ours.questions]


def test_a_trait_without_pairs_cannot_be_exported(tmp_path):
    bank = Bank((load_bank().default,), (Question("q", "Why?"),), (Trait("calm", ("a", "b"), ("c",)),))
    with pytest.raises(UserError, match="'calm' has 2 positive and 1 negative prompts"):
        export_bank(bank, tmp_path)


def test_a_default_of_another_name_is_still_the_default_when_it_comes_back(tmp_path):
    model = Role("model", ("", "You are {model}."), is_default=True, rubric="itself")
    bank = Bank((model, Role("bard", ("You are a bard.",))), (Question("q", "Why?"),))
    export_bank(bank, tmp_path / "theirs")
    assert load_bank(tmp_path / "theirs").default.prompts == model.prompts
    with pytest.raises(UserError, match="a role is named 'default' and is not the default"):
        export_bank(Bank((model, Role("default", ("Be plain.",))), bank.questions), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_bank_written_over_another_leaves_no_traits_of_it(tmp_path):
    write_bank(load_bank(), tmp_path)
    plain = Bank((load_bank().default,), (Question("q", "Why?"),))
    write_bank(plain, tmp_path)
    assert load_bank(tmp_path) == plain
