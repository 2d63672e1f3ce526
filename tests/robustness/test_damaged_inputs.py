"""Damaged files of every kind, given to every command that reads them: one line and exit status 2, or a result.

Runs, checkpoints, tokenizers, tokens, banks, exports, caps, classifiers, conversations and the results and logs of
studies, whose hashes are right again after the damage. The usual tests try a sample; `make test-robustness` 2,000.
"""

import random
import re
import shutil
from pathlib import Path

import pytest
from damage import damage, faults, within
from every_command import COMMANDS, CPU, STEERED, TRAIN

from personatlas.analysis.emergence import EmergenceResult
from personatlas.cli.app import main
from personatlas.persona.artifacts import read_record
from personatlas.persona.errors import UserError
from personatlas.steering.calibration.result import CalibrationResult
from personatlas.steering.drift.result import DriftResult
from personatlas.steering.evals.result import EvalResult

SAMPLE, FULL = 24, pytest.param(2000, marks=pytest.mark.robustness)
SECONDS = 120
LONGEST = 600  # characters of the line


def into(name, out):
    """A command whose output is another folder."""
    return re.sub(r"--(out|export) out\b", rf"--\1 {out}", COMMANDS[name])


MADE = {
    "calibrate": None,
    "eval": "evaluated",
    "drift": "drifted",
    "emergence": "emerged",
    "train chat": "chatted",
    "train tokenizer": "tokenizer",
    "tools import caps": "run/caps",
    "tools harm-judge fit": "classifier",
    "train export": "exported",
}
TRAIN_BASE = f"train base --depth 1 --corpus corpus --vocabulary 300 --held-share 0.1 --out base {TRAIN}"
TRAIN_AGAIN = f"train base --depth 1 --corpus corpus --tokenizer {{}} --held-share 0.1 --out out {TRAIN}"
GENERATE = f"generate tiny Hello --arm {{}} {STEERED}"
SELF_TEST = f"tools self-test {{}} {CPU}"
# files that are damaged -> what reads them: commands, or functions of a folder whose result is looked through
READERS = {
    "run/calibration.json": [CalibrationResult.load, COMMANDS["calibrate"], "tools show run"],
    "run/trials.jsonl": [COMMANDS["calibrate"]],
    "run/run.json": [COMMANDS["calibrate"], GENERATE.format("cap:p50@1"), "run report run"],
    "run/caps/*.safetensors": [GENERATE.format("assistant"), "tools show run"],
    "drifted/drift.json": [DriftResult.load, into("drift", "drifted")],
    "drifted/*.jsonl": [into("drift", "drifted"), f"trace tiny drifted/conversations.jsonl --axis run {CPU}"],
    "drifted/run.json": [into("drift", "drifted")],
    "evaluated/eval.json": [EvalResult.load, into("eval", "evaluated")],
    "evaluated/*.jsonl": [into("eval", "evaluated")],
    "evaluated/run.json": [into("eval", "evaluated"), "calibrate evaluated"],
    "evaluated/caps/*.safetensors": [into("eval", "evaluated")],
    "emerged/emergence.json": [
        lambda folder: read_record(folder / "emergence.json", EmergenceResult),
        into("emergence", "emerged"),
    ],
    "emerged/step-000008/*.json*": [into("emergence", "emerged")],
    "emerged/step-000008/*.safetensors": [into("emergence", "emerged")],
    "base/run.json": [TRAIN_BASE, "run report base", "train export base --out out", COMMANDS["train chat"]],
    "base/metrics.jsonl": [TRAIN_BASE, "run report base"],
    "base/tokens/*": [TRAIN_AGAIN.format("base/tokenizer") + " --token-folder base/tokens"],
    "base/tokenizer/*": [TRAIN_BASE, TRAIN_AGAIN.format("base/tokenizer")],
    "base/checkpoints/step-000008/*": [
        "resume " + TRAIN_BASE,
        SELF_TEST.format("base/checkpoints/step-000008"),
    ],
    "base/model/*": [
        "train export base --out out --gguf out.gguf",
        COMMANDS["train chat"],
        SELF_TEST.format("base"),
        f"train eval base --text text.txt {CPU}",
    ],
    "chatted/checkpoints/step-000016/*": ["resume " + into("train chat", "chatted")],
    "chatted/run.json": [into("train chat", "chatted"), "run report chatted"],
    "chatted/metrics.jsonl": [into("train chat", "chatted")],
    "chatted/model/*": ["tools spans chatted --user Hello", SELF_TEST.format("chatted")],
    "exported/*": [SELF_TEST.format("exported"), "tools spans exported --user Hello"],
    "out.gguf": [SELF_TEST.format("out.gguf")],
    "tokenizer/*": [TRAIN_AGAIN.format("tokenizer"), into("train tokenizer", "tokenizer")],
    "bank/*.jsonl": ["roles --bank bank", "roles --check bank", "roles --bank bank --export out"],
    "paper-bank/*.jsonl": ["tools import roles paper-bank --out out"],
    "paper-bank/*/*.json": ["tools import roles paper-bank --out out"],
    "tiny/*": [SELF_TEST.format("tiny"), "tools spans tiny --user Hello", GENERATE.format("cap:p50@1")],
    "classifier.safetensors": ["tools harm-judge check labels.csv --judge classifier"],
    "chats.jsonl": [f"trace tiny chats.jsonl --axis run {CPU}", COMMANDS["train chat"]],
    "scripts.jsonl": [COMMANDS["drift"]],
    "labels.csv": [COMMANDS["tools harm-judge fit"], COMMANDS["tools harm-judge check"]],
    "requests.csv": [COMMANDS["eval"]],
}
SLOW = ("eval", "emergence", "calibrate", "tools self-test out.gguf")  # left to the whole size


@pytest.fixture(scope="session")
def studied(whole_workbench, tmp_path_factory):
    """The workbench with what all of its commands make."""
    folder = shutil.copytree(whole_workbench, tmp_path_factory.mktemp("studied") / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, out in MADE.items():
            main(into(name, out).split())
    return folder


def prepare_resume(path, line):
    """Takes away what was made after a checkpoint, so that training goes on from it."""
    out = Path(line.split("--out ")[1].split()[0])
    shutil.rmtree(out / "model")
    for later in (out / "checkpoints").iterdir():
        if later.name > path.parent.name:
            shutil.rmtree(later)


def try_reader(path, reader, capsys):
    """How a reader ends: its status, 0 or 2, after a look at what it said."""
    if callable(reader):
        try:
            wrong, message = list(faults(reader(path.parent))), ""
        except UserError as error:
            wrong, message = [], str(error)
        assert not wrong
        assert "\n" not in message
        return 2 if message else 0
    if reader.startswith("resume "):
        prepare_resume(path, reader := reader.removeprefix("resume "))
    capsys.readouterr()
    status = 0
    try:
        main(reader.split())
    except SystemExit as stop:
        status = stop.code or 0
    said, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if line.startswith("personatlas: ")]
    assert (status, len(lines)) in ((0, 0), (2, 1)), error[-1000:]
    if lines:
        assert error.endswith(lines[0] + "\n")
        assert len(lines[0]) < LONGEST
    assert status or not re.search(r"(?<![\w-])(nan|inf)(?![\w-])", said, re.IGNORECASE), said
    return status


@pytest.mark.parametrize("count", [SAMPLE, FULL])
def test_a_damaged_file_is_refused_in_one_line_or_harmless(studied, tmp_path, monkeypatch, capsys, count):
    draw, refused, folder = random.Random(count), 0, tmp_path / "copy"
    cases = [(pattern, reader) for pattern, readers in READERS.items() for reader in readers]
    if count == SAMPLE:
        cases = [case for case in cases if callable(case[1]) or not case[1].startswith(SLOW)]
        draw.shuffle(cases)
    for number in range(count):
        pattern, reader = cases[number % len(cases)]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(studied, folder)
        monkeypatch.chdir(folder)
        files = sorted(path for path in Path().glob(pattern) if path.is_file())
        path = draw.choice([path for path in files if path.suffix != ".html"])
        damage(path, draw)
        what = f"{path}, case {number} of seed {count}: {reader}"
        try:
            with within(SECONDS):
                refused += try_reader(path, reader, capsys) == 2
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert refused > count / 4
