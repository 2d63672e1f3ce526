"""Traces of stored conversations: whose tokens are whose, what is left out, and the command."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import refused
from families import tiny_model
from sample_pages import a_study
from test_drift_monitor import reference_conversations
from tiny_axis import axis_of

from personatlas.cli.app import main
from personatlas.cli.drift_tables import print_trace
from personatlas.persona.axis import load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Conversation, read_conversations
from personatlas.steering.conversations.scripts import EVERYDAY, SCRIPTS
from personatlas.steering.drift.trace import write_trace_page
from personatlas.steering.drift_monitor import save_reference
from personatlas.steering.traces import trace_conversations


def chat(*answers):
    messages = [{"role": "user", "content": "Hello there"}]
    for answer in answers:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
    return messages


def talk(name, *answers):
    return Conversation(name, tuple(chat(*answers)))


def test_a_turn_is_the_mean_over_its_answers_tokens_in_one_reading_of_the_whole():
    model = tiny_model()
    axis = axis_of(model)
    conversations = [talk("long", "I am here.", "Then nothing.", "So it goes."), talk("short", "Hi.")]
    long, short = trace_conversations(model, axis, conversations)
    assert [len(one.turns) for one in (long, short)] == [3, 1]
    assert (long.left_out, short.left_out) == (0, 0)
    for one in (long, short):
        ids = torch.tensor([one.ids])
        kept = []
        handle = model.blocks[axis.layer].register_forward_hook(
            lambda _m, _a, output, kept=kept: kept.append(
                output if isinstance(output, torch.Tensor) else output[0]
            )
        )
        with torch.no_grad():
            model.hf(input_ids=ids)
        handle.remove()
        places = kept[0][0].float() @ axis.at(axis.layer)
        assert torch.allclose(one.projection, places, atol=1e-4)
        for turn in one.turns:
            assert turn.projection == pytest.approx(float(places[turn.start : turn.stop].mean()), abs=1e-4)


def test_turns_beyond_the_context_are_left_out_and_counted():
    model = tiny_model()
    room = model.hf.config.max_position_embeddings
    axis = axis_of(model)
    (one,) = trace_conversations(model, axis, [talk("long", "Hi.", "word " * room, "Bye.")])
    assert (len(one.turns), one.left_out) == (1, 2)
    with pytest.raises(UserError, match=rf"long: no answer of an assistant that fits into the {room} tokens"):
        trace_conversations(model, axis, [talk("long", "word " * room)])
    with pytest.raises(UserError, match="none: no answer of an assistant: there"):
        trace_conversations(model, axis, [talk("none")])


@pytest.fixture
def files(tmp_path):
    calm = [{"messages": chat(f"I am calm {n}.", f"Still {n}.", "Yes.")} for n in range(48)]
    (tmp_path / "reference.jsonl").write_text("".join(json.dumps(one) + "\n" for one in calm))
    odd = chat(*["xq zz 9 !! xq zz 9 !!" for _ in range(6)])
    (tmp_path / "odd.json").write_text(json.dumps({"id": "odd", "messages": odd}))
    return tmp_path


def told(tiny_run, files, *more):
    how = ["--device", "cpu", "--dtype", "float32"]
    return [
        "trace",
        str(tiny_run / "tiny"),
        str(files / "odd.json"),
        "--axis",
        str(tiny_run / "run"),
        *how,
        *more,
    ]


def test_the_command_says_z_of_every_turn_and_alarms_only_where_they_are_calibrated(tiny_run, files, capsys):
    main(told(tiny_run, files, "--json"))
    content = json.loads(capsys.readouterr().out)
    (one,) = content["conversations"]
    assert content["alarm"] is None
    assert one["lowest_z"] == min(turn["z"] for turn in one["turns"])
    assert one["slope"] == pytest.approx(
        np.polyfit(range(6), [turn["projection"] for turn in one["turns"]], 1)[0]
    )
    assert len(one["turns"]) == 6
    assert all("alarm" not in turn for turn in one["turns"])
    assert len(one["projection"]) == len(one["ids"])
    baseline = content["baseline"]
    means = baseline["by_turn"] or [baseline["mean"]]
    for number, turn in enumerate(one["turns"]):
        mean = means[min(number, len(means) - 1)]
        assert turn["z"] == pytest.approx((turn["projection"] - mean) / baseline["spread"])
    for rule in ("cusum", "two_of_three"):
        main(told(tiny_run, files, "--reference", str(files / "reference.jsonl"), "--rule", rule, "--json"))
        content = json.loads(capsys.readouterr().out)
        assert content["alarm"]["n"] == 48
        assert 0 <= content["alarm"]["interval"][0] <= content["alarm"]["false_alarms"] <= 0.5
        assert all(isinstance(turn["alarm"], bool) for turn in content["conversations"][0]["turns"])
    main(told(tiny_run, files, "--reference", str(files / "reference.jsonl")))
    assert "of 48 reference conversations, each with a limit that other scripts set" in " ".join(
        capsys.readouterr().out.split()
    )


def test_many_conversations_open_with_those_to_read_first_and_the_page_stays_small(tmp_path, capsys):
    study = a_study([f"chat-{n}" for n in range(5000)], answers=6, words=4)
    rows = [study.conversations[index] for index in study.ranked]
    raised = [row.first_alarm is not None for row in rows]
    assert raised == sorted(raised, reverse=True)
    assert 0 < sum(raised) < 5000
    for group in (rows[: sum(raised)], rows[sum(raised) :]):
        assert [row.lowest_z for row in group] == sorted(row.lowest_z for row in group)
    write_trace_page(tmp_path / "trace.html", study)
    page = (tmp_path / "trace.html").read_text()
    finding = (
        f"{sum(raised):,} of 5,000 conversations raise the alarm; of conversations that do not drift 5% do."
    )
    assert finding in page
    assert page.count('<section class="sample"') == 20
    assert len(page) < 6_000_000  # of which plotly is 4.8
    print_trace(study)
    out = capsys.readouterr().out
    assert " ".join(out.split()).startswith(finding)
    assert "4,980 more conversations: --json has all" in " ".join(out.split())
    assert out.count("turn  tokens") == 5


def test_what_cannot_be_traced_is_refused_in_one_line(tiny_run, files, capsys):
    (files / "few.jsonl").write_text(json.dumps(chat("Hi.", "Ho.")) + "\n")
    assert "reference conversations of 1 script" in refused(
        capsys, told(tiny_run, files, "--reference", str(files / "few.jsonl"))
    )
    assert "outside 0..1" in refused(capsys, told(tiny_run, files, "--false-alarms", "2"))
    (files / "odd.json").write_text("{}")
    assert "holds no conversation" in refused(capsys, told(tiny_run, files))


def test_a_reference_json_beside_the_axis_is_found_and_one_of_another_axis_is_refused(
    tiny_run, files, capsys, tmp_path
):
    run = shutil.copytree(tiny_run / "run", tmp_path / "beside")
    axis = load_axis(run / "axis")
    calm = reference_conversations(axis)
    save_reference(run / "reference.json", axis, axis.model, calm, {})
    asked = [*told(tiny_run, files), "--json"]
    asked[asked.index("--axis") + 1] = str(run)
    main(asked)
    beside = json.loads(capsys.readouterr().out)
    assert (beside["alarm"]["n"], beside["baseline"]["of"]) == (80, "reference conversations")
    main([*told(tiny_run, files, "--reference", str(run / "reference.json")), "--json"])
    assert json.loads(capsys.readouterr().out) == beside
    other = replace(axis, vectors=-axis.vectors)
    save_reference(run / "reference.json", other, axis.model, calm, {})
    assert "along another direction" in refused(capsys, asked)


def test_our_own_scripts_have_eight_turns_ten_in_each_domain_of_the_study_and_forty_of_everyday_help():
    scripts = read_conversations(SCRIPTS)
    domains = dict.fromkeys(("coding", "writing", "therapy", "philosophy"), 10) | {EVERYDAY: 40}
    assert Counter(one.domain for one in scripts) == domains
    assert [one.name for one in scripts] == [
        f"{name}-{n:02}" for name, most in domains.items() for n in range(1, most + 1)
    ]
    assert all([message["role"] for message in one.messages] == ["user"] * 8 for one in scripts)
    said = [message["content"] for one in scripts for message in one.messages]
    assert len(set(said)) == len(said)
    assert all(20 <= len(text) <= 600 and text == text.strip() for text in said)
