"""Floors by gradient: what no grid over windows and levels reaches, a floor of its own for each layer, for prompts and answers.

    floors = fitted(model, axis, layers, places, wanted, benign, Descent(budget=0.05))
    floors.cap(axis)

A floor enters the forward as h + v * max(floor - <h, v>, 0), so the loss of any text has a gradient with respect to it.
Wanted texts are what the model says as the default when asked who it is, put after role prompts; benign ones are its own
answers that a cap should leave alone. The floors descend on the loss of the first plus a price times the benign loss's rise;
the price goes up while that rise is over the budget and down while it is under. They begin where the budget holds. A few dozen numbers are fitted, and nothing
of the half that is reported on is seen.

What a cap is to make likely: the default's own answers about who it is, put after the prompts of roles.

texts = wanted_texts(model, chat, bank, trial.halves["choose"].requests, seed=0)
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.hooks import residual
from personatlas.persona.models.load import Model
from personatlas.persona.progress import progress
from personatlas.persona.roles.bank import Bank
from personatlas.persona.rollout import Request, Rollout
from personatlas.persona.sampling.sampler import Answer, Sampling, batch_tokens
from personatlas.steering.arms import run_arms
from personatlas.steering.calibration.quantile_floors import Projections
from personatlas.steering.hooks.account import Batch
from personatlas.steering.hooks.step import apply_bounds, gather_bounds
from personatlas.steering.hooks.tables import IDLE, Table
from personatlas.steering.identity import identity_class, identity_requests
from personatlas.steering.teacher_forcing import batches

CPU_TOKENS, GPU_TOKENS = (
    1024,
    8192,
)  # padded tokens a batch: logits, and what the gradient needs of every layer
START = (0.2, 0.1)  # quantiles of default tokens, of prompts and of answers, at which the floors begin
LOWER = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # spreads by which they are lowered, until the budget holds
KEPT = 0.25  # the floors are the mean over this last part of the descent


@dataclass(frozen=True)
class Descent:
    """How to descend: texts a step, Adam's rate in standard deviations of a layer's projections, the price to begin with."""

    budget: float
    steps: int = 60
    wanted: int = 24
    benign: int = 12
    rate: float = 0.06
    price: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class Floors:
    """Floors and spreads (standard deviations of default tokens) of C layers, for prompts [0] and for answers [1]."""

    layers: tuple[int, ...]
    floors: Float[Tensor, "2 C"]
    spreads: Float[Tensor, "2 C"]

    def cap(self, axis: Axis, shift: float = 0.0) -> Cap:
        """A cap with the floors, all of them shifted by so many spreads."""
        prompt, answer = self.floors + shift * self.spreads
        vectors = torch.stack([axis.at(layer) for layer in self.layers])
        how = {"prompt_floor": prompt, "population": "fitted", "spare_first": True, "model": axis.model}
        return Cap(self.layers, vectors, answer, **how)

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {"layers": list(self.layers), "floors": self.floors.tolist(), "spreads": self.spreads.tolist()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Floors":
        """What `to_json` wrote."""
        return cls(tuple(row["layers"]), torch.tensor(row["floors"]), torch.tensor(row["spreads"]))


def fitted(
    model: Model,
    axis: Axis,
    layers: Sequence[int],
    places: Projections,
    wanted: Sequence[Rollout],
    benign: Sequence[Rollout],
    how: Descent,
    advance: Callable[[int], None] = lambda _: None,
) -> Floors:
    """Floors at `layers` for the loss of `wanted` at the budget on `benign`; `advance` counts steps.

    Raises `UserError` when a loss is not finite.
    """
    start, spreads = _begin(places, layers)
    moved = torch.zeros_like(start, requires_grad=True)  # in spreads
    optimizer = torch.optim.Adam([moved], lr=how.rate)
    draws, price, kept = random.Random(how.seed), how.price, []
    with _frozen(model), _floored(model, axis, layers, lambda: start + moved * spreads) as now:
        with torch.no_grad():
            before = _losses(model, benign)
            for lower in LOWER:
                moved.fill_(-lower)
                if sum(_losses(model, benign, now).values()) <= (1 + how.budget) * sum(before.values()):
                    break
        for step in range(how.steps):
            ours = draws.sample(list(wanted), min(how.wanted, len(wanted)))
            theirs = draws.sample(list(benign), min(how.benign, len(benign)))
            optimizer.zero_grad()
            loss = _descend(model, ours, now, 1 / sum(len(text.answer_ids) for text in ours))
            whole = sum(before[text.key] for text in theirs)
            rise = _descend(model, theirs, now, price / whole) / price - 1
            if not math.isfinite(loss + rise):
                raise UserError(f"the loss is not finite in step {step} of fitting floors; try --steps 0")
            optimizer.step()
            price *= math.exp(0.2 * min(max((rise - how.budget) / how.budget, -1.0), 1.0))
            kept.append(moved.detach().clone())
            advance(1)
    last = torch.stack(kept[-max(round(KEPT * how.steps), 1) :]).mean(0)
    return Floors(tuple(layers), start + last * spreads, spreads)


def _begin(places: Projections, layers: Sequence[int]) -> tuple[Float[Tensor, "2 C"], Float[Tensor, "2 C"]]:
    """Floors to begin with, and the spreads of default tokens, for prompts and for answers."""
    columns = places.places(layers)
    sides = [tokens["default"][:, columns] for tokens in (places.prompts, places.tokens)]
    floors = [side.quantile(level, dim=0) for side, level in zip(sides, START, strict=True)]
    return torch.stack(floors), torch.stack([side.std(0) for side in sides])


def _descend(model: Model, texts: Sequence[Rollout], now: list[Any], weight: float) -> float:
    """Add the gradient of `weight` times the texts' summed loss; return that number."""
    total = 0.0
    for batch in batches(model, texts, batch_tokens(model, CPU_TOKENS, GPU_TOKENS)):
        now[:] = [batch.lengths, batch.starts]
        loss = weight * batch.token_losses(batch.log_probs(model)).sum()
        loss.backward()
        total += float(loss.detach())
    return total


def _losses(model: Model, texts: Sequence[Rollout], now: list[Any] | None = None) -> dict[str, float]:
    """Each text's summed loss by its key, with the floors that `now` belongs to or without any."""
    found: dict[str, float] = {}
    for batch in batches(model, texts, batch_tokens(model, CPU_TOKENS, GPU_TOKENS)):
        if now is not None:
            now[:] = [batch.lengths, batch.starts]
        found |= dict(
            zip((text.key for text in batch.texts), batch.losses(batch.log_probs(model)), strict=True)
        )
    return found


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """No parameter asks for a gradient inside."""
    asking = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _floored(
    model: Model, axis: Axis, layers: Sequence[int], floors: Callable[[], Float[Tensor, "2 C"]]
) -> Iterator[list[Any]]:
    """The steering step with floors that have a gradient; what is yielded holds the next batch's (lengths, starts), or nothing."""
    now: list[Any] = []

    def hook(place: int, vector: Tensor) -> Any:
        def step(_module: Any, _args: Any, output: Any) -> Any:
            if not now:
                return None
            h = residual(output)
            lengths, starts = (value.to(h.device) for value in now)
            floor = torch.cat([floors()[:, place], torch.full((2,), -math.inf)]).to(
                h.device
            )  # none for first tokens
            bounds = torch.stack([floor, torch.full_like(floor, math.inf), torch.zeros_like(floor)], dim=-1)
            bounds = torch.stack(
                [bounds, bounds.new_tensor(IDLE).expand_as(bounds)]
            )  # of the plan, and of padding
            active = torch.ones(2, 4, dtype=torch.bool, device=h.device)
            table = Table(vector.to(h.device)[None], bounds[:, :, None], active)
            batch = Batch(torch.zeros_like(lengths), lengths, starts, torch.ones_like(lengths))
            moved, _ = apply_bounds(h, table.vectors, gather_bounds(table, batch, h.shape[1]))
            return moved if isinstance(output, Tensor) else (moved, *output[1:])

        return step

    handles = [
        model.blocks[layer].register_forward_hook(hook(place, axis.at(layer)))
        for place, layer in enumerate(layers)
    ]
    try:
        yield now
    finally:
        for handle in handles:
            handle.remove()


LONGEST = 32  # tokens: who it is, it says at once
TIMES = 2  # answers to a question under each default prompt


def wanted_texts(
    model: Model, chat: ChatFormat, bank: Bank, requests: Sequence[Request], seed: int
) -> list[Rollout]:
    """The requests with an answer of the default in which it calls itself an assistant, to the same question.

    Requests whose question the default never answers so are left out; that may be all of them.
    """
    asked = [
        request
        for time in range(TIMES)
        for request in identity_requests(
            bank, [bank.default.name], len(bank.default.prompts), model.name, seed + time
        )
    ]
    with progress("asking the default who it is", len(asked)) as advance:
        arm = next(iter(run_arms(model, chat, asked, {"default": []}, Sampling(LONGEST), advance)))
    found: dict[str, list[tuple[str, Answer]]] = {}
    for request, text, answer in zip(asked, arm.texts, arm.answers, strict=True):
        if identity_class(text) == "assistant":
            found.setdefault(_question(request), []).append((text, answer))
    wanted = []
    for number, request in enumerate(request for request in requests if _question(request) in found):
        own = found[_question(request)]
        text, answer = own[number % len(own)]
        ids = tuple(chat.prompt_ids(list(request.messages)))
        wanted.append(
            Rollout(request.key, tuple(request.messages), ids, answer.ids, text, request.seed, answer.stopped)
        )
    return wanted


def _question(request: Request) -> str:
    return request.key.split("/")[2]
