"""Every form of a stored conversation through every command that reads one: all read the same."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from personatlas.persona.formats import Exclusions, read_conversations
from personatlas.persona.logs import append_lines
from personatlas.persona.roles.bank import load_bank
from personatlas.steering.drift.options import DriftOptions
from personatlas.steering.evals.harm.agreement import read_labels
from personatlas.steering.evals.options import EvalOptions
from personatlas.steering.evals.suites import SuiteInputs
from personatlas.steering.evals.suites.conversations import Drift
from personatlas.steering.evals.suites.requests import read_requests
from personatlas.training.chat.conversations import read_examples

# characters at which str.splitlines, though not JSON, would end a line
TEXTS = (
    "Be\u2028brief.",
    "Who\x0bare\x0cyou\x1c?",
    "An\u0085AI\u2029.",
    "And \U0001f9d1‍\U0001f680 then?",
    "Same.",
)
SYSTEM, *TURNS = TEXTS
NAMES = ("user", "assistant", "user", "assistant")
OPENAI = [{"role": "system", "content": SYSTEM}] + [
    {"role": role, "content": text} for role, text in zip(NAMES, TURNS, strict=True)
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}[role], "value": text, "weight": None}
    for role, text in zip(NAMES, TURNS, strict=True)
]
WILDCHAT = {
    "conversation_hash": "f00",
    "model": "m",
    "turn": 2,
    "openai_moderation": [{"flagged": False}],
    "conversation": [
        {**message, "hashed_ip": "1", "toxic": False, "turn_identifier": 7} for message in OPENAI
    ],
}
PARTS = [
    {"role": one["role"], "name": "ann", "content": [{"type": "text", "text": one["content"]}]}
    for one in OPENAI
]
TAVERN = [{"user_name": "Ann", "character_name": "Bot", "create_date": "2024-1-1", "chat_metadata": {}}] + [
    {"name": "Ann" if role == "user" else "Bot", "is_user": role == "user", "is_system": False, "mes": text}
    for role, text in zip(NAMES, TURNS, strict=True)
]


def chatgpt() -> dict[str, Any]:
    """An export's tree, with an answer that was generated again, an empty message and one of a tool."""
    nodes: dict[str, Any] = {"root": {"id": "root", "message": None, "parent": None, "children": ["n0"]}}
    parent = "root"
    texts = [
        ("system", ""),
        *((m["role"], m["content"]) for m in OPENAI[:2]),
        ("tool", "4"),
        *zip(NAMES, TURNS, strict=True),
    ][:4]
    texts += [(m["role"], m["content"]) for m in OPENAI[2:]]
    for number, (role, text) in enumerate(texts):
        name = f"n{number}"
        message = {
            "author": {"role": role},
            "content": {"content_type": "text", "parts": [text]},
            "recipient": "all",
        }
        nodes[name] = {"id": name, "message": message, "parent": parent}
        if role == "assistant":
            nodes[f"{name}-other"] = {
                "id": f"{name}-other",
                "message": {**message, "content": {"content_type": "text", "parts": ["Other."]}},
                "parent": parent,
            }
        parent = name
    return {"title": "t", "mapping": nodes, "current_node": parent}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(*rows: dict[str, Any], delimiter: str = ",") -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def zipped(name: str, text: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("__MACOSX/._x", "")
        archive.writestr(name, text)
    return file.getvalue()


def as_parquet(*rows: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def dump(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


ONE = {"messages": OPENAI}
QUESTION = {"system": SYSTEM, "instruction": TURNS[0], "input": "", "output": TURNS[1], "source": "port"}
WHOLE: dict[str, str | bytes] = {
    "list.json": dump(OPENAI),
    "object.json": dump(ONE, indent=2),
    "array.json": dump([ONE]),
    "lists.json": dump([OPENAI]),
    "inside.json": dump({"version": 1, "data": [ONE]}),
    "inside-same-name.json": dump({"conversations": [ONE]}, indent=1),
    "paper.json": dump({"model": "m", "turns": 2, "conversation": OPENAI, "domain": "d"}),
    "developer.json": dump([{**OPENAI[0], "role": "developer"}, *OPENAI[1:]]),
    "parts.json": dump({"messages": PARTS}),
    "system-beside.json": dump({"system": SYSTEM, "messages": OPENAI[1:]}),
    "system-twice.json": dump({"system_prompt": SYSTEM, "messages": OPENAI}),
    "sharegpt.json": dump([{"id": "x_0", "system": SYSTEM, "conversations": SHAREGPT}]),
    "wildchat.jsonl": lines(WILDCHAT),
    "lmsys.jsonl": lines({**WILDCHAT, "conversation_id": "c1", "language": "en"}),
    "chatgpt.json": dump([chatgpt()]),
    "lines.jsonl": lines(ONE),
    "no-newline.jsonl": lines(ONE).rstrip("\n"),
    "blank-lines.ndjson": "\n \n" + lines(ONE) + "\n",
    "crlf.jsonl": lines(ONE).replace("\n", "\r\n"),
    "one-message-a-line.jsonl": lines(*OPENAI),
    "bom.jsonl": lines(ONE).encode("utf-8-sig"),
    "wide.jsonl": lines(ONE).encode("utf-16"),
    "wide-le.json": dump(ONE).encode("utf-16-le"),
    "lines.jsonl.gz": gzip.compress(lines(ONE)[:50].encode()) + gzip.compress(lines(ONE)[50:].encode()),
    "lines.jsonl.xz": lzma.compress(lines(ONE).encode()),
    "lines.json.bz2": bz2.compress(dump(ONE).encode()),
    "lines.jsonl.zst": zstandard.compress(lines(ONE).encode()),
    "packed.zip": zipped("inner/chats.json", dump([ONE])),
    "messages.csv": table(*OPENAI),
    "messages-crlf.tsv": table(*OPENAI, delimiter="\t").encode("utf-8-sig"),
    "cell.csv": table({"messages": dump(OPENAI), "n": 1}),
    "rows.parquet": as_parquet({"messages": OPENAI, "n": 1}),
    "rows.parquet.gz": gzip.compress(as_parquet(WILDCHAT)),
    "wrong-ending.txt": lines(ONE),
}
NO_SYSTEM: dict[str, str | bytes] = {"tavern.jsonl": lines(*TAVERN), "tavern.json": dump(TAVERN[1:])}
SHORT: dict[str, str | bytes] = {
    "columns.csv": table(QUESTION),
    "columns.jsonl": lines(QUESTION),
    "prompt.parquet": as_parquet(
        {"system_prompt": SYSTEM, "prompt": TURNS[0], "response": TURNS[1], "id": 4}
    ),
    "question.json": dump([{"system": SYSTEM, "question": TURNS[0], "answer": TURNS[1]}]),
}
FORMS = {
    **{name: (content, OPENAI) for name, content in WHOLE.items()},
    **{name: (content, OPENAI[1:]) for name, content in NO_SYSTEM.items()},
    **{name: (content, OPENAI[:3]) for name, content in SHORT.items()},
}


@pytest.fixture
def write(tmp_path) -> Callable[[str, str | bytes], Path]:
    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_conversation_in_every_command(name, write, capsys):
    content, messages = FORMS[name]
    path, users = write(name, content), [one["content"] for one in messages if one["role"] == "user"]
    (stored,) = read_conversations(path)  # trace, chat --load
    assert list(stored.messages) == messages
    (spans,) = read_conversations(path, require_user=False)  # tools spans
    assert spans == stored
    options = DriftOptions(scripts=path)
    (script,) = options.scripts_of(options.select_conversations())  # drift --scripts
    assert list(script.users) == users
    assert list(script.opening) == messages[: messages[0]["role"] == "system"]
    (case,) = Drift().build_cases(
        SuiteInputs(EvalOptions(transcripts=path), load_bank())
    )  # eval --transcripts
    assert [case.question, *case.later] == users
    (example,) = read_examples(path, left_out := Exclusions())  # train chat
    assert list(example.messages) == messages
    said = capsys.readouterr().err
    assert bool(left_out.counts) == (name == "chatgpt.json") == ("left out" in said)


@pytest.mark.parametrize("name", ["object", "sharegpt", "wildchat", "parts"])
def test_stored_conversations_are_requests_and_labelled_answers(name, write):
    row = {
        "object": ONE,
        "sharegpt": {"conversations": SHAREGPT},
        "wildchat": WILDCHAT,
        "parts": {"messages": PARTS},
    }
    rows = [{**row[name], "id": f"c{n}", "label": n % 2} for n in range(20)]
    path = write("a.jsonl", lines(*rows))
    labelled = read_labels(path)  # tools harm-judge
    assert (labelled.texts, labelled.requests) == ([TURNS[3]] * 20, [TURNS[2]] * 20)
    assert labelled.labels == [0, 1] * 10
    assert [one.text for one in read_requests(path)] == [TURNS[0]]  # eval --requests


def test_rows_that_are_messages_are_told_apart_by_their_conversation(write):
    rows = [{"conversation_id": f"c{n}", **message} for message in OPENAI for n in range(2)]
    for name, content in {
        "a.csv": table(*rows),
        "a.jsonl": lines(*rows),
        "a.parquet": as_parquet(*rows),
    }.items():
        found = read_conversations(write(name, content))
        assert [(one.name, list(one.messages)) for one in found] == [("c0", OPENAI), ("c1", OPENAI)]


def test_values_may_follow_each_other_in_any_layout(write):
    pretty = dump(ONE, indent=2)
    for content in (
        pretty + pretty,
        f"{pretty}\n\n{dump(ONE)}\n",
        f"{dump(ONE)}{dump(ONE)}",
        f"{dump(ONE)}\n{pretty}",
    ):
        found = read_conversations(write("a.json", content))
        assert [list(one.messages) for one in found] == [OPENAI, OPENAI]
    with pytest.raises(Exception, match=r"a\.jsonl:2 is not valid JSON: Invalid control"):
        read_conversations(write("a.jsonl", lines(ONE) + dump(ONE)[:40] + "\n" + lines(ONE)))


def test_without_its_current_node_an_export_is_read_to_its_last_leaf(write):
    (one,) = read_conversations(write("a.json", dump({**chatgpt(), "current_node": None})))
    assert [message["content"] for message in one.messages][-1] == "Other."
    looped = {"a": {"parent": "b", "message": None}, "b": {"parent": "a", "message": None}}
    with pytest.raises(Exception, match="1 without messages"):
        read_conversations(write("b.json", dump({"mapping": looped, "current_node": "a"})))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("two.zip", zipped("a.json", dump(ONE))[:-30], "two.zip is damaged or cut short"),
        ("cut.jsonl.gz", gzip.compress(lines(ONE).encode())[:-9], "damaged or cut short"),
        ("cut.jsonl.zst", zstandard.compress(lines(ONE).encode())[:-9], "damaged or cut short"),
        ("cut.parquet", as_parquet({"messages": OPENAI})[:-9], "damaged or cut short"),
        ("mixed.jsonl", lines(ONE).encode() + b'{"messages": "\xe9"}\n', r"mixed.jsonl:2 is not UTF-8"),
        ("ragged.csv", "question,answer\na,b\nc\n", "1 fields where the header has 2"),
        ("twice.csv", "question,question\na,b\n", "has the column 'question' twice"),
        ("huge.json", '{"messages": [], "n": ' + "9" * 5000 + "}", "is not valid JSON"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(name, content, reason, write):
    path = write(name, content)
    for reader in (read_conversations, lambda path: read_examples(path, Exclusions())):
        with pytest.raises(Exception, match=reason) as caught:
            reader(path)
        assert type(caught.value).__name__ == "UserError"
        assert "\n" not in str(caught.value)


def test_what_is_logged_is_read_back_over_all_of_unicode(tmp_path):
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    texts = ["".join(map(chr, points[start : start + 4096])) for start in range(0, len(points), 4096)]
    messages = [{"role": NAMES[index % 2], "content": text} for index, text in enumerate(texts)]
    append_lines(
        tmp_path / "conversations.jsonl", [{"id": "s/0/baseline", "domain": "d", "messages": messages}]
    )
    (read,) = read_conversations(tmp_path / "conversations.jsonl")
    assert list(read.messages) == messages
