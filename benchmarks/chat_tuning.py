"""Rates and batch of chat tuning, arm beside arm in one process.

    python benchmarks/chat_tuning.py BASE --data chats.jsonl --data runs/roles --epochs 2 --arm matrix=1,others=1 --arm matrix=2

An arm is what differs from the plan (`training/chat_plan.py`), as factors: matrix, others (the rates of embedding, head and
gains), batch; or epochs. Every arm starts from the base's weights. Printed: nats a token of the held-out answers, before
and after, with the loss of the last steps in training: where that falls and the other rises, it is learned by heart.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from personatlas.persona.distributed import World
from personatlas.training.chat.mixture import ChatData, prepare
from personatlas.training.chat.packing import ChatEncoder
from personatlas.training.chat.plan import chat_plan, peaks_of
from personatlas.training.finetune import Parent, parent_of
from personatlas.training.loop.checkpoints import Checkpoint, load_weights
from personatlas.training.loop.distributed import join, wait_for
from personatlas.training.loop.step import Stepper
from personatlas.training.model.gpt import GPT
from personatlas.training.options import Chats
from personatlas.training.plan import Plan, chip_of

LAST = 20  # steps whose loss is told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--per-role", type=int)
    parser.add_argument("--cut", action="store_true")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--device")
    parser.add_argument("--arm", action="append")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    parent, device = parent_of(asked.base), join(World(), asked.device)
    chats = Chats(data=tuple(asked.data), per_role=asked.per_role, cut=asked.cut)
    data = prepare(chats, ChatEncoder.load(parent.folder), context=parent.shape.context, seed=0)
    print("\n".join(data.lines()), flush=True)
    stepper = None
    for text in asked.arm or [""]:
        arm = {name: float(value) for name, value in (part.split("=") for part in text.split(",") if part)}
        plan = plan_for(asked, arm, data, parent, device)
        data.source.rows = plan.batch // data.source.context
        if stepper is None:
            compute = torch.bfloat16 if device.type == "cuda" else torch.float32
            model = GPT(plan.shape, compute=compute, checkpointing=plan.checkpointing).to(device)
            stepper = Stepper(model, data.source, plan, World(), device)
        stepper.replan(plan, data.source)
        row = {"arm": text, "steps": plan.steps, "rows": data.source.rows, **measured(stepper, data, parent)}
        print(json.dumps(row), flush=True)
        if asked.out:
            with asked.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def plan_for(
    asked: argparse.Namespace, arm: dict[str, float], data: ChatData, parent: Parent, device: torch.device
) -> Plan:
    """The plan with an arm's changes."""
    rows, told = data.source.rows_in(arm.get("epochs", asked.epochs)), data.source.describe()
    counted = round(rows * told["counted"] / told["rows"])
    peaks = peaks_of(parent.shape, parent.plan)
    plan = chat_plan(parent.shape, peaks, rows=rows, counted=counted, chip=chip_of(device))
    if "batch" in arm:  # as if so many times more fitted into a step; rates stay
        wanted = max(1, round(arm["batch"] * plan.batch / parent.shape.context))
        steps = max(1, round(rows / wanted))
        batch, decay = wanted * parent.shape.context, max(1, steps - plan.warmup)
        plan = replace(plan, batch=batch, steps=steps, tokens=steps * batch, decay=decay)
    others = arm.get("others", 1.0)
    return replace(
        plan,
        micro_batch=asked.micro_batch or plan.micro_batch,
        matrix_rate=plan.matrix_rate * arm.get("matrix", 1.0),
        embedding_rate=plan.embedding_rate * others,
        head_rate=plan.head_rate * others,
        gain_rate=plan.gain_rate * others,
    )


def measured(stepper: Stepper, data: ChatData, parent: Parent) -> dict[str, object]:
    """One run from the base's weights."""
    load_weights(Checkpoint(0, parent.folder), stepper.model)
    before = losses(stepper, data)
    if stepper.device.type == "cuda":
        stepper.speed(1)  # compiles
        load_weights(Checkpoint(0, parent.folder), stepper.model)
    stepper.optimizer.forget()
    wait_for(stepper.device)
    start = time.monotonic()
    heard = [stepper.step(number) for number in range(stepper.plan.steps)]
    wait_for(stepper.device)
    seconds = time.monotonic() - start
    last = [one.wait()[0] for one in heard[-LAST:]]
    return {
        "before": before,
        "after": losses(stepper, data),
        "training": round(sum(last) / len(last), 4),
        "seconds": round(seconds, 1),
        "matrix_rate": stepper.plan.matrix_rate,
    }


def losses(stepper: Stepper, data: ChatData) -> dict[str, float]:
    row = data.held_out.row(stepper.model, 0, whole=True, most=0)
    return {name: round(one["loss"], 4) for name, one in row["sources"].items()}


if __name__ == "__main__":
    main()
