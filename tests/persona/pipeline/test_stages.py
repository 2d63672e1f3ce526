"""A run survives what happens to runs: kills, a full disk, ranks, and a second hand on the same folder.

The reference of every test is one uninterrupted run in one process; whatever happened on the way, what is written must
equal it byte for byte.
"""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from banks import TRAITS, write_bank
from families import TEMPLATE, save_tiny, tiny_model

from personatlas.cli.app import main
from personatlas.persona.pipeline import stages
from personatlas.persona.pipeline.stages import plan_rollouts
from personatlas.persona.roles.bank import load_bank
from personatlas.persona.rollout import Selection

# 8 samples make 216 rollouts, enough for the gate that tries a few roles first; whole roles of 24 to 48 in a part
HOW = "--plan standard --device cpu --dtype float32 --samples 8 --chunk 32 --max-new-tokens 8 --judge none --keep all --replicates 4"
PART = 50
RESULTS = ("activations.safetensors", "activations.json", "axis.safetensors", "space.safetensors", "fit.json")

# The command with small parts; given "log 30" or "part 2" it is killed by SIGKILL right after that many are written.
SCRIPT = f"""
import os, signal, sys
from personatlas.persona.pipeline import activations
from personatlas.cli import app as cli
from personatlas.persona.pipeline import stages

stages.PART_ROLLOUTS = {PART}
what, after = sys.argv[1], int(sys.argv[2])

def deadly(write):
    def count(*given, **how):
        global after
        done = write(*given, **how)
        after -= 1
        if after == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return count

if what == "log":
    stages.append_lines = deadly(stages.append_lines)
if what == "part":
    activations.Activations.save = deadly(activations.Activations.save)
cli.main(sys.argv[3:])
"""


def lines(run):
    return set((run / "rollouts.jsonl").read_bytes().splitlines())


def snapshot(run, times=True):
    """Content (and time of writing) of every file but the lock."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns if times else 0) for path in files}


def same_as_reference(run, reference):
    assert lines(run) == lines(reference)
    assert len((run / "rollouts.jsonl").read_bytes().splitlines()) == len(lines(reference))
    for name in RESULTS:
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    assert {path.name for path in run.iterdir()} == {
        path.name for path in reference.iterdir()
    }  # nothing left behind


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, a bank, the script above, and a finished run."""
    folder = tmp_path_factory.mktemp("stages")
    save_tiny(folder / "tiny")
    write_bank(folder / "bank")
    (folder / "script.py").write_text(SCRIPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "PART_ROLLOUTS", PART)
        main(axis(folder, "reference"))
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(stages, "PART_ROLLOUTS", PART)


def axis(place, run, *more):
    return [
        "axis",
        str(place / "tiny"),
        "--bank",
        str(place / "bank"),
        "--out",
        str(place / run),
        *HOW.split(),
        *more,
    ]


def refused(capsys, arguments, *words):
    """The one line that a call ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("personatlas: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def killed(place, run, what, after):
    command = [sys.executable, str(place / "script.py"), what, str(after), *axis(place, run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_run_killed_in_its_rollouts_and_again_in_recording_ends_as_if_nothing_had_happened(place):
    run = place / "killed"
    killed(place, "killed", "log", 45)
    assert len(lines(run)) == 45  # in the middle of the second chunk after the gate
    with (run / "rollouts.jsonl").open("ab") as file:
        file.write(b'{"key": "pirate/0/q')  # as a power cut would leave it
    killed(place, "killed", "part", 2)
    assert lines(run) == lines(place / "reference")
    assert len(list((run / "activations.parts").glob("*.safetensors"))) == 2
    assert not (run / "activations.safetensors").exists()
    main(axis(place, "killed"))
    same_as_reference(run, place / "reference")


def test_parts_that_were_recorded_before_a_kill_are_not_recorded_again(place, monkeypatch):
    run = place / "parts"
    shutil.copytree(place / "reference", run)
    for path in run.glob("activations.*"):
        path.unlink()
    made, save = [], stages.Activations.save

    def stop_after_three(self, stem):
        save(self, stem)
        made.append(stem.name)
        if len(made) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(stages.Activations, "save", stop_after_three)
    with pytest.raises(SystemExit):
        main(axis(place, "parts"))
    main(axis(place, "parts"))
    assert made == sorted(made)  # no number came twice; "activations" comes last
    assert len(set(made)) == len(made)
    assert len(made) > 4
    same_as_reference(run, place / "reference")


def test_two_ranks_give_the_very_run_that_one_process_gives(place):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(place / "script.py"), "none", "0", *axis(place, "ranks")]
    # torchrun gives each process one thread unless told; on some CPUs another number of threads adds in another order
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **threads})
    assert done.returncode == 0, done.stderr
    same_as_reference(place / "ranks", place / "reference")


def test_ranks_wait_for_the_judge_before_they_record(place):
    """The second rank read the scores before the first had judged, and recorded its roles without any."""

    def judged(run):
        arguments = axis(place, run)
        arguments[arguments.index("none")] = "rules"
        return arguments

    main(judged("judged"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(place / "script.py"), "none", "0", *judged("judged-ranks")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **threads})
    assert done.returncode == 0, done.stderr
    same_as_reference(place / "judged-ranks", place / "judged")


def test_a_run_that_was_begun_by_ranks_is_finished_by_one_process(place):
    """The ranks' own logs, as a kill leaves them, count as done and are put into the one log."""
    run = place / "shards"
    run.mkdir()
    rows = (place / "reference" / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
    (run / "run.json").write_bytes((place / "reference" / "run.json").read_bytes())
    (run / "rollouts.0000.jsonl").write_bytes(b"".join(rows[:50]))
    (run / "rollouts.0001.jsonl").write_bytes(b"".join(rows[40:90]) + rows[90][:30])
    main(axis(place, "shards"))
    same_as_reference(run, place / "reference")


def test_a_disk_that_fills_up_ends_each_step_in_one_line_and_loses_nothing(place, capsys):
    """The limit on file size stands for the disk: the kernel refuses the write in the same place."""
    run, reference = place / "full", place / "reference"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = sorted(
        (reference / name).stat().st_size
        for name in ("rollouts.jsonl", "activations.safetensors", "report.html")
    )
    for limit in (200, 20_000, *(size - 1 for size in sizes)):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(SystemExit) as stop:
                main(axis(place, "full"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        *before, last = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert last.startswith(f"personatlas: {run}")
        assert "a file grew too large; finished work is kept" in last
        assert not any(line.startswith(("personatlas:", "Traceback")) for line in before)
        assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    main(axis(place, "full"))
    same_as_reference(run, reference)


def test_a_second_process_on_a_run_folder_is_refused(place, capsys):
    before = snapshot(place / "reference")
    with (place / "reference" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(capsys, axis(place, "reference"), "in use by another process", "--out")
        refused(capsys, ["run", "fit", str(place / "reference")], "in use by another process")
    assert snapshot(place / "reference") == before


def test_a_run_of_another_model_in_the_same_place_is_refused_and_left_as_it_is(place, tmp_path, capsys):
    """The folder's name is the same: only the weights tell."""
    model, run = save_tiny(tmp_path / "tiny"), tmp_path / "run"
    options = [
        "--plan",
        "standard",
        "--bank",
        str(place / "bank"),
        "--out",
        str(run),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    main(["run", "rollout", str(model), *options, "--max-new-tokens", "4"])
    before = snapshot(run)
    save_tiny(model, seed=1)
    refused(
        capsys,
        ["run", "rollout", str(model), *options, "--max-new-tokens", "4"],
        "is a run with model",
        "--out",
    )
    refused(capsys, ["run", "record", str(run), "--device", "cpu"], "is a run with model")
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--temperature", "0.5", "temperature 0.7, not 0.5"),
        ("--top-p", "0.5", "top_p 0.9, not 0.5"),
        ("--seed", "1", "seed 0, not 1"),
        ("--max-new-tokens", "9", "max_new_tokens 8, not 9"),
        ("--dtype", "bfloat16", "dtype float32, not bfloat16"),
        ("--chunk", "16", "chunk 32, not 16"),
    ],
)
def test_a_run_with_other_sampling_is_refused_and_left_as_it_is(place, capsys, option, value, named):
    before = snapshot(place / "reference")
    arguments = axis(place, "reference")
    if option in arguments:
        arguments[arguments.index(option) + 1] = value
    else:
        arguments += [option, value]
    refused(capsys, arguments, named, "--out")
    assert snapshot(place / "reference") == before


def test_a_run_with_another_bank_or_chat_template_is_refused_and_left_as_it_is(place, tmp_path, capsys):
    before = snapshot(place / "reference")
    other = shutil.copytree(place / "bank", tmp_path / "bank")
    with (other / "questions.jsonl").open("a") as file:
        file.write('{"id": "q9", "question": "Why?"}\n')
    arguments = axis(place, "reference")
    arguments[arguments.index("--bank") + 1] = str(other)
    refused(capsys, arguments, "is a run with bank")
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("<|end|>", "<|end|>\n"))
    refused(
        capsys, axis(place, "reference", "--chat-template", str(tmp_path / "other.jinja")), "chat_template"
    )
    assert snapshot(place / "reference") == before


def test_a_second_call_on_a_finished_run_makes_nothing_again(place, monkeypatch, capsys):
    def never(*_given, **_how):
        raise AssertionError("made again")

    run = place / "reference"
    before = snapshot(run)
    monkeypatch.setattr("personatlas.persona.sampling.sampler.Sampler.answers", never)
    monkeypatch.setattr(stages, "record", never)
    monkeypatch.setattr("personatlas.analysis.fit.axis.fit_axis", never)
    monkeypatch.setattr("personatlas.analysis.fit.page.write_report", never)
    main(axis(place, "reference", "--json"))
    after = snapshot(run)
    assert {name: content for name, (content, _) in after.items()} == {
        name: c for name, (c, _) in before.items()
    }
    assert {name for name in after if after[name] != before[name]} <= {"run.json"}
    assert json.loads(capsys.readouterr().out)["report"] == str(run / "report.html")


def test_a_larger_selection_in_the_same_folder_keeps_what_is_there(place):
    run = place / "grown"
    arguments = axis(place, "grown")
    arguments[0:1] = ["run", "rollout"]
    for name in ("--judge", "--keep", "--replicates"):
        del arguments[arguments.index(name) : arguments.index(name) + 2]
    main([*arguments, "--roles", "nun,crow,judge", "--questions", "1"])
    few = lines(run)
    main(arguments)
    assert few < lines(run)
    key = [json.loads(line)["key"] for line in lines(run)]
    assert len(key) == len(set(key)) == 216


def test_traits_added_to_a_run_leave_what_is_there_and_are_fitted_beside_it(place):
    shutil.copytree(place / "reference", place / "traits")
    before = snapshot(place / "traits")
    main(axis(place, "traits", "--traits"))
    after = snapshot(place / "traits")
    for name in ("activations.safetensors", "axis.safetensors", "space.safetensors"):
        assert after[name][0] == before[name][0], name
    assert lines(place / "reference") < lines(place / "traits")
    fit = json.loads((place / "traits" / "fit.json").read_bytes())
    assert {row["trait"] for row in fit["traits"]["traits"]} == set(TRAITS)
    assert {tuple(row["n"]) for row in fit["traits"]["traits"]} == {(24, 24)}
    assert "Traits along the axis" in (place / "traits" / "report.html").read_text()
    # the same in one go
    main(axis(place, "at-once", "--traits"))
    for name in (*RESULTS, "traits.safetensors", "trait_activations.safetensors"):
        assert (place / "at-once" / name).read_bytes() == (place / "traits" / name).read_bytes(), name


def test_controls_added_to_a_run_leave_what_is_there_and_are_placed_on_its_axis(place):
    bank = place / "bank-with-controls"
    shutil.copytree(place / "bank", bank)
    rows = [
        {"name": "facts", "prompts": ["Water is wet.", "Rain falls."]},
        {"name": "style", "prompts": ["Be brief."]},
    ]
    (bank / "controls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(place / "reference", place / "controls")
    before = snapshot(place / "controls")
    arguments = axis(place, "controls")
    arguments[arguments.index("--bank") + 1] = str(bank)
    main(arguments)
    after = snapshot(place / "controls")
    for name in ("activations.safetensors", "axis.safetensors", "space.safetensors"):
        assert after[name][0] == before[name][0], name
    assert lines(place / "reference") < lines(place / "controls")
    fit = json.loads((place / "controls" / "fit.json").read_bytes())
    assert {row["name"] for row in fit["controls"]} == {"facts", "style"}
    assert "1 is “default”" in (place / "controls" / "report.html").read_text()


def test_other_traits_in_the_same_folder_are_refused(place, capsys):
    shutil.copytree(place / "bank", place / "other-traits")
    rows = (place / "bank" / "traits.jsonl").read_text().replace("Be calm.", "Be quite calm.")
    (place / "other-traits" / "traits.jsonl").write_text(rows)
    main(axis(place, "first-traits", "--traits"))
    arguments = axis(place, "first-traits", "--traits")
    arguments[arguments.index("--bank") + 1] = str(place / "other-traits")
    refused(capsys, arguments, "traits_bank", "choose another folder with --out")


def test_answers_of_white_space_alone_are_neither_recorded_nor_fitted(place, capsys):
    """They had tokens, so they were recorded, and the fit refused sums that held more than was kept."""
    arguments = axis(place, "blank")
    main(["run", "rollout", *arguments[1 : arguments.index("--judge")]])
    path = place / "blank" / "rollouts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for role in ("default", "crow"):
        next(row for row in rows if row["key"].startswith(f"{role}/"))["answer"] = " \n"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(arguments)
    assert f"{sum(bool(row['answer'].strip()) for row in rows)} rollouts fitted" in capsys.readouterr().out


def test_answers_that_would_not_fit_are_refused_before_the_run_is_begun(place, capsys):
    """They were sampled whole, and recording refused them; and the folder kept what had been asked for."""
    long = axis(place, "too-long")
    long[long.index("--max-new-tokens") + 1] = "600"
    refused(capsys, long, "fit into the 512 that", "--max-new-tokens ")
    main(axis(place, "too-long"))


def test_the_same_key_has_the_same_prompt_and_seed_in_every_selection(place):
    bank, model = load_bank(place / "bank"), tiny_model()

    def planned(selection, seed=0, size=7):
        plan = plan_rollouts(bank, model, selection, seed, size)
        made = {r.key: (r.seed, r.messages, plan.prompt_ids[r.key]) for chunk in plan.chunks for r in chunk}
        assert len(made) == len(plan.keys)
        return made

    whole = planned(Selection(samples=8))
    for part in (Selection(role_names=("crow", "nun"), questions=2), Selection(prompts=1, samples=3)):
        some = planned(part, size=64)
        assert 0 < len(some) < len(whole)
        assert some.items() <= whole.items()
    assert len({seed for seed, _, _ in whole.values()}) == len(whole)
    other = planned(Selection(samples=8), seed=1)
    assert all(other[key][1:] == whole[key][1:] and other[key][0] != whole[key][0] for key in whole)
