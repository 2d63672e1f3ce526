"""What a run tells: the record on disk, its mirrors, and the line on stderr."""

import json
import sys
from pathlib import Path

import pytest

from personatlas.persona.errors import UserError
from personatlas.persona.logs import read_lines
from personatlas.training.loop.run_log import MetricsLog, ProgressLine, cut_log, read_metrics


def a_step(step, loss=3.0, **more):
    return {
        "kind": "step",
        "step": step,
        "tokens": step * 1000,
        "loss": loss,
        "rate": 1.0,
        "gradient_norm": 0.5,
        "seconds": step * 2.0,
        "tokens_a_second": 500.0,
        "utilisation": None,
        **more,
    }


def an_evaluation(step):
    return {
        "kind": "held-out",
        "step": step,
        "bits_per_byte": 1.25,
        "loss": 3.6,
        "tokens": 1000,
        "bytes": 4000,
    }


def an_event(step, text):
    return {"kind": "event", "step": step, "what": "stopped", "text": text}


def test_rows_come_back_in_order_with_everything_that_was_in_them(tmp_path):
    rows = [a_step(1), an_evaluation(1), an_event(1, "stopped by Ctrl-C"), a_step(2, 2.9)]
    with MetricsLog(tmp_path) as log:
        assert read_metrics(tmp_path) == []
        for row in rows:
            log.write(row)
    assert read_metrics(tmp_path) == rows


def test_a_number_that_is_not_finite_is_null_in_the_record_and_in_no_mirror(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(a_step(1, float("nan"), gradient_norm=float("inf")))
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (row["loss"], row["gradient_norm"], row["rate"]) == (None, None, 1.0)


def test_resuming_cuts_what_came_after_the_checkpoint(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.cut_after(0)
        for step in range(1, 8):
            log.write(a_step(step))
            log.write(an_evaluation(step))
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "step", "st')  # killed while it wrote
        log.cut_after(4)
        log.write(a_step(5, 1.0))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 1, 2, 2, 3, 3, 4, 4, 5]
    before = (tmp_path / "metrics.jsonl").stat()
    cut_log(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before.st_ino  # nothing to cut: not written again
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("option", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_mirror_without_its_package_is_one_line_that_says_what_to_install(
    tmp_path, monkeypatch, option, package
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"^--{option} needs .*: pip install {package}$"):
        MetricsLog(tmp_path, **{option: True if option == "tensorboard" else "project"})
    assert list(tmp_path.iterdir()) == []


def scalars(folder):
    """(tag, step, value) in TensorBoard's event files, oldest first, and at which steps they say to forget later ones."""
    from tensorboardX.event_file_writer import EventsWriter  # noqa: F401 (the package is there)
    from tensorboardX.proto.event_pb2 import Event

    found, purged = [], []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log"):
                purged.append(event.step)
            found += [(value.tag, event.step, round(value.simple_value, 4)) for value in event.summary.value]
    return found, purged


def test_tensorboard_sees_the_numbers_and_forgets_what_was_cut(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsLog(tmp_path, tensorboard=True) as log:
        assert not (tmp_path / "tensorboard").exists()
        log.write(a_step(7, 2.5))
        log.write(an_evaluation(7))
        log.write(an_event(7, "no number"))
    found, purged = scalars(tmp_path / "tensorboard")
    assert ("train/loss", 7, 2.5) in found
    assert ("held-out/bits_per_byte", 7, 1.25) in found
    assert "train/utilisation" not in [tag for tag, _, _ in found]
    assert purged == []
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.cut_after(4)
        log.write(a_step(5, 2.7))
    found, purged = scalars(tmp_path / "tensorboard")
    assert ("train/loss", 5, 2.7) in found
    assert purged == [5]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
def test_weights_and_biases_works_offline_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for step in (1, 2):
        with MetricsLog(tmp_path, wandb="project") as log:
            log.write(a_step(step))
        ids.append((tmp_path / "wandb" / "id").read_text())
    assert ids[0] == ids[1]
    assert (
        len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/*.wandb"))) >= 1
    )  # folders are named by the second
    assert len(read_metrics(tmp_path)) == 2


def test_lines_come_every_ten_seconds_and_say_where_the_run_stands(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("personatlas.training.loop.run_log.time.monotonic", lambda: now[0])
    with ProgressLine(100) as line:
        for step in range(1, 31):
            now[0] += 2.0
            line.show(a_step(step, 4.0, utilisation=0.491))
            if step == 12:
                line.show(an_evaluation(12))
        line.show(an_event(30, "stopped by Ctrl-C"))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "step 1/100, loss 4.000, 500 tokens/s, 49.1% of the peak"
    assert said[1] == "step 6/100, loss 4.000, 500 tokens/s, 49.1% of the peak, 3 min left"
    assert "step 12: held out 1.2500 bits per byte" in said
    assert said[-2] == "step 30: stopped by Ctrl-C"
    assert said[-1].startswith("step 30/100, loss 4.000, held out 1.2500 bits per byte, 500 tokens/s")
    assert len(said) == 1 + 5 + 1 + 2


def test_the_time_left_is_training_time_at_the_pace_since_this_process_began(capsys):
    with ProgressLine(1000) as line:
        line.show(a_step(500, seconds=4000.0))
        assert line.seconds_left() is None
        line.show(a_step(510, seconds=4030.0))
        assert line.seconds_left() == pytest.approx(3.0 * 490)
        line.show(a_step(1000, seconds=9000.0))
        assert line.seconds_left() is None


def test_on_a_terminal_one_line_moves(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    with ProgressLine(100) as line:
        line.show(a_step(1))
        line.show(an_event(1, "resumed from step 0"))
        line.show(a_step(2, 2.0))
    said = capsys.readouterr().err
    assert "2/100" in said
    assert "loss 2.474" in said
    assert "resumed from step 0" in said


def test_samples_and_metrics_are_cut_by_the_same_rule(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "prompt": "", "text": "¿"}) + "\n" for step in (0, 5, 5, 9))
    )
    cut_log(path, 5)
    assert [row["step"] for row in read_lines(path)] == [0, 5, 5]
    assert "¿" in Path(path).read_text(encoding="utf-8")
