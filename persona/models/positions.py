"""How far a model's positions go on one scale.

Some rotary embeddings take other frequencies for the whole forward as soon as one row is longer than the
model was first trained on: `longrope` (Phi-3 and Phi-4-mini with long contexts) and `dynamic`. Rows that
share a forward would then change each other, and the keys of a text that grows past the switch would stand in
the cache on the old scale. Llama 4 counts the tokens of its own cache to scale attention. All of these are
the same model up to the switch: the context ends there.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from personatlas.persona.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from personatlas.persona.models.load import Model


def scale_switch(config: "PreTrainedConfig") -> int | None:
    """Most tokens of a text that is read on one scale; None where there is one scale for all lengths."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters, *(own for own in parameters.values() if isinstance(own, Mapping))]  # one a layer type
    longest, first = (getattr(config, f"{name}max_position_embeddings", None) for name in ("", "original_"))
    switches = [
        own.get("original_max_position_embeddings") or first or longest
        for own in sets
        if own.get("rope_type") == "longrope"
    ]
    if any("dynamic" in str(own.get("rope_type")) for own in sets):
        switches.append(longest)
    if getattr(config, "attn_temperature_tuning", False) and getattr(config, "floor_scale", None):
        switches.append(config.floor_scale - 1)
    return min((int(switch) for switch in switches if switch), default=None)


def limit_reading(base: nn.Module, limit: int, model_id: str) -> None:
    """Lets a model refuse to read rows that are longer than its scale goes."""

    def check(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if kwargs.get("position_ids") is None and ids is not None and ids.shape[-1] > limit:
            raise UserError(
                f"{model_id} changes the scale of its positions after {limit} tokens, and a text of "
                f"{ids.shape[-1]} cannot share a batch beyond; give shorter texts"
            )

    base.register_forward_pre_hook(check, with_kwargs=True)


@torch.no_grad()
def far_neighbour_error(model: "Model") -> float:
    """How much a text changes, relative to itself, when another row of its batch is at the end of the
    context.

    0 for a model that counts positions itself or says nothing of its context.
    """
    length = min(64, model.context or 0)
    if not length:
        return 0.0
    ids = (torch.arange(length, device=model.device) * 7 % model.vocab_size).repeat(2, 1)
    near = torch.arange(length, device=model.device)

    def read(other: Tensor) -> Tensor:
        positions = torch.stack([near, other])
        h: Tensor = model.base(input_ids=ids, position_ids=positions, use_cache=False)[0][0].float()
        return h

    try:
        alone, beside = read(near), read(near + (model.context or 0) - length)
    except TypeError:
        return 0.0
    return float((alone - beside).norm() / alone.norm())
