"""Stored conversations run again: their answers beside the new ones; and the page of traces."""

import json
from dataclasses import replace

import pytest
from commands import refused
from test_drift_monitor import reference_conversations

from personatlas.cli.app import main
from personatlas.persona.axis import load_axis
from personatlas.steering.conversations import runner
from personatlas.steering.drift_monitor import save_reference

CAP = "p90@1,2"
HOW = ["--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def chats(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Welcome."},
        {"role": "user", "content": "Hello <b>there</b>"},
        {"role": "assistant", "content": "I am & was."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "Nothing."},
        {"role": "user", "content": "Why?"},
    ]
    scripted = [{"role": "user", "content": text} for text in ("Only asked.", "Again.")]
    rows = [{"id": "talk", "messages": messages}, {"id": "script", "domain": "coding", "messages": scripted}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(tiny_run, chats, *more):
    model, run, out = (str(path) for path in (tiny_run / "tiny", tiny_run / "run", chats.parent / "again"))
    arguments = ["drift", model, "--scripts", str(chats), "--axis", run, "--arm", "cap:p90@1,2", "--out", out]
    return [*arguments, "--max-new-tokens", "4", *HOW, *more]


def test_users_are_asked_again_and_stored_answers_stand_at_the_turn_that_they_follow(
    tiny_run, chats, capsys, monkeypatch
):
    main(command(tiny_run, chats, "--json"))
    content = json.loads(capsys.readouterr().out)
    stored = json.loads((chats.parent / "again" / "drift.json").read_text())["stored"]
    assert content["stored"] == stored
    talk, script = stored["conversations"]
    assert list(talk["arms"]) == ["baseline", CAP, "stored"]
    assert [row["text"] for row in talk["arms"]["stored"]] == ["I am & was.", "Nothing."]
    assert [row["user"] for row in talk["arms"]["stored"]] == ["Hello <b>there</b>", "And then?"]
    assert len(talk["arms"][CAP]) == 3
    assert "stored" not in script["arms"]
    assert len(script["arms"]["baseline"]) == 2
    assert all(row["acted"] for row in talk["arms"][CAP])
    assert not any(row["acted"] for row in talk["arms"]["baseline"])
    assert stored["mean"]["n"] == 2
    assert content["means"]["all"]["baseline"]["n"] == 5
    rows = [json.loads(line) for line in (chats.parent / "again" / "turns.jsonl").read_text().splitlines()]
    assert {row["conversation"] for row in rows} == {"talk/0", "script/0"}
    text = (chats.parent / "again" / "drift.html").read_text()
    assert "Hello &lt;b&gt;there&lt;/b&gt;" in text
    assert "I am &amp; was." in text
    monkeypatch.setattr(runner, "_answer", None)  # nothing is answered twice
    main(command(tiny_run, chats))
    shown = " ".join(capsys.readouterr().out.split())
    assert "stored: mean projection" in shown
    assert "beside the baseline" in shown


def test_with_a_calibrated_alarm_there_is_an_arm_whose_cap_acts_while_it_is_on(tiny_run, chats, capsys):
    axis = load_axis(tiny_run / "run" / "axis")
    high = [
        replace(one, projections=tuple(1e4 + p for p in one.projections))
        for one in reference_conversations(axis)
    ]
    save_reference(chats.parent / "reference.json", axis, axis.model, high, {})
    main(command(tiny_run, chats, "--reference", str(chats.parent / "reference.json"), "--json"))
    content = json.loads(capsys.readouterr().out)
    arms = content["stored"]["conversations"][0]["arms"]
    assert list(arms) == ["stored", "baseline", CAP, f"{CAP}, adaptive"]
    assert content["arms"] == ["baseline", CAP, f"{CAP}, adaptive"]
    # every answer is far below references like those
    assert [row["acted"] for row in arms[f"{CAP}, adaptive"]] == [False, True, True]
    assert [row["raised"] for row in arms[f"{CAP}, adaptive"]] == [True, False, False]
    assert arms["stored"][1]["alarm"]
    assert content["watch"]["source"].endswith("reference.json")
    assert "drift begins" in (chats.parent / "again" / "drift.html").read_text()


def test_what_cannot_be_asked_again_is_refused_in_one_line(tiny_run, chats, capsys):
    assert "--turns 0 is below 1" in refused(capsys, command(tiny_run, chats, "--turns", "0"))
    assert "does not exist" in refused(capsys, command(tiny_run, chats.parent / "none.jsonl"))
    arguments = ["adds:8@1" if text == "cap:p90@1,2" else text for text in command(tiny_run, chats)]
    assert "arm 'adds:8@1' is not baseline, random:3, or such as cap:p50@18-23" in refused(capsys, arguments)


def test_a_trace_is_a_page_with_every_token_of_the_answers(tiny_run, chats, capsys):
    one = chats.parent / "one.json"
    one.write_text(chats.read_text().splitlines()[0])
    page = chats.parent / "trace.html"
    asked = ["trace", str(tiny_run / "tiny"), str(one), "--axis", str(tiny_run / "run"), *HOW]
    main([*asked, "--html", str(page), "--json"])
    (content,) = json.loads(capsys.readouterr().out)["conversations"]
    text = page.read_text()
    tokens = sum(stop - start for start, stop in (turn["tokens"] for turn in content["turns"]))
    assert text.count('<span class="t"') == tokens
    assert "Hello &lt;b&gt;there&lt;/b&gt;" in text
    for turn in content["turns"]:
        assert f"{turn['projection']:.1f}, z {turn['z']:+.1f}" in text
    assert "No alarm is calibrated" in text
    assert "this is a folder" in refused(capsys, [*asked, "--html", str(chats.parent)])
