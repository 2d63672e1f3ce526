"""The command `drift`: a whole study of a tiny model, what it writes, what it refuses, and that it goes on where it was."""

import json

import pytest
from commands import refused

from personatlas.cli.app import main
from personatlas.persona.axis import load_axis
from personatlas.persona.formats import read_conversations
from personatlas.steering.conversations import runner
from personatlas.steering.drift.options import DriftOptions
from personatlas.steering.drift.result import DriftResult
from personatlas.steering.drift_monitor import ReferenceConversation, ReferenceConversations, load_reference

HOW = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "4"]
TURNS = ["--turns", "3", "--false-alarms", "0.4"]
CAP = "p90@1,2"
ARMS = ["baseline", CAP, f"{CAP}, adaptive"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripts") / "scripts.jsonl"
    rows = [
        {
            "id": f"{domain}-{n}",
            "domain": domain,
            "messages": [
                {"role": "user", "content": f"{word} {n}"},
                {"role": "user", "content": f"more {word}?"},
                {"role": "user", "content": "End."},
            ],
        }
        for domain, word, count in (
            ("coding", "code", 11),
            ("everyday", "bread", 11),
            ("therapy", "grief", 3),
        )
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told(tiny_run, scripts, out, *more):
    asked = [
        "drift",
        str(tiny_run / "tiny"),
        "--axis",
        str(tiny_run / "run"),
        "--arm",
        "cap:p90@1,2",
        "--turns",
        "3",
        "--false-alarms",
        "0.4",
    ]
    return [*asked, "--seeds", "2", "--scripts", str(scripts), "--out", str(out), *HOW, *more]


@pytest.fixture(scope="module")
def study(tiny_run, scripts, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "drift"
    main(told(tiny_run, scripts, out))
    return out


def test_a_study_has_three_arms_whose_alarm_is_calibrated_on_its_own_reference_conversations(study, tiny_run):
    content = json.loads((study / "drift.json").read_text())
    assert content["arms"] == ARMS
    assert DriftResult.load(study).to_json() == content
    assert content["conversations"] == {"coding": 22, "everyday": 22, "therapy": 6, "all": 50}
    for domain in ("coding", "therapy", "all"):
        for arm in ARMS:
            rows = content["trajectories"][domain][arm]
            assert [row["turn"] for row in rows] == [1, 2, 3]
            assert all(row["low"] <= row["mean"] <= row["high"] for row in rows)
            assert content["slopes"][domain][arm]["n"] <= content["conversations"][domain]
    # what the text of a capped answer shows, read without the cap, is another figure than its capped projection
    assert set(content["uncapped"]["all"]) == set(ARMS[1:])
    read = [row["mean"] for row in content["uncapped"]["all"][CAP]]
    assert read != [row["mean"] for row in content["trajectories"]["all"][CAP]]
    watch = content["watch"]
    assert watch["source"] == "this study's own reference conversations"
    assert watch["alarm"]["n"] == 44
    # the reference domains' scripts count alarms too, each with a limit that the others set
    assert content["alarms"]["all"]["baseline"]["n"] == 50
    assert content["alarms"]["therapy"]["baseline"]["n"] == 6
    wrote = content["wrote"]
    assert (wrote["baseline"]["acted"], wrote[CAP]["acted"]) == (0, 1)
    assert 0 < wrote[ARMS[2]]["acted"] < 1
    assert wrote[CAP]["fired"] > 0
    cost = content["cost"]
    assert cost["n"] == 24
    assert cost["arms"][CAP]["low"] <= cost["arms"][CAP]["value"] <= cost["arms"][CAP]["high"]
    assert abs(cost["arms"][ARMS[2]]["value"]) <= abs(cost["arms"][CAP]["value"])
    assert content["next_turn"]["projection"]["scripts"] == 25
    axis = load_axis(tiny_run / "run" / "axis")
    reference = load_reference(study / "reference.json", axis)
    assert len(reference.conversations) == 44
    assert reference.provenance["domains"] == ["coding", "everyday"]


def test_one_sample_of_our_own_scripts_is_enough_to_calibrate_an_alarm():
    options = DriftOptions()
    conversations = options.select_conversations()
    scripts = [one for one in options.scripts_of(conversations) if one.domain in options.references]
    rows = tuple(ReferenceConversation(script.name, script.domain, (0.0,)) for script in scripts)
    reference = ReferenceConversations(rows, {})
    reference.require_enough(options.false_alarms)
    assert len(reference.scripts) == 50


def test_its_conversations_can_be_traced_and_its_page_names_every_domain(study, tiny_run, capsys):
    chats = read_conversations(study / "conversations.jsonl")
    assert len(chats) == 3 * 50
    rows = [json.loads(line) for line in (study / "turns.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 50 * 3
    one = next(
        chat for chat in chats if chat.name.startswith("therapy-0_1_p90") and chat.name.endswith("adaptive")
    )
    own = [row for row in rows if (row["arm"], row["conversation"]) == (ARMS[2], "therapy-0/1")]
    assert [message["content"] for message in one.messages] == [
        text for row in own for text in (row["user"], row["text"])
    ]
    page = (study / "drift.html").read_text()
    for text in ("therapy", "adaptive", "What it costs", "turns-2", "shaded"):
        assert text in page
    main(["trace", str(tiny_run / "tiny"), str(study / "conversations.jsonl"), "--axis", str(tiny_run / "run"), "--reference", str(study / "reference.json"), "--json", *HOW[:4]])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["alarm"]["n"] == 44


def test_the_same_command_again_asks_nothing_and_finds_the_same(
    study, tiny_run, scripts, capsys, monkeypatch
):
    before = {
        name: (study / name).read_bytes()
        for name in ("drift.json", "turns.jsonl", "reference.json", "drift.html")
    }
    monkeypatch.setattr(runner, "_answer", None)
    main(told(tiny_run, scripts, study, "--json"))
    assert json.loads(capsys.readouterr().out)["arms"] == ARMS
    assert {name: (study / name).read_bytes() for name in before} == before
    assert "with seed 0, not 1" in refused(capsys, told(tiny_run, scripts, study, "--seed", "1"))


def test_without_enough_reference_conversations_there_is_no_alarm_and_a_page_all_the_same(
    tiny_run, scripts, tmp_path, capsys
):
    main(
        told(
            tiny_run,
            scripts,
            tmp_path / "few",
            "--domains",
            "therapy,coding",
            "--conversations",
            "2",
            "--json",
        )
    )
    content = json.loads(capsys.readouterr().out)
    assert content["arms"] == ARMS[:2]
    assert content["watch"]["alarm"] is None
    assert content["alarms"] == {}
    assert content["next_turn"] is None
    assert "no alarm is calibrated" in content["warnings"][0]
    assert "Not computed" in (tmp_path / "few" / "drift.html").read_text()


def test_a_study_of_one_answer_is_measured_by_the_axis(tiny_run, scripts, tmp_path, capsys):
    asked = told(tiny_run, scripts, tmp_path / "one", "--domains", "coding", "--conversations", "1", "--json")
    for option in ("--turns", "--seeds"):
        asked[asked.index(option) + 1] = "1"
    main(asked)
    content = json.loads(capsys.readouterr().out)
    assert content["watch"]["baseline"]["of"] == "the axis's default answers"
    assert content["slopes"]["coding"] == {"baseline": None, CAP: None}
    assert content["trajectories"]["coding"][CAP][0]["low"] is None


def test_an_axis_without_caps_is_studied_as_the_model_is(tiny_run, scripts, tmp_path, capsys):
    asked = told(tiny_run, scripts, tmp_path / "plain", "--domains", "therapy", "--json")
    del asked[asked.index("--arm") : asked.index("--arm") + 2]
    main(asked)
    content = json.loads(capsys.readouterr().out)
    assert content["arms"] == ARMS[:1]
    assert (content["interventions"], content["cost"]) == ({}, None)
    assert "the axis's default answers" in content["watch"]["baseline"]["of"]
    assert not (tmp_path / "plain" / "reference.json").exists()
    assert 'data-figure="differences"' not in (tmp_path / "plain" / "drift.html").read_text()


def test_what_cannot_be_studied_is_refused_in_one_line_before_a_model_is_loaded(
    tiny_run, scripts, tmp_path, capsys
):
    no_model = tmp_path / "no model"
    no_model.mkdir()

    def says(*more):
        asked = ["drift", str(no_model), "--axis", str(tiny_run / "run"), "--scripts", str(scripts)]
        return refused(capsys, [*asked, "--out", str(tmp_path / "out"), *more])

    assert "--turns 0 is below 1" in says("--turns", "0")
    assert "'chess' is not one of coding" in says("--domains", "chess")
    assert "outside 0..1" in says("--false-alarms", "1")
    assert "needs --user-model" in says("--user", "http://127.0.0.1:9")
    assert "give --user URL with it" in says("--user-model", "someone")
    assert "is no reference.json" in says("--reference", str(scripts))
    assert "temperature 200" in says("--temperature", "200")
