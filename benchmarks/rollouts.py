"""Rollouts of the packaged model against plain `generate`, both in one run.

    python benchmarks/rollouts.py [--rollouts 64] [--tokens 32] [--chunk 64]

Prints tokens/s of `generate` (bf16 and fp32, sampled, same prompts, same answer length) and of this project's sampler in
the dtype that it chooses, recording included where --record is given. The end token is disabled in all arms, so that
each makes the same number of tokens. On a GPU `generate` runs at batch 768.
"""

import argparse
import time

import torch

from personaxis.persona.bank import load_bank
from personaxis.persona.chat import chat_format
from personaxis.persona.record import record
from personaxis.persona.rollouts import Rollout, Selection
from personaxis.persona.sampler import Prompt, Sampler, Sampling
from personaxis.persona.stages import plan_rollouts
from personaxis.persona.subject import load_subject


def synchronised() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def generate_arm(dtype: str, prompts: list[Prompt], tokens: int, batch: int) -> float:
    subject = load_subject("smollm2-135m", dtype=dtype)
    subject.tokenizer.padding_side = "left"
    start = synchronised()
    for first in range(0, len(prompts), batch):
        ids = [list(prompt.ids) for prompt in prompts[first : first + batch]]
        padded = subject.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(subject.device)
        subject.model.generate(
            **padded,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            pad_token_id=2,
        )
    return len(prompts) * tokens / (synchronised() - start)


def own_arm(prompts: list[Prompt], tokens: int, chunk: int, recorded: bool) -> tuple[float, str]:
    subject = load_subject("smollm2-135m")
    sampling = Sampling(max_new_tokens=tokens)
    if subject.device.type == "cuda":
        from personaxis.persona.graph import GraphSampler

        sampler: Sampler = GraphSampler(subject, frozenset(), sampling)
    else:
        sampler = Sampler(subject, frozenset(), sampling)
    start = synchronised()
    made = []
    for first in range(0, len(prompts), chunk):
        part = prompts[first : first + chunk]
        for answer in sampler.answers(part):
            ids = part[answer.index].ids
            made.append(Rollout(f"r/0/q/{len(made)}", (), ids, answer.ids, "", 0, "length"))
    if recorded:
        for _ in record(subject, made):
            pass
    return len(prompts) * tokens / (synchronised() - start), str(subject.dtype)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    subject, bank = load_subject("smollm2-135m"), load_bank()
    plan = plan_rollouts(bank, subject, chat_format(subject.tokenizer), Selection(), 0, options.chunk)
    requests = [request for chunk in plan.chunks[1:] for request in chunk]
    step = max(len(requests) // options.rollouts, 1)
    chosen = sorted(requests[::step][: options.rollouts], key=lambda r: len(plan.prompt_ids[r.key]))
    prompts = [Prompt(plan.prompt_ids[request.key], request.seed) for request in chosen]
    for _ in range(options.repeats):
        arms = {
            f"generate {dtype}": generate_arm(dtype, prompts, options.tokens, 768 if gpu else 64)
            for dtype in ("bfloat16", "float32")
        }
        own, dtype = own_arm(prompts, options.tokens, options.chunk, recorded=False)
        whole, _ = own_arm(prompts, options.tokens, options.chunk, recorded=True)
        arms |= {f"personaxis {dtype}": own, f"personaxis {dtype}, recorded": whole}
        plain = arms["generate bfloat16"]
        print(
            "  ".join(f"{name} {rate:,.0f} tokens/s ({rate / plain:.2f}x)" for name, rate in arms.items()), flush=True
        )


if __name__ == "__main__":
    main()
