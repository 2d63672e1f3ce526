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
    assert messages_in(tmp_path) == [
        (USER, ANSWER),
        (USER,),
        *lines,
    ]  # without the one that no user speaks in


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
    with refused("with a system text and another system message, of which one must go (a.json)"):
        read_conversations(put(path, {"system_prompt": "Be brief.", "messages": [system, USER]}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"conversations": [{"from": "bing", "value": "x"}]},
            "1 with the speaker 'bing', which is not one of",
        ),
        ([USER, {"role": "assistant", "content": None}], "1 with content that is null (a.json, message 2)"),
        ({"messages": [{"role": "user", "content": 3}]}, "1 with content that is no text but 3"),
        ([USER, {"role": "assistant"}], "1 with content that is missing (a.json, message 2)"),
        ([USER, 3], "1 with a message that is 3 (a.json, message 2)"),
        ([{"text": "x"}], "1 with neither messages nor a question and an answer, but text (a.json, item 1)"),
        (
            {"messages": [USER], "conversation": [USER]},
            "1 with several lists of messages (messages, conversation)",
        ),
        ({"messages": []}, "1 without messages (a.json)"),
        ({"messages": "hello"}, "1 with messages that are no list but a str"),
        ({"messages": [USER], "system": {"x": 1}}, "1 with a system text that is no text but a dict of 'x'"),
        ({"messages": [USER], "system": "A", "persona": "B"}, "1 with a persona and a system text"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "1 with half a surrogate pair"),
        (
            {"messages": [{"role": "user", "content": "x" * (1 << 24)}, ANSWER]},
            "1 longer than 16,777,216 characters",
        ),
        ([ANSWER], "1 without a user (a.json)"),
        ([{"role": "tool", "content": "4"}], "1 without messages"),
        ([], "1 without messages"),
        ('{"messages": [', "a.json:1 is not valid JSON: Expecting value"),
        ('{"messages": [\n{"role": user}]}', "a.json:1 is not valid JSON: Expecting value at line 2"),
        ('{"role": "user", "content": "a", "role": "assistant"}', "the key 'role' stands there twice"),
        ('{"messages": [], "score": NaN}', "a.json:1 is not valid JSON: NaN is no number of JSON"),
        ("[" * 100_000, "a.json:1 is not valid JSON: too deep"),
        ('{"messages": []}\n\n{"messages": ', "a.jsonl:3 is not valid JSON"),
        ("3\n", "1 with messages that are no list but 3 (a.jsonl:1)"),
        ("\n", "a.jsonl holds no conversation that can be used: it is empty"),
        (
            "",
            "a.json holds no conversation that can be used: it is empty; a conversation is a list of messages",
        ),
    ],
)
def test_a_file_without_a_conversation_is_refused_with_the_place_and_what_was_expected(
    tmp_path, content, reason
):
    with refused(reason):
        read_conversations(put(tmp_path / ("a.jsonl" if "a.jsonl" in reason else "a.json"), content))


def test_what_cannot_be_used_is_left_out_and_said_in_one_line(tmp_path, capsys):
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    said = {"role": "assistant", "content": "Wait.", "tool_calls": [{"id": "1"}]}
    rows = [
        [USER, call, {"role": "tool", "content": "4", "tool_call_id": "1"}, ANSWER],
        [USER, said, {"role": "function", "name": "sum", "content": "4"}, ANSWER],
        [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}, picture]}, ANSWER],
        [USER, {"role": "assistant", "content": 4}],
        {"text": "x"},
        [USER, ANSWER],
    ]
    path = put(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    waiting = {"role": "assistant", "content": "Wait."}
    assert messages_in(path) == [(USER, ANSWER), (USER, waiting, ANSWER), (USER, ANSWER), (USER, ANSWER)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"{path}: left out 2 calls of tools (a.jsonl:1, a.jsonl:2); 2 turns of tools (a.jsonl:1, a.jsonl:2); "
        "1 parts of the kind 'image_url' (a.jsonl:3); 1 with content that is no text but 4 (a.jsonl:4, message 2); "
        "1 with neither messages nor a question and an answer, but text (a.jsonl:5)"
    )


def test_conversations_of_one_id_keep_apart(tmp_path):
    rows = [{"id": name, "messages": [USER]} for name in ("a/b", "a_b", "a_b", "a_b (2)")]
    found = read_conversations(put(tmp_path / "a.json", rows))
    assert [one.name for one in found] == ["a_b", "a_b (2)", "a_b (3)", "a_b (2) (2)"]


def test_a_place_without_conversations_is_refused(tmp_path):
    with refused("holds no .json, .jsonl or .parquet file"):
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
