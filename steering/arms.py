"""Arms: named interventions that are compared on the same prompts, seeds and engine.

    parse_arms(["baseline", "cap:assistant", "add:8@21"], axis)    # what the option --arm means

    for arm in run_arms(model, requests, {BASELINE: [], "capped": [cap]}, Sampling(48)):
        arm.name, arm.texts, arm.tally                             # in the order of the requests

On a GPU all arms are rows of the same batches, each following its own plan, so hundreds of caps cost one
capture; on a CPU, where every hooked layer costs, arms run one after the other.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from personatlas.persona.axis import Axis
from personatlas.persona.caps import parse_layers
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE, Intervention, Interventions
from personatlas.persona.models.load import Model
from personatlas.persona.pipeline.stages import CPU_CHUNK, GPU_CHUNK
from personatlas.persona.rollout import Request
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Answer, Prompt, Sampler, Sampling
from personatlas.steering.hooks.account import SteeringTally
from personatlas.steering.hooks.steering import steer


@dataclass(frozen=True)
class Arm:
    """A name and what acts under it; `n_random` asks for so many random caps, matched to the first cap, in
    its place.
    """

    name: str
    interventions: tuple[Intervention, ...] = ()
    n_random: int = 0


@dataclass(frozen=True)
class ArmKind:
    """What may be written after a kind's name, an example, and how that becomes an intervention along an
    axis.
    """

    example: str
    pattern: str
    make: Callable[[Axis, re.Match[str]], Intervention]


NUMBER, LAYERS = r":(?P<number>[+-]?\d+(?:\.\d+)?)", r"(?:@(?P<layers>[\d,-]+))?"


def _layers(axis: Axis, match: re.Match[str]) -> list[int]:
    return parse_layers(match["layers"]) if match["layers"] else [axis.layer]


def _mean_ablate(axis: Axis, match: re.Match[str]) -> Intervention:
    layers = _layers(axis, match)
    return axis.mean_ablate([float(match["number"])] * len(layers), layers)


ARM_KINDS: dict[str, ArmKind] = {  # a new intervention is nameable by one entry here
    "cap": ArmKind("cap:p50@18-23", r":(?P<spec>.+)", lambda axis, match: axis.cap(match["spec"])),
    "add": ArmKind(
        "add:8@21",
        NUMBER + LAYERS,
        lambda axis, match: axis.add(float(match["number"]), _layers(axis, match)),
    ),
    "ablate": ArmKind("ablate@20-22", LAYERS, lambda axis, match: axis.ablate(_layers(axis, match))),
    "mean-ablate": ArmKind("mean-ablate:0.5@21", NUMBER + LAYERS, _mean_ablate),
}


def parse_arm(text: str, axis: Axis) -> Arm:
    """The arm that a text names: baseline, cap:SPEC, add:AMOUNT@LAYERS, ablate@LAYERS, random:COUNT.

    Without layers the axis's own layer is meant. A cap's arm is called by its spec, others by their text.
    Raises `UserError` for anything else.
    """
    kind, rest = re.fullmatch(r"([a-z-]*)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    if text == BASELINE:
        return Arm(BASELINE)
    if kind == "random" and re.fullmatch(r":\d{1,3}", rest):
        return Arm(text, n_random=int(rest[1:]))
    match = re.fullmatch(ARM_KINDS[kind].pattern, rest) if kind in ARM_KINDS else None
    if match is None:
        examples = ", ".join(kind.example for kind in ARM_KINDS.values())
        raise UserError(f"arm {text[:80]!r} is not {BASELINE}, random:3, or such as {examples}")
    return Arm(match["spec"] if kind == "cap" else text, (ARM_KINDS[kind].make(axis, match),))


def parse_arms(texts: Sequence[str], axis: Axis) -> list[Arm]:
    """The arms that texts name, the baseline first. Raises `UserError` for a name that is there twice."""
    arms = [parse_arm(text, axis) for text in dict.fromkeys([BASELINE, *texts])]
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise UserError(f"two arms have one name ({', '.join(names)})")
    return arms


def distinct_ngrams(ids: Sequence[int], n: int = 1) -> float:
    """Distinct n-grams among those of an answer's tokens; NaN where it is shorter."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


@dataclass(frozen=True)
class ArmAnswers:
    """What one arm answered, in the order of the requests; `tally` is None for an arm without
    interventions.
    """

    name: str
    texts: tuple[str, ...]
    answers: tuple[Answer, ...]
    tally: SteeringTally | None

    @property
    def fired(self) -> float:
        """Share of tokens times layers that the arm changed; 0 without interventions."""
        return 0.0 if self.tally is None else self.tally.share

    @property
    def distinct(self) -> float:
        """Distinct tokens among the tokens of an answer, mean over the answers that are not empty; NaN if all
        are.
        """
        shares = [distinct_ngrams(answer.ids) for answer in self.answers if answer.ids]
        return sum(shares) / len(shares) if shares else math.nan


def run_arms(
    model: Model,
    requests: Sequence[Request],
    arms: Mapping[str, Interventions],
    sampling: Sampling,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[ArmAnswers]:
    """Answers all requests in all arms; `advance` is told how many answers more there are."""
    ids = [tuple(model.chat.prompt_ids(list(request.messages))) for request in requests]
    sampler = fastest_sampler(model, model.chat.end_ids, sampling, max(map(len, ids)))
    on_gpu = model.device.type == "cuda"
    for group in [list(arms)] if on_gpu else [[name] for name in arms]:
        acting = [name for name in group if arms[name]]
        prompts = [
            Prompt(own, request.seed, acting.index(name) if name in acting else -1)
            for name in group
            for own, request in zip(ids, requests, strict=True)
        ]
        chunk = GPU_CHUNK if on_gpu else CPU_CHUNK
        answers, tally = _answer_all(model, sampler, prompts, [arms[name] for name in acting], chunk, advance)
        for number, name in enumerate(group):
            rows = range(number * len(requests), (number + 1) * len(requests))
            own_answers = tuple(answers[row] for row in rows)
            texts = [model.decode(own.ids) for own in own_answers]
            own_tally = tally.rows(rows) if tally is not None and arms[name] else None
            yield ArmAnswers(name, tuple(texts), own_answers, own_tally)


def _answer_all(
    model: Model,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    plans: Sequence[Interventions],
    chunk: int,
    advance: Callable[[int], None],
) -> tuple[list[Answer], SteeringTally | None]:
    """Answers to the prompts in their order, and the tally of all of them."""
    answers: list[Answer] = []
    tallies: list[SteeringTally] = []
    with steer(model, *plans) if plans else nullcontext() as steering:
        callback = None if steering is None else steering.callback
        for first in range(0, len(prompts), chunk):
            part: dict[int, Answer] = {}
            for answer in sampler.answers(prompts[first : first + chunk], callback):
                part[answer.index] = answer
                advance(1)
            answers += [part[index] for index in sorted(part)]
            if callback is not None:
                tallies.append(callback.tally)
    return answers, SteeringTally.concatenate(tallies) if tallies else None
