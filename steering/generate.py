"""One answer in several arms (as the model is, capped, ...), token by token, and the trace of each arm's projection.

    arms = generate(model, chat, messages, {"baseline": [], "capped": [cap]}, axis, Sampling(), seed=0)
    arms["capped"].text, arms["capped"].trace.projection

All arms are rows of one batch and sample with the same seed. A trace is read afterwards in one forward over prompt and
answer with the same interventions on: projection before the step at the axis's layer, and the corrections at every layer.

The page of `personatlas generate --html`: both answers, every token coloured by its projection, fired tokens marked.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personatlas.analysis.html.page import write_page as write
from personatlas.persona.axis import Axis
from personatlas.persona.caps import format_layers
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, Interventions, apply_steps, steps_by_layer
from personatlas.persona.models.chat_template import ChatFormat, Messages
from personatlas.persona.models.hooks import residual
from personatlas.persona.models.load import Model
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Prompt, Sampling
from personatlas.steering.hooks.account import SteeringTally
from personatlas.steering.hooks.steering import steer


@dataclass(frozen=True)
class Trace:
    """Projections of one conversation at one layer, and what was done to it at C layers. T tokens, prompt and answer.

    `projection` is before any step at `layer`, `corrections` are the lengths of what was done at `layers`; `answer_from` is
    where the answer begins.
    """

    ids: tuple[int, ...]
    answer_from: int
    layer: int
    projection: Float[Tensor, " T"]
    layers: tuple[int, ...]
    corrections: Float[Tensor, "C T"]

    @property
    def answer(self) -> Float[Tensor, " A"]:
        """The answer's projections."""
        return self.projection[self.answer_from :]

    @property
    def fired(self) -> Tensor:
        """At how many layers each token (T,) was changed."""
        return (self.corrections > 0).sum(0)


@dataclass(frozen=True)
class Generated:
    """An answer, why it stopped, its trace, and the account of its row; None for an arm without interventions."""

    text: str
    stopped: str
    trace: Trace
    tally: SteeringTally | None


def generate(
    model: Model,
    chat: ChatFormat,
    messages: Messages,
    arms: Mapping[str, Interventions],
    axis: Axis,
    sampling: Sampling,
    seed: int = 0,
) -> dict[str, Generated]:
    """Answer a conversation once in every arm. The axis names the layer of the traces.

    Raises `UserError` for a conversation that leaves no room for the answer in the model's context.
    """
    ids = tuple(chat.prompt_ids(messages))
    limit = model.context
    if limit and len(ids) + sampling.max_new_tokens > limit:
        raise UserError(
            f"{len(ids)} tokens to read and {sampling.max_new_tokens} to write are more than the {limit} that "
            f"{model.id} holds; shorten the prompt or --max-new-tokens"
        )
    sampler = fastest_sampler(model, chat.end_ids, sampling)  # proves its decoder before anything steers
    acting = [name for name, plan in arms.items() if plan]
    prompts = [Prompt(ids, seed, acting.index(name) if name in acting else -1) for name in arms]
    with steer(model, *(arms[name] for name in acting)) if acting else nullcontext() as held:
        callback = None if held is None else held.callback
        answers = sorted(sampler.answers(prompts, callback), key=lambda answer: answer.index)
        tally = None if callback is None else callback.tally
    found = {}
    for row, (name, answer) in enumerate(zip(arms, answers, strict=True)):
        text = model.decode(answer.ids)
        own = tally.rows([row]) if tally is not None and arms[name] else None
        found[name] = Generated(text, answer.stopped, trace(model, ids, answer.ids, arms[name], axis), own)
    return found


@torch.no_grad()
def trace(
    model: Model, prompt: tuple[int, ...], answer: tuple[int, ...], interventions: Interventions, axis: Axis
) -> Trace:
    """Read a conversation again with the interventions on. Raises `UserError` for an axis of another model."""
    axis.require_model(model.describe())
    steps = steps_by_layer(interventions)
    entered = {layer: torch.empty(0) for layer in sorted({axis.layer, *steps})}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            entered[layer] = residual(output).float()

        return hook

    ids = torch.tensor([prompt + answer], device=model.device)
    with steer(model, interventions) if interventions else nullcontext() as held:
        # before the step at the layer
        handles = [model.blocks[layer].register_forward_hook(keep(layer), prepend=True) for layer in entered]
        try:
            if held is not None:
                held.describe(answer_from=torch.tensor([len(prompt)]))
            model.base(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    is_answer = (torch.arange(ids.shape[1]) >= len(prompt))[None]
    lengths = []
    for layer in sorted(steps):
        side = is_answer.to(entered[layer].device)
        lengths.append(apply_steps(entered[layer], steps[layer], ~side, side)[1][0].cpu())
    corrections = torch.stack(lengths) if lengths else torch.zeros(0, ids.shape[1])
    h = entered[axis.layer][0]
    projection = (h @ axis.at(axis.layer).to(h.device)).cpu()
    return Trace(prompt + answer, len(prompt), axis.layer, projection, tuple(sorted(steps)), corrections)


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


HERE = Path(__file__).parent


def write_page(
    path: Path,
    arms: Mapping[str, Generated],
    model: Model,
    axis: Axis,
    cap: Cap,
    name: str,
    messages: Sequence[Mapping[str, str]],
) -> None:
    """Write the page. Colours run from the lowest to the highest projection of any answer's token, around their middle."""
    values = sorted(value for one in arms.values() for value in one.trace.answer.tolist())
    low, high = (values[len(values) // 50], values[-1 - len(values) // 50]) if values else (0.0, 1.0)
    floor = float(cap.floor[cap.layers.index(axis.layer)]) if axis.layer in cap.layers else None
    shown = {
        "arms": [_arm(label, one, model, low, high) for label, one in arms.items()],
        "messages": messages,
        "model": model.describe(),
        "layer": axis.layer,
        "poles": axis.poles,
        "low": low,
        "high": high,
        "floor": floor,
        "floor_place": None if floor is None else 100 * placed(floor, low, high),
        "cap": {
            "name": name,
            "layers": format_layers(cap.layers),
            "level": cap.level,
            "population": cap.population,
            "phase": cap.phase,
        },
    }
    write(path, HERE / "generate.html.jinja", shown, {}, {})


def _arm(name: str, one: Generated, model: Model, low: float, high: float) -> dict[str, Any]:
    trace, tally = one.trace, one.tally
    start = trace.answer_from
    answer = trace.answer.tolist()
    return {
        "name": name,
        "prompt": _tokens(trace, model, 0, start, low, high),
        "answer": _tokens(trace, model, start, len(trace.ids), low, high),
        "mean": sum(answer) / len(answer) if answer else None,
        "share": None if tally is None else tally.share,
        "most": None if tally is None else float(tally.largest.max()),
        "stopped": one.stopped,
    }


def _tokens(
    trace: Trace, model: Model, first: int, last: int, low: float, high: float
) -> list[dict[str, Any]]:
    """Text, colour and what was done, token by token. A token that is part of a character shows as its replacement mark."""
    fired, moved = trace.fired.tolist(), trace.corrections.sum(0).tolist()
    found = []
    for at in range(first, last):
        place = placed(float(trace.projection[at]), low, high)
        side = "positive" if place >= 0.5 else "others"
        said = f"projection {float(trace.projection[at]):.1f}"
        if fired[at]:
            said += f"; changed at {fired[at]} of {len(trace.layers)} layers, by {moved[at]:.1f} in all"
        text = model.tokenizer.decode([trace.ids[at]])
        depth = round(abs(place - 0.5) * 2 * 62)
        found.append({"text": text, "side": side, "depth": depth, "fired": fired[at], "said": said})
    return found


def placed(value: float, low: float, high: float) -> float:
    """Where a value lies between two others, from 0 to 1."""
    return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)
