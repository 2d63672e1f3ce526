"""One answer without and with steering, token by token, and the trace of its projection.

    found = generate(subject, chat, messages, [cap], axis, Sampling(), seed=0)
    found.text, found.trace.projection

Both arms sample with the same seed through the same decoder. The trace is read afterwards in one forward over prompt and
answer with the same interventions on: projection before the step, and the length of the correction.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personaxis.persona.axis import Axis
from personaxis.persona.chat import ChatFormat, Messages
from personaxis.persona.errors import KnownError
from personaxis.persona.sampler import Decoder, PlainDecoder, Prompt, Sampler, Sampling
from personaxis.persona.subject import Subject, residual
from personaxis.steering.interventions import Intervention
from personaxis.steering.steer import Steering, correct, steered


@dataclass(frozen=True)
class Trace:
    """Projections of one conversation at one layer. T tokens, prompt and answer.

    `projection` is before any step at that layer and `correction` the length of what it did there; `answer_from` is
    where the answer begins.
    """

    ids: tuple[int, ...]
    answer_from: int
    layer: int
    projection: Float[Tensor, " T"]
    correction: Float[Tensor, " T"]

    @property
    def answer(self) -> Float[Tensor, " A"]:
        """The answer's projections."""
        return self.projection[self.answer_from :]

    @property
    def fired(self) -> float:
        """Share of the answer's tokens that were changed at this layer; NaN for an empty answer."""
        return float((self.correction[self.answer_from :] > 0).float().mean())


@dataclass(frozen=True)
class Generated:
    """An answer, why it stopped, and its trace."""

    text: str
    stopped: str
    trace: Trace


class SteeredDecoder(Decoder):
    """The sampler's decoder that tells the steering which tokens are the prompt's: also the last one, which is decoded."""

    def __init__(self, held: Steering, *given: Any) -> None:
        super().__init__(*given)
        self.held, self.stepped = held, 0

    def prefill(self, prompts: Sequence[tuple[int, ...]], slots: Sequence[int] | None = None) -> None:
        self.held.describe(answer_from=torch.tensor([len(ids) for ids in prompts]))
        super().prefill(prompts, slots)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.held.describe(answer_from=torch.full_like(tokens, int(self.stepped == 0)))
        self.stepped += 1
        return super().step(tokens, positions)


class SteeredPlainDecoder(PlainDecoder):
    """The same where the whole text is read again at every step."""

    def __init__(self, held: Steering, *given: Any) -> None:
        super().__init__(*given)
        self.held = held

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> None:
        self.held.describe(answer_from=torch.tensor([len(ids) for ids in prompts]))
        super().prefill(prompts)


def generate(
    subject: Subject,
    chat: ChatFormat,
    messages: Messages,
    interventions: Sequence[Intervention],
    axis: Axis,
    sampling: Sampling,
    seed: int = 0,
) -> Generated:
    """Answer a conversation with the interventions on (none: as the model is). The axis names the layer of the trace.

    Raises `KnownError` for a conversation that leaves no room for the answer in the model's context.
    """
    ids = tuple(chat.prompt_ids(messages))
    limit = getattr(subject.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and len(ids) + sampling.max_new_tokens > limit:
        raise KnownError(
            f"{len(ids)} tokens to read and {sampling.max_new_tokens} to write are more than the {limit} that "
            f"{subject.id} holds; shorten the prompt or --max-new-tokens"
        )
    sampler = Sampler(subject, chat.end_ids, sampling)  # proves its decoder before anything steers
    with steered(subject, interventions) if interventions else nullcontext() as held:
        if held is not None:
            chosen = SteeredDecoder if sampler.decoder is Decoder else SteeredPlainDecoder
            sampler.decoder = partial(chosen, held)  # type: ignore[assignment]
        answer = next(iter(sampler.answers([Prompt(ids, seed)])))
    text = subject.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
    return Generated(text, answer.stopped, trace(subject, ids, answer.ids, interventions, axis))


@torch.no_grad()
def trace(
    subject: Subject,
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    interventions: Sequence[Intervention],
    axis: Axis,
) -> Trace:
    """Read a conversation again with the interventions on. Raises `KnownError` for an axis of another model."""
    axis.require_model(subject.describe())
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept.append(residual(output)[0].float())

    ids = torch.tensor([prompt + answer], device=subject.device)
    with steered(subject, interventions) if interventions else nullcontext() as held:
        handle = subject.blocks[axis.layer].register_forward_hook(keep, prepend=True)  # before the step at that layer
        try:
            if held is not None:
                held.describe(answer_from=torch.tensor([len(prompt)]))
            subject.base(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        steps = [] if held is None else held.steps.get(axis.layer, [])
    h, at = kept[0], torch.arange(ids.shape[1], device=kept[0].device)
    is_answer = (at >= len(prompt))[None]
    _, length = correct(h[None], steps, ~is_answer, is_answer)
    projection = h @ axis.at(axis.layer).to(h.device)
    return Trace(prompt + answer, len(prompt), axis.layer, projection.cpu(), length[0].cpu())


BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], low: float, high: float, width: int = 60) -> str:
    """Means of neighbouring values as bars between `low` and `high`; values outside are the lowest or highest bar."""
    values = list(values)
    if not values:
        return ""
    width = min(width, len(values))
    edges = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    span = (high - low) or 1.0
    return "".join(BARS[min(max(int((mean - low) / span * len(BARS)), 0), len(BARS) - 1)] for mean in means)
