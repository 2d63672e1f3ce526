"""`train base` end to end on small texts: what it makes, going on after any end, and what goes wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from base_runs import book, command, environment, losses, train
from corpora import write_book
from transformers import AutoModelForCausalLM

from personatlas.cli.app import main
from personatlas.persona.artifacts import read_json
from personatlas.persona.errors import UserError
from personatlas.training import pretrain
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.token_shards import open_tokens
from personatlas.training.export.huggingface import load_exported
from personatlas.training.loop import checkpoints
from personatlas.training.loop import step as stepping
from personatlas.training.loop.checkpoints import checkpoints_in, newest_resumable
from personatlas.training.loop.run_log import read_metrics
from personatlas.training.options import CorpusOptions
from personatlas.training.plan import CHIPS, make_plan
from personatlas.training.run import TrainResult


def test_a_run_learns_and_leaves_an_ordinary_model(base_result):
    out, result = base_result.folder, base_result
    found = losses(out)
    assert sorted(found) == list(range(1, 40))
    assert found[1][0] > 5 > 4 > found[39][0]
    assert result.held_out.bits_per_byte < 2.5
    assert result.to_json() == read_json(out / "run.json")["result"]
    assert TrainResult.load(out) == result
    ours, ids = load_exported(out / "model"), torch.randint(300, (2, 30))
    theirs = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-5)


def test_checkpoints_stand_at_powers_of_two_and_two_can_be_gone_on_from(base_run):
    found = checkpoints_in(base_run)
    assert [one.step for one in found] == [0, 1, 2, 4, 8, 16, 32, 39]
    assert [one.step for one in found if one.is_resumable] == [32, 39]
    assert torch.equal(
        load_exported(found[-1].path).lm_head.weight, load_exported(base_run / "model").lm_head.weight
    )


def test_a_finished_run_is_taken_as_it_is(base_run, books):
    before = (base_run / "metrics.jsonl").read_text()
    assert train(books, base_run).held_out == TrainResult.load(base_run).held_out
    steps = [line for line in (base_run / "metrics.jsonl").read_text().splitlines() if '"event"' not in line]
    assert steps == [line for line in before.splitlines() if '"event"' not in line]


@pytest.mark.parametrize("at", [3, 16, 37])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(base_run, books, tmp_path, monkeypatch, at):
    """Ctrl-C in the middle of a step: the step is finished, saved, and the process ends."""
    step = stepping.Stepper.step

    def interrupted(self, number, *how):
        if number == at:
            signal.raise_signal(signal.SIGINT)
        return step(self, number, *how)

    monkeypatch.setattr(stepping.Stepper, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(books, tmp_path / "run", like=base_run)
    assert newest_resumable(tmp_path / "run").step == at + 1
    monkeypatch.undo()
    train(books, tmp_path / "run", like=base_run)
    assert losses(tmp_path / "run") == losses(base_run)
    one, two = (load_exported(folder / "model").state_dict() for folder in (tmp_path / "run", base_run))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(base_run, tmp_path):
    outs = [tmp_path / "straight", tmp_path / "killed"]
    program = [sys.executable, "-m", "personatlas.cli.app"]
    subprocess.run(
        [*program, *command(base_run, outs[0], 200_000)], check=True, capture_output=True, env=environment()
    )
    for _ in range(3):
        process = subprocess.Popen(
            [*program, *command(base_run, outs[1], 200_000)], stderr=subprocess.DEVNULL, env=environment()
        )
        time.sleep(6 + torch.rand(1).item() * 3)
        process.kill()
        process.wait()
    subprocess.run(
        [*program, *command(base_run, outs[1], 200_000)], check=True, capture_output=True, env=environment()
    )
    assert losses(outs[0]) == losses(outs[1])
    assert (outs[0] / "model/model.safetensors").read_bytes() == (
        outs[1] / "model/model.safetensors"
    ).read_bytes()
    assert not list((outs[1] / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_two_processes_train_the_model_of_one_and_one_goes_on_where_two_stopped(base_run, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [*torchrun, "-m", "personatlas.cli.app"]
    done = subprocess.run(
        [*program, *command(base_run, tmp_path / "two")], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    found, wanted = losses(tmp_path / "two"), losses(base_run)
    assert found.keys() == wanted.keys()
    for step in wanted:
        assert found[step] == pytest.approx(wanted[step], rel=2e-3), step
    shutil.rmtree(tmp_path / "two/checkpoints/step-000039")
    main(command(base_run, tmp_path / "two"))
    events = [row["text"] for row in read_metrics(tmp_path / "two") if row["kind"] == "event"]
    assert "2 processes made it, 1 go on" in events[-1]
    assert losses(tmp_path / "two")[39] == pytest.approx(wanted[39], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_several_processes_that_are_asked_to_stop_save_the_same_step_and_go_on(base_run, tmp_path, number):
    """They were killed in the middle of it, and lost what they had done since their last checkpoint."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [
        *torchrun,
        "-m",
        "personatlas.cli.app",
        *command(base_run, tmp_path / "two", 200_000),
        "--keep",
        "last",
    ]
    own = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True)
    while not (tmp_path / "two/metrics.jsonl").exists() or max(losses(tmp_path / "two"), default=0) < 5:
        assert own.poll() is None, own.stderr.read()
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(own.pid, number)  # as a terminal does: to all of them
    else:
        own.send_signal(number)
    said = own.communicate(timeout=60)[1]
    assert "the same command resumes" in said
    assert newest_resumable(tmp_path / "two").step == max(losses(tmp_path / "two")) < 390
    assert newest_resumable(tmp_path / "two").is_resumable


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 3}, "a run with depth 1, not 3"),
        ({"tokens": 30_000}, "a run with tokens 20000, not 30000"),
        ({"seed": 1}, "a run with seed 0, not 1"),
    ],
)
def test_a_run_does_not_go_on_as_another(base_run, books, change, said):
    with pytest.raises(UserError, match=said):
        train(books, base_run, **change)


def test_a_run_does_not_go_on_with_other_text(base_run, books, tmp_path):
    shutil.copytree(books, tmp_path / "books")
    (tmp_path / "books" / "new.txt").write_text(book(99))
    with pytest.raises(UserError, match="tokens of another corpus"):
        train(tmp_path / "books", base_run, texts={"tokenizer": base_run / "tokenizer"})


def test_tokens_of_another_tokenizer_are_refused(base_run, books, tmp_path):
    shutil.copytree(base_run / "tokenizer", tmp_path / "other")
    text = (tmp_path / "other/tokenizer.json").read_text()
    (tmp_path / "other/tokenizer.json").write_text(text.replace("<|pad|>", "<|fill|>"))
    with pytest.raises(UserError, match="another tokenizer"):
        train(books, tmp_path / "run", like=base_run, texts={"tokenizer": tmp_path / "other"})


def broken(monkeypatch, at, error=None):
    """Steps whose loss is no number, or that raise, from a number on."""
    step = stepping.Stepper.step

    def spoiled(self, number, *how):
        metrics = step(self, number, *how)
        if number < at:
            return metrics
        if error is not None:
            raise error
        return stepping.StepMetrics(torch.tensor([float("nan"), 1.0, 0.0]), None)

    monkeypatch.setattr(stepping.Stepper, "step", spoiled)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    base_run, books, tmp_path, monkeypatch
):
    broken(monkeypatch, at=9)
    with pytest.raises(UserError, match=r"the loss is nan at step 10: stopped; the last good .*step-000008"):
        train(books, tmp_path / "run", like=base_run)
    assert checkpoints_in(tmp_path / "run")[-1].step == 8
    assert [row["what"] for row in read_metrics(tmp_path / "run") if row["kind"] == "event"] == ["stopped"]


def test_out_of_memory_names_the_knob_and_its_value(base_run, books, tmp_path, monkeypatch):
    broken(monkeypatch, at=2, error=torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(
        UserError, match=r"out of memory with 8 rows of 64 tokens at once: give --micro-batch 4"
    ):
        train(books, tmp_path / "run", like=base_run)
    with pytest.raises(UserError, match="with 1 rows of 64 tokens at once: give --recompute"):
        train(books, tmp_path / "one", like=base_run, micro_batch=1)


def test_micro_batches_change_no_result(base_run, books, tmp_path):
    train(books, tmp_path / "run", like=base_run, micro_batch=2)
    for step, wanted in losses(base_run).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(wanted, rel=2e-3)


def test_a_full_disk_keeps_the_checkpoints_before_and_the_run_goes_on_later(
    base_run, books, tmp_path, monkeypatch
):
    save = checkpoints.save_file

    def full(tensors, path, *more):
        save(
            {name: value[:1] for name, value in tensors.items()} if "count" not in tensors else {},
            path,
            *more,
        )
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    step = stepping.Stepper.step

    def filling(self, number, *how):
        if number == 10:
            monkeypatch.setattr(checkpoints, "save_file", full)
        return step(self, number, *how)

    monkeypatch.setattr(stepping.Stepper, "step", filling)
    with pytest.raises(OSError, match="No space left"):
        train(books, tmp_path / "run", like=base_run)
    assert [one.step for one in checkpoints_in(tmp_path / "run") if one.is_resumable] == [4, 8]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    monkeypatch.undo()
    train(books, tmp_path / "run", like=base_run)
    assert losses(tmp_path / "run") == losses(base_run)


def test_minutes_are_turned_into_steps_at_the_speed_that_is_measured(base_run, books, tmp_path, monkeypatch):
    monkeypatch.setattr(stepping, "MEASURED_STEPS", (4, 4))
    result = train(books, tmp_path / "run", like=base_run, minutes=0.05, batch=None)
    plan = read_json(tmp_path / "run/run.json")["plan"]
    assert result.steps == plan["steps"] == int(60 * 0.05 * plan["tokens_a_second"]) // plan["batch"]
    assert (
        plan["tokens_a_second"] != make_plan(1, vocabulary=300, context=64, chip=CHIPS["cpu"]).tokens_a_second
    )


def test_two_books_are_trained_on_without_any_option(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stepping, "MEASURED_STEPS", (1, 1))
    monkeypatch.setattr(pretrain, "CPU_MINUTES", 0.1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for name in ("one", "two"):
        write_book(tmp_path / "books" / f"{name}.txt", 60_000, seed=len(name))
    for _ in range(2):  # begins, and takes what is finished
        main(["train", "base", "books/", "--device", "cpu"])
        out, err = capsys.readouterr()
        assert "report: runs/books/report.html" in out
        assert "next: personatlas train chat runs/books --data demo" in err
        derived = next(line for line in err.splitlines() if line.startswith("for "))
        assert derived.startswith(
            "for 0.11 MB of text on cpu: vocabulary 330, depth 2, context 256, 0.1 minutes;"
        )
    record, split = read_json(tmp_path / "runs/books/run.json"), Corpus.open(tmp_path / "books").split
    assert record["plan"]["shape"]["depth"] == record["asked"]["depth"] == 2
    assert (
        read_json(tmp_path / "runs/books/tokens/tokens.json")["split"]["passages"].keys()
        == split.passages.keys()
    )
    assert record["result"]["held_out"]["bytes"] == Corpus.open(tmp_path / "books").scan().held_out.bytes


def test_no_texts_at_all_are_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "base"])
    assert ended.value.code == 2
    assert (
        "give texts (personatlas train base books/), or --token-folder and --out" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--corpus PATH is missing"),
        (["--corpus", "nowhere"], "--corpus nowhere does not exist"),
        (["--corpus", "EMPTY"], "has nothing; allowed"),
        (["--corpus", "LINE"], "nothing can be held out of so short a corpus"),
        (["--corpus", "BOOKS", "--tokenizer", "EMPTY"], "has no tokenizer.json"),
        (
            ["--corpus", "BOOKS", "--vocabulary", "300", "--context", "64", "--batch", "100"],
            "a multiple of 64",
        ),
        (["--corpus", "BOOKS", "--vocabulary", "300", "--rate-scale", "0"], "--rate-scale 0.0 is no factor"),
        (["--corpus", "BOOKS", "--vocabulary", "300", "--keep", "all"], "--keep"),
        (["--corpus", "BOOKS", "--vocabulary", "300", "--fp8"], "--fp8 is for GPUs"),
        (["--corpus", "BOOKS", "--vocabulary", "300", "--seed", "-1"], "--seed -1 is not in 0..9"),
        (["--corpus", "BOOKS/..", "--vocabulary", "300"], "becomes text to train on; choose another"),
        (["--corpus", "BOOKS", "--vocabulary", "300", "--minutes", "1", "--tokens", "9"], "give one of them"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(books, tmp_path, capsys, options, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "line.txt").write_text("one line\n")
    names = {"EMPTY": str(tmp_path / "empty"), "LINE": str(tmp_path / "line.txt"), "BOOKS": str(books)}
    options = [names.get(option, option.replace("BOOKS/..", str(tmp_path))) for option in options]
    with pytest.raises(SystemExit) as ended:
        main(["train", "base", "--depth", "1", "--device", "cpu", "--out", str(tmp_path / "run"), *options])
    assert ended.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("personatlas: ")
    assert said in last


def test_a_folder_that_holds_something_else_is_refused(tmp_path, books):
    (tmp_path / "run.json").write_text(json.dumps({"asked": {"model": {"id": "smollm2-135m"}}}))
    with pytest.raises(UserError, match="holds a run of another kind"):
        train(books, tmp_path)


def test_what_is_odd_in_a_corpus_is_said(books, tmp_path, capsys):
    shutil.copytree(books, tmp_path / "mixed")
    (tmp_path / "mixed" / "bad.txt").write_bytes(b"caf\xe9 in another encoding")
    (tmp_path / "mixed" / "nul.txt").write_bytes(b"a\0b")
    train(tmp_path / "mixed", tmp_path / "run", tokens=2_000)
    said = capsys.readouterr().err
    assert (
        "the corpus has 1 pieces with bytes that are no UTF-8 (now U+FFFD), 1 pieces with NUL bytes left out"
        in said
    )


def test_bits_per_byte_are_those_of_a_plain_sum(base_result):
    """Over the whole held-out text, in windows of one context, marks of documents left out."""
    from personatlas.training.data.tokenizer import load_corpus_tokenizer, token_sizes

    out, loss = base_result.folder, base_result.held_out
    tokens, model = open_tokens(out / "tokens"), load_exported(out / "model")
    lengths = torch.from_numpy(token_sizes(load_corpus_tokenizer(out / "tokenizer")))
    ids, nats, size = torch.from_numpy(tokens.held_out.read(0, len(tokens.held_out))), 0.0, 0
    for start in range(0, len(ids) - 1, 64):
        row = ids[start : start + 65]
        logs = torch.log_softmax(model(row[None, :-1]).double(), -1)[0]
        for place, target in enumerate(row[1:].tolist()):
            if lengths[target]:
                nats -= logs[place, target].item()
                size += int(lengths[target])
    assert size == loss.bytes
    assert loss.bits_per_byte == pytest.approx(nats / size / 0.6931471805599453, rel=1e-5)


def test_a_run_on_a_cpu_keeps_the_number_of_threads_that_it_began_with(
    base_run, books, tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train(books, tmp_path / "run", like=base_run, tokens=5_000)
        chosen = read_json(tmp_path / "run/run.json")["threads"]
        assert chosen in (1, 2)
        torch.set_num_threads(3 - chosen)
        shutil.rmtree(tmp_path / "run/checkpoints/step-000009")
        train(books, tmp_path / "run", like=base_run, tokens=5_000)
        assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(before)


def test_a_vocabulary_beside_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="--tokenizer names one"):
        CorpusOptions(tokenizer=tmp_path, vocabulary=300)
