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
from transformers import AutoModelForCausalLM

from personatlas.cli.app import main
from personatlas.persona.artifacts import read_json
from personatlas.persona.errors import UserError
from personatlas.training.data.token_shards import open_tokens
from personatlas.training.export.huggingface import load_exported
from personatlas.training.loop import checkpoints, samples
from personatlas.training.loop import step as stepping
from personatlas.training.loop.checkpoints import checkpoints_in, newest
from personatlas.training.loop.run_log import read_metrics
from personatlas.training.options import BaseAsked, Length, Texts, Tuning
from personatlas.training.plan import CHIPS, plan_of
from personatlas.training.pretrain import train_base

WORDS = "the old clock in the hall struck seven and nobody in the house was awake to hear it but the cat"


def book(number, words=400):
    generator = torch.Generator().manual_seed(number)
    known = WORDS.split()
    drawn = torch.randint(len(known), (words,), generator=generator)
    return " ".join(known[i] for i in drawn.tolist())


@pytest.fixture(scope="module", autouse=True)
def short_samples():
    """Samples of few tokens: they are more than half of the time that so small a run takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "LENGTH", 4)
        yield


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for number in range(40):
        (folder / f"{number}.txt").write_text(book(number))
    return folder


def asked(books, out, tokens=20_000, **more):
    tuning = Tuning(**{"context": 64, "batch": 512, **more.pop("tuning", {})})
    own = more.pop("texts", {})
    texts = Texts(corpus=books, held_share=0.1, vocabulary=None if "tokenizer" in own else 300, **own)
    return BaseAsked(
        depth=2, out=out, texts=texts, length=Length(tokens=tokens), tuning=tuning, device="cpu", **more
    )


@pytest.fixture(scope="module")
def whole(books, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train_base(asked(books, out))


def losses(folder):
    return {
        row["step"]: (row["loss"], row["gradient_norm"])
        for row in read_metrics(folder)
        if row["kind"] == "step"
    }


def again(whole, books, out):
    """What another run needs, with the texts that the first one made."""
    more = {"tokenizer": whole[0] / "tokenizer", "token_folder": whole[0] / "tokens"}
    return asked(books, out, texts=more)


def test_a_run_learns_and_leaves_an_ordinary_model(whole):
    out, result = whole
    found = losses(out)
    assert sorted(found) == list(range(1, 40))
    assert found[1][0] > 5 > 4 > found[39][0]
    assert result["held_out"]["bits_per_byte"] < 2.5
    assert result == read_json(out / "run.json")["result"]
    ours, ids = load_exported(out / "model"), torch.randint(300, (2, 30))
    theirs = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-5)


def test_checkpoints_stand_at_powers_of_two_and_two_can_be_gone_on_from(whole):
    found = checkpoints_in(whole[0])
    assert [one.step for one in found] == [0, 1, 2, 4, 8, 16, 32, 39]
    assert [one.step for one in found if one.resumes] == [32, 39]
    assert torch.equal(
        load_exported(found[-1].path).lm_head.weight, load_exported(whole[0] / "model").lm_head.weight
    )


def test_a_finished_run_is_taken_as_it_is(whole, books):
    before = (whole[0] / "metrics.jsonl").read_text()
    assert train_base(asked(books, whole[0]))["held_out"] == whole[1]["held_out"]
    steps = [line for line in (whole[0] / "metrics.jsonl").read_text().splitlines() if '"event"' not in line]
    assert steps == [line for line in before.splitlines() if '"event"' not in line]


@pytest.mark.parametrize("at", [3, 16, 37])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(whole, books, tmp_path, monkeypatch, at):
    """Ctrl-C in the middle of a step: the step is finished, saved, and the process ends."""
    step = stepping.Stepper.step

    def interrupted(self, number, *how):
        if number == at:
            signal.raise_signal(signal.SIGINT)
        return step(self, number, *how)

    monkeypatch.setattr(stepping.Stepper, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_base(again(whole, books, tmp_path / "run"))
    assert newest(tmp_path / "run").step == at + 1
    monkeypatch.undo()
    train_base(again(whole, books, tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(whole[0])
    one, two = (load_exported(folder / "model").state_dict() for folder in (tmp_path / "run", whole[0]))
    assert all(torch.equal(one[name], two[name]) for name in one)


def command(whole, out, tokens=20_000):
    texts = ["--token-folder", str(whole[0] / "tokens"), "--tokenizer", str(whole[0] / "tokenizer")]
    how = ["--depth", "2", "--context", "64", "--batch", "512", "--tokens", str(tokens), "--device", "cpu"]
    return ["train", "base", *how, *texts, "--out", str(out)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path):
    outs = [tmp_path / "straight", tmp_path / "killed"]
    program = [sys.executable, "-m", "personatlas.cli.app"]
    subprocess.run(
        [*program, *command(whole, outs[0], 200_000)], check=True, capture_output=True, env=environment()
    )
    for _ in range(3):
        process = subprocess.Popen(
            [*program, *command(whole, outs[1], 200_000)], stderr=subprocess.DEVNULL, env=environment()
        )
        time.sleep(6 + torch.rand(1).item() * 3)
        process.kill()
        process.wait()
    subprocess.run(
        [*program, *command(whole, outs[1], 200_000)], check=True, capture_output=True, env=environment()
    )
    assert losses(outs[0]) == losses(outs[1])
    assert (outs[0] / "model/model.safetensors").read_bytes() == (
        outs[1] / "model/model.safetensors"
    ).read_bytes()
    assert not list((outs[1] / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_two_processes_train_the_model_of_one_and_one_goes_on_where_two_stopped(whole, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [*torchrun, "-m", "personatlas.cli.app"]
    done = subprocess.run(
        [*program, *command(whole, tmp_path / "two")], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    found, wanted = losses(tmp_path / "two"), losses(whole[0])
    assert found.keys() == wanted.keys()
    for step in wanted:
        assert found[step] == pytest.approx(wanted[step], rel=2e-3), step
    shutil.rmtree(tmp_path / "two/checkpoints/step-000039")
    main(command(whole, tmp_path / "two"))
    events = [row["text"] for row in read_metrics(tmp_path / "two") if row["kind"] == "event"]
    assert "2 processes made it, 1 go on" in events[-1]
    assert losses(tmp_path / "two")[39] == pytest.approx(wanted[39], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_several_processes_that_are_asked_to_stop_save_the_same_step_and_go_on(whole, tmp_path, number):
    """They were killed in the middle of it, and lost what they had done since their last checkpoint."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [
        *torchrun,
        "-m",
        "personatlas.cli.app",
        *command(whole, tmp_path / "two", 200_000),
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
    assert newest(tmp_path / "two").step == max(losses(tmp_path / "two")) < 390
    assert newest(tmp_path / "two").resumes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 3}, "a run with depth 2, not 3"),
        ({"length": Length(tokens=30_000)}, "a run with tokens 20000, not 30000"),
        ({"tuning": Tuning(context=64, batch=512, seed=1)}, "a run with seed 0, not 1"),
    ],
)
def test_a_run_does_not_go_on_as_another(whole, books, change, said):
    with pytest.raises(UserError, match=said):
        train_base(BaseAsked(**{**vars(asked(books, whole[0])), **change}))


def test_a_run_does_not_go_on_with_other_text(whole, books, tmp_path):
    shutil.copytree(books, tmp_path / "books")
    (tmp_path / "books" / "new.txt").write_text(book(99))
    with pytest.raises(UserError, match="tokens of another corpus"):
        train_base(asked(tmp_path / "books", whole[0], texts={"tokenizer": whole[0] / "tokenizer"}))


def test_tokens_of_another_tokenizer_are_refused(whole, books, tmp_path):
    shutil.copytree(whole[0] / "tokenizer", tmp_path / "other")
    text = (tmp_path / "other/tokenizer.json").read_text()
    (tmp_path / "other/tokenizer.json").write_text(text.replace("<|pad|>", "<|fill|>"))
    texts = {"tokenizer": tmp_path / "other", "token_folder": whole[0] / "tokens"}
    with pytest.raises(UserError, match="another tokenizer"):
        train_base(asked(books, tmp_path / "run", texts=texts))


def broken(monkeypatch, at, error=None):
    """Steps whose loss is no number, or that raise, from a number on."""
    step = stepping.Stepper.step

    def spoiled(self, number, *how):
        heard = step(self, number, *how)
        if number < at:
            return heard
        if error is not None:
            raise error
        return stepping.Heard(torch.tensor([float("nan"), 1.0, 0.0]), None)

    monkeypatch.setattr(stepping.Stepper, "step", spoiled)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    whole, books, tmp_path, monkeypatch
):
    broken(monkeypatch, at=9)
    with pytest.raises(UserError, match=r"the loss is nan at step 10: stopped; the last good .*step-000008"):
        train_base(again(whole, books, tmp_path / "run"))
    assert checkpoints_in(tmp_path / "run")[-1].step == 8
    assert [row["what"] for row in read_metrics(tmp_path / "run") if row["kind"] == "event"] == ["stopped"]


def test_out_of_memory_names_the_knob_and_its_value(whole, books, tmp_path, monkeypatch):
    broken(monkeypatch, at=2, error=torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(
        UserError, match=r"out of memory with 8 rows of 64 tokens at once: give --micro-batch 4"
    ):
        train_base(again(whole, books, tmp_path / "run"))
    ask = again(whole, books, tmp_path / "one")
    few = Tuning(context=64, batch=512, micro_batch=1)
    with pytest.raises(UserError, match="with 1 rows of 64 tokens at once: give --recompute"):
        train_base(BaseAsked(**{**vars(ask), "tuning": few}))


def test_micro_batches_change_no_result(whole, books, tmp_path):
    few = Tuning(context=64, batch=512, micro_batch=2)
    train_base(BaseAsked(**{**vars(again(whole, books, tmp_path / "run")), "tuning": few}))
    for step, wanted in losses(whole[0]).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(wanted, rel=2e-3)


def test_a_full_disk_keeps_the_checkpoints_before_and_the_run_goes_on_later(
    whole, books, tmp_path, monkeypatch
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
        train_base(again(whole, books, tmp_path / "run"))
    assert [one.step for one in checkpoints_in(tmp_path / "run") if one.resumes] == [4, 8]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    monkeypatch.undo()
    train_base(again(whole, books, tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(whole[0])


def test_the_words_of_the_writer_for_a_full_disk_are_understood(tmp_path):
    error = checkpoints.SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    assert checkpoints._as_full(error, tmp_path).errno == errno.ENOSPC


def test_only_the_last_checkpoints_are_kept_where_asked(whole, books, tmp_path):
    ask = again(whole, books, tmp_path / "run")
    train_base(BaseAsked(**{**vars(ask), "tuning": Tuning(context=64, batch=512, keep="last")}))
    assert [one.step for one in checkpoints_in(tmp_path / "run")] == [39]


def test_minutes_are_turned_into_steps_at_the_speed_that_is_measured(whole, books, tmp_path):
    ask = again(whole, books, tmp_path / "run")
    result = train_base(
        BaseAsked(**{**vars(ask), "length": Length(minutes=0.05), "tuning": Tuning(context=64)})
    )
    plan = read_json(tmp_path / "run/run.json")["plan"]
    assert result["steps"] == plan["steps"] == int(60 * 0.05 * plan["tokens_a_second"]) // plan["batch"]
    assert (
        plan["tokens_a_second"] != plan_of(2, vocabulary=300, context=64, chip=CHIPS["cpu"]).tokens_a_second
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--corpus PATH is missing"),
        (["--corpus", "nowhere"], "--corpus nowhere does not exist"),
        (["--corpus", "EMPTY"], "has nothing; allowed"),
        (["--corpus", "LINE"], "none of the corpus's 1 documents is held out"),
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
        main(["train", "base", "--depth", "2", "--device", "cpu", "--out", str(tmp_path / "run"), *options])
    assert ended.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("personatlas: ")
    assert said in last


def test_a_folder_that_holds_something_else_is_refused(tmp_path, books):
    (tmp_path / "run.json").write_text(json.dumps({"asked": {"model": "smollm2-135m"}}))
    with pytest.raises(UserError, match="holds a run of another kind"):
        train_base(asked(books, tmp_path))


def test_what_is_odd_in_a_corpus_is_said(books, tmp_path, capsys):
    shutil.copytree(books, tmp_path / "mixed")
    (tmp_path / "mixed" / "bad.txt").write_bytes(b"caf\xe9 in another encoding")
    (tmp_path / "mixed" / "nul.txt").write_bytes(b"a\0b")
    train_base(asked(tmp_path / "mixed", tmp_path / "run", tokens=2_000))
    said = capsys.readouterr().err
    assert (
        "the corpus has 1 pieces with bytes that are no UTF-8 (now U+FFFD), 1 pieces with NUL bytes left out"
        in said
    )


def test_bits_per_byte_are_those_of_a_plain_sum(whole):
    """Over the whole held-out text, in windows of one context, marks of documents left out."""
    from personatlas.training.data.tokenizer import load_tokenizer, token_bytes

    out, result = whole
    tokens, model = open_tokens(out / "tokens"), load_exported(out / "model")
    lengths = torch.from_numpy(token_bytes(load_tokenizer(out / "tokenizer")))
    ids, nats, size = torch.from_numpy(tokens.held_out.read(0, len(tokens.held_out))), 0.0, 0
    for start in range(0, len(ids) - 1, 64):
        row = ids[start : start + 65]
        logs = torch.log_softmax(model(row[None, :-1]).double(), -1)[0]
        for place, target in enumerate(row[1:].tolist()):
            if lengths[target]:
                nats -= logs[place, target].item()
                size += int(lengths[target])
    assert size == result["held_out"]["bytes"]
    assert result["held_out"]["bits_per_byte"] == pytest.approx(nats / size / 0.6931471805599453, rel=1e-5)


def test_a_run_on_a_cpu_keeps_the_number_of_threads_that_it_began_with(whole, books, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train_base(again(whole, books, tmp_path / "run"))
        chosen = read_json(tmp_path / "run/run.json")["threads"]
        assert chosen in (1, 2)
        torch.set_num_threads(3 - chosen)
        shutil.rmtree(tmp_path / "run/checkpoints/step-000039")
        train_base(again(whole, books, tmp_path / "run"))
        assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(before)


def test_a_vocabulary_beside_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="--tokenizer names one"):
        Texts(tokenizer=tmp_path, vocabulary=300)
