"""Conversations and tables as people keep them: one reading of every form, or one line that says what is wrong."""

import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pytest

from personatlas.persona.errors import UserError
from personatlas.persona.formats import read_conversations, read_table

USER, ANSWER = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An AI."}
SHAREGPT = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "An AI."}]


def put(path: Path, content: Any) -> Path:
    """Write text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def messages_in(path: Path, **options: bool) -> list[tuple[dict[str, str], ...]]:
    return [conversation.messages for conversation in read_conversations(path, **options)]


def refused(part: str) -> Any:
    """Expect a UserError of one line that holds the part."""
    return pytest.raises(UserError, match=rf"\A.*{re.escape(part)}.*\Z")


def test_every_form_of_a_conversation_becomes_the_same_messages(tmp_path):
    for content in (
        {"model": "m", "turns": 1, "conversation": [USER, ANSWER]},
        {"messages": [{**USER, "name": "ann"}, ANSWER]},
        {"messages": [USER, ANSWER], "conversation": "therapy-03"},
        {"conversations": SHAREGPT},
        {"conversations": [USER, ANSWER]},
        [USER, ANSWER],
        SHAREGPT,
        [{"messages": [USER, ANSWER]}],
        [[USER, ANSWER]],
    ):
        assert messages_in(put(tmp_path / "a.json", content)) == [(USER, ANSWER)]
        if not isinstance(content, list) or content in ([USER, ANSWER], SHAREGPT):
            line = json.dumps(content)
            assert messages_in(put(tmp_path / "a.jsonl", f"{line}\n\n")) == [(USER, ANSWER)]


def test_a_developer_or_a_system_message_is_the_system_message(tmp_path):
    told = ({"role": "system", "content": "Be brief."}, USER)
    for content in (
        list(told),
        {"messages": [{"role": "developer", "content": "Be brief."}, USER]},
        [{"conversations": [{"from": "system", "value": "Be brief."}, SHAREGPT[0]]}],
    ):
        assert messages_in(put(tmp_path / "a.json", content)) == [told]


def test_files_and_folders_of_conversations_are_read_in_order(tmp_path):
    put(tmp_path / "b.json", [{"messages": [ANSWER]}, {"messages": [USER]}])
    put(tmp_path / "a" / "deep" / "z.json", [USER, ANSWER])
    rows = [[USER, USER], {"messages": [USER]}, {"conversations": SHAREGPT}]
    put(tmp_path / "c.jsonl", "\n\n".join(json.dumps(row) for row in rows))  # and no newline at the end
    put(tmp_path / "README.md", "not a conversation")
    lines = [(USER, USER), (USER,), (USER, ANSWER)]
    found = messages_in(tmp_path, require_user=False)
    assert found == [(USER, ANSWER), (ANSWER,), (USER,), *lines]
    names = [conversation.name for conversation in read_conversations(tmp_path, require_user=False)]
    assert names == [f"conversation {n}" for n in range(6)]
    with refused("b.json, item 1 has no turn of a user"):
        read_conversations(tmp_path)


def test_a_system_prompt_beside_the_messages_becomes_the_first_message(tmp_path):
    path, system = tmp_path / "a.json", {"role": "system", "content": "You are a pirate."}
    for content in (
        {"system_prompt": "You are a pirate.", "conversation": [USER]},
        {"system": "You are a pirate.", "conversations": SHAREGPT[:1]},
        {"conversations": [{"from": "system", "value": "You are a pirate."}, SHAREGPT[0]]},
        {"system_prompt": "You are a pirate.", "conversation": [system, USER]},
    ):
        assert messages_in(put(path, content)) == [(system, USER)]
    for nothing in ("", None):
        assert messages_in(put(path, {"system_prompt": nothing, "conversation": [USER]})) == [(USER,)]
    with refused("its system prompt and its first message, a system message, differ"):
        read_conversations(put(path, {"system_prompt": "Be brief.", "messages": [system, USER]}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            [USER, {"role": "tool", "content": "4"}],
            "a.json: message 2: speaker 'tool' is not one of system, ",
        ),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "a.json: message 1: speaker 'bing' is not one"),
        ([{"role": "assistant", "content": None}], "a.json: message 1: its content is None, not text"),
        ({"messages": [{"role": "user", "content": 3}]}, "a.json: message 1: its content is 3, not text"),
        ([USER, {"role": "assistant"}], "a.json: message 2 is a dict of 'role', not a dict with 'role' and"),
        ([[USER], [USER, 3]], "a.json, item 2: message 2 is 3"),
        ([[USER], {"text": "x"}], "a.json, item 2 is no conversation but a dict of 'text'; it has one of"),
        ({"messages": [USER], "conversation": [USER]}, "has one of conversation, messages, conversations"),
        ({"messages": []}, "a.json is a list of 0, not a list of messages that is not empty"),
        ({"messages": "hello"}, "a.json is a str, not a list of messages"),
        ({"messages": [USER], "system": ["x"]}, "its system prompt is a list of 1, not text"),
        ([ANSWER], "a.json has no turn of a user"),
        ([{"id": 1, "messages": [USER]}, {"id": 1, "messages": [USER]}], "two conversations with the id '1'"),
        ([], "a.json holds no conversation"),
        ('{"messages": [', "a.json is not valid JSON"),
        ('{"messages": []}\n{"messages": []}\n', "one object a line is .jsonl"),
        ('[{"role": "user", "content": ""}]\n\n{"messages": ', "a.jsonl:3 is not valid JSON"),
        ('[{"role": "user", "content": ""}]\n\n{"messages": [3]}\n[]\n', "a.jsonl:3: message 1 is 3"),
        ("3\n", "a.jsonl:1 is 3, not a list of messages"),
        ("\n", "a.jsonl holds no conversation"),
    ],
)
def test_a_conversation_that_is_none_is_refused_with_its_place(tmp_path, content, reason):
    is_lines = ".jsonl" in reason and "one object" not in reason
    with refused(reason):
        read_conversations(put(tmp_path / ("a.jsonl" if is_lines else "a.json"), content))


def test_a_place_without_conversations_is_refused(tmp_path):
    with refused("holds no .json or .jsonl file"):
        read_conversations(tmp_path)
    with refused("nowhere.json does not exist"):
        read_conversations(tmp_path / "nowhere.json")


def test_a_transcript_in_plain_text_is_a_conversation(tmp_path):
    path = tmp_path / "told.txt"
    path.write_text("User: Who are you?\nReally.\n\n**Assistant:** I am:\n\nModel: none.\nhuman: And then?\n")
    (one,) = read_conversations(path)
    assert one.name == "told"
    assert [(message["role"], message["content"]) for message in one.messages] == [
        ("user", "Who are you?\nReally."),
        ("assistant", "I am:\n\nModel: none."),
        ("user", "And then?"),
    ]
    for text in ("Once upon a time", "Once.\nUser: Hello"):
        path.write_text(text)
        with pytest.raises(UserError, match="does not begin with who speaks"):
            read_conversations(path)


def test_compressed_conversations_and_tables_are_read_as_the_plain_ones(tmp_path):
    lines = "".join(json.dumps({"messages": [USER, ANSWER], "id": n}) + "\n" for n in "ab").encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    assert messages_in(tmp_path / "a.jsonl.gz") == [(USER, ANSWER)] * 2
    (tmp_path / "a.csv.xz").write_bytes(lzma.compress(b"goal,label\nTie a knot,0\n"))
    rows = [(f"{tmp_path / 'a.csv.xz'}:2", {"goal": "Tie a knot", "label": "0"})]
    assert read_table(tmp_path / "a.csv.xz") == rows
    (tmp_path / "cut.csv.xz").write_bytes(lzma.compress(b"goal,label\nTie a knot,0\n" * 99)[:-9])
    with refused("damaged or cut short"):
        read_table(tmp_path / "cut.csv.xz")


def test_a_table_is_the_same_in_every_form_and_encoding(tmp_path):
    rows = [{"goal": "Knüpfe \u2028 einen Knoten"}, {"goal": "Löse ihn"}]
    texts = {
        "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "a.json": json.dumps(rows),
        "a.csv": "goal\n" + "".join(row["goal"] + "\n" for row in rows),
    }
    for name, text in texts.items():
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            (tmp_path / name).write_bytes(text.encode(encoding))
            assert [row for _, row in read_table(tmp_path / name)] == rows
