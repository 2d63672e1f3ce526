"""`train chat`, end to end on a tiny model: it learns what the assistant says, goes on where it stopped, and refuses plainly."""

import json
import shutil
from dataclasses import astuple, replace

import pytest
import torch
from chats import GOOD, in_character, rollout, turns, write_rows, write_run
from tiny_gpt import SHAPE, lively

from personatlas.cli.app import main
from personatlas.persona.artifacts import read_json, write_json
from personatlas.persona.errors import UserError
from personatlas.persona.logs import read_lines
from personatlas.training.chat.plan import RELATIVE_RATE, make_chat_plan, rows_per_step
from personatlas.training.export.huggingface import export_model, load_exported
from personatlas.training.finetune import find_base_model
from personatlas.training.loop import step
from personatlas.training.loop.checkpoints import checkpoints_in
from personatlas.training.optim.schedule import PeakRates, peak_rates
from personatlas.training.plan import CHIPS, Plan, batch_for, make_plan, optimal_tokens

TINY = replace(SHAPE, vocabulary=320, context=96)
QUICK = ["--device", "cpu", "--held-share", "0.1"]


@pytest.fixture(scope="module")
def base(chat_tokenizer, tmp_path_factory):
    return export_model(lively(TINY), chat_tokenizer, tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [
        {"persona": role, "question": f"{number}?", "answer": in_character(role, number)[:30]}
        for role in ("pirate", "butler")
        for number in range(30)
    ]
    odd = [{"messages": turns("a")}, {"messages": turns("a", "sea " * 200)}]
    return write_rows(tmp_path_factory.mktemp("data") / "voices.jsonl", [*rows, *odd])


def tune(base, out, *how, data=()):
    paths = [part for one in data for part in ("--data", str(one))]
    main(["train", "chat", str(base), "--out", str(out), *QUICK, *paths, *how])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["train", "chat", *map(str, arguments)])
    assert caught.value.code == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("personatlas: ")
    return text


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tuned"
    tune(base, out, "--epochs", "2", "--rate-scale", "1", data=[data])
    return out


def losses(run):
    return [row["loss"] for row in read_lines(run / "metrics.jsonl") if row["kind"] == "step"]


def test_tuning_learns_the_answers_and_leaves_a_model_folder(base, tuned):
    found = read_json(tuned / "run.json")
    before, after = found["result"]["sources"]["before"], found["result"]["sources"]["after"]
    assert after["voices"]["loss"] < before["voices"]["loss"] - 0.5
    assert after["all"]["conversations"] == found["data"]["held_out"] >= 6
    assert found["kind"] == "training"
    assert found["parent"]["sha256"] == find_base_model(base).sha256
    assert found["result"]["epochs"] == pytest.approx(2, abs=0.2)
    model = load_exported(tuned / "model")
    assert model.shape == TINY
    assert not torch.equal(model.lm_head.weight, load_exported(base).lm_head.weight)
    assert (tuned / "tokenizer" / "chat_template.jinja").is_file()


def test_what_is_left_out_is_in_the_record_and_said(tuned, base, data, tmp_path, capsys):
    assert read_json(tuned / "run.json")["data"]["left_out"] == {
        "without an assistant turn": {"count": 1, "examples": ["voices.jsonl:61"]},
        "longer than the context of 96 tokens": {"count": 1, "examples": ["voices.jsonl:62"]},
    }
    tune(base, tmp_path / "run", "--epochs", "0.2", data=[data])
    said_ = capsys.readouterr()
    assert "left out: 1 without an assistant turn (voices.jsonl:61)" in said_.err
    assert "nats a token" in said_.out


def test_every_step_is_told_of(tuned):
    rows = read_lines(tuned / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, len(losses(tuned)) + 1))
    whole = [row["step"] for row in rows if row["kind"] == "held-out" and "sources" in row]
    assert whole == [0, len(losses(tuned))]
    assert {row["step"] for row in read_lines(tuned / "samples.jsonl")} >= {0, len(losses(tuned))}


def test_the_same_command_on_a_finished_run_changes_nothing(base, data, tuned, capsys):
    before = {path: path.read_bytes() for path in tuned.rglob("*.jsonl")}
    tune(base, tuned, "--epochs", "2", "--rate-scale", "1", data=[data])
    assert {path: path.read_bytes() for path in tuned.rglob("*.jsonl") if "metrics" not in path.name} == {
        path: text for path, text in before.items() if "metrics" not in path.name
    }
    assert "perplexity" in capsys.readouterr().out


def test_it_goes_on_from_a_checkpoint_to_the_same_numbers(base, data, tuned, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(tuned, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(checkpoints_in(again)[-1].path)
    assert checkpoints_in(again)[-1].step < len(losses(tuned))
    tune(base, again, "--epochs", "2", "--rate-scale", "1", data=[data])
    assert losses(again) == losses(tuned)
    assert (again / "model" / "model.safetensors").read_bytes() == (
        tuned / "model" / "model.safetensors"
    ).read_bytes()


def test_a_run_goes_on_with_nothing_else_than_it_began_with(base, data, tuned, tmp_path, capsys):
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": f"{i}?", "response": "I."} for i in range(9)])
    common = [base, "--out", tuned, *QUICK, "--rate-scale", "1"]
    assert "holds a run with epochs 2.0, not 3.0" in refused(capsys, *common, "--data", data, "--epochs", "3")
    assert "holds a run with data" in refused(capsys, *common, "--data", other, "--epochs", "2")


def test_a_run_of_rollouts_is_data_and_roles_can_be_held_out(base, tmp_path):
    keys = [f"{role}/0/q{i}/0" for role in ("default", "ghost", "pirate") for i in range(12)]
    run = write_run(tmp_path / "rolled", [rollout(key, answer=f"Arr {key[:3]}.") for key in keys])
    tune(base, tmp_path / "run", "--held-out-roles", "pirate", data=[run])
    found = read_json(tmp_path / "run" / "run.json")
    assert set(found["result"]["sources"]["after"]) == {"all", "rolled", "rolled, held-out roles"}
    assert found["result"]["sources"]["after"]["rolled, held-out roles"]["conversations"] == 12
    assert found["data"]["train"] + found["data"]["held_out"] == 36


def test_minutes_are_kept_at_the_speed_that_is_measured(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "MEASURED_STEPS", (4, 4))
    tune(base, tmp_path / "run", "--minutes", "0.03", data=[data])
    found = read_json(tmp_path / "run" / "run.json")
    assert found["plan"]["horizon"] == "what 0.03 minutes hold"
    assert 0.5 < found["plan"]["seconds"] < 2.5
    assert len(losses(tmp_path / "run")) == found["plan"]["steps"]


def test_a_checkpoint_of_a_run_and_a_run_itself_are_bases(tuned, data, tmp_path):
    assert find_base_model(tuned).folder == tuned / "model"
    first = checkpoints_in(tuned)[0].path
    tune(first, tmp_path / "run", "--epochs", "0.2", data=[data])
    assert read_json(tmp_path / "run" / "run.json")["parent"]["sha256"] == find_base_model(first).sha256


def test_what_is_no_base_is_refused_in_one_line(base, data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "axis").mkdir()
    (tmp_path / "axis" / "run.json").write_text("{}")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "run.json").write_text("[]")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text('{"kind": "training"}')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llama"}')
    reasons = {"nowhere": "does not exist", "empty": "no training run", "axis": "another kind", "list": "not an object", "half": "has not finished", "foreign": "a GPT of this kind has"}  # fmt: skip
    for name, reason in reasons.items():
        assert reason in refused(capsys, tmp_path / name, "--out", tmp_path / "out", "--data", data)
    assert "choose another folder" in refused(capsys, base, "--out", base, "--data", data)


def test_wrong_options_are_refused_in_one_line(base, data, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert "give conversations: --data FILE" in refused(capsys, base, *out)
    assert "give one of them" in refused(
        capsys, base, *out, "--data", data, "--epochs", "1", "--minutes", "1"
    )
    assert "--rate-scale 0" in refused(capsys, base, *out, "--data", data, "--rate-scale", "0")
    assert "--seed -1 is not in" in refused(capsys, base, *out, "--data", data, "--seed", "-1")
    assert "--micro-batch 0: give 1" in refused(capsys, base, *out, "--data", data, "--micro-batch", "0")
    assert "1000 times at most" in refused(capsys, base, *out, "--data", f"{data}=100000x")
    assert "say 0.3x" in refused(capsys, base, *out, "--data", f"{data}=0.3")
    one = write_rows(tmp_path / "one.jsonl", [GOOD])
    assert "too few different questions" in refused(capsys, base, *out, "--data", one)
    few = write_rows(tmp_path / "few.jsonl", [{"prompt": f"{i}?", "response": "sea"} for i in range(4)])
    assert "reads no conversation" in refused(capsys, base, *out, "--data", f"{few}=0.01x")
    long = write_rows(
        tmp_path / "long.jsonl", [{"prompt": f"{i}?", "response": "sea " * 300} for i in range(9)]
    )
    assert "8 of 8 conversations are longer than the base's context" in refused(
        capsys, base, *out, "--data", long
    )


# The plan


PEAKS = PeakRates(0.01, 0.1, 0.004, 0.002)


def plan(rows=2000, counted=1_000_000, **options):
    return make_chat_plan(TINY, PEAKS, rows=rows, counted=counted, chip=CHIPS["h100"], **options)


def test_the_batch_follows_the_answers_tokens_and_the_rates_the_base():
    one = plan()
    assert one.batch == rows_per_step(2000, 1_000_000, 1) * TINY.context == 5 * TINY.context
    assert one.steps == 400
    rates = PeakRates(one.matrix_rate, one.embedding_rate, one.head_rate, one.norm_rate)
    assert rates == PeakRates(*(RELATIVE_RATE * value for value in astuple(PEAKS)))
    twice = plan(rows=4000)  # as many answers in twice the text: the same steps
    assert (twice.steps, twice.adam_beta2) == (one.steps, one.adam_beta2)
    assert twice.batch == 2 * one.batch


def test_the_bases_rates_come_from_its_run_or_else_from_its_shape(tmp_path, base):
    plan = make_plan(4, vocabulary=320)
    of_plan = PeakRates(plan.matrix_rate, plan.embedding_rate, plan.head_rate, plan.norm_rate)
    of_shape = peak_rates(batch_for(optimal_tokens(TINY), TINY.context), TINY.width)
    assert of_plan != of_shape
    run = tmp_path / "run"
    shutil.copytree(base, run / "model")
    shutil.copytree(base, run / "checkpoints" / "step-000001")
    for stage, expected in (("base", of_plan), ("chat", of_shape)):
        content = {"kind": "training", "asked": {"stage": stage}, "plan": plan.to_json()}
        write_json(run / "run.json", content)
        for folder in (run, run / "model", run / "checkpoints" / "step-000001"):
            assert find_base_model(folder).rates == expected
    assert find_base_model(base).rates == of_shape


def test_rates_rise_and_fall_straight_to_zero():
    made = plan()
    rates = [made.rate_at(step) for step in range(made.steps)]
    peak = rates.index(max(rates))
    assert rates[peak] == 1.0
    assert peak <= made.warmup
    assert all(a > b for a, b in zip(rates[peak + 1 :], rates[peak + 2 :], strict=False))
    assert 0 < rates[-1] < 0.01
    assert made.weight_decay == 0.0


def test_gpus_share_a_step_evenly_and_the_least_run_has_a_step():
    assert rows_per_step(2000, 1_000_000, 4) % 4 == 0
    assert plan(rows=1, counted=5).steps == 1
    with pytest.raises(UserError, match="nothing to tune on"):
        plan(rows=0, counted=0)


def test_a_plan_is_read_back_as_it_was():
    assert Plan.from_json(json.loads(json.dumps(plan().to_json()))) == plan()
