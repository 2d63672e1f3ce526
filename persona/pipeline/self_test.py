"""The self-test: recording and sampling on this model, this dtype and this machine against plain references.

Every check is a relative error with the bound that it must keep. In fp32 the bound on means is 1e-5; in half
precision two correct ways to batch differ by rounding alone, so bounds there are those of the format.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from personatlas.persona.models.hooks import capture
from personatlas.persona.models.load import Model
from personatlas.persona.models.parity import count_changed
from personatlas.persona.models.positions import far_neighbour_error
from personatlas.persona.pipeline.record import record
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.sampler import (
    Decoder,
    PlainDecoder,
    Prompt,
    Sampler,
    Sampling,
    decodes_from_cache,
    decoding_error,
)

LENGTHS = ((5, 3), (9, 14), (30, 1), (2, 21), (17, 6))  # (prompt, answer) tokens, uneven on purpose
LONGEST_WINDOW = 8192  # of attention that is crossed: reading once past a longer one would take minutes


@dataclass(frozen=True)
class Check:
    """One check: what was found, what is allowed, and whether it passed."""

    name: str
    found: float
    allowed: float

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.found <= self.allowed

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "passed": self.passed}


@torch.no_grad()
def run_self_test(model: Model) -> list[Check]:
    """Run all checks; nothing is raised for a failed one."""
    exact = model.dtype == torch.float32
    rollouts = [_made_up(model, i, *lengths) for i, lengths in enumerate(LENGTHS)]
    before, hooks = _logits(model, rollouts[1]), _hooks(model)
    recorded = torch.empty(len(rollouts), model.n_layers, model.d_model)
    for indices, means in record(model, rollouts, tokens=64):
        recorded[indices] = means
    after, left = _logits(model, rollouts[1]), _hooks(model) - hooks
    decoder = Decoder if decodes_from_cache(model) else PlainDecoder
    by_hand = torch.stack([_mean_by_hand(model, rollout) for rollout in rollouts])
    errors = (recorded.double() - by_hand).norm(dim=-1) / by_hand.norm(dim=-1)
    checks = [
        Check(
            "recorded means against a float64 mean, one text at a time",
            float(errors.max()),
            1e-5 if exact else 2e-2,
        ),
        Check(
            "block outputs against output_hidden_states",
            _hidden_states_error(model, rollouts[1]),
            1e-6 if exact else 1e-3,
        ),
        Check("hooks left behind on the blocks", float(left), 0.0),
        Check("logits changed by recording", float(count_changed(before, after)), 0.0),
        Check(
            f"decoding ({decoder.name}) against reading the whole text",
            decoding_error(model, decoder),
            1e-4 if exact else 5e-2,
        ),
        Check(
            "a seed gives another answer in another batch", _batch_dependence(model), 0.0 if exact else 1.0
        ),
        Check(
            "a text changed by another one at the end of the context",
            far_neighbour_error(model),
            1e-5 if exact else 2e-2,
        ),
    ]
    for window in _windows(model):
        error = decoding_error(model, decoder, (window + 7, 9, window + 2))
        checks.append(Check(f"the same across {window} tokens of attention", error, 1e-4 if exact else 5e-2))
    return checks


def _windows(model: Model) -> list[int]:
    """Lengths after which a token no longer sees the first one, where reading that much is feasible."""
    config = model.hf.config.get_text_config(decoder=True)
    found = {getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    most = min(LONGEST_WINDOW, (model.context or LONGEST_WINDOW) - 7)
    return sorted(window for window in found if window and window <= most)


def _made_up(model: Model, number: int, prompt: int, answer: int) -> Rollout:
    vocabulary = model.vocab_size
    ids = [(7 + 31 * number + 13 * i * i) % vocabulary for i in range(prompt + answer)]
    return Rollout(f"test/0/{number}/0", (), tuple(ids[:prompt]), tuple(ids[prompt:]), "", 0, "end")


def _ids(model: Model, rollout: Rollout) -> Tensor:
    return torch.tensor([rollout.prompt_ids + rollout.answer_ids], device=model.device)


def _logits(model: Model, rollout: Rollout) -> Tensor:
    return model.hf(input_ids=_ids(model, rollout), use_cache=False).logits.float()


def _hooks(model: Model) -> int:
    return sum(len(block._forward_hooks) for block in model.blocks)


def _outputs(model: Model, rollout: Rollout) -> list[Tensor]:
    with capture(model, range(model.n_layers)) as residuals:
        model.base(input_ids=_ids(model, rollout), use_cache=False)
    return list(residuals.values())


def _mean_by_hand(model: Model, rollout: Rollout) -> Tensor:
    start = len(rollout.prompt_ids)
    return torch.stack([h[0, start:].double().mean(0).cpu() for h in _outputs(model, rollout)])


def _hidden_states_error(model: Model, rollout: Rollout) -> float:
    """Block l's output is hidden_states[l + 1] (in Mamba's family, which leaves the embedding out, [l]), for
    all but the last block, whose entry comes after the final norm.
    """
    states = model.base(
        input_ids=_ids(model, rollout), use_cache=False, output_hidden_states=True
    ).hidden_states
    outputs = torch.stack(_outputs(model, rollout)[:-1]).float() if model.n_layers > 1 else torch.zeros(0)
    if not len(outputs):
        return 0.0
    wholes = [torch.stack(states[first:][: len(outputs)]).float() for first in (0, 1)]
    errors = [(outputs - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1) for whole in wholes]
    return min(float(error.max()) for error in errors)


def _batch_dependence(model: Model) -> float:
    """Share of answers that differ when the same prompts and seeds are sampled alone and together."""
    prompts = [Prompt(_made_up(model, i, p, 1).prompt_ids, seed=1000 + i) for i, (p, _) in enumerate(LENGTHS)]
    sampler = Sampler(model, frozenset(), Sampling(max_new_tokens=6))
    together = {answer.index: answer.ids for answer in sampler.answers(prompts)}
    alone = [next(iter(sampler.answers([prompt]))).ids for prompt in prompts]
    return sum(together[i] != ids for i, ids in enumerate(alone)) / len(prompts)
