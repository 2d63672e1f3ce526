"""One answer, with interventions or without, and the trace of its projection.

    generation = generate(model, messages, steer=[cap], axis=axis, sampling=Sampling(64), seed=0)
    generation.text, generation.fired, generation.trace.projection

    arms = generate_arms(model, messages, {BASELINE: [], "capped": [cap]}, axis)

All arms are rows of one batch and sample with the same seed. A trace is read afterwards in one forward over
prompt and answer with the same interventions on. `write_generation_page` shows the arms beside each other,
every token coloured by its projection, fired tokens marked.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import personatlas.steering.hooks.steering as hooks
from personatlas.analysis.html.page import write_page
from personatlas.persona.axis import Axis
from personatlas.persona.caps import format_layers
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, Interventions
from personatlas.persona.models.chat_template import Messages
from personatlas.persona.models.load import Model
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Prompt, Sampling
from personatlas.steering.hooks.account import SteeringTally
from personatlas.steering.traces import Trace, colour_range, scale_position, shade_token, trace_answer

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Generation:
    """An answer, why it stopped, its trace (None without an axis), and its tally (None without
    interventions).
    """

    text: str
    stopped: str
    trace: Trace | None
    tally: SteeringTally | None

    @property
    def fired(self) -> float:
        """Share of tokens times layers that were changed, prompt and answer; 0 without interventions."""
        return 0.0 if self.tally is None else self.tally.share


def generate(
    model: Model,
    messages: Messages,
    *,
    steer: Interventions = (),
    axis: Axis | None = None,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> Generation:
    """Answers a conversation once with the interventions on. Raises like `generate_arms`."""
    return generate_arms(model, messages, {"answer": steer}, axis, sampling, seed)["answer"]


def generate_arms(
    model: Model,
    messages: Messages,
    arms: Mapping[str, Interventions],
    axis: Axis | None,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> dict[str, Generation]:
    """Answers a conversation once in every arm. The axis names the layer of the traces; without one there are
    none.

    Raises `UserError` for a conversation that leaves no room for the answer in the model's context.
    """
    ids = tuple(model.chat.prompt_ids(messages))
    if model.context and len(ids) + sampling.max_new_tokens > model.context:
        raise UserError(
            f"{len(ids)} tokens to read and {sampling.max_new_tokens} to write are more than the {model.context} that "
            f"{model.id} holds; shorten the prompt or --max-new-tokens"
        )
    sampler = fastest_sampler(model, model.chat.end_ids, sampling)
    acting = [name for name, interventions in arms.items() if interventions]
    prompts = [Prompt(ids, seed, acting.index(name) if name in acting else -1) for name in arms]
    with hooks.steer(model, *(arms[name] for name in acting)) if acting else nullcontext() as steering:
        callback = None if steering is None else steering.callback
        answers = sorted(sampler.answers(prompts, callback), key=lambda answer: answer.index)
        tally = None if callback is None else callback.tally
    generations = {}
    for row, (name, answer) in enumerate(zip(arms, answers, strict=True)):
        trace = None if axis is None else trace_answer(model, ids, answer.ids, arms[name], axis)
        own_tally = tally.rows([row]) if tally is not None and arms[name] else None
        generations[name] = Generation(model.decode(answer.ids), answer.stopped, trace, own_tally)
    return generations


def sparkline(values: Sequence[float], low: float, high: float, width: int = 60) -> str:
    """Means of neighbouring values as bars between `low` and `high`; those outside are the lowest or highest
    bar.
    """
    values = list(values)
    if not values:
        return ""
    width = min(width, len(values))
    edges = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    span = (high - low) or 1.0
    return "".join(BARS[min(max(int((mean - low) / span * len(BARS)), 0), len(BARS) - 1)] for mean in means)


def write_generation_page(
    path: Path,
    arms: Mapping[str, Generation],
    model: Model,
    axis: Axis,
    cap: Cap,
    name: str,
    messages: Messages,
) -> None:
    """Writes the page of `personatlas generate --html`. `name` is the cap's."""
    low, high = colour_range(arm.trace for arm in arms.values() if arm.trace is not None)
    floor = float(cap.floor[cap.layers.index(axis.layer)]) if axis.layer in cap.layers else None
    content = {
        "arms": [_arm(label, arm, low, high) for label, arm in arms.items()],
        "messages": messages,
        "model": model.describe(),
        "layer": axis.layer,
        "poles": axis.poles,
        "low": low,
        "high": high,
        "floor": floor,
        "floor_place": None if floor is None else 100 * scale_position(floor, low, high),
        "cap": {
            "name": name,
            "layers": format_layers(cap.layers),
            "level": cap.level,
            "population": cap.population,
            "phase": cap.phase,
        },
    }
    write_page(path, Path(__file__).parent / "generate.html.jinja", content, {}, {})


def _arm(name: str, arm: Generation, low: float, high: float) -> dict[str, Any]:
    trace, tally = arm.trace, arm.tally
    assert trace is not None
    answer, fired, moved = (
        trace.answer.tolist(),
        trace.fired_layers.tolist(),
        trace.corrections.sum(0).tolist(),
    )
    tokens = []
    for index in range(len(trace.ids)):
        token = {**shade_token(trace, index, low, high), "fired": fired[index]}
        if fired[index]:
            changes = f"{fired[index]} of {len(trace.layers)} layers, by {moved[index]:.1f} in all"
            token["said"] = f"{token['said']}; changed at {changes}"
        tokens.append(token)
    return {
        "name": name,
        "prompt": tokens[: trace.answer_from],
        "answer": tokens[trace.answer_from :],
        "mean": sum(answer) / len(answer) if answer else None,
        "share": None if tally is None else tally.share,
        "most": None if tally is None else float(tally.largest.max()),
        "stopped": arm.stopped,
    }
