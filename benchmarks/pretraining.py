"""Rates, batch and speed of pretraining, arm beside arm in one process.

    python benchmarks/pretraining.py TOKENS TOKENIZER --depth 12 --tokens 20000000 --arm matrix=2,others=2 --arm batch=131072

An arm is what differs from the plan: batch (tokens), matrix, others, decay, second (factors of what the plan
says; others are the rates of embedding, head and norm weights, second is AdamW's memory in steps), tokens.
Every arm starts from the same weights and reads the same text in the same order. Printed: bits per byte of
the held-out text, tokens/s, the share of the chip's peak.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from personatlas.persona.distributed import World
from personatlas.training.bits_per_byte import held_out_bits_per_byte
from personatlas.training.data.batches import CorpusBatches
from personatlas.training.data.token_shards import open_tokens
from personatlas.training.data.tokenizer import load_corpus_tokenizer, token_sizes
from personatlas.training.loop.distributed import init_distributed, synchronize
from personatlas.training.loop.step import Stepper
from personatlas.training.model.gpt import GPT
from personatlas.training.plan import Plan, detect_chip, make_plan, utilisation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("token_folder", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--arm", action="append", default=None)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tokens = open_tokens(arguments.token_folder, arguments.tokenizer)
    world = World()
    device = init_distributed(world)
    lengths = torch.from_numpy(token_sizes(load_corpus_tokenizer(arguments.tokenizer))).to(device)
    stepper = None
    for text in arguments.arm or [""]:
        arm = {name: float(value) for name, value in (part.split("=") for part in text.split(",") if part)}
        plan = plan_for(arguments, arm, tokens.vocabulary, device)
        batches = CorpusBatches(tokens.train, plan.shape.context, plan.batch // plan.shape.context)
        if stepper is None:
            compute = torch.bfloat16 if device.type == "cuda" else torch.float32
            model = GPT(plan.shape, compute=compute, checkpointing=plan.checkpointing, fp8=arguments.fp8)
            stepper = Stepper(model.initialise(0).to(device), batches, plan, world, device)
        stepper.set_plan(plan, batches)
        row = measured(stepper)
        loss = held_out_bits_per_byte(
            stepper.model, tokens.held_out, lengths, plan.shape.context, min(16, stepper.micro_batch)
        )
        row = {"arm": text, "fp8": arguments.fp8, "bits_per_byte": round(loss.bits_per_byte, 4), **row}
        print(json.dumps(row), flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def plan_for(
    arguments: argparse.Namespace, arm: dict[str, float], vocabulary: int, device: torch.device
) -> Plan:
    """The plan with an arm's changes."""
    batch = int(arm.get("batch", arguments.batch or 0)) or None
    tokens = int(arm.get("tokens", arguments.tokens))
    plan = make_plan(
        arguments.depth, vocabulary=vocabulary, tokens=tokens, chip=detect_chip(device), batch=batch
    )
    others = arm.get("others", 1.0)
    return replace(
        plan,
        micro_batch=arguments.micro_batch or plan.micro_batch,
        matrix_rate=plan.matrix_rate * arm.get("matrix", 1.0),
        embedding_rate=plan.embedding_rate * others * arm.get("embedding", 1.0),
        head_rate=plan.head_rate * others * arm.get("head", 1.0),
        norm_rate=plan.norm_rate * others,
        weight_decay=plan.weight_decay * arm.get("decay", 1.0),
        adam_beta2=plan.adam_beta2 ** (1 / arm.get("second", 1.0)),
    )


def measured(stepper: Stepper) -> dict[str, float | int]:
    """One run from fresh weights: its speed, the last losses."""
    plan = stepper.plan
    stepper.measure_speed()  # compiles
    stepper.model.initialise(0)
    stepper.optimizer.reset()
    synchronize(stepper.device)
    start = time.monotonic()
    metrics = [stepper.step(number) for number in range(plan.steps)]
    synchronize(stepper.device)
    seconds = time.monotonic() - start
    losses = [step.wait()[0] for step in metrics]
    speed = plan.tokens / seconds
    memory = torch.cuda.max_memory_allocated() if stepper.device.type == "cuda" else 0
    return {
        "steps": plan.steps,
        "batch": plan.batch,
        "seconds": round(seconds, 2),
        "tokens_a_second": round(speed),
        "utilisation": round(utilisation(speed, plan.shape, plan.chip), 4),
        "last_losses": round(sum(losses[-10:]) / len(losses[-10:]), 4),
        "gigabytes": round(memory / 1e9, 1),
    }


if __name__ == "__main__":
    main()
