"""The report of a training run, at every stage of it: what it says is what the record says."""

import base64
import json
import math
import re
import shutil

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from test_fit_page import XSS
from training_runs import a_training_run

from personatlas.cli.app import main
from personatlas.persona.errors import UserError
from personatlas.persona.runs import spread_steps
from personatlas.training.plan import CHIPS, critical_batch, make_plan
from personatlas.training.report.figures import MAX_POINTS, smoothed, training_figures
from personatlas.training.report.page import write_training_report
from personatlas.training.report.read import read_training_record
from personatlas.training.report.tables import plan_table


def page_of(folder):
    return write_training_report(folder).read_text(encoding="utf-8")


def text_of(html):
    """What a reader sees, on one line."""
    bare = re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", bare).split())


def drawn(html):
    return json.loads(
        re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.S)[1]
    )


def values_in(array):
    """Plotly's own form of an array of numbers."""
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"]).tolist()


def rows_in(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return a_training_run(tmp_path_factory.mktemp("runs") / "books-d12")


def test_the_summary_of_a_finished_run_says_what_its_last_rows_say(finished):
    rows = rows_in(finished)
    last = [row for row in rows if row["kind"] == "step"][-1]
    held = [row for row in rows if row["kind"] == "held-out"][-1]
    html = page_of(finished)
    text = text_of(html)
    assert f"{held['bits_per_byte']:.4f} bits per byte on held-out text, after {last['step']} steps" in text
    assert f"{last['seconds']:.0f} s of training" in text
    assert "of the peak" in text
    assert "tokens 94,765,056 what 3 minutes hold" in text
    assert "98,304 tokens, 964 steps" in text
    assert "Checkpoints that are kept, each an ordinary model folder: steps 0, 64, 128, 256, 512." in text
    assert "resumed went on from the checkpoint of this step; it had been at 402" in text
    assert set(drawn(html)) == {"loss", "held-out", "rate", "gradient", "speed"}
    assert all(f'data-figure="{name}"' in html for name in drawn(html))


def test_samples_are_shown_from_the_first_to_the_last_step_and_the_rest_is_there(finished):
    text = text_of(page_of(finished))
    samples = rows_in(finished, "samples")
    prompts = list(dict.fromkeys(row["prompt"] for row in samples))
    assert len(prompts) == 4
    for prompt in prompts:
        assert " ".join(prompt.split()) in text
    assert text.count("9 more steps") == 4
    assert text.count("and there, of a Sunday, the bells were heard.") == sum(
        "bells" in row["text"] for row in samples
    )


def test_a_page_can_be_written_before_the_first_step_and_while_the_run_goes_on(tmp_path):
    begun = page_of(a_training_run(tmp_path / "begun", done=0.0))
    assert "Nothing has been trained yet" in text_of(begun)
    assert drawn(begun) == {}
    assert "· √(batch / 65,536)" in begun
    under_way = text_of(page_of(a_training_run(tmp_path / "under-way", done=0.41)))
    assert re.search(
        r"Step 395 of 964 \(41%\): 1\.\d{4} bits per byte on held-out text \(at step 320\)", under_way
    )
    assert re.search(r"about \d+ s left", under_way)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_text('{"kind": "training"}')
    write_rows(tmp_path / "bare", [{"kind": "step", "step": 1, "loss": 3.0}])
    assert "a training loss of 3.000 nats a token, after 1 steps" in text_of(page_of(tmp_path / "bare"))


def test_tuning_is_told_in_losses_and_without_the_rules_for_base_models(tmp_path):
    run = a_training_run(tmp_path / "tuned", steps=385, tuned=True, parent={"path": "runs/books/model"})
    fit = {"loss": 3.1, "low": 3.0, "high": 3.2, "perplexity": 22.0, "tokens": 4000, "conversations": 50}
    rows = rows_in(run)
    held = [row for row in rows if row["kind"] == "held-out"]
    held[0]["sources"] = {"all": {**fit, "loss": 9.0, "low": None}}
    held[-1]["sources"] = {"all": fit, "roles.jsonl": {**fit, "loss": 2.5, "met": 45}, "more.jsonl": fit}
    write_rows(run, rows)
    # earlier versions wrote it
    (run / "style.json").write_text(json.dumps({"kind": "style", "questions": 200}))
    text = text_of(page_of(run))
    assert "tuned from runs/books/model" in text
    assert re.search(r"\d\.\d{4} nats a token on held-out text, after \d+ steps", text)
    assert "· √(batch / 65,536)" not in text
    assert "all 9.000 3.100 [3.000, 3.200] 50 · 4,000 roles.jsonl · 2.500 [3.000, 3.200] 50 90% 4,000" in text
    assert "bits per byte on held-out" not in text


def test_a_loss_that_was_no_number_and_the_reason_for_a_stop_stand_at_the_top(tmp_path):
    run = a_training_run(tmp_path / "broken", done=0.1)
    rows = [
        *rows_in(run),
        {"kind": "step", "step": 97, "loss": None, "tokens": 1, "seconds": 30.0, "rate": 1.0},
    ]
    write_rows(
        run, [*rows, {"kind": "event", "step": 97, "what": "stopped", "text": "the loss is nan at step 97"}]
    )
    text = text_of(page_of(run))
    assert "Note. Step 97: the loss is nan at step 97." in text
    assert "Note. The loss of step 97 was not a finite number." in text
    write_rows(
        run, [*rows, {"kind": "held-out", "step": 97, "bits_per_byte": None, "loss": None, "bytes": 1}]
    )
    assert "held-out text 1." in text_of(page_of(run))  # the last that was one


def test_evaluations_on_a_part_are_marked_and_not_compared_with_those_on_all(finished, tmp_path):
    html = page_of(finished)
    parts, whole = drawn(html)["held-out"]["data"]
    assert (parts["marker"]["symbol"], whole["marker"]["symbol"]) == ("circle-open", "circle")
    held = [row for row in rows_in(finished) if row["kind"] == "held-out"]
    assert values_in(whole["x"]) == [held[-1]["step"]]
    assert values_in(parts["x"]) == [row["step"] for row in held[:-1]]
    assert "Open circles are evaluations on a part of the held-out text" in html
    run = a_training_run(tmp_path / "under-way", done=0.41)
    rows = rows_in(run)
    held = [row for row in rows if row["kind"] == "held-out"]
    held[-1]["bits_per_byte"] = held[-2]["bits_per_byte"] + 0.1  # it was better one before
    write_rows(run, rows)
    html = page_of(run)
    assert f"lowest {held[-2]['bits_per_byte']:.4f} at step {held[-2]['step']}" in text_of(html)
    assert "Open circles" not in html


def test_nobodys_text_can_run(tmp_path):
    run = a_training_run(tmp_path / "foreign", done=0.1, command=f"personatlas train base {XSS}", parent=XSS)
    (run / "samples.jsonl").write_text(json.dumps({"step": 0, "prompt": XSS, "text": XSS}) + "\n")
    rows = [*rows_in(run), {"kind": "event", "step": 96, "what": XSS, "text": XSS}]
    write_rows(run, rows)
    html = page_of(run)
    assert "<img src=x" not in html
    assert "alert(1)</script>" not in html
    assert html.count("&lt;img src=x") > 5


def test_the_rules_that_the_page_tells_are_those_that_the_dial_goes_by():
    told = []
    for depth, minutes in ((4, 30.0), (12, 3.0), (20, 60.0)):
        plan = make_plan(depth, minutes=minutes, chip=CHIPS["h200"])
        table = {
            name: rule for name, _, rule in plan_table(plan.to_json(), {"rate_scale": 1.0}, is_base=True)
        }
        names = {
            "matrices": "matrix_rate",
            "embedding": "embedding_rate",
            "head": "head_rate",
            "gains": "norm_rate",
        }
        known = {"batch": plan.batch, "width": plan.shape.width, "sqrt": math.sqrt}
        for name, field in names.items():
            formula = table[f"rate of {name}"].replace(",", "").replace("·", "*").replace("√", "sqrt")
            assert eval(formula, known) == pytest.approx(getattr(plan, field), rel=0.01), name
        told.append([table[f"rate of {name}"] for name in names])
        assert "straight down over the last 60%" in table["schedule"]
    assert told[0] == told[1] == told[2]  # constants are constants
    assert critical_batch(4 * 10**10) / critical_batch(10**10) == pytest.approx(4**0.383)
    assert critical_batch(400_000) == 1000
    assert "tokens^0.383, at most a 400th of the tokens" in table["batch"]


def test_rates_and_batches_that_were_asked_for_are_told_as_such():
    plan = make_plan(4, minutes=30.0, chip=CHIPS["h200"]).scaled(0.5)
    table = {
        name: rule
        for name, _, rule in plan_table(plan.to_json(), {"rate_scale": 0.5, "batch": 7}, is_base=True)
    }
    plain = {name: rule for name, _, rule in plan_table(make_plan(4).to_json(), {}, is_base=True)}
    assert table["rate of head"] == plain["rate of head"] + ", times 0.5 as asked"
    assert table["batch"] == "as asked"


def test_smoothing_keeps_a_line_and_the_first_value():
    steps = np.arange(1.0, 1001.0)
    assert smoothed(steps, np.full(1000, 2.5)) == pytest.approx(2.5)
    line = smoothed(steps, 3 * steps)
    assert line[0] == 3.0
    assert line[500] == pytest.approx(3 * 501)
    drawn = np.random.default_rng(0).standard_normal(1000)
    assert smoothed(steps, drawn)[100:].std() < 0.35


def test_a_long_run_is_drawn_from_few_points_with_its_ends(tmp_path):
    run = a_training_run(tmp_path / "long", done=0.01)
    rows = [
        {"kind": "step", "step": n, "loss": 10 / n**0.1, "tokens_a_second": 5.0} for n in range(1, 20_001)
    ]
    write_rows(run, rows)
    loss = training_figures(read_training_record(run))["loss"]
    assert len(loss.data[1].x) <= MAX_POINTS
    assert (loss.data[1].x[0], loss.data[1].x[-1]) == (1, 20_000)


def test_shown_steps_are_the_first_two_the_last_and_spread_between():
    assert spread_steps([0, 5], 5) == [0, 5]
    assert spread_steps(list(range(0, 1001, 100)), 5) == [0, 100, 200, 500, 1000]
    assert spread_steps([0, *(2**n for n in range(13))], 5) == [0, 1, 32, 256, 4096]


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_in_a_browser_nothing_is_refused_nothing_overflows_and_the_axes_change_over_and_back(
    finished, width, scheme
):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the page is tested in Debian's chromium: apt-get install chromium")
    path, wrong = write_training_report(finished), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(path.as_uri())
        kinds = []
        for _ in range(3):
            kinds.append(page.evaluate("document.querySelector('.chart.loss')._fullLayout.xaxis.type"))
            page.get_by_role("button", name="Logarithmic axes").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert kinds == ["linear", "log", "linear"]
    assert wrong == []


def test_the_verb_report_writes_it_also_while_the_run_holds_its_lock(tmp_path, capsys):
    import fcntl

    run = a_training_run(tmp_path / "mine", done=0.1)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        main(["run", "report", str(run)])
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    assert "training report" in (run / "report.html").read_text(encoding="utf-8")


def test_a_training_run_is_no_run_of_rollouts(tmp_path, tiny_run, capsys):
    run = a_training_run(tmp_path / "mine", done=0.1)
    before = (run / "run.json").read_text()
    for command, words in (
        (["run", "record", run], "no run.json with rollouts"),
        (["run", "fit", run], "activations"),
        (["run", "judge", run], "no rollouts"),
        (
            ["axis", tiny_run / "tiny", "--out", run, "--device", "cpu", "--plan", "demo"],
            "belongs to a training run",
        ),
    ):
        with pytest.raises(SystemExit):
            main([str(part) for part in command])
        assert words in capsys.readouterr().err
    assert (run / "run.json").read_text() == before
    with pytest.raises(UserError, match="not the folder of a training run"):
        write_training_report(tmp_path)
