"""A model loaded once with its chat format, an axis and caps, each checked to belong to the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import say


class SteeredModel:
    """A model with an axis and caps that were checked to belong to it."""

    def __init__(self, model: Any, chat: Any, axis: Any, stem: Path, caps: list[Any]) -> None:
        self.model, self.chat, self.axis, self.stem, self.caps = model, chat, axis, stem, caps


def load_steered_model(
    model: str, how: ModelOptions, axis: str, caps: list[str], *, force: bool = False
) -> SteeredModel:
    """Load axis, caps and model, the cheap ones first, and prove that every cap binds. Raises `UserError` for what does not
    belong together; `force` lets another weight format of the same model pass."""
    from dataclasses import replace

    from personatlas.persona.axis import load_axis, require_origin
    from personatlas.persona.models.load import load_model
    from personatlas.persona.runs import axis_stem
    from personatlas.steering.caps import cap_named, require_cap
    from personatlas.steering.hooks.binding_check import require_binding

    stem = axis_stem(axis)
    along = load_axis(stem)
    held = [cap_named(cap, along, stem) for cap in caps]
    decoder = load_model(model, device=how.device, dtype=how.dtype, chat_template=how.chat_template)
    own = decoder.describe()
    require_origin("axis", along.model, own, force=force)
    for name, cap in zip(caps, held, strict=True):
        require_origin("cap", cap.model, own, force=force)
        if cap.model.get("fingerprint") is None:
            say(f"the cap {name} does not say which weights it was made for: only its size was checked")
        require_cap(cap, along)
    if force:
        along, held = replace(along, model=own), [replace(cap, model=own) for cap in held]
    for cap in held:
        require_binding(decoder, [cap])
    return SteeredModel(decoder, _chat(decoder), along, stem, held)


def _chat(model: Any) -> Any:
    from personatlas.persona.models.chat_template import chat_format

    config = model.hf.generation_config
    return chat_format(model.tokenizer, config.eos_token_id if config is not None else None)


@dataclass(frozen=True)
class BaselineModel:
    """A model without an axis, in the place of `SteeredModel`."""

    model: Any
    chat: Any
    caps: tuple[()] = ()


def load_baseline(model: str, how: ModelOptions) -> BaselineModel:
    """Load a model that nothing is to be done to."""
    from personatlas.persona.models.load import load_model

    decoder = load_model(model, device=how.device, dtype=how.dtype, chat_template=how.chat_template)
    return BaselineModel(decoder, _chat(decoder))
