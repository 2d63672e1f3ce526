"""Floors from a population: where answers lie on an axis, and which share of their tokens a floor would lift.

    places = read_projections(model, axis, {"default": ..., "roles": ...})
    cap = places.cap(axis, range(18, 24), level=0.5)                # the median of the default's answers
    places.below(cap, "default")                                     # by layer, as read without a cap

A level is a quantile of the answers' mean projections (the paper's percentiles, arXiv 2601.10387, section 5), a population
whose answers: "default", "roles", or "pooled", both together in equal numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap
from personatlas.persona.models.hooks import residual
from personatlas.persona.models.load import Model
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.sampler import batch_tokens
from personatlas.steering.teacher_forcing import Texts, batches

POPULATIONS = ("default", "roles", "pooled")
CPU_TOKENS, GPU_TOKENS = 2048, 65536  # most padded tokens a batch


@dataclass(frozen=True)
class Projections:
    """Projections at L layers of N answers (their means), M tokens of them and M tokens of the prompts before them (without
    the first token, an attention sink with a projection of its own), by population ("default", "roles")."""

    layers: tuple[int, ...]
    means: dict[str, Float[Tensor, "_ L"]]
    tokens: dict[str, Float[Tensor, "_ L"]]
    prompts: dict[str, Float[Tensor, "_ L"]]

    def floors(self, layers: Sequence[int], levels: Sequence[float], population: str) -> Float[Tensor, " C"]:
        """A quantile of a population's answer means at each layer. Raises `UserError` for a level outside 0..1."""
        _require_level(levels)
        if population not in POPULATIONS:
            raise UserError(f"population {population!r} is not one of {', '.join(POPULATIONS)}")
        values = self.means[population] if population != "pooled" else self._pooled()
        places = self.places(layers)
        return torch.stack(
            [values[:, place].quantile(level) for place, level in zip(places, levels, strict=True)]
        )

    def cap(
        self,
        axis: Axis,
        layers: Sequence[int],
        level: float | Sequence[float],
        population: str = "default",
        phase: str = "both",
    ) -> Cap:
        """A cap with floors at that level of a population, or at a level for each layer."""
        chosen = tuple(layers)
        levels = [level] * len(chosen) if isinstance(level, (int, float)) else list(level)
        floor = self.floors(chosen, levels, population)
        vectors = torch.stack([axis.at(layer) for layer in chosen])
        middle = sorted(levels)[len(levels) // 2]
        return Cap(
            chosen,
            vectors,
            floor,
            level=middle,
            population=population,
            phase=phase,
            spare_first=True,
            model=axis.model,
        )

    def below(self, cap: Cap, population: str, side: str = "answer") -> Float[Tensor, " C"]:
        """Share of the population's tokens, of the "answer" or the "prompt", below the floor at each layer, as the model is."""
        values = (self.tokens if side == "answer" else self.prompts)[population][:, self.places(cap.layers)]
        return (
            (values < torch.tensor([cap.floor_of(row, side) for row in range(len(cap.layers))]))
            .float()
            .mean(0)
        )

    def places(self, layers: Sequence[int]) -> list[int]:
        """Columns of layers. Raises `UserError` for one that is not there."""
        return [self._place(layer) for layer in layers]

    def _place(self, layer: int) -> int:
        if layer not in self.layers:
            raise UserError(f"layer {layer} is not in this axis ({self.layers[0]}..{self.layers[-1]})")
        return self.layers.index(layer)

    def _pooled(self) -> Tensor:
        size = min(len(values) for values in self.means.values())
        return torch.cat([values[:size] for values in self.means.values()])


@torch.no_grad()
def read_projections(
    model: Model,
    axis: Axis,
    populations: Mapping[str, Sequence[Rollout]],
    advance: Callable[[int], None] = lambda _: None,
) -> Projections:
    """Read answers again and project every token of theirs at every layer of the axis; `advance` counts answers."""
    axis.require_model(model.describe())
    means: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    prompts: dict[str, Tensor] = {}
    for name, rollouts in populations.items():
        if not rollouts:
            raise UserError(f"there are no answers of population {name!r} to take floors from")
        found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(rollouts)
        for batch in batches(model, rollouts, batch_tokens(model, CPU_TOKENS, GPU_TOKENS)):
            for place, values in zip(batch.places, _projected(model, axis, batch), strict=True):
                found[place] = values
            advance(len(batch.places))
        means[name] = torch.stack([answer.mean(0) for _, answer in found])
        prompts[name], tokens[name] = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Projections(axis.layers, means, tokens, prompts)


def _projected(
    model: Model, axis: Axis, batch: Texts
) -> list[tuple[Float[Tensor, "P L"], Float[Tensor, "A L"]]]:
    """Projections of each prompt's tokens but the first, and of its answer's."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            h = residual(output)
            kept[layer] = (h.float() @ axis.at(layer).to(h.device)).cpu()  # (B, T)

        return hook

    handles = [model.blocks[layer].register_forward_hook(keep(layer)) for layer in axis.layers]
    try:
        model.base(input_ids=batch.ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    whole = torch.stack([kept[layer] for layer in axis.layers], dim=-1)  # (B, T, L)
    spans = zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)
    return [(whole[row, 1:start], whole[row, start:stop]) for row, (start, stop) in enumerate(spans)]


def _require_level(levels: Sequence[float]) -> None:
    for level in levels:
        if not 0 <= level <= 1:
            raise UserError(f"level {level} is outside 0..1: it is a quantile")
