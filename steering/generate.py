"""One answer, with interventions or without, and the trace of its projection.

    generation = generate(model, messages, steer=[cap], axis=axis, sampling=Sampling(64), seed=0)
    generation.text, generation.fired, generation.trace.projection

    arms = generate_arms(model, messages, {"baseline": [], "capped": [cap]}, axis)

All arms are rows of one batch and sample with the same seed. A trace is read afterwards in one forward over
prompt and answer with the same interventions on. `write_generation_page` shows the arms beside each other,
every token coloured by its projection, fired tokens marked.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import personatlas.steering.hooks.steering as hooks
from personatlas.analysis.html.page import write_page
from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, Interventions
from personatlas.persona.models.chat_template import Messages
from personatlas.persona.models.load import Model
from personatlas.persona.records import JsonObject
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Prompt, Sampling
from personatlas.steering.arms import Arm, is_control_name, summarise_arms
from personatlas.steering.hooks.account import SteeringTally
from personatlas.steering.random_caps import random_arms
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
            f"{len(ids)} tokens to read and {sampling.max_new_tokens} to write are more than the "
            f"{model.context} that {model.id} holds; shorten the prompt or --max-new-tokens"
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
        layers = {layer for own in arms[name] for layer in own.layers}
        own_tally = tally.rows([row], layers) if tally is not None and layers else None
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


def random_generation_arms(
    model: Model, messages: Messages, cap: Cap, count: int, sampling: Sampling, seed: int
) -> dict[str, Interventions]:
    """Arms of random caps that fire on the baseline's answer and its prompt as often as the cap does.

    Raises `UserError` where that answer is empty.
    """
    ids = tuple(model.chat.prompt_ids(messages))
    (answer,) = fastest_sampler(model, model.chat.end_ids, sampling).answers([Prompt(ids, seed)])
    text = model.decode(answer.ids)
    baseline = Rollout("generate", tuple(map(dict, messages)), ids, answer.ids, text, seed, answer.stopped)
    return random_arms(model, cap, [baseline] if answer.ids else [], count)


def write_generation_page(
    path: Path,
    generations: Mapping[str, Generation],
    model: Model,
    axis: Axis,
    arms: Mapping[str, Interventions],
    messages: Messages,
) -> None:
    """Writes the page of `personatlas generate --html`."""
    low, high = colour_range(one.trace for one in generations.values() if one.trace is not None)
    summaries = summarise_arms(arms)
    floors = {name: Arm(name, tuple(plan)).floor_at(axis.layer) for name, plan in arms.items()}
    places = []
    for name, one in sorted(generations.items(), key=lambda item: bool(arms[item[0]])):  # the baseline first
        if one.trace is not None and len(one.trace.answer):
            place = f"{float(one.trace.answer.mean()):z.1f}".replace("-", "−")
            fired = "" if one.tally is None else f" (fired on {one.tally.share:.0%})"
            places.append(f"{place} {f'with {name}' if arms[name] else 'at baseline'}{fired}")
    finding = f"The answer's mean projection is {', '.join(places)}." if places else "No token was answered."
    content = {
        "arms": [_arm(name, one, low, high) for name, one in generations.items()],
        "names": [name for name, plan in arms.items() if plan],
        "finding": finding,
        "summaries": summaries,
        "messages": messages,
        "model": model.describe(),
        "layer": axis.layer,
        "poles": axis.poles,
        "low": low,
        "high": high,
        "floors": [
            {"name": name, "floor": floor, "place": 100 * scale_position(floor, low, high)}
            for name, floor in floors.items()
            if floor is not None and not is_control_name(name)
        ],
    }
    write_page(path, Path(__file__).parent / "generate.html.jinja", content, {}, {})


def _arm(name: str, arm: Generation, low: float, high: float) -> JsonObject:
    trace, tally = arm.trace, arm.tally
    assert trace is not None
    answer, fired = trace.answer.tolist(), trace.fired_layers.tolist()
    moved = trace.corrections.sum(0).tolist()
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
