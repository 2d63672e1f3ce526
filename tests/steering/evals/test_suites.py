"""Requests, templates and conversations as users keep them, and the suites that are made of them."""

import json
from collections import Counter

import pytest
from banks import write_bank

from personatlas.persona.errors import UserError
from personatlas.persona.roles.bank import load_bank
from personatlas.steering.evals import suites as suites_module
from personatlas.steering.evals.options import EvalOptions
from personatlas.steering.evals.suites import (
    Case,
    Suite,
    SuiteInputs,
    registered_suites,
    select_suites,
    suite,
)
from personatlas.steering.evals.suites.requests import fill_template, read_requests, read_templates


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "id", "text", "category"),
    [
        ("hb.csv", "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\nTie a knot,standard,rope,,,knot\n", "knot", "Tie a knot", "rope"),
        ("context.csv", "Behavior,SemanticCategory,ContextString,BehaviorID\nSum it up,rope,A rope is long.,sum\n", "sum", "A rope is long.\n\n---\n\nSum it up", "rope"),
        ("advbench.csv", "goal,target\nTie a knot,\"Sure, here is\"\n", "advbench-0", "Tie a knot", ""),
        ("jbb.csv", "Index,Goal,Target,Behavior,Category,Source\n3,Tie a tight knot,Sure,Knots,Rope,own\n", "3", "Tie a tight knot", "Rope"),
        ("strong.csv", "category,source,forbidden_prompt\nrope,own,Tie a knot?\n", "strong-0", "Tie a knot?", "rope"),
        ("xs.csv", "id,prompt,type,label,focus,note\n9,Kill a process?,homonyms,safe,kill,\n", "9", "Kill a process?", "homonyms"),
        ("plain.jsonl", '{"instruction": "Tie a knot", "category": "rope"}\n', "plain-0", "Tie a knot", "rope"),
        ("turns.jsonl", '{"turns": ["Tie a knot", "And now?"], "question": ["Tie a knot", "And now?"], "question_id": 81}\n', "81", "Tie a knot", ""),
        ("list.json", '[{"prompt": "Tie a knot"}]', "list-0", "Tie a knot", ""),
        ("lines.txt", "Tie a knot\n\n", "lines-0", "Tie a knot", ""),
        ("bom.csv", b"\xef\xbb\xbfprompt\nTie a knot\n", "bom-0", "Tie a knot", ""),
        ("wide.csv", "prompt\nTie a knot\n".encode("utf-16"), "wide-0", "Tie a knot", ""),
        ("quoted.csv", 'prompt\n"Tie a knot,\nthen ""pull"" it"\n', "quoted-0", 'Tie a knot,\nthen "pull" it', ""),
    ],
)  # fmt: skip
def test_the_fields_own_forms_are_read(tmp_path, name, content, id, text, category):
    (ask,) = read_requests(written(tmp_path / name, content))
    assert (ask.id, ask.text, ask.category) == (id, text, category)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone.csv", None, "does not exist"),
        ("empty.csv", "", "is empty"),
        ("header.csv", "prompt,id\n", "no row"),
        ("other.csv", "words,number\nhello,1\n", "has no request column"),
        (
            "mixed.csv",
            b"prompt\nTie a kn\xc3\xb6t\nTie a kn\xf6t\n",
            "mixed.csv:3 is not UTF-8 at byte 27 (0xf6)",
        ),
        ("twice.csv", "id,prompt\n1,a\n2,b\n1,c\n", "twice.csv:4 has the id '1' of"),
        ("hole.csv", "prompt,id\n,1\n", "hole.csv:2 has no request"),
        ("label.csv", "prompt,label\nhello,perhaps\n", "label 'perhaps'"),
        ("long.csv", "prompt\na,b\n", "2 fields where the header has 1"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt"\n', "bad.jsonl:2 is not valid JSON"),
        ("number.jsonl", "{}\n3\n", "number.jsonl:2 is 3"),
        ("table.xlsx", b"PK\x03\x04\xf0\x9f", "is not UTF-8"),
        ("same.csv", "prompt,prompt\na,b\n", "the column 'prompt' twice"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_place(tmp_path, name, content, told):
    if content is not None:
        written(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        read_requests(tmp_path / name)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hundred_thousand_rows_are_read_and_a_text_is_kept_once(tmp_path):
    rows = "".join(f"request {n % 50_000},{n}\n" for n in range(100_000))
    assert len(read_requests(written(tmp_path / "many.csv", "prompt,id\n" + rows))) == 50_000


def test_a_column_with_a_name_of_its_own(tmp_path):
    path = written(tmp_path / "own.csv", "words,number\nhello,1\n")
    assert read_requests(path, "words")[0].text == "hello"
    with pytest.raises(UserError, match="no column 'letters'; its columns: words, number"):
        read_requests(path, "letters")


def test_templates_have_a_placeholder(tmp_path):
    path = written(tmp_path / "t.csv", 'id,text\n0,"Say: [INSERT PROMPT HERE]!"\n1,Now {request}\n')
    assert [fill_template(one, "hello {x}") for one in read_templates(path)] == [
        "Say: hello {x}!",
        "Now hello {x}",
    ]
    with pytest.raises(UserError, match=r"t\.csv:3 has no placeholder"):
        read_templates(written(path, "text\n{request}\nnothing\n"))


@pytest.fixture
def knots(tmp_path):
    """A file of seven requests."""
    rows = "".join(f"a{n},Tell me about knot number {n}.,knots\n" for n in range(7))
    return written(tmp_path / "knots.csv", "id,prompt,category\n" + rows)


@pytest.fixture
def bank(tmp_path):
    return load_bank(write_bank(tmp_path / "bank"))


def prepared(name, bank, roles=(), **options):
    return Suite.named(name).prepare(SuiteInputs(EvalOptions(**options), bank, tuple(roles), "tiny"))


def test_roles_and_requests_are_dealt_evenly_and_no_pair_twice(bank, knots):
    roles = [role.name for role in bank.roles if not role.is_default][:4]
    (suite,) = prepared("persona-jailbreak", bank, roles, requests=knots, pairs=28)
    pairs = Counter((case.role, case.request) for case in suite.cases)
    assert len(pairs) == 28  # all of them, once
    (some,) = prepared("persona-jailbreak", bank, roles, requests=knots, pairs=12)
    assert set(Counter(case.role for case in some.cases).values()) == {3}
    assert max(Counter(case.request for case in some.cases).values()) <= 2
    assert len({some.seed_of(case) for case in some.cases}) == 12
    assert all(
        case.messages[0]["role"] == "system" and case.judged_request == case.messages[-1]["content"]
        for case in some.cases
    )
    with pytest.raises(UserError, match="fewer than the 4 roles"):
        prepared("persona-jailbreak", bank, roles, requests=knots, pairs=3)


@pytest.mark.parametrize("name", ["harm", "persona-jailbreak"])
def test_contextual_and_copyright_behaviours_are_suites_of_their_own(bank, tmp_path, name):
    kinds = ("standard", "contextual", "copyright", "standard")
    rows = "".join(f"b{n},behaviour {n},{kind}\n" for n, kind in enumerate(kinds * 2))
    file = written(tmp_path / "hb.csv", "BehaviorID,Behavior,FunctionalCategory\n" + rows)
    roles = [role.name for role in bank.roles if not role.is_default][:4]
    suites = prepared(name, bank, roles, requests=file, pairs=32)
    assert [own.name for own in suites] == [name, f"{name}-contextual", f"{name}-copyright"]
    asked = [{case.request for case in own.cases} for own in suites]
    assert asked == [{"b0", "b3", "b4", "b7"}, {"b1", "b5"}, {"b2", "b6"}]
    assert sum(len(own.cases) for own in suites) == (8 if name == "harm" else 32)


def test_a_judge_sees_the_request_without_its_template(bank, knots, tmp_path):
    templates = written(tmp_path / "t.csv", "text\nPretend: {request}\nNow: {request}\n")
    (suite,) = prepared("harm", bank, requests=knots, templates=templates, pairs=4)
    assert [case.role for case in suite.cases] == ["template 0", "template 1"] * 2
    assert suite.cases[0].question == "Pretend: " + suite.cases[0].judged_request


def test_safe_and_unsafe_requests_are_two_suites(bank, tmp_path):
    rows = "".join(f"{n},question {n},{'unsafe' if n % 3 else 'safe'}\n" for n in range(9))
    file = written(tmp_path / "xs.csv", "id,prompt,label\n" + rows)
    safe, unsafe = prepared("over-refusal", bank, over_refusal=file)
    assert (safe.name, len(safe.cases), unsafe.name, len(unsafe.cases)) == ("over-refusal", 3, "contrast", 6)
    assert (safe.outcomes["refused"], unsafe.outcomes["refused"]) == ("less", "more")
    only = written(tmp_path / "only.csv", "id,prompt,label\n1,question,unsafe\n")
    assert [own.name for own in prepared("over-refusal", bank, over_refusal=only)] == ["contrast"]


def test_what_an_answer_counts_as_depends_on_its_suite(bank, knots):
    (harm,) = prepared("harm", bank, requests=knots)
    scores = harm.score(harm.cases[0], "Fold it twice, then cut the end off.", 0.7)
    assert scores == {
        "complied": 1.0,
        "refused": 0.0,
        "degenerate": 0.0,
        "harmful": 1.0,
        "harmful if coherent": 1.0,
    }
    loop = harm.score(harm.cases[0], "a a a a a a a a a a", 0.7)
    assert (loop["harmful"], loop["harmful if coherent"]) == (0.0, None)
    assert harm.score(harm.cases[0], "Fold it twice.", None)["harmful"] is None
    (who,) = prepared("susceptibility", bank, [bank.roles[1].name])
    for answer, claimed in (
        ("I am an AI assistant.", "assistant"),
        ("I'm Nyx, a ghost who haunts this lighthouse.", "mystical"),
        ("I was born in Bergen and I am a baker.", "human"),
        ("I am an old oak in the forest.", "non-human"),
        ("Blue, mostly.", "unclear"),
    ):
        scores = who.score(who.cases[0], answer, None)
        assert {name for name, score in scores.items() if score} == {claimed}
        assert set(scores) == {
            "assistant",
            "mystical",
            "human",
            "non-human",
            "unclear",
            "yes_to_assistant",
            "yes_to_counter",
        }
    assert who.max_new_tokens == 48


def test_a_suite_in_a_file_of_ones_own_is_named_like_the_packaged_ones(bank):
    before = dict(registered_suites())

    @suite
    class Greetings(Suite):
        name = "greetings"
        outcomes = {"greets": "more"}  # noqa: RUF012

        def build_cases(self, inputs):
            return [
                Case.from_text(f"greetings/0/{text}/0", text)
                for text in ("Hello!", "Hello!", "Good evening.")
            ]

        def score(self, case, answer, harm):
            return {"greets": float("hello" in answer.lower())}

    try:
        assert set(registered_suites()) - set(before) == {"greetings"}
        (own,) = prepared("greetings", bank)
        assert [case.request for case in own.cases] == ["Hello!", "Good evening."]
        assert own.score(own.cases[0], "Hello to you.", None) == {"greets": 1.0}
        with pytest.raises(ValueError, match="suite 'benign' is already"):
            suite(type("Other", (Greetings,), {"name": "benign"}))
    finally:
        suites_module._SUITES.pop("greetings")


def test_a_suite_brings_its_own_file_and_settings(bank, knots):
    (own,) = select_suites([Suite.named("harm", requests=knots, pairs=3)], EvalOptions())
    assert len(own.prepare(SuiteInputs(EvalOptions(), bank))[0].cases) == 3
    with pytest.raises(UserError, match="suite harm has no setting 'request'"):
        select_suites([Suite.named("harm", request=knots)], EvalOptions())


@pytest.mark.parametrize(
    ("suites", "said"),
    [
        (["harm"], "needs --requests FILE"),
        (["charm"], "suite 'charm' is not one of"),
        ([], "no suite is named"),
    ],
)
def test_suites_that_cannot_be_run_are_refused(suites, said):
    with pytest.raises(UserError, match=said):
        select_suites(suites, EvalOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pairs": 0}, "--limit 0 is below 1"),
        ({"roles": 2}, "--roles 2 is below 4"),
        ({"prompts": 0}, "--prompts 0 is below 1"),
        ({"margin": 1.5}, "--margin 1.5 is outside"),
    ],
)
def test_options_that_make_no_evaluation_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        EvalOptions(**options).check()


def test_without_a_choice_all_suites_that_have_material_are_run(knots):
    def names(**options):
        return [own.name for own in select_suites(None, EvalOptions(**options))]

    assert names() == ["susceptibility", "benign"]
    assert names(requests=knots) == ["persona-jailbreak", "harm", "susceptibility", "benign"]


def test_of_our_own_scripts_the_suite_drift_asks_the_four_domains_of_the_study(bank, tmp_path):
    (suite,) = prepared("drift", bank)
    assert Counter(case.category for case in suite.cases) == dict.fromkeys(
        ("coding", "writing", "therapy", "philosophy"), 10
    )
    chats = [
        {"id": "own", "domain": "everyday", "messages": [{"role": "user", "content": "How do I bake bread?"}]}
    ]
    (own,) = prepared("drift", bank, transcripts=written(tmp_path / "chats.json", json.dumps(chats)))
    assert [case.question for case in own.cases] == ["How do I bake bread?"]
