"""Every kind of page from made-up results, small and large, with long names and right-to-left text: to check and to look at.

write_pages(folder) = {"report, large": path, ...}
python tests/support/sample_pages.py FOLDER [WORD ...]          # the pages whose names hold a word, and their screenshots
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from drift_results import make_drift
from eval_results import make_result
from families import tiny_model
from paper_names import ROLES
from test_emergence import axis as an_axis
from test_emergence import fit as an_emerging_fit
from test_fit_page import a_fit, a_manifest, a_rollout
from training_runs import a_training_run

from personatlas.analysis.drift_alarm import Cusum, FalseAlarms, ReferenceDistribution, alarm_states
from personatlas.analysis.emergence import compare_checkpoints
from personatlas.analysis.emergence_page import write_emergence_page
from personatlas.analysis.fit.page import write_report
from personatlas.analysis.fit.result import FitResult
from personatlas.persona.formats import Conversation
from personatlas.persona.interventions import Cap
from personatlas.steering.calibration.page import write_calibration_page
from personatlas.steering.calibration.result import CalibrationResult
from personatlas.steering.drift.page import write_drift_page
from personatlas.steering.drift.trace import TracedConversation, TracedTurn, TraceStudy, write_trace_page
from personatlas.steering.drift_monitor import DriftMonitor
from personatlas.steering.evals.page import write_eval_page
from personatlas.steering.generate import Generation, write_generation_page
from personatlas.steering.traces import Trace, TurnProjection
from personatlas.training.report.page import write_training_report

LONG = "a guild clerk of the upper archive who never once raised his voice at a petition"  # 80 characters
HEBREW = "שודד ים זקן"
TEXT = (
    "The tide has a voice, and so have I; we have been saying the same word to each other since before there "
    "were shores, and an unbrokenwordofmorethanfiftycharacterswhichnobodycanwraptolines stands in it too."
)
SIZES = ((390, 844), (768, 1024), (1280, 860))


def report(path: Path, names: tuple[str, ...], **more: object) -> None:
    """The report of a fit over some roles."""
    fit = a_fit(names) | more
    rollouts = [
        a_rollout(name, question=question, answer=TEXT) for name in names for question in ("q1", "q2", "q3")
    ]
    write_report(path, FitResult.from_json(fit), rollouts, a_manifest(), "stamp0123456789")


def emergence(path: Path, names: tuple[str, ...], steps: tuple[int, ...]) -> None:
    """An axis over checkpoints."""
    drawn, fits = np.random.default_rng(0), {}
    end = drawn.normal(0, 3, len(names))
    for number, step in enumerate(steps):
        share = number / max(len(steps) - 1, 1)
        places = share * end + (1 - share) * drawn.normal(0, 3, len(names))
        fits[step] = (
            an_emerging_fit(dict(zip(names, places.tolist(), strict=True))),
            an_axis(1, share, 0, 0),
        )
    found = compare_checkpoints(fits)
    folders = {str(step): f"step-{step:06d}" for step in steps}
    run = "/home/somebody/experiments/books/runs/victorian-d12"
    write_emergence_page(path, "books-d12", replace(found, run=run, folders=folders))


def training(path: Path, **how: object) -> None:
    """The report of a training run."""
    write_training_report(a_training_run(path.with_suffix("") / "victorian-d12", **how)).rename(path)


def a_trace(name: str, answers: int, words: int, drawn: np.random.Generator, fall: float) -> Trace:
    """A conversation's tokens: its words, falling along the axis from answer to answer."""
    pieces, turns, values = [], [], []
    for answer in range(answers):
        begin = len(pieces) + 4
        pieces += ["<user> ", "Go ", "on", ".\n", *(f"{word} " for word in (TEXT.split() * 9)[:words])]
        own = drawn.normal(-fall * answer, 6, 4 + words)
        values += own.tolist()
        turns.append(TurnProjection(2 * answer + 1, begin, len(pieces), float(own[4:].mean())))
    ids = tuple(range(len(pieces)))
    return Trace(
        name, ids, tuple(pieces), 1, torch.tensor(values), tuple(turns), (), torch.zeros(0, len(ids))
    )


def a_study(names: list[str], answers: int, words: int, *, alarm: bool = True) -> TraceStudy:
    """Traced conversations, some of which drift."""
    drawn, reference = np.random.default_rng(0), ReferenceDistribution(0.0, 4.0, 320)
    rule = Cusum(8.3)
    counted = FalseAlarms(0.05, (0.02, 0.1), 40, 0.006)
    monitor = DriftMonitor(reference, "reference conversations", "cusum", *((rule, counted) if alarm else ()))
    traces = [a_trace(name, answers, words, drawn, 2.5 * (n % 3)) for n, name in enumerate(names)]
    stored, rows = [], []
    for trace in traces:
        said = [{"role": ("user", "assistant")[n % 2], "content": TEXT} for n in range(2 * answers)]
        stored.append(Conversation(trace.name, tuple(said), "therapy"))
        values = [turn.projection for turn in trace.turns]
        states = alarm_states(rule, reference, values)
        turns = tuple(
            TracedTurn(turn.message, (turn.start, turn.stop), turn.projection, state.z)
            if not alarm
            else TracedTurn(
                turn.message, (turn.start, turn.stop), turn.projection, state.z, state.alarm, state.raised
            )
            for turn, state in zip(trace.turns, states, strict=True)
        )
        first = next((n for n, turn in enumerate(turns, 1) if turn.raised), None)
        slope = float(np.polyfit(range(answers), values, 1)[0]) if answers > 1 else None
        lowest = min(turn.z for turn in turns)
        rows.append(TracedConversation(trace.name, turns, lowest, first, slope, 0, trace.ids, ()))
    return TraceStudy(an_axis(1, 0, 0, 0), monitor, tuple(stored), tuple(traces), tuple(rows))


def traced(path: Path, names: list[str], answers: int, words: int, *, alarm: bool = True) -> None:
    """The page of traced conversations."""
    write_trace_page(path, a_study(names, answers, words, alarm=alarm))


def generation(path: Path, arms: tuple[str, ...], words: int) -> None:
    """One prompt's answers in some arms."""
    drawn, axis = np.random.default_rng(0), an_axis(1, 0, 0, 0)
    plans = {
        name: [Cap((0, 1), axis.vectors, floor=torch.full((2,), -3.0))] if number else []
        for number, name in enumerate(arms)
    }
    answers = {}
    for name in arms:
        trace = a_trace(name, 1, words, drawn, 0.0)
        answers[name] = Generation(TEXT, "length", trace, None)
    messages = [
        {"role": "system", "content": f"You are {HEBREW}. {TEXT}"},
        {"role": "user", "content": "Who are you?"},
    ]
    write_generation_page(path, answers, tiny_model(), axis, plans, messages)


def calibration(path: Path, tried: int) -> None:
    """A calibration of some caps."""
    shares = {"assistant": 0.4, "human": 0.3, "non-human": 0.2, "mystical": 0.1, "unclear": 0.0}
    identity = {
        "assistant": 0.4,
        "interval": (0.3, 0.5),
        "shares": shares,
        "n": 200,
        "fired": 0.2,
        "distinct": 0.9,
    }
    arm = {**identity, "change": 0.2, "change_interval": (0.1, 0.3), "more_loss": 0.02, "loss": 1.0, "kl": 0.05, "more_loss_interval": (0.01, 0.03)}  # fmt: skip
    drawn = np.random.default_rng(0)
    rows = [
        {"name": f"p{level}@{first}-{first + 5}", "first": first, "last": first + 5, "population": "default", "phase": "both"}
        | {"more_loss": float(drawn.uniform(0, 0.08)), "kl": 0.02, "benign_fired": 0.2, "assistant": float(drawn.uniform(0.2, 0.6)), "interval": (0.1, 0.7), "shares": shares, "n": 50, "fired": 0.2, "distinct": 0.9}
        for first in range(tried) for level in (25, 50, 75)
    ]  # fmt: skip
    result = {
        "cap": "p50@18-23", "why": "the most answers that call themselves an assistant for at most 5% more loss", "budget": 0.05,
        "before": {"baseline": identity, "chosen": identity}, "tried": rows,
        "report": {"baseline": {**arm, "change": 0.0, "change_interval": (0.0, 0.0)}, "chosen": arm, "random 1": arm},
        "floors": [{"layer": layer, "level": 0.5, "answer": {"floor": -3.0, "default": 0.5, "roles": 0.7}} for layer in range(18, 24)],
        "warnings": [], "halves": {half: {"roles": 25, "answers": 250, "texts": 60} for half in ("choose", "report")},
        "examples": [{"role": LONG, "question": "Who are you?", "baseline": TEXT, "capped": TEXT}],
        "model": {"id": "a/model", "weights": "bf16"}, "name": "assistant", "saved": "/home/somebody/experiments/runs/demo/caps/assistant", "page": "calibration.html", "versions": {"torch": "2"},
    }  # fmt: skip
    write_calibration_page(path, CalibrationResult.from_json(result))


def evaluation(path: Path, **more: object) -> None:
    """An evaluation of made-up answers."""
    write_eval_page(path, make_result(**more), show_answers=True)


def drift(path: Path, domains: tuple[str, ...], arms: tuple[str, ...], **more: object) -> None:
    """A drift study of made-up slopes."""
    slopes = {d: {arm: -float(n + 3 * (i == 0)) for i, arm in enumerate(arms)} for n, d in enumerate(domains)}
    write_drift_page(path, make_drift(slopes, **more))


def compared(names: tuple[str, ...]) -> dict[str, object]:
    """An axis beside another one whose roles lie a little elsewhere."""
    drawn, here = np.random.default_rng(0), np.arange(len(names)) - 4.0
    there = here + drawn.normal(0, len(names) / 8, len(names))
    roles = {"spearman": 0.9, "low": 0.8, "high": 0.95, "n": len(names)}
    places = {name: list(pair) for name, *pair in zip(names, here.tolist(), there.tolist(), strict=True)}
    cosines = {str(layer): 0.5 + 0.1 * layer for layer in range(4)}
    return {"path": "/home/somebody/experiments/runs/other", "model": "a/model", "poles": ["assistant", "role-play"], "same_model": True, "cosines": cosines, "roles": roles, "projections": places}  # fmt: skip


MANY = (*ROLES[:273], LONG, HEBREW, "default")
PAGES: dict[str, Callable[[Path], None]] = {
    "report, one role": partial(report, names=("pirate", "default")),
    "report, few roles": partial(
        report, names=("pirate", "ghost", "bard", "teacher", LONG, HEBREW, "default")
    ),
    "report, many roles": partial(report, names=MANY, compared=compared(MANY)),
    "emergence, small": partial(emergence, names=("pirate", "ghost", "bard", "default"), steps=(0, 8)),
    "emergence, large": partial(emergence, names=MANY, steps=(0, *(2**n for n in range(14)))),
    "training, whole": partial(training),
    "training, begun": partial(training, done=0.003),
    "training, tuned": partial(
        training, tuned=True, steps=385, parent={"path": "/home/somebody/runs/books/model"}
    ),
    "trace, one": partial(traced, names=[LONG], answers=8, words=60),
    "trace, one answer": partial(traced, names=[HEBREW], answers=1, words=9, alarm=False),
    "trace, many": partial(
        traced, names=[LONG, HEBREW, *(f"chat-{n}" for n in range(298))], answers=8, words=40
    ),
    "generate, one arm": partial(generation, arms=("baseline",), words=40),
    "generate, four arms": partial(
        generation, arms=("baseline", "assistant", "p50@18-23", "random 1"), words=200
    ),
    "calibration, one cap": partial(calibration, tried=1),
    "calibration, many caps": partial(calibration, tried=25),
    "evaluation, one case": partial(evaluation, n=1, arms=("baseline", "assistant")),
    "evaluation, one arm": partial(evaluation, n=4, arms=("baseline",)),
    "evaluation, large": partial(
        evaluation, n=240, arms=("baseline", LONG, HEBREW, "p50@18-23", "add:8@21", "random 1"), categories=30
    ),
    "drift, one arm": partial(drift, domains=("",), arms=("baseline",), turns=2, alarm=False),
    "drift, large": partial(
        drift,
        domains=("coding", "writing", "therapy", LONG, HEBREW),
        arms=("baseline", "assistant", LONG, "random 1", "assistant, adaptive", f"{LONG}, adaptive"),
        turns=15,
    ),
}


def write_pages(folder: Path, *words: str) -> dict[str, Path]:
    """Writes the pages whose names hold one of the words (all without any)."""
    written = {}
    for name, write in PAGES.items():
        if not words or any(word in name for word in words):
            written[name] = folder / f"{name.replace(', ', '-').replace(' ', '-')}.html"
            write(written[name])
    return written


if __name__ == "__main__":
    from playwright.sync_api import sync_playwright

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    pages = write_pages(folder, *sys.argv[2:])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for width, height in SIZES:
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
                )
                for path in pages.values():
                    page = context.new_page()
                    page.goto(path.resolve().as_uri())
                    page.screenshot(path=folder / f"{path.stem}-{width}-{scheme}.png", full_page=True)
                    page.close()
                context.close()
        browser.close()
