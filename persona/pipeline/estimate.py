"""How long the answers and recordings of an axis take on a model's device, measured before they begin.

    seconds = estimate_seconds(model, n_rollouts=784, n_prompt=42.0, n_answer=32)

A prompt is read twice, when it is answered and when its answer is recorded, and an answer once, many tokens at a
time; an answer is made one token for each rollout of a chunk at a time. The two are probed apart.
"""

import time

import torch

from personatlas.persona.models.load import Model
from personatlas.persona.options import PlanOptions, selection_of
from personatlas.persona.pipeline.stages import CPU_CHUNK
from personatlas.persona.roles.bank import load_bank
from personatlas.persona.rollout import rollout_requests

GPU_ROWS = 1024
READ_ROWS, READ_TOKENS = 8, 96
PROBE_SECONDS = 1.0  # on a machine that does other things too, one forward says little
N_PROMPTS = 16  # whose lengths stand for all


@torch.no_grad()
def estimate_seconds(model: Model, n_rollouts: int, n_prompt: float, n_answer: int) -> float:
    """Seconds for so many rollouts with prompts of so many tokens and answers of up to so many, from a short
    probe.
    """
    rows = GPU_ROWS if model.device.type == "cuda" else CPU_CHUNK
    made = n_rollouts * n_answer / rows * _forward_seconds(model, rows, 1)
    length = min(READ_TOKENS, model.context or READ_TOKENS)
    read = n_rollouts * (2 * n_prompt + n_answer) / (READ_ROWS * length)
    return made + read * _forward_seconds(model, READ_ROWS, length)


def _forward_seconds(model: Model, rows: int, length: int) -> float:
    """Mean seconds of a forward over random tokens (rows, length)."""
    ids = torch.arange(rows * length, device=model.device).view(rows, length) % model.vocab_size
    n_probes, start = 0, 0.0
    while n_probes < 2 or time.perf_counter() < start + PROBE_SECONDS:
        model.hf(input_ids=ids, use_cache=False, logits_to_keep=1).logits.max().item()  # waits for a GPU
        n_probes += 1
        if n_probes == 1:  # it warms up
            start = time.perf_counter()
    return (time.perf_counter() - start) / (n_probes - 1)


def estimate_axis(model: Model, plan: PlanOptions) -> float:
    """Seconds for the axis of a model by a plan, with the packaged bank."""
    selection, max_new_tokens = selection_of(plan)
    requests = rollout_requests(load_bank(), model.name, selection, plan.seed)
    some = requests[:: max(1, len(requests) // N_PROMPTS)]
    prompt = sum(len(model.chat.prompt_ids(list(request.messages))) for request in some) / len(some)
    return estimate_seconds(model, len(requests), prompt, max_new_tokens)
