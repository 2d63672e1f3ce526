"""A bank is read strictly, every mistake is named with its place, and the packaged bank keeps its promises."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from paper_names import ROLES, TRAITS

from personatlas.persona.errors import UserError
from personatlas.persona.roles.bank import PACKAGED, Bank, Role, Trait, check_file, load_bank

DEFAULT = {"name": "default", "prompts": ["", "You are {model}."], "is_default": True}
BARD = {"name": "bard", "prompts": ["You are a bard."], "rubric": "sings", "tags": ["human"]}
CALM = {
    "name": "calm",
    "positive": ["Be calm."],
    "negative": ["Be frantic."],
    "rubric": "0 to 100",
    "tags": ["style"],
}
KINDS = {
    "human",
    "nonhuman",
    "profession",
    "archetype",
    "fictional",
    "historical",
    "mystical",
    "collective",
    "artistic",
}
KINDS |= {"everyday", "machine", "model_self", "culture", "harmful_potential"}
QUESTION = {"id": "q1", "question": "Who are you?", "tags": ["self"]}


def written(folder: Path, roles: list[Any], questions: list[Any] | None = None) -> Path:
    """A bank folder; a row that is a string is written as it stands."""
    for name, rows in (("roles", roles), ("questions", [QUESTION] if questions is None else questions)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def packaged() -> Bank:
    return load_bank()


def test_a_bank_is_read_in_file_order_with_its_defaults_filled_in(tmp_path):
    bank = load_bank(written(tmp_path, [BARD, "", DEFAULT], [QUESTION, {"id": 7, "question": "Why?"}]))
    assert [role.name for role in bank.roles] == ["bard", "default"]
    assert bank.role("bard") == Role(
        "bard", ("You are a bard.",), is_default=False, rubric="sings", tags=("human",)
    )
    assert bank.default is bank.role("default")
    assert (bank.default.rubric, bank.default.tags) == ("", ())
    assert [(question.id, question.tags) for question in bank.questions] == [("q1", ("self",)), ("7", ())]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**BARD, "prompts": ["Another bard."]}, "role 'bard' is in the bank twice"),
        (
            {**BARD, "name": "b", "prompts": ["You are b.", " "]},
            "role 'b' has an empty prompt; only the default",
        ),
        ({**BARD, "name": "b", "prompts": []}, "needs `prompts`, a list of at least one string"),
        ({**BARD, "name": "b", "prompts": "You are b."}, "needs `prompts`, a list of at least one string"),
        ({**BARD, "name": "b", "prompts": [None]}, "needs `prompts`, a list of at least one string"),
        ({**BARD, "name": "a/b"}, "role name 'a/b' may not hold '/'"),
        ({**BARD, "name": " b"}, "may not hold '/' or outer spaces"),
        ({**BARD, "name": ""}, "`name` must be a string that is not empty"),
        ({"prompts": ["You are b."]}, "`name` must be a string that is not empty"),
        ({**BARD, "name": "b", "tags": "human"}, "`tags` must be a list of strings"),
        ({**BARD, "name": "b", "is_default": "false"}, "`is_default` true or false"),
        ({**BARD, "name": "b", "rubric": None}, "a string as `rubric`"),
        ('{"name": "b", "prompts": ["You are b."}', "is not valid JSON"),
        ('["b"]', "is not a JSON object"),
    ],
)
def test_a_mistake_in_a_role_is_named_with_file_and_line(tmp_path, row, message):
    with pytest.raises(UserError, match=rf"roles\.jsonl:4:? .*{re.escape(message)}") as error:
        load_bank(written(tmp_path, [DEFAULT, BARD, "", row]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**QUESTION, "question": "Another?"}, "question id 'q1' is in the bank twice"),
        ({"id": "q2", "question": "  "}, "`question` must be a string that is not empty"),
        ({"id": "q2"}, "`question` must be a string that is not empty"),
        ({"question": "Why?"}, "a question needs an `id`"),
        ({"id": None, "question": "Why?"}, "a question needs an `id`"),
        ({"id": "a/b", "question": "Why?"}, "a question needs an `id` without '/'"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_mistake_in_a_question_is_named_with_file_and_line(tmp_path, row, message):
    with pytest.raises(UserError, match=rf"questions\.jsonl:2:? .*{re.escape(message)}"):
        load_bank(written(tmp_path, [DEFAULT], [QUESTION, row]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**CALM, "positive": ["Be still."]}, "trait 'calm' is in the bank twice"),
        ({**CALM, "name": "c", "negative": []}, "trait 'c' needs `negative`, a list of at least one string"),
        ({"name": "c", "positive": ["x"]}, "trait 'c' needs `negative`"),
        ({**CALM, "name": "c", "positive": [" "]}, "trait 'c' has an empty prompt"),
        ({**CALM, "name": "c", "negative": ["Be calm."]}, "trait 'c' has the same prompt on both sides"),
        (
            {**CALM, "name": "-calm"},
            "trait name '-calm' may not hold '/' or outer spaces, or begin with +, - or =",
        ),
        ({**CALM, "name": "c", "rubric": 7}, "trait 'c' needs a string as `rubric`"),
    ],
)
def test_a_mistake_in_a_trait_is_named_with_file_and_line(tmp_path, row, message):
    written(tmp_path, [DEFAULT])
    (tmp_path / "traits.jsonl").write_text(json.dumps(CALM) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"traits\.jsonl:2:? .*{re.escape(message)}"):
        load_bank(tmp_path)


def test_traits_are_read_and_have_a_digest_of_their_own(tmp_path):
    without = load_bank(written(tmp_path, [DEFAULT, BARD]))
    assert without.traits == ()
    (tmp_path / "traits.jsonl").write_text(json.dumps(CALM) + "\n")
    bank = load_bank(tmp_path)
    assert bank.traits == (Trait("calm", ("Be calm.",), ("Be frantic.",), "0 to 100", ("style",)),)
    assert bank.digest == without.digest  # a run of roles may get traits later
    assert bank.traits_digest != without.traits_digest
    assert bank.trait("calm") is bank.traits[0]
    with pytest.raises(UserError, match=r"trait 'clam' is not one of .*; did you mean calm"):
        bank.trait("clam")


def test_one_file_can_be_checked_by_its_name(tmp_path):
    written(tmp_path, [DEFAULT, BARD])
    assert check_file(tmp_path / "roles.jsonl") == 2
    assert check_file(tmp_path / "questions.jsonl") == 1
    with pytest.raises(
        UserError, match=r"is not named roles\.jsonl, questions\.jsonl, traits\.jsonl or controls\.jsonl"
    ):
        check_file(tmp_path / "other.jsonl")


@pytest.mark.parametrize("name", ["+calm", "-calm", "=calm"])
def test_no_role_may_have_the_name_of_a_traits_pole(tmp_path, name):
    with pytest.raises(UserError, match=r"roles\.jsonl:2.* begin with \+, - or ="):
        load_bank(written(tmp_path, [DEFAULT, {**BARD, "name": name}]))


@pytest.mark.parametrize(
    ("roles", "count"), [([BARD], 0), ([DEFAULT, {**DEFAULT, "name": "other"}], 2), ([], 0)]
)
def test_a_bank_needs_exactly_one_default(tmp_path, roles, count):
    with pytest.raises(
        UserError, match=rf"roles\.jsonl needs exactly one role with is_default true, it has {count}"
    ):
        load_bank(written(tmp_path, roles))


def test_a_bank_without_questions_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"questions\.jsonl holds no question"):
        load_bank(written(tmp_path, [DEFAULT], []))


def test_a_missing_file_is_named_and_says_what_a_bank_is(tmp_path):
    with pytest.raises(UserError, match=r"roles\.jsonl does not exist; a bank is a folder with"):
        load_bank(tmp_path)
    written(tmp_path, [DEFAULT])
    with pytest.raises(UserError, match=r"roles\.jsonl does not exist; a bank is a folder with"):
        load_bank(tmp_path / "roles.jsonl")  # a file where the folder should be was a traceback
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(UserError, match=r"questions\.jsonl does not exist"):
        load_bank(tmp_path)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    written(tmp_path, [DEFAULT])
    (tmp_path / "questions.jsonl").write_bytes(b'{"id": "q", "question": "Gar\xe7on?"}\n')
    with pytest.raises(UserError, match=r"questions\.jsonl:1 is not UTF-8"):
        load_bank(tmp_path)


def test_an_unknown_role_suggests_the_closest_names(packaged):
    with pytest.raises(UserError, match=r"role 'pirat' is not one of .*; did you mean pirate"):
        packaged.role("pirat")
    with pytest.raises(UserError, match=rf"role 'xyzzy' is not one of the {len(packaged.roles)} there are"):
        packaged.role("xyzzy")


def test_the_digest_changes_with_a_comma_and_not_with_the_layout_of_the_file(tmp_path):
    bank = load_bank(written(tmp_path, [DEFAULT, BARD]))
    reordered = [
        "",
        json.dumps(DEFAULT, indent=None, separators=(" , ", " : ")),
        dict(reversed(BARD.items())),
        "",
    ]
    assert load_bank(written(tmp_path, reordered)).digest == bank.digest
    digests = {bank.digest}
    for roles, questions in [
        ([DEFAULT, {**BARD, "prompts": ["You are, a bard."]}], [QUESTION]),
        ([DEFAULT, {**BARD, "rubric": "sings,"}], [QUESTION]),
        ([DEFAULT, {**BARD, "tags": ["human", "artistic"]}], [QUESTION]),
        ([DEFAULT, BARD], [{**QUESTION, "question": "Who, are you?"}]),
        ([DEFAULT, BARD], [{**QUESTION, "id": "q2"}]),
        ([BARD, DEFAULT], [QUESTION]),
    ]:
        digests.add(load_bank(written(tmp_path, roles, questions)).digest)
    assert len(digests) == 7


def test_the_packaged_digest_changes_with_a_comma(packaged):
    role = packaged.roles[1]
    changed = replace(role, prompts=(role.prompts[0].replace(",", "", 1), *role.prompts[1:]))
    assert changed != role
    assert (
        replace(packaged, roles=(packaged.roles[0], changed, *packaged.roles[2:])).digest != packaged.digest
    )
    assert packaged.digest == load_bank(PACKAGED).digest


def test_the_packaged_bank_is_as_wide_as_the_papers(packaged):
    others = [role for role in packaged.roles if not role.is_default]
    assert len(others) >= 300
    assert set(ROLES) - {role.name for role in others} == set()
    assert {role.name: len(role.prompts) for role in others if len(role.prompts) != 5} == {}
    assert len(packaged.traits) >= 240
    assert set(TRAITS) - {trait.name for trait in packaged.traits} == set()
    assert {t.name for t in packaged.traits if (len(t.positive), len(t.negative)) != (5, 5)} == set()
    assert len(packaged.questions) >= 240


def test_the_packaged_roles_are_of_all_kinds(packaged):
    counts = Counter(tag for role in packaged.roles for tag in role.tags)
    assert set(counts) == KINDS
    assert min(counts.values()) >= 5
    assert [r.name for r in packaged.roles if len({"human", "nonhuman"} & set(r.tags)) != 1] == []
    assert 0.15 < counts["nonhuman"] / len(packaged.roles) < 0.5


def test_any_beginning_of_the_questions_is_balanced(packaged):
    """A run asks the first n questions: none of the kinds may be missing from them, or be more than its share."""
    kinds = [question.tags[0] for question in packaged.questions]
    for n in (12, 16, 60, len(kinds)):
        counts = Counter(kinds[:n])
        assert len(counts) == 7
        assert max(counts.values()) - min(counts.values()) <= max(2, n // 20)


def test_the_five_prompts_of_a_role_differ_in_form_and_length(packaged):
    for role in packaged.roles[1:]:
        assert role.prompts[0].startswith("You are"), role.name
        assert not role.prompts[1].startswith(("You are", "I am")), role.name
        assert re.search(r"\b(I|I'm|I've|my|me|we|our|us)\b", role.prompts[4], re.IGNORECASE), role.name
        lengths = [len(prompt.split()) for prompt in role.prompts]
        assert max(lengths) >= 1.2 * min(lengths), role.name
        assert all(6 <= length <= 80 for length in lengths), role.name


def test_the_packaged_default_is_the_model_itself(packaged):
    # the five of arXiv 2601.10387; the empty one sends no system message
    assert packaged.default.name == "default"
    assert packaged.default.prompts == (
        "",
        "You are an AI assistant.",
        "You are a large language model.",
        "You are {model}.",
        "Respond as yourself.",
    )


def test_every_packaged_role_has_a_rubric_and_tags(packaged):
    assert [role.name for role in packaged.roles if len(role.rubric) < 40 or not role.tags] == []
    assert [question.id for question in packaged.questions if not question.tags] == []
    assert [
        trait.name
        for trait in packaged.traits
        if not re.search(r"\b100\b.*\b0\b|\b0\b.*\b100\b", trait.rubric)
    ] == []


def all_texts(bank: Bank) -> list[str]:
    texts = [text for role in bank.roles for text in (*role.prompts, role.rubric)]
    texts += [text for trait in bank.traits for text in (*trait.positive, *trait.negative, trait.rubric)]
    return texts + [question.question for question in bank.questions]


def test_no_placeholder_is_left_in_the_packaged_bank(packaged):
    suspect = re.compile(r"[{}<>\[\]]|TODO|FIXME|XXX|TBD|lorem ipsum|\bplaceholder\b", re.IGNORECASE)
    texts = all_texts(packaged)
    assert [text for text in texts if suspect.search(text)] == ["You are {model}."]


def test_packaged_texts_are_tidy(packaged):
    texts = all_texts(packaged)
    assert [
        text for text in texts if text != text.strip() or "  " in text or "\n" in text or "\ufffd" in text
    ] == []


def near_duplicates(texts: list[str], threshold: float = 0.3, n: int = 8) -> list[tuple[str, str]]:
    """Pairs whose sets of character n-grams have a Jaccard index of `threshold` or more."""
    grams = [{text.lower()[i : i + n] for i in range(len(text) - n + 1)} for text in texts]
    holders = defaultdict(list)
    for index, found in enumerate(grams):
        for gram in found:
            holders[gram].append(index)
    shared = Counter(pair for indices in holders.values() for pair in combinations(indices, 2))
    close = [
        (i, j)
        for (i, j), both in shared.items()
        if both >= threshold * (len(grams[i]) + len(grams[j]) - both)
    ]
    return [(texts[i], texts[j]) for i, j in close]


def test_near_duplicates_are_found_when_there_are_any():
    texts = [
        "You are a pirate captain at sea.",
        "You are a pirate captain at sea!",
        "Answer as an old oak tree would.",
    ]
    assert near_duplicates(texts) == [(texts[0], texts[1])]


def test_no_two_packaged_prompts_or_questions_are_near_duplicates(packaged):
    prompts = [prompt for role in packaged.roles if not role.is_default for prompt in role.prompts]
    prompts += [prompt for trait in packaged.traits for prompt in (*trait.positive, *trait.negative)]
    prompts += [prompt for control in packaged.controls for prompt in control.prompts]
    assert near_duplicates(prompts) == []
    assert near_duplicates([question.question for question in packaged.questions]) == []
    assert near_duplicates([role.rubric for role in packaged.roles]) == []
