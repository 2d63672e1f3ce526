"""Rollouts of the packaged model against plain `generate`, both in one run.

    python benchmarks/rollouts.py [--rollouts 64] [--tokens 32] [--chunk 64]

Prints tokens/s of `generate` (bf16 and fp32, sampled, same prompts, same answer length) and of this project's sampler in
the dtype that it chooses, without and with recording. The end token is disabled in all arms, so that
each makes the same number of tokens. On a GPU `generate` runs at batch 768.
"""

import argparse
import time

import torch

from personatlas.persona.models.load import load_model
from personatlas.persona.pipeline.record import record
from personatlas.persona.pipeline.stages import plan_rollouts
from personatlas.persona.roles.bank import load_bank
from personatlas.persona.rollout import Rollout, Selection
from personatlas.persona.sampling.sampler import Prompt, Sampler, Sampling, pad


def synchronised() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def generate_arm(dtype: str, prompts: list[Prompt], tokens: int, batch: int) -> float:
    model = load_model("smollm2-135m", dtype=dtype)
    start = synchronised()
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        ids = pad([prompt.ids[::-1] for prompt in part], model.device).flip(
            1
        )  # on the left, as `generate` wants it
        mask = pad([[1] * len(prompt.ids) for prompt in part], model.device).flip(1)
        model.hf.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            pad_token_id=2,
        )
    return len(prompts) * tokens / (synchronised() - start)


def own_sampler(prompts: list[Prompt], tokens: int, slots: int | None) -> Sampler:
    model = load_model("smollm2-135m")
    sampling = Sampling(max_new_tokens=tokens)
    if model.device.type != "cuda":
        return Sampler(model, frozenset(), sampling)
    from personatlas.persona.sampling.cuda_graph import GraphSampler

    return GraphSampler(model, frozenset(), sampling, slots, max(len(prompt.ids) for prompt in prompts))


@torch.no_grad()
def own_arm(sampler: Sampler, prompts: list[Prompt], chunk: int, recorded: bool) -> float:
    model, tokens = sampler.model, sampler.sampling.max_new_tokens
    start = synchronised()
    made = []
    for first in range(0, len(prompts), chunk):
        part = prompts[first : first + chunk]
        for answer in sampler.answers(part):
            ids = part[answer.index].ids
            made.append(Rollout(f"r/0/q/{len(made)}", (), ids, answer.ids, "", 0, "length"))
    if recorded:
        for _ in record(model, made):
            pass
    return len(prompts) * tokens / (synchronised() - start)


@torch.no_grad()
def where_a_step_goes(sampler: Sampler) -> str:
    """One replayed decoding step on a GPU, and its draw, attention and head alone, in milliseconds."""
    from triton.testing import do_bench

    from personatlas.persona.sampling.cuda_graph import GraphSampler
    from personatlas.persona.sampling.kernels import attend_on_gpu, draw_on_gpu

    assert isinstance(sampler, GraphSampler)
    steps = sampler._steps
    assert steps is not None
    model, n = sampler.model, steps.slots
    head = model.hf.get_output_embeddings()
    h = torch.randn(n, model.d_model, device=model.device, dtype=model.dtype)
    logits, noise = head(h) * 4, steps.seeds & 0xFFFFFFFF
    layer = steps.decoder.cache.layers[0]
    query = torch.randn(n, 9, 64, device=model.device, dtype=model.dtype)
    steps.positions.fill_(steps.length - 2)
    steps.running.zero_()
    arms = {
        "step": steps._step,
        "draw": lambda: draw_on_gpu(logits, noise, 0.7, 0.9),
        "head": lambda: head(h),
        f"{model.n_layers} attentions": lambda: [
            attend_on_gpu(query, layer.keys, layer.values, steps.positions, 0.125)
            for _ in range(model.n_layers)
        ],
    }
    found = {name: do_bench(work, return_mode="median") for name, work in arms.items()}
    return f"{n} slots of {steps.length}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", type=int, help="rollouts for `generate`, all unless given")
    parser.add_argument(
        "--slots", type=int, nargs="*", help="on a GPU: rows that decode together, several to compare"
    )
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    model, bank = load_model("smollm2-135m"), load_bank()
    plan = plan_rollouts(bank, model, Selection(), 0, options.chunk)
    requests = [request for chunk in plan.chunks[1:] for request in chunk]
    step = max(len(requests) // options.rollouts, 1)
    chosen = sorted(requests[::step][: options.rollouts], key=lambda r: len(plan.prompt_ids[r.key]))
    prompts = [Prompt(plan.prompt_ids[request.key], request.seed) for request in chosen]
    samplers = {slots: own_sampler(prompts, options.tokens, slots) for slots in options.slots or [None]}
    for sampler in samplers.values():
        own_arm(
            sampler, prompts[: options.chunk], options.chunk, recorded=False
        )  # captures, compiles kernels
        if gpu:
            print(where_a_step_goes(sampler), flush=True)
    for _ in range(options.repeats):
        arms = {
            f"generate {dtype}": generate_arm(
                dtype, prompts[: options.plain], options.tokens, 768 if gpu else 64
            )
            for dtype in ("bfloat16", "float32")[: 1 if gpu else 2]
        }
        plain = arms["generate bfloat16"]
        for slots, sampler in samplers.items():
            name = f"personatlas {sampler.model.dtype}" + (f", {slots} slots" if slots else "")
            arms[name] = own_arm(sampler, prompts, options.chunk, recorded=False)
            arms[f"{name}, recorded"] = own_arm(sampler, prompts, options.chunk, recorded=True)
        for name, rate in arms.items():
            print(f"{name}: {rate:,.0f} tokens/s ({rate / plain:.2f}x)", flush=True)


if __name__ == "__main__":
    main()
