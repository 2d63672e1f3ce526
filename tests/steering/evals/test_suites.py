"""Requests, templates and conversations as users keep them, and the suites that are made of them."""

import json
from collections import Counter

import pytest
from test_stages import write_bank

from personatlas.persona.errors import UserError
from personatlas.persona.roles.bank import load_bank
from personatlas.steering.evals.options import EvalOptions, chosen, made
from personatlas.steering.evals.suites.build import harmful_requests, over_refusal, persona_jailbreaks
from personatlas.steering.evals.suites.requests import Ask, filled, read_requests, read_templates

ASKS = [Ask(f"a{n}", f"Tell me about knot number {n}.", "knots", "") for n in range(7)]


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
        ("number.jsonl", "{}\n3\n", "number.jsonl:2 is a int"),
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


def test_templates_have_a_hole(tmp_path):
    path = written(tmp_path / "t.csv", 'id,text\n0,"Say: [INSERT PROMPT HERE]!"\n1,Now {request}\n')
    assert [filled(one, "hello {x}") for one in read_templates(path)] == ["Say: hello {x}!", "Now hello {x}"]
    with pytest.raises(UserError, match=r"t\.csv:3 has no hole"):
        read_templates(written(path, "text\n{request}\nnothing\n"))


def test_roles_and_requests_are_dealt_evenly_and_no_pair_twice(tmp_path):
    bank = load_bank(write_bank(tmp_path / "bank"))
    roles = [role.name for role in bank.roles if not role.is_default][:4]
    suite = persona_jailbreaks(bank, roles, ASKS, 28, 0, 16)
    pairs = Counter((case.role, case.request) for case in suite.cases)
    assert len(pairs) == 28  # all of them, once
    some = persona_jailbreaks(bank, roles, ASKS, 12, 0, 16).cases
    assert set(Counter(case.role for case in some).values()) == {3}
    assert max(Counter(case.request for case in some).values()) <= 2
    assert len({case.seed for case in some}) == 12
    assert all(
        case.messages[0]["role"] == "system" and case.judged == case.messages[-1]["content"] for case in some
    )
    with pytest.raises(UserError, match="fewer than the 4 roles"):
        persona_jailbreaks(bank, roles, ASKS, 3, 0, 16)


def test_a_judge_sees_the_request_without_its_template():
    suite = harmful_requests(ASKS, ["Pretend: {request}", "Now: {request}"], 4, 0, 16)
    assert [case.role for case in suite.cases] == ["template 0", "template 1"] * 2
    assert suite.cases[0].asked == "Pretend: " + suite.cases[0].judged


def test_safe_and_unsafe_requests_are_two_suites():
    asks = [Ask(str(n), f"question {n}", "", "unsafe" if n % 3 else "safe") for n in range(9)]
    safe, unsafe = over_refusal(asks, 100, 0, 16)
    assert (safe.name, len(safe.cases), unsafe.name, len(unsafe.cases)) == ("over-refusal", 3, "contrast", 6)
    assert (safe.outcomes["refused"], unsafe.outcomes["refused"]) == (False, True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"suite": "harm"}, "needs --requests FILE"),
        ({"suite": "charm"}, "suite 'charm' is not one of"),
        ({"suite": ","}, "names none"),
        ({"pairs": 0}, "--pairs 0 is below 1"),
        ({"roles": 2}, "--roles 2 is below 4"),
        ({"margin": 1.5}, "--margin 1.5 is outside"),
    ],
)
def test_options_that_make_no_evaluation_are_refused(options, told):
    with pytest.raises(UserError) as error:
        chosen(EvalOptions(**options))
    assert told in str(error.value)


def test_without_a_choice_all_suites_that_have_material_are_run(tmp_path):
    assert chosen(EvalOptions()) == ("susceptibility", "benign")
    assert chosen(EvalOptions(requests=tmp_path / "x.csv"))[:2] == ("persona-jailbreak", "harm")


def test_of_our_own_scripts_the_suite_drift_asks_the_four_domains_of_the_study(tmp_path):
    bank = load_bank(write_bank(tmp_path / "bank"))
    (suite,) = made(EvalOptions(suite="drift"), ("drift",), bank, (), "tiny")
    assert Counter(case.category for case in suite.cases) == dict.fromkeys(
        ("coding", "writing", "therapy", "philosophy"), 10
    )
    chats = [
        {"id": "own", "domain": "everyday", "messages": [{"role": "user", "content": "How do I bake bread?"}]}
    ]
    path = written(tmp_path / "chats.json", json.dumps(chats))
    (own,) = made(EvalOptions(suite="drift", transcripts=path), ("drift",), bank, (), "tiny")
    assert [case.asked for case in own.cases] == ["How do I bake bread?"]
