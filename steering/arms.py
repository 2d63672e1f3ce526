"""Arms: named interventions that are compared on the same prompts, seeds and engine.

    parse_arms(["baseline", "cap:assistant", "add:8@21"], axis)    # what the option --arm means

    for arm in run_arms(model, requests, {BASELINE: [], "capped": [cap]}, Sampling(48)):
        arm.name, arm.texts, arm.tally                             # in the order of the requests

On a GPU all arms are rows of the same batches, each following its own plan, so hundreds of caps cost one
capture; on a CPU, where every hooked layer costs, arms run one after the other.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

from personatlas.persona.axis import Axis
from personatlas.persona.caps import format_layers, parse_layers
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import (
    BASELINE,
    Cap,
    Intervention,
    Interventions,
    check_phase,
    interventions_digest,
    steps_by_layer,
)
from personatlas.persona.models.load import Model
from personatlas.persona.pipeline.stages import CPU_CHUNK, GPU_CHUNK
from personatlas.persona.progress import Advance, no_advance, say
from personatlas.persona.records import Fraction, JsonRecord
from personatlas.persona.rollout import Request
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Answer, Prompt, Sampler, Sampling
from personatlas.steering.arm_kinds import is_control, match_arm
from personatlas.steering.hooks.account import SteeringTally
from personatlas.steering.hooks.steering import steer

DEFAULT_CAP = "assistant"
DEFAULT_REACH = 0.1  # of all layers, on either side of the axis's own
RANDOM = "random"  # controls are called "random 1", "random 2", ...


@dataclass(frozen=True)
class Arm:
    """A name and what acts under it. `n_random` asks for so many random controls in its place, None for an
    arm of its own.
    """

    name: str
    interventions: tuple[Intervention, ...] = ()
    n_random: int | None = None

    @cached_property
    def digest(self) -> str:
        """16 hex digits of all that it does."""
        return interventions_digest(self.interventions)

    @cached_property
    def answer_layers(self) -> frozenset[int]:
        """Layers at which it acts on the tokens of answers."""
        steps = steps_by_layer(self.interventions).items()
        return frozenset(layer for layer, own in steps if any(step.phase != "prompt" for step in own))

    @cached_property
    def is_uniform(self) -> bool:
        """Whether a token is changed alike in a prompt and in an answer."""
        steps = steps_by_layer(self.interventions).values()
        return all(step.phase == "both" for own in steps for step in own)

    @property
    def caps(self) -> list[Cap]:
        """Those of its interventions that are caps."""
        return [own for own in self.interventions if isinstance(own, Cap)]

    def floor_at(self, layer: int, side: str = "answer") -> float | None:
        """The floor of its first cap at a layer for tokens of the "prompt" or the "answer", None without."""
        caps = (cap for cap in self.caps if layer in cap.layers)
        return next((cap.floor_of(cap.layers.index(layer), side) for cap in caps), None)


def parse_arm(text: str, axis: Axis) -> Arm:
    """The arm that a text names: baseline, random:COUNT, or one of `ARM_KINDS`, such as add:AMOUNT@LAYERS.

    Without layers the axis's own layer is meant. A cap's arm is called by its spec, others by their text.
    Raises `UserError` for anything else.
    """
    if (found := match_arm(text)) is None:
        return Arm(text, n_random=int(text.partition(":")[2]) if is_control(text) else None)
    kind, match = found
    try:
        intervention = kind.make(axis, match)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"arm {text[:80]!r}: {error}") from None
    return Arm(match.groupdict().get("name") or text, (intervention,))


def default_arm(axis: Axis) -> str | None:
    """What acts where nobody says: the cap `assistant` beside the axis, else the first one saved there, else
    one at the default's median around the axis's layer; None where the axis keeps no quantiles there.

    What is not the cap `assistant` is said.
    """
    saved = axis.saved_caps
    if DEFAULT_CAP in saved:
        return f"cap:{DEFAULT_CAP}"
    if saved:
        say(f"no cap {DEFAULT_CAP} is saved beside this axis: the arm is cap:{saved[0]}")
        return f"cap:{saved[0]}"
    reach = max(1, round(len(axis.layers) * DEFAULT_REACH))
    median = axis.levels.index(0.5) if 0.5 in axis.levels else None
    layers = [
        layer
        for row, layer in enumerate(axis.layers)
        if median is not None
        and abs(layer - axis.layer) <= reach
        and math.isfinite(float(axis.default_quantiles[row, median]))
    ]
    calibrate = (
        f"`personatlas calibrate {axis.folder if axis.stem is not None else 'RUN'}` makes a calibrated one"
    )
    if not layers:
        say(f"no cap is saved beside this axis, and it keeps no quantiles: baseline alone ({calibrate})")
        return None
    arm = f"cap:p50@{format_layers(layers).replace(' ', '')}"
    say(f"no cap is saved beside this axis: the arm is {arm}, the default's median ({calibrate})")
    return arm


def parse_arms(texts: Sequence[str], axis: Axis) -> list[Arm]:
    """The arms that texts name, the baseline first.

    Raises `UserError` for two arms of one name, and for a name that a random control has.
    """
    arms = [parse_arm(text, axis) for text in [BASELINE, *(text for text in texts if text != BASELINE)]]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the arm {name} is given twice: leave one out")
        if is_control_name(name):
            raise UserError(f"the arm {name} has the name of a random control: save the cap under another")
    return arms


def require_no_controls(arms: Iterable[Arm]) -> None:
    """Raises `UserError` for random controls, where nothing is compared."""
    for arm in arms:
        if arm.n_random is not None:
            raise UserError(
                f"{arm.name} has no place here: random controls are for eval, generate, drift and calibrate"
            )


def is_control_name(name: str) -> bool:
    """Whether an arm is a control: "random 1", or of a calibration such as "PC2, same KL"."""
    return re.fullmatch(rf"{RANDOM} \d+|.*, same KL|{RANDOM} \d+, fitted", name) is not None


@dataclass(frozen=True)
class InterventionSummary(JsonRecord):
    """What an intervention is, for files and pages; `level` and `population` are a cap's."""

    layers: Annotated[str, parse_layers]
    level: Fraction | None
    population: str | None
    phase: Annotated[str, check_phase]
    spare_first: bool
    kind: str | None = None
    "cap, add, ablate, mean-ablate, ...; None in files of earlier versions, which hold caps"

    omit_none: ClassVar[tuple[str, ...]] = ("kind",)


def summarise_arms(arms: Mapping[str, Interventions]) -> dict[str, InterventionSummary]:
    """What acts in each arm; the second intervention of an arm is called "NAME (2)"."""
    return {
        f"{name} ({number})" if number > 1 else name: InterventionSummary(
            format_layers(own.layers),
            own.level if isinstance(own, Cap) else None,
            own.population if isinstance(own, Cap) else None,
            own.phase,
            own.spare_first,
            re.sub(r"(?<!^)(?=[A-Z])", "-", type(own).__name__).lower(),
        )
        for name, plan in arms.items()
        for number, own in enumerate(plan, 1)
    }


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
    advance: Advance = no_advance,
) -> Iterator[ArmAnswers]:
    """Answers all requests in all arms; `advance` counts answers, also while they are written."""
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
    advance: Advance,
) -> tuple[list[Answer], SteeringTally | None]:
    """Answers to the prompts in their order, and the tally of all of them."""
    answers: list[Answer] = []
    tallies: list[SteeringTally] = []
    with steer(model, *plans) if plans else nullcontext() as steering:
        callback = None if steering is None else steering.callback
        for first in range(0, len(prompts), chunk):
            part: dict[int, Answer] = {}
            for answer in sampler.answers(prompts[first : first + chunk], callback, advance):
                part[answer.index] = answer
            answers += [part[index] for index in sorted(part)]
            if callback is not None:
                tallies.append(callback.tally)
    return answers, SteeringTally.concatenate(tallies) if tallies else None
