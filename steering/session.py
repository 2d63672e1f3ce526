"""A model with its axis and caps, each checked to belong to the others.

steered = load_steered_model("smollm2-135m", ModelOptions(), "smollm2-135m", ["p50@18-23"])
steered = steered_model(model, axis, [axis.cap("p50@18-23")])       # of a model that is loaded already
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from personatlas.persona.axis import Axis, load_axis, require_origin
from personatlas.persona.interventions import Cap
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model, load_model
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import resolve_axis
from personatlas.steering.hooks.binding_check import require_binding


@dataclass(frozen=True)
class SteeredModel:
    """A model, an axis of it, and caps that were proved to bind on it."""

    model: Model
    axis: Axis
    caps: tuple[Cap, ...] = ()

    @property
    def chat(self) -> ChatFormat:
        """The model's chat format."""
        return self.model.chat


def load_steered_model(
    name: str, load: ModelOptions, axis: str, caps: Sequence[str] = (), *, force: bool = False
) -> SteeredModel:
    """Loads axis, caps and model, the cheap ones first, and proves that every cap binds.

    `axis` is a run folder, an axis file or a packaged axis; `caps` are cap specs. `force` lets another weight
    format of the same model pass. Raises `UserError` for what does not belong together.
    """
    loaded_axis = load_axis(resolve_axis(axis))
    loaded_caps = [loaded_axis.cap(spec) for spec in caps]
    model = load_model(name, device=load.device, dtype=load.dtype, chat_template=load.chat_template)
    for spec, cap in zip(caps, loaded_caps, strict=True):
        if cap.model.get("fingerprint") is None:
            say(f"the cap {spec} does not say which weights it was made for: only its size was checked")
    return steered_model(model, loaded_axis, loaded_caps, force=force)


def steered_model(model: Model, axis: Axis, caps: Sequence[Cap] = (), *, force: bool = False) -> SteeredModel:
    """Checks that axis and caps belong to the model and that every cap binds. Raises `UserError`
    otherwise.
    """
    description = model.describe()
    require_origin("axis", axis.model, description, force=force)
    for cap in caps:
        require_origin("cap", cap.model, description, force=force)
        axis.require_sign(cap)
    if force:
        axis, caps = replace(axis, model=description), [replace(cap, model=description) for cap in caps]
    for cap in caps:
        require_binding(model, [cap])
    return SteeredModel(model, axis, tuple(caps))
