"""Rates and batch of chat tuning, arm beside arm in one process.

    python benchmarks/chat_tuning.py BASE --data chats.jsonl --data runs/roles --epochs 2 --arm matrix=1,others=1 --arm matrix=2

An arm is what differs from the plan (`training/chat/plan.py`), as factors: matrix, others (the rates of
embedding, head and norm weights), batch; or epochs. Every arm starts from the base's weights. Printed: nats a
token of the held-out answers, before and after, with the loss of the last steps in training: where that falls
and the other rises, it is learned by heart.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from personatlas.persona.distributed import World
from personatlas.training.chat.mixture import ChatData, prepare_chat_data
from personatlas.training.chat.packing import ChatEncoder
from personatlas.training.chat.plan import make_chat_plan
from personatlas.training.finetune import BaseModel, find_base_model
from personatlas.training.loop.checkpoints import Checkpoint, load_weights
from personatlas.training.loop.distributed import init_distributed, synchronize
from personatlas.training.loop.step import Stepper
from personatlas.training.model.gpt import GPT
from personatlas.training.options import ChatDataOptions
from personatlas.training.plan import Plan, detect_chip

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
    arguments = parser.parse_args()
    base, device = find_base_model(arguments.base), init_distributed(World(), arguments.device)
    chats = ChatDataOptions(data=tuple(arguments.data), per_role=arguments.per_role, cut=arguments.cut)
    data = prepare_chat_data(chats, ChatEncoder.load(base.folder), context=base.shape.context, seed=0)
    print("\n".join(data.lines()), flush=True)
    stepper = None
    for text in arguments.arm or [""]:
        arm = {name: float(value) for name, value in (part.split("=") for part in text.split(",") if part)}
        plan = plan_for(arguments, arm, data, base, device)
        data.batches.rows = plan.batch // data.batches.context
        if stepper is None:
            compute = torch.bfloat16 if device.type == "cuda" else torch.float32
            model = GPT(plan.shape, compute=compute, checkpointing=plan.checkpointing).to(device)
            stepper = Stepper(model, data.batches, plan, World(), device)
        stepper.set_plan(plan, data.batches)
        row = {"arm": text, "steps": plan.steps, "rows": data.batches.rows, **measured(stepper, data, base)}
        print(json.dumps(row), flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def plan_for(
    arguments: argparse.Namespace,
    arm: dict[str, float],
    data: ChatData,
    base: BaseModel,
    device: torch.device,
) -> Plan:
    """The plan with an arm's changes."""
    rows, epoch = data.batches.rows_in(arm.get("epochs", arguments.epochs)), data.batches.describe()
    counted = round(rows * epoch["counted"] / epoch["rows"])
    plan = make_chat_plan(base.shape, base.rates, rows=rows, counted=counted, chip=detect_chip(device))
    if "batch" in arm:  # as if so many times more fitted into a step; rates stay
        wanted = max(1, round(arm["batch"] * plan.batch / base.shape.context))
        steps = max(1, round(rows / wanted))
        batch, decay = wanted * base.shape.context, max(1, steps - plan.warmup)
        plan = replace(plan, batch=batch, steps=steps, tokens=steps * batch, decay=decay)
    others = arm.get("others", 1.0)
    return replace(
        plan,
        micro_batch=arguments.micro_batch or plan.micro_batch,
        matrix_rate=plan.matrix_rate * arm.get("matrix", 1.0),
        embedding_rate=plan.embedding_rate * others,
        head_rate=plan.head_rate * others,
        norm_rate=plan.norm_rate * others,
    )


def measured(stepper: Stepper, data: ChatData, base: BaseModel) -> dict[str, object]:
    """One run from the base's weights."""
    load_weights(Checkpoint(0, base.folder), stepper.model)
    before = losses(stepper, data)
    if stepper.device.type == "cuda":
        stepper.measure_speed()  # compiles
        load_weights(Checkpoint(0, base.folder), stepper.model)
    stepper.optimizer.reset()
    synchronize(stepper.device)
    start = time.monotonic()
    metrics = [stepper.step(number) for number in range(stepper.plan.steps)]
    synchronize(stepper.device)
    seconds = time.monotonic() - start
    last = [step.wait()[0] for step in metrics[-LAST:]]
    return {
        "before": before,
        "after": losses(stepper, data),
        "training": round(sum(last) / len(last), 4),
        "seconds": round(seconds, 1),
        "matrix_rate": stepper.plan.matrix_rate,
    }


def losses(stepper: Stepper, data: ChatData) -> dict[str, float]:
    row = data.held_out.row(stepper.model, 0, whole=True, max_tokens=0)
    return {name: round(one["loss"], 4) for name, one in row["sources"].items()}


if __name__ == "__main__":
    main()
