"""Folders of training runs as the loop leaves them, with made-up but plausible numbers: for the report's tests, and to look at.

python tests/training_runs.py FOLDER          # runs at every stage, each with its report
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from personatlas.training.plan import CHIPS, make_plan

PROMPTS = (
    "CHAPTER I.\n\nThe old house stood upon the hill, and from its windows",
    "My dear Sir,—I have the honour to acknowledge the receipt of",
    "It was upon a dreary evening in November that we first",
    "Of all the virtues, patience is the one which",
)
TEXTS = (
    " oan;the , hNe1 tt–iz wor-\n#a e&8 sm",
    " the the of , and and the to of the was . the in a of to and , the",
    " the hand of the said, and the man of the was to be the and the whole of the",
    " the whole country was seen to be of the same kind, and the people had been made to go",
    " one might see the whole of the valley, and the river which ran beneath it, as it had been in her father's time.",
    " one could look down, past the orchard and the broken wall, to the village; and there, of a Sunday, the bells were heard.",
)


def a_training_run(folder, *, depth=12, steps=964, chip="h200", done=1.0, tuned=False, seed=0, **more):
    """A run that has done a share of its steps; all of them, and it is finished. `more` goes into run.json."""
    folder.mkdir(parents=True)
    batch = 98_304 if chip != "cpu" else 2048
    length = {
        "steps": steps,
        "batch": batch,
        "tokens": steps * batch,
        "warmup": steps // 50,
        "decay": round(0.6 * steps),
    }
    plan = replace(
        make_plan(depth, minutes=3.0, chip=CHIPS[chip]), **length
    )  # whatever the dial's rules are just now
    record = {
        "kind": "training",
        "created": "2026-11-27T08:00:00+00:00",
        "asked": {"depth": depth, "corpus": "books", "minutes": 3.0, "seed": 0, "tokens": None},
        "plan": json.loads(json.dumps(plan.to_json())),
        "versions": {"python": "3.11.7", "torch": "2.13.0", "personatlas": "0.1.0"},
    }
    (folder / "run.json").write_text(json.dumps(record | more))
    last, every = round(plan.steps * done), max(1, plan.steps // 12)
    rows, samples = [], []
    drawn = np.random.default_rng(seed)
    for step in range(last + 1 if done else 0):
        if step:
            rows.append(_step(step, plan, drawn))
        if step % every == 0 or step == plan.steps:
            rows.append(_evaluation(step, plan, tuned))
            level = min(5, round(6.2 * math.log1p(step) / math.log1p(plan.steps) - 0.8)) if step else 0
            samples += [{"step": step, "prompt": prompt, "text": TEXTS[max(level, 0)]} for prompt in PROMPTS]
    if last > plan.steps // 2:
        at = plan.steps // 3
        rows.insert(at, {"kind": "event", "step": at, "what": "resumed", "text": "went on from the checkpoint of this step; it had been at 402"})  # fmt: skip
    for name, content in (("metrics", rows), ("samples", samples)):
        if content:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    for step in (0, *(2**n for n in range(6, 20))):
        if done and step <= last:
            _model(folder / "checkpoints" / f"step-{step:06}")
    if done == 1.0:
        _model(folder / "model")
    return folder


def _loss(step, plan):
    return (
        3.35 + 6.9 / (1 + step / 9) ** 0.62 - 0.22 * max(0.0, (step - plan.steps + plan.decay) / plan.decay)
    )


def _step(step, plan, drawn):
    speed = (
        plan.tokens_a_second
        * 1.13
        * (1 + 0.012 * drawn.standard_normal())
        * (0.93 if drawn.random() < 0.01 else 1)
    )
    return {
        "kind": "step",
        "step": step,
        "tokens": step * plan.batch,
        "loss": round(_loss(step, plan) + 0.035 * drawn.standard_normal(), 4),
        "rate": plan.rate_at(step - 1),
        "gradient_norm": round(
            float((0.35 + 4 / (1 + step / 5)) * math.exp(0.18 * drawn.standard_normal())), 4
        ),
        "seconds": round(step * plan.batch / (plan.tokens_a_second * 1.13), 3),
        "tokens_a_second": round(speed),
        "utilisation": round(0.45 * speed / plan.tokens_a_second, 4),
    }


def _evaluation(step, plan, tuned):
    loss = _loss(step, plan) + 0.04
    bits = None if tuned else loss / math.log(2) / 4.1
    whole = step == plan.steps  # earlier ones read a part only
    tokens, size = (1_018_686, 4_260_000) if whole else (480_112, 2_007_000)
    return {
        "kind": "held-out",
        "step": step,
        "bits_per_byte": bits,
        "loss": loss,
        "tokens": tokens,
        "bytes": size,
    }


def _model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


if __name__ == "__main__":
    from personatlas.training.report.page import write_training_report

    at = Path(sys.argv[1])
    a_training_run(at / "victorian-d12")
    a_training_run(at / "under-way", done=0.41)
    a_training_run(at / "begun", done=0.0)
    a_training_run(at / "first-steps", done=0.003)
    a_training_run(at / "on-a-laptop", depth=4, steps=300, chip="cpu")
    a_training_run(at / "tuned", depth=12, steps=385, tuned=True, parent={"path": "runs/victorian-d12/model"})
    for folder in sorted(at.iterdir()):
        print(write_training_report(folder))
