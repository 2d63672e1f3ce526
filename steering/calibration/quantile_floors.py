"""Floors from a population: where answers lie on an axis, and which share of their tokens a floor would lift.

    projections = read_projections(model, axis, {"default": ..., "roles": ...})
    cap = projections.cap(axis, range(18, 24), 0.5)                  # the median of the default's answers
    projections.below(cap, "default")                               # by layer, as read without a cap

A level is a quantile of the answers' mean projections (the paper's percentiles, arXiv 2601.10387, section 5),
a population whose answers: "default", "roles", or "pooled", both together in equal numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.interventions import Cap
from personatlas.persona.models.hooks import capture
from personatlas.persona.models.load import Model
from personatlas.persona.rollout import Rollout
from personatlas.steering.teacher_forcing import reading_batches

POPULATIONS = ("default", "roles", "pooled")


@dataclass(frozen=True)
class Projections:
    """Projections of two populations ("default", "roles") at L layers.

    `means` are those of N answers, `tokens` those of their M tokens, `prompts` those of the tokens of the
    prompts before them, without the first token, an attention sink with a projection of its own.
    """

    layers: tuple[int, ...]
    means: dict[str, Float[Tensor, "_ L"]]
    tokens: dict[str, Float[Tensor, "_ L"]]
    prompts: dict[str, Float[Tensor, "_ L"]]

    def cap(
        self,
        axis: Axis,
        layers: Sequence[int],
        levels: float | Sequence[float],
        population: str = "default",
        phase: str = "both",
    ) -> Cap:
        """A cap with floors at a quantile of a population's answer means, or at one for each layer.

        Raises `UserError` for a level outside 0..1 and for an unknown layer or population.
        """
        levels = [levels] * len(layers) if isinstance(levels, int | float) else list(levels)
        for level in levels:
            if not 0 <= level <= 1:
                raise UserError(f"level {level} is outside 0..1: it is a quantile")
        if population not in POPULATIONS:
            raise UserError(f"population {not_one_of(population, POPULATIONS)}")
        if population == "pooled":
            size = min(map(len, self.means.values()))
            values = torch.cat([own[:size] for own in self.means.values()])
        else:
            values = self.means[population]
        columns = zip(self.columns(layers), levels, strict=True)
        return Cap(
            tuple(layers),
            torch.stack([axis.at(layer) for layer in layers]),
            torch.stack([values[:, column].quantile(level) for column, level in columns]),
            level=sorted(levels)[len(levels) // 2],
            population=population,
            phase=phase,
            spare_first=True,
            model=axis.model,
        )

    def below(self, cap: Cap, population: str, side: str = "answer") -> Float[Tensor, " C"]:
        """Share of the population's tokens of the "answer" or the "prompt" below the floor at each layer,
        uncapped.
        """
        values = (self.tokens if side == "answer" else self.prompts)[population][:, self.columns(cap.layers)]
        floors = torch.tensor([cap.floor_of(row, side) for row in range(len(cap.layers))])
        return (values < floors).float().mean(0)

    def columns(self, layers: Sequence[int]) -> list[int]:
        """Columns of layers. Raises `UserError` for one that is not there."""
        for layer in layers:
            if layer not in self.layers:
                raise UserError(f"layer {layer} is not in this axis ({self.layers[0]}..{self.layers[-1]})")
        return [self.layers.index(layer) for layer in layers]


@torch.no_grad()
def read_projections(
    model: Model,
    axis: Axis,
    populations: Mapping[str, Sequence[Rollout]],
    advance: Callable[[int], None] = lambda _: None,
) -> Projections:
    """Reads answers again and projects all of their tokens at every layer of the axis; `advance` counts
    answers.
    """
    axis.require_model(model.describe())
    means: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    prompts: dict[str, Tensor] = {}

    def to_projection(layer: int, h: Tensor) -> Tensor:
        return (h.float() @ axis.at(layer).to(h.device)).cpu()  # (B, T)

    for name, rollouts in populations.items():
        if not rollouts:
            raise UserError(f"there are no answers of population {name!r} to take floors from")
        by_text: dict[int, tuple[Tensor, Tensor]] = {}
        for batch in reading_batches(model, rollouts):
            with capture(model, axis.layers, to_projection) as captured:
                model.base(input_ids=batch.ids, use_cache=False)
            values = torch.stack([captured[layer] for layer in axis.layers], dim=-1)  # (B, T, L)
            spans = zip(batch.indices, batch.starts.tolist(), batch.lengths.tolist(), strict=True)
            for row, (index, start, stop) in enumerate(spans):
                by_text[index] = values[row, 1:start], values[row, start:stop]
            advance(len(batch.indices))
        pairs = [by_text[index] for index in range(len(rollouts))]
        means[name] = torch.stack([answer.mean(0) for _, answer in pairs])
        prompts[name], tokens[name] = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return Projections(axis.layers, means, tokens, prompts)
