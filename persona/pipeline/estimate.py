"""How long the answers and recordings of an axis take on a model's device, measured before they begin.

    seconds = estimate_seconds(model, n_rollouts=784, n_tokens=74.0)

Every token of a prompt or an answer goes through the model twice, when it is sampled and when it is recorded,
in batches about as large as the probe's: one token for each rollout of a chunk.
"""

import time

import torch

from personatlas.persona.models.load import Model
from personatlas.persona.options import PlanOptions, selection_of
from personatlas.persona.pipeline.stages import CPU_CHUNK
from personatlas.persona.roles.bank import load_bank
from personatlas.persona.rollout import rollout_requests

GPU_ROWS = 1024
PROBE_SECONDS = 1.0  # on a machine that does other things too, one forward says little
N_PROMPTS = 16  # whose lengths stand for all


@torch.no_grad()
def estimate_seconds(model: Model, n_rollouts: int, n_tokens: float) -> float:
    """Seconds for so many rollouts with so many tokens of prompt and answer each, from a short probe."""
    on_gpu = model.device.type == "cuda"
    ids = torch.arange(GPU_ROWS if on_gpu else CPU_CHUNK, device=model.device)[:, None] % model.vocab_size
    n_probes, start = 0, 0.0
    while n_probes < 2 or time.perf_counter() < start + PROBE_SECONDS:
        model.hf(input_ids=ids, use_cache=False).logits[:, -1].max().item()  # waits for a GPU
        n_probes += 1
        if n_probes == 1:  # it warms up
            start = time.perf_counter()
    seconds = (time.perf_counter() - start) / (n_probes - 1)
    return 2 * n_rollouts * n_tokens * seconds / len(ids)


def estimate_axis(model: Model, plan: PlanOptions) -> float:
    """Seconds for the axis of a model by a plan, with the packaged bank."""
    selection, max_new_tokens = selection_of(plan)
    requests = rollout_requests(load_bank(), model.name, selection, plan.seed)
    some = requests[:: max(1, len(requests) // N_PROMPTS)]
    prompt = sum(len(model.chat.prompt_ids(list(request.messages))) for request in some) / len(some)
    return estimate_seconds(model, len(requests), prompt + max_new_tokens)
