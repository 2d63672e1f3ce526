"""Conversations from files: common shapes are read, what is odd is counted, named and left out, and nothing is repaired."""

import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest
from chats import GOOD, rollout, turns, write_rows, write_run

from personatlas.persona.errors import UserError
from personatlas.persona.rollout import read_rollouts
from personatlas.training.chat.conversations import (
    Columns,
    Exclusions,
    RolloutFilter,
    has_rollouts,
    read_examples,
    read_rollout_examples,
)
from personatlas.training.chat.mixture import epoch_times, parse_dataset, read_datasets, split_examples


def read(path, **how):
    faults = Exclusions()
    return read_examples(path, faults, **how), faults


def test_messages_are_read_as_they_stand(tmp_path):
    found, faults = read(write_rows(tmp_path / "a.jsonl", [GOOD, GOOD | {"source": "port", "weight": 0.5}]))
    assert [list(one.messages) for one in found] == [GOOD["messages"]] * 2
    assert [(one.place, one.source, one.weight) for one in found] == [
        ("a.jsonl:1", "a", 1.0),
        ("a.jsonl:2", "port", 0.5),
    ]
    assert found[0].answers == ["A sailor.", "A captain."]
    assert not faults.counts


ODD = {
    "with two user turns running": [{"role": "user", "content": "x"}, *turns("a", "b")],
    "with two assistant turns running": [*turns("a", "b"), {"role": "assistant", "content": "x"}],
    "with an empty answer": turns("a", " \n"),
    "with an empty user message": turns("", "b"),
    "with an empty system message": turns("a", "b", system=""),
    "without an assistant turn": turns("a"),
    "without messages": [],
    "with a system message that is not the first": [*turns("a", "b"), {"role": "system", "content": "x"}],
    "in which the assistant speaks first": [{"role": "assistant", "content": "x"}],
    "with a message that is not to be learned": [*turns("a", "b")[:1], {"role": "assistant", "content": "x", "weight": 0}],
    "with NUL, which is no text": turns("a\0", "b"),
    "with half a surrogate pair, which is no text": turns("a", "\ud83d"),
    "with messages that are no list but a str": "who?",
}  # fmt: skip


@pytest.mark.parametrize("fault", ODD)
def test_what_is_odd_is_counted_and_named_and_left_out(fault, tmp_path):
    rows = [GOOD, {"messages": ODD[fault]}, GOOD, {"messages": ODD[fault]}]
    found, faults = read(write_rows(tmp_path / "a.jsonl", rows))
    assert [one.place for one in found] == ["a.jsonl:1", "a.jsonl:3"]
    assert faults.lines() == [f"2 {fault} (a.jsonl:2, a.jsonl:4)"]


@pytest.mark.parametrize("row", [3, {"text": "x"}, {"prompt": "x"}, GOOD | {"weight": -1}, GOOD | {"weight": 0}, GOOD | {"weight": True}, GOOD | {"weight": 1e9}, GOOD | {"persona": ["a"]}])  # fmt: skip
def test_rows_that_are_no_conversation_are_left_out_too(row, tmp_path):
    found, faults = read(write_rows(tmp_path / "a.jsonl", [row, GOOD]))
    assert [one.place for one in found] == ["a.jsonl:2"]
    assert sum(faults.counts.values()) == 1


def test_only_the_first_places_are_named_and_all_are_counted(tmp_path):
    rows = [GOOD, *[{"messages": turns("a")}] * 7, {"messages": []}, *[GOOD] * 7]
    lines = read(write_rows(tmp_path / "a.jsonl", rows))[1].lines()
    assert lines[0] == "7 without an assistant turn (a.jsonl:2, a.jsonl:3, a.jsonl:4, ...)"
    assert lines[1] == "1 without messages (a.jsonl:9)"


def test_a_file_of_which_nothing_is_left_is_refused_with_the_reasons(tmp_path):
    with pytest.raises(
        UserError, match=r"no conversation that can be used: 2 without an assistant turn \(a.jsonl:1"
    ):
        read(write_rows(tmp_path / "a.jsonl", [{"messages": turns("a")}] * 2))
    with pytest.raises(UserError, match="it is empty"):
        read(write_rows(tmp_path / "a.jsonl", []))


def test_questions_and_answers_under_common_names_are_conversations(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "response": "La.", "generator": "someone"},
        {"prompt": "Who?", "response": "I.", "system": "Be brief."},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]},
    ]
    expected = [turns("Add.\n\n1 and 2", "3"), turns("Sing.", "La."), turns("Who?", "I.", system="Be brief."), turns("Who?", "I.")]  # fmt: skip
    found, faults = read(write_rows(tmp_path / "a.jsonl", rows))
    assert [list(one.messages) for one in found] == expected
    assert not faults.counts


def test_a_persona_becomes_the_system_message_and_the_style(tmp_path):
    long = "You grew up by the sea and you speak of nothing else, whatever they ask you about."
    rows = [{"persona": one, "question": "Who?", "answer": "I."} for one in ("witty", long)]
    found, _ = read(write_rows(tmp_path / "a.jsonl", rows))
    assert [one.messages[0]["content"] for one in found] == ["You are a witty assistant.", long]
    assert [one.role for one in found] == ["witty", ""]
    assert found[0].label == "a/witty"


def test_other_columns_are_named_by_hand(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"title": "Who?", "text": "I.", "prompt": "not this"}])
    found, _ = read(path, columns=Columns.parse("question=title,answer=text"))
    assert list(found[0].messages) == turns("Who?", "I.")
    with pytest.raises(
        UserError, match="--columns asks=title: write NAME=COLUMN; the names are messages, system"
    ):
        Columns.parse("asks=title")


def test_packed_files_and_lists_hold_the_same(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in [GOOD] * 3).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text))
    (tmp_path / "a.json").write_text(json.dumps([GOOD] * 3))
    for name in ("a.jsonl.gz", "a.jsonl.xz", "a.json"):
        found, _ = read(tmp_path / name)
        assert [list(one.messages) for one in found] == [GOOD["messages"]] * 3
        assert {one.source for one in found} == {"a"}


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(json.dumps(GOOD).encode() * 50)[:-20])
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "one.json").write_text('{"a": 1}')
    (tmp_path / "bad.jsonl").write_text(json.dumps(GOOD) + "\n{\n")
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    reasons = {
        "folder": "a folder without rollouts",
        "cut.jsonl.xz": "damaged or cut short",
        "lines.json": "2 with neither messages nor a question and an answer, but a",
        "one.json": "1 with neither messages nor a question and an answer, but a",
        "bad.jsonl": "bad.jsonl:2 is not valid JSON",
        "text.txt": "does not begin with who speaks",
        "nowhere.jsonl": "does not exist",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


# Rollouts


def test_a_runs_rollouts_are_conversations_with_the_role_as_style(tmp_path):
    keys = ["pirate/0/q1/0", "pirate/0/q2/0", "default/0/q1/0"]
    run = write_run(tmp_path / "run", [*map(rollout, keys), rollout("+calm/0/q1/0"), rollout("ghost/0/q1/0", stopped="length"), rollout("ghost/0/q2/0", answer="")])  # fmt: skip
    faults = Exclusions()
    assert has_rollouts(run)
    found = read_rollout_examples(run, faults)
    assert sorted((one.role, one.place) for one in found) == sorted(
        (key.split("/")[0], f"run: {key}") for key in keys
    )
    assert {one.source for one in found} == {"run"}
    spoken = next(one for one in found if one.role == "default")
    assert list(spoken.messages) == turns("Question q1?", "Arr.")
    assert faults.counts == {
        "of a trait, not of a role": 1,
        "cut at the token limit": 1,
        "with an empty answer": 1,
    }


def test_data_of_which_most_would_be_left_out_unasked_is_refused_with_what_to_do(tmp_path):
    cut = [rollout(f"ghost/0/q{i}/0", stopped="length") for i in range(5)]
    whole = [rollout(f"pirate/0/q{i}/0") for i in range(4)]
    run = write_run(tmp_path / "run", [*cut, *whole])
    with pytest.raises(UserError, match=r"5 of 9 conversations would be left out \(5 cut at.*--cut keeps"):
        read_rollout_examples(run, Exclusions())
    assert len(read_rollout_examples(run, Exclusions(), RolloutFilter(cut=True))) == 9
    poles = [rollout(f"+calm/0/q{i}/0") for i in range(20)]
    assert (
        len(read_rollout_examples(write_run(tmp_path / "even", [*cut[1:], *whole, *poles]), Exclusions()))
        == 4
    )
    rows = [{"messages": turns("a")}] * 3
    with pytest.raises(UserError, match=r"3 of 5 conversations would be left out.*take them out of the file"):
        read(write_rows(tmp_path / "a.jsonl", [*rows, GOOD, GOOD]))
    assert len(read(write_rows(tmp_path / "b.jsonl", [*[GOOD | {"weight": 0}] * 3, GOOD]))[0]) == 1


def test_the_log_of_a_real_run_is_read(tiny_run):
    faults = Exclusions()
    found = read_rollout_examples(tiny_run / "run", faults, RolloutFilter(cut=True))
    rollouts = read_rollouts(tiny_run / "run")
    assert len(found) + sum(faults.counts.values()) == len(rollouts)
    assert {one.role for one in found} == {one.role for one in rollouts}
    assert {one.answers[-1] for one in found} <= {one.answer for one in rollouts}


def test_a_least_score_drops_what_is_below_it_but_never_the_default(tmp_path):
    keys = [f"{role}/0/q{i}/0" for role in ("default", "ghost", "pirate") for i in range(4)]
    scores = {
        key: (3, 2, 1, None)[int(key.split("q")[1][0])] for key in keys if not key.startswith("default")
    }
    run = write_run(tmp_path / "run", map(rollout, keys), scores)
    faults = Exclusions()
    found = read_rollout_examples(run, faults, RolloutFilter(score=2))
    assert [sum(one.role == role for one in found) for role in ("default", "ghost", "pirate")] == [4, 2, 2]
    assert faults.counts == {"with a score below 2": 2, "without a judge's score": 2}


def test_a_score_without_scores_is_refused(tmp_path):
    run = write_run(tmp_path / "run", map(rollout, ["default/0/q1/0", "pirate/0/q1/0"]))
    with pytest.raises(UserError, match="judge them first: personatlas run judge"):
        read_rollout_examples(run, Exclusions(), RolloutFilter(score=1))


def test_at_most_so_many_of_a_role_are_spread_over_its_questions(tmp_path):
    run = write_run(tmp_path / "run", [rollout(f"pirate/0/q{i}/0") for i in range(8)])
    faults = Exclusions()
    found = read_rollout_examples(run, faults, RolloutFilter(per_role=4))
    assert [one.place[-4] for one in found] == ["0", "2", "4", "6"] or [
        one.place.split("/")[2] for one in found
    ] == ["q0", "q2", "q4", "q6"]
    assert faults.counts == {"beyond 4 of a role": 4}


# Mixtures


def write_parts(tmp_path, **rows):
    return [str(write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}?", "response": "I."} for i in range(count)])) for name, count in rows.items()]  # fmt: skip


def test_a_weight_is_times_or_a_share_and_a_bare_number_is_refused(tmp_path):
    assert (parse_dataset("a=b.jsonl=2x").times, parse_dataset("a=b.jsonl=2x").path.name) == (
        2.0,
        "a=b.jsonl",
    )
    assert (parse_dataset("a.jsonl=30%").times, parse_dataset("a.jsonl=30%").share) == (None, 0.3)
    (tmp_path / "a=2x").mkdir()
    assert parse_dataset(str(tmp_path / "a=2x")).times == 1.0
    for asked in ("a.jsonl=0.3", "a.jsonl=0x", "a.jsonl=101%"):
        with pytest.raises(UserError, match=r"--data a\.jsonl="):
            parse_dataset(asked)


def test_shares_hold_of_the_answers_tokens(tmp_path):
    a, b, c = write_parts(tmp_path, a=4, b=4, c=4)
    cases = {
        (a, b + "=2x", c): (1.0, 2.0, 1.0),
        (a, b, c + "=50%"): (1.0, 1.0, 3.0),
        (a + "=90%", b + "=5%", c + "=5%"): (0.9 / 0.9, 0.5 * 100 / 900, 1 / 9),
    }
    tokens = (900, 100 * 9, 100 * 6)
    for asked, expected in cases.items():
        times = epoch_times(
            read_datasets(asked, Exclusions()),
            (900, 900, 600) if "%" in asked[2] and "%" in asked[0] else tokens,
        )
        if "%" not in asked[0]:
            assert times == pytest.approx(expected)
        read = [count * time for count, time in zip((900, 900, 600), times, strict=True)]
        for one, count in zip(asked, read, strict=True):
            if one.endswith("%"):
                assert count / sum(read) == pytest.approx(float(one.split("=")[1][:-1]) / 100)


def test_where_all_have_a_share_nothing_is_read_twice(tmp_path):
    a, b = write_parts(tmp_path, a=4, b=4)
    times = epoch_times(read_datasets([a + "=20%", b + "=80%"], Exclusions()), (1000, 400))
    assert times == pytest.approx((0.1, 1.0))


@pytest.mark.parametrize("weights", [("=60%", "=60%"), ("=60%", "=20%"), ("", "=100%")])
def test_shares_that_do_not_add_up_are_refused(weights, tmp_path):
    paths = write_parts(tmp_path, a=2, b=2)
    with pytest.raises(UserError, match="add up to"):
        read_datasets([path + weight for path, weight in zip(paths, weights, strict=True)], Exclusions())


def test_the_same_data_twice_is_refused(tmp_path):
    (path,) = write_parts(tmp_path, a=2)
    with pytest.raises(UserError, match="given twice"):
        read_datasets([path, path], Exclusions())


def test_no_question_is_on_both_sides_whoever_answers_it(tmp_path):
    rows = [
        {"persona": one, "question": f"{i}?", "answer": "I."}
        for one in ("witty", "caring")
        for i in range(100)
    ]
    one, two = write_rows(tmp_path / "one.jsonl", rows), write_rows(tmp_path / "two.jsonl", rows[:50])
    sides = split_examples(read_datasets([str(one), str(two)], Exclusions()), 0.1)
    train, held = sides.train, sides.held_out
    assert [len(a) + len(b) for a, b in zip(train, held, strict=True)] == [200, 50]
    asked = [{one.question for part in side for one in part} for side in (train, held)]
    assert not asked[0] & asked[1]
    assert 20 <= len(held[0]) <= 32
    assert asked[1] == sides.questions
    assert split_examples(read_datasets([str(one), str(two)], Exclusions()), 0.1) == sides


def test_held_out_roles_are_tuned_on_nowhere_and_are_a_source_of_their_own(tmp_path):
    rows = [
        {"persona": one, "question": f"{i}?", "answer": "I."}
        for one in ("witty", "caring")
        for i in range(10)
    ]
    parts = read_datasets([str(write_rows(tmp_path / "a.jsonl", rows))], Exclusions())
    sides = split_examples(parts, 0.1, ["witty"])
    assert {one.role for one in sides.train[0]} == {"caring"}
    assert sum(one.group == "a, held-out roles" for one in sides.held_out[0]) == 10
    assert len(sides.train[0]) == 9
    met = [one.role for one in sides.held_out[0] if one.question not in sides.questions]
    assert met == ["witty"] * 9
    assert sorted(one.role for one in sides.held_out[0] if one.question in sides.questions) == [
        "caring",
        "witty",
    ]
    with pytest.raises(UserError, match="--held-out-roles 'pirate' is not one of caring, witty"):
        split_examples(parts, 0.1, ["pirate"])


def test_one_question_cannot_be_split(tmp_path):
    parts = read_datasets([str(write_rows(tmp_path / "a.jsonl", [GOOD] * 3))], Exclusions())
    with pytest.raises(UserError, match="no conversation is held out"):
        split_examples(parts, 0.5)


def test_options_about_rollouts_are_refused_where_there_are_none(tmp_path):
    data = str(write_rows(tmp_path / "a.jsonl", [GOOD]))
    for wanted in (RolloutFilter(score=2), RolloutFilter(per_role=3), RolloutFilter(cut=True)):
        with pytest.raises(UserError, match="no --data is the folder of a run"):
            read_datasets([data], Exclusions(), selection=wanted)


def test_the_packaged_chats_are_found_by_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (dataset,) = read_datasets(["demo=2x"], left_out := Exclusions())
    prompts = Counter(
        example.messages[0]["content"] for example in dataset.examples if len(example.messages) == 3
    )
    assert dataset.times == 2
    assert not left_out.lines()
    assert len(dataset.examples) == 783
    assert len(prompts) == 39  # 35 roles, and four ways to ask for the assistant beside none
    assert min(prompts.values()) >= 12
    assert {example.source for example in dataset.examples} == {"demo"}
    assert len({example.question for example in dataset.examples}) == 24
    (tmp_path / "demo").write_text("a file of one's own")
    assert parse_dataset("demo").path == Path("demo")
