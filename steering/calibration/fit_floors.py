"""Floors by gradient: a floor of its own for each layer, for prompts and for answers, which no grid reaches.

    target = target_texts(model, bank, requests, seed=0)
    floors = fit_floors(model, axis, layers, projections, target, benign, DescentOptions(budget=0.05))
    floors.cap(axis)

A floor enters the forward as h + v * max(floor - <h, v>, 0), so the loss of any text has a gradient with
respect to it. Target texts are what the model says as the default when asked who it is, put after role
prompts; benign ones are its own answers that a cap should leave alone. The floors descend on the loss of the
first plus a price times the benign loss's rise; the price goes up while that rise is over the budget and down
while it is under. They begin where the budget holds. A few dozen numbers are fitted, and nothing of the half
that is reported on is seen.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap
from personatlas.persona.models.hooks import residual
from personatlas.persona.models.load import Model
from personatlas.persona.progress import progress
from personatlas.persona.records import FieldError, Layers, NonNegative, Number, read_field
from personatlas.persona.roles.bank import Bank
from personatlas.persona.rollout import Request, Rollout
from personatlas.persona.sampling.sampler import Answer, Sampling, batch_tokens
from personatlas.steering.arms import run_arms
from personatlas.steering.calibration.quantile_floors import Projections
from personatlas.steering.hooks.account import Batch
from personatlas.steering.hooks.step import apply_bounds, gather_bounds
from personatlas.steering.hooks.tables import IDLE, Table
from personatlas.steering.identity import identity_class, identity_requests
from personatlas.steering.teacher_forcing import CPU_LOGIT_TOKENS, GPU_LOGIT_TOKENS, TextBatch, text_batches

START = (0.2, 0.1)  # quantiles of default tokens, of prompts and of answers, at which the floors begin
LOWER = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # spreads by which they are lowered, until the budget holds
AVERAGED = 0.25  # the floors are the mean over this last part of the descent
MAX_TARGET_TOKENS = 32  # who it is, the default says at once
TARGET_ANSWERS = 2  # to a question under each default prompt


@dataclass(frozen=True)
class DescentOptions:
    """How to descend: texts a step, Adam's rate in standard deviations of a layer's projections, the first
    price.
    """

    budget: float
    steps: int = 60
    wanted: int = 24
    benign: int = 12
    rate: float = 0.06
    price: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class Floors:
    """Floors and spreads (standard deviations of default tokens) of C layers, for prompts [0] and for answers
    [1].
    """

    layers: tuple[int, ...]
    floors: Float[Tensor, "2 C"]
    spreads: Float[Tensor, "2 C"]

    def cap(self, axis: Axis, shift: float = 0.0) -> Cap:
        """A cap with the floors, all of them shifted by `shift` spreads."""
        prompt, answer = self.floors + shift * self.spreads
        vectors = torch.stack([axis.at(layer) for layer in self.layers])
        return Cap(
            self.layers,
            vectors,
            answer,
            prompt_floor=prompt,
            population="fitted",
            spare_first=True,
            model=axis.model,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {"layers": list(self.layers), "floors": self.floors.tolist(), "spreads": self.spreads.tolist()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Floors":
        """What `to_json` wrote. Raises `FieldError` for anything else."""
        layers = read_field(row, "layers", Layers)
        floors = read_field(row, "floors", tuple[tuple[Number, ...], tuple[Number, ...]])
        spreads = read_field(row, "spreads", tuple[tuple[NonNegative, ...], tuple[NonNegative, ...]])
        if {len(side) for side in (*floors, *spreads)} != {len(layers)}:
            raise FieldError(f": not one number for each of {len(layers)} layers", "floors")
        return cls(layers, torch.tensor(floors), torch.tensor(spreads))


def fit_floors(
    model: Model,
    axis: Axis,
    layers: Sequence[int],
    projections: Projections,
    target: Sequence[Rollout],
    benign: Sequence[Rollout],
    options: DescentOptions,
    advance: Callable[[int], None] = lambda _: None,
) -> Floors:
    """Floors at `layers` for the loss of `target` at the budget on `benign`; `advance` counts steps.

    Raises `UserError` when a loss is not finite.
    """
    columns = projections.columns(layers)
    sides = [tokens["default"][:, columns] for tokens in (projections.prompts, projections.tokens)]
    start = torch.stack([side.quantile(level, dim=0) for side, level in zip(sides, START, strict=True)])
    spreads = torch.stack([side.std(0) for side in sides])
    moved = torch.zeros_like(start, requires_grad=True)  # in spreads
    optimizer = torch.optim.Adam([moved], lr=options.rate)
    draws, price, history = random.Random(options.seed), options.price, []
    with torch.enable_grad(), _frozen(model):
        floored = _FlooredModel(model, axis, layers, lambda: start + moved * spreads)
        with torch.no_grad():
            before = floored.losses(benign)
        with floored.attached():
            with torch.no_grad():
                for lower in LOWER:
                    moved.fill_(-lower)
                    if sum(floored.losses(benign).values()) <= (1 + options.budget) * sum(before.values()):
                        break
            for step in range(options.steps):
                targets = draws.sample(list(target), min(options.wanted, len(target)))
                controls = draws.sample(list(benign), min(options.benign, len(benign)))
                optimizer.zero_grad()
                loss = floored.backward(targets, 1 / sum(len(text.answer_ids) for text in targets))
                rise = (
                    floored.backward(controls, price / sum(before[text.key] for text in controls)) / price - 1
                )
                if not math.isfinite(loss + rise):
                    raise UserError(f"the loss is not finite in step {step} of fitting floors; try --steps 0")
                optimizer.step()
                price *= math.exp(0.2 * min(max((rise - options.budget) / options.budget, -1.0), 1.0))
                history.append(moved.detach().clone())
                advance(1)
    last = torch.stack(history[-max(round(AVERAGED * options.steps), 1) :]).mean(0)
    return Floors(tuple(layers), start + last * spreads, spreads)


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """No parameter has a gradient inside."""
    parameters = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class _FlooredModel:
    """A model under the steering step with floors (2, C) that have a gradient."""

    def __init__(
        self, model: Model, axis: Axis, layers: Sequence[int], floors: Callable[[], Float[Tensor, "2 C"]]
    ) -> None:
        self.model, self.axis, self.layers, self.floors = model, axis, layers, floors
        self.batch: TextBatch | None = None  # of the next forward

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The step is on the blocks inside."""
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.callback(
                    self.model.blocks[layer].register_forward_hook(self._hook(index, layer)).remove
                )
            yield

    def backward(self, texts: Sequence[Rollout], weight: float) -> float:
        """Adds the gradient of `weight` times the texts' summed loss, and returns that number."""
        total = 0.0
        for batch in self._batches(texts):
            loss = weight * batch.token_losses(batch.log_probs(self.model)).sum()
            loss.backward()
            total += float(loss.detach())
        return total

    def losses(self, texts: Sequence[Rollout]) -> dict[str, float]:
        """Each text's summed loss by its key."""
        losses: dict[str, float] = {}
        for batch in self._batches(texts):
            own = batch.losses(batch.log_probs(self.model))
            losses |= {text.key: loss for text, loss in zip(batch.texts, own, strict=True)}
        return losses

    def _batches(self, texts: Sequence[Rollout]) -> Iterator[TextBatch]:
        tokens = batch_tokens(self.model, CPU_LOGIT_TOKENS, GPU_LOGIT_TOKENS)
        for batch in text_batches(self.model, texts, tokens):
            self.batch = batch
            yield batch

    def _hook(self, index: int, layer: int) -> Callable[[nn.Module, Any, Any], Any]:
        vector = self.axis.at(layer)

        def step(_module: nn.Module, _args: Any, output: Any) -> Any:
            assert self.batch is not None
            h = residual(output)
            lengths, starts = self.batch.lengths.to(h.device), self.batch.starts.to(h.device)
            # none for first tokens
            floor = torch.cat([self.floors()[:, index], torch.full((2,), -math.inf)]).to(h.device)
            bounds = torch.stack([floor, torch.full_like(floor, math.inf), torch.zeros_like(floor)], dim=-1)
            bounds = torch.stack(
                [bounds, bounds.new_tensor(IDLE).expand_as(bounds)]
            )  # of the plan, of padding
            active = torch.ones(2, 4, dtype=torch.bool, device=h.device)
            table = Table(vector.to(h.device)[None], bounds[:, :, None], active)
            batch = Batch(torch.zeros_like(lengths), lengths, starts, torch.ones_like(lengths))
            moved, _ = apply_bounds(h, table.vectors, gather_bounds(table, batch, h.shape[1]))
            return moved if isinstance(output, Tensor) else (moved, *output[1:])

        return step


def target_texts(model: Model, bank: Bank, requests: Sequence[Request], seed: int) -> list[Rollout]:
    """The requests with an answer of the default in which it calls itself an assistant, to the same question.

    Requests whose question the default never answers so are left out; that may be all of them.
    """
    default_requests = [
        request
        for repeat in range(TARGET_ANSWERS)
        for request in identity_requests(
            bank, [bank.default.name], len(bank.default.prompts), model.name, seed + repeat
        )
    ]
    with progress("asking the default who it is", len(default_requests)) as advance:
        arms = run_arms(model, default_requests, {"default": []}, Sampling(MAX_TARGET_TOKENS), advance)
        arm = next(iter(arms))
    answers: dict[str, list[tuple[str, Answer]]] = {}
    for request, text, answer in zip(default_requests, arm.texts, arm.answers, strict=True):
        if identity_class(text) == "assistant":
            answers.setdefault(_question(request), []).append((text, answer))
    texts = []
    for number, request in enumerate(request for request in requests if _question(request) in answers):
        own = answers[_question(request)]
        text, answer = own[number % len(own)]
        messages, ids = tuple(request.messages), tuple(model.chat.prompt_ids(list(request.messages)))
        texts.append(Rollout(request.key, messages, ids, answer.ids, text, request.seed, answer.stopped))
    return texts


def _question(request: Request) -> str:
    return request.key.split("/")[2]
