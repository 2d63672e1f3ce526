"""Damaged artefacts with right hashes: each is refused in one line, or gives what the healthy one gives.

The usual tests try a sample; `make test-robustness` tries 2,400 artefacts and 500 run folders.
"""

import json
import random
import re
import shutil
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from damage import damage, faults, within
from training_runs import a_training_run

from personatlas.analysis.fit.pipeline import fit_run, report_run
from personatlas.analysis.fit.result import FitResult
from personatlas.cli.app import main
from personatlas.persona.axis import load_axis, load_space
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, load_cap
from personatlas.persona.judges.base import read_scores
from personatlas.persona.options import FitOptions
from personatlas.persona.pipeline.activations import load_activations
from personatlas.persona.roles.traits import TraitSpace, load_traits
from personatlas.persona.rollout import read_rollouts
from personatlas.persona.runs import PACKAGED_AXES, read_manifest
from personatlas.steering.drift_monitor import load_reference
from personatlas.steering.evals.harm.classifier import fit_harm_classifier, load_harm_classifier
from personatlas.training.report.page import write_training_report
from personatlas.training.report.read import read_training_record

PACKAGED = PACKAGED_AXES / "smollm2-135m"
SAMPLE, FULL = 90, 2400
SAMPLE_FOLDERS, FULL_FOLDERS = 4, 500
SECONDS = 20  # that a reader may take


# --- healthy artefacts ---


@pytest.fixture(scope="session")
def artefacts(whole_run, tmp_path_factory):
    """A folder with healthy artefacts of many kinds."""
    folder = tmp_path_factory.mktemp("artefacts")
    shutil.copytree(whole_run / "run", folder / "run")
    (folder / "run" / "scores.jsonl").write_text(
        "".join(
            json.dumps({"key": rollout.key, "judge": "j", "score": 2, "reply": "2", "problem": None}) + "\n"
            for rollout in read_rollouts(folder / "run")
        )
    )
    for name in ("axis", "space"):
        for ending in (".json", ".safetensors"):
            shutil.copy(PACKAGED / f"{name}{ending}", folder / f"{name}{ending}")
    shutil.copy(PACKAGED / "reference.json", folder)
    generator = torch.Generator().manual_seed(0)

    def unit(*shape):
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    model = {"id": "m", "weights": "w", "fingerprint": "f", "revision": None, "n_layers": 3, "d_model": 8}
    Cap((0, 2), unit(2, 8), torch.tensor([0.5, -1.0]), level=0.5, population="default", model=model).save(
        folder / "cap"
    )
    traits = (("calm", "bold"), unit(2, 3, 8), torch.ones(2, 3), torch.tensor([[3, 4], [5, 6]]), 1)
    TraitSpace(*traits, torch.zeros(8), unit(1, 8), torch.tensor([0.9]), model).save(folder / "traits")
    texts = [f"{'harm' if i % 2 else 'help'} word{i % 5} more" for i in range(30)]
    fit_harm_classifier(texts, [i % 2 for i in range(30)], folds=0).save(folder / "classifier")
    a_training_run(folder / "train", depth=4, steps=100, chip="cpu")
    return folder


def read_training(folder):
    write_training_report(folder)
    return read_training_record(folder)


# file that is damaged -> what reads it, given the folder
READERS = {
    "axis.safetensors": lambda folder: load_axis(folder / "axis"),
    "space.safetensors": lambda folder: load_space(folder / "space"),
    "cap.safetensors": lambda folder: load_cap(folder / "cap"),
    "traits.safetensors": lambda folder: load_traits(folder / "traits"),
    "classifier.safetensors": lambda folder: load_harm_classifier(folder / "classifier"),
    "run/activations.safetensors": lambda folder: load_activations(folder / "run" / "activations"),
    "axis.json": lambda folder: load_axis(folder / "axis"),
    "reference.json": lambda folder: load_reference(folder / "reference.json", load_axis(PACKAGED / "axis")),
    "run/fit.json": lambda folder: FitResult.load(folder / "run"),
    "run/run.json": lambda folder: read_manifest(folder / "run"),
    "run/rollouts.jsonl": lambda folder: read_rollouts(folder / "run"),
    "run/scores.jsonl": lambda folder: read_scores(folder / "run" / "scores.jsonl"),
    "train/run.json": lambda folder: read_training(folder / "train"),
    "train/metrics.jsonl": lambda folder: read_training(folder / "train"),
    "train/samples.jsonl": lambda folder: read_training(folder / "train"),
}


# --- what must hold ---


def plain(value):
    """A value as something that compares, with the types of numbers."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if is_dataclass(value):
        names = [field.name for field in fields(value) if field.name != "stem"]
        return type(value).__name__, [plain(getattr(value, name)) for name in names]
    if isinstance(value, dict):
        return [(key, plain(item)) for key, item in sorted(value.items())]
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)


def check_readers(artefacts, folder, count, seed):
    """Damages artefacts of every kind; returns how many were refused and how many were as the healthy one or other."""
    draw, outcomes = random.Random(seed), {"refused": 0, "equal": 0, "other": 0}
    healthy = {name: plain(read(artefacts)) for name, read in READERS.items()}
    for number in range(count):
        name = list(READERS)[number % len(READERS)]
        parts = (
            [name.partition("/")[0]]
            if "/" in name
            else [name, name.replace(".safetensors", ".json"), name.replace(".json", ".safetensors")]
        )
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for part in dict.fromkeys(parts):
            source = artefacts / part
            if source.is_dir():
                shutil.copytree(source, folder / part)
            elif source.is_file():
                shutil.copy(source, folder / part)
        damage(folder / name, draw)
        what, message = f"{name}, case {number} of seed {seed}", None
        try:
            with within(SECONDS):
                found = READERS[name](folder)
        except UserError as error:
            message = str(error)
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        if message is not None:
            assert "\n" not in message, f"{what}: {message}"
            assert re.search(r"\.jsonl?\b|safetensors|classifier|folder", message), (
                f"{what} names no file: {message}"
            )
            outcomes["refused"] += 1
        else:
            wrong = list(faults(found))
            assert not wrong, f"{what} is accepted: {wrong[:3]}"
            outcomes["equal" if plain(found) == healthy[name] else "other"] += 1
    return outcomes


def test_a_damaged_artefact_with_a_right_hash_is_refused_in_one_line(artefacts, tmp_path, capsys):
    outcomes = check_readers(artefacts, tmp_path / "case", SAMPLE, seed=0)
    assert outcomes["refused"] > SAMPLE // 2


@pytest.mark.robustness
def test_2400_damaged_artefacts_are_refused_in_one_line_or_harmless(artefacts, tmp_path, capsys):
    outcomes = check_readers(artefacts, tmp_path / "case", FULL, seed=1)
    assert outcomes["refused"] > FULL // 2


def damage_folder(run, other, draw):
    """One file of a run folder deleted, cut, damaged, or another run's."""
    files = sorted(path for path in run.iterdir() if path.suffix in (".json", ".jsonl", ".safetensors"))
    path = draw.choice(files)
    kind = draw.choice(["deleted", "cut", "damaged", "swapped"])
    if kind == "deleted":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    elif kind == "damaged":
        damage(path, draw)
    else:
        shutil.copy(other / path.name, path)
    return f"{path.name} {kind}"


AXIS = "--device cpu --dtype float32 --samples 4 --chunk 32 --max-new-tokens 8 --judge none --keep all --replicates 4"


def axis_command(whole_run, run, *more):
    """The status with which `axis` on a run folder ends."""
    argv = [
        "axis",
        str(whole_run / "tiny"),
        "--bank",
        str(whole_run / "bank"),
        "--out",
        str(run),
        *AXIS.split(),
        *more,
    ]
    try:
        main(argv)
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


def refusal(read):
    """The message with which a reader refuses, "" where it does not."""
    try:
        with within(60):
            read()
    except UserError as error:
        return str(error)
    return ""


def check_folders(whole_run, tmp_path, capsys, count, seed):
    """Every damage ends in a whole run again: by the same command, or after deleting the files that its messages name."""
    draw, other, run = random.Random(seed), tmp_path / "other", tmp_path / "run"
    assert axis_command(whole_run, other, "--seed", "5") == 0
    wanted = json.loads((whole_run / "run" / "fit.json").read_text())
    for number in range(count):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole_run / "run", run)
        what = f"{damage_folder(run, other, draw)}, case {number} of seed {seed}"
        for read in (lambda: report_run(run), lambda: fit_run(run, FitOptions(replicates=4, keep="all"))):
            assert "\n" not in refusal(read), what
        for _ in range(3):
            capsys.readouterr()
            with within(120):
                status = axis_command(whole_run, run)
            if status == 0:
                assert json.loads((run / "fit.json").read_text())["layers"] == wanted["layers"], what
                break
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("personatlas:")]
            assert (status, len(lines)) == (2, 1), f"{what}: {status} {lines}"
            if "choose another folder with --out" in lines[0]:  # the record of another run
                break
            named = [path for path in run.iterdir() if f"{path}" in lines[0]]
            assert named, f"{what}: no file to delete in {lines[0]}"
            for path in named:
                path.unlink()
        else:
            raise AssertionError(f"{what}: refused for ever")


def test_a_damaged_run_folder_is_made_whole_by_the_same_command(whole_run, tmp_path, capsys):
    check_folders(whole_run, tmp_path, capsys, SAMPLE_FOLDERS, seed=0)


@pytest.mark.robustness
def test_500_damaged_run_folders_are_made_whole(whole_run, tmp_path, capsys):
    check_folders(whole_run, tmp_path, capsys, FULL_FOLDERS, seed=1)
