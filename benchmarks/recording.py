"""What recording all layers costs: the same prefill with and without the hooks, in turn, in one run.

    python benchmarks/recording.py [--rollouts 64] [--batch-tokens N]

Prints tokens/s of both arms and the median of their paired ratios, on a GPU also with compiled blocks. The first check is
of the recorder against float64 means over plain block outputs. Lengths are those of real rollouts (70-160 tokens, half of
them the answer), and both arms pad and send the same batches.
"""

import argparse
import statistics
import time

import torch

from personatlas.persona.models.load import Model, load_model
from personatlas.persona.pipeline.record import CPU_TOKENS, GPU_MULTIPLE, GPU_TOKENS, compiled, record
from personatlas.persona.pipeline.self_test import run_self_test
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.sampler import batch_end, batch_tokens, pad


def made_up(number: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(number):
        prompt, answer = (
            int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((40, 90), (30, 70))
        )
        ids = torch.randint(5, 40000, (prompt + answer,), generator=generator).tolist()
        found.append(Rollout(f"r/0/q{i}/0", (), tuple(ids[:prompt]), tuple(ids[prompt:]), "", 0, "end"))
    return sorted(found, key=lambda r: -len(r.prompt_ids) - len(r.answer_ids))


def seconds(work) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def plain(model: Model, rollouts: list[Rollout], tokens: int) -> None:
    lengths = [len(r.prompt_ids) + len(r.answer_ids) for r in rollouts]
    first = 0
    while first < len(rollouts):
        stop = batch_end(lengths, first, tokens)
        multiple = GPU_MULTIPLE if model.device.type == "cuda" else 1
        ids = pad([r.prompt_ids + r.answer_ids for r in rollouts[first:stop]], model.device, multiple)
        model.base(input_ids=ids, use_cache=False)
        first = stop


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    model = load_model("smollm2-135m")
    for check in run_self_test(model):
        print(
            f"{'ok' if check.passed else 'FAILED'}  {check.name}: {check.found:.3g} (allowed {check.allowed:.3g})"
        )
    tokens = options.batch_tokens or batch_tokens(model, CPU_TOKENS, GPU_TOKENS)
    rollouts = made_up(options.rollouts)
    total = sum(len(r.prompt_ids) + len(r.answer_ids) for r in rollouts)
    print(f"{model.dtype}, {total} tokens, batches of {tokens}")

    def recorded() -> None:
        for _ in record(model, rollouts, tokens=tokens, compile=False):
            pass

    for compile in (False, True) if model.device.type == "cuda" else (False,):
        with compiled(model, enabled=compile):
            first = seconds(recorded)
            plain(model, rollouts, tokens)
            times = [
                (seconds(recorded), seconds(lambda: plain(model, rollouts, tokens)))
                for _ in range(options.repeats)
            ]
        with_hooks, without = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        print(
            f"{'compiled' if compile else 'eager'}: with hooks {total / with_hooks:,.0f} tokens/s, "
            f"without {total / without:,.0f}, time ratio {ratio:.3f}; the first pass took {first:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
