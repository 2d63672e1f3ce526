"""The arms of an evaluation, loaded: a model, its axis, and interventions by name that were proved to bind."""

from collections.abc import Mapping, Sequence

from personatlas.persona.axis import Axis, load_axis
from personatlas.persona.interventions import BASELINE, Cap, Interventions
from personatlas.persona.models.load import Model, load_model
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import resolve_axis
from personatlas.steering.session import SteeredModel, steered_model

Arms = Mapping[str, Interventions] | Sequence[str]


def load_arms(
    model: str | Model,
    axis: str | Axis,
    arms: Arms,
    *,
    load: ModelOptions = ModelOptions(),
    force: bool = False,
) -> tuple[SteeredModel, dict[str, Interventions]]:
    """Loads what is named, the cheap things first, and checks that all belong together.

    `model` and `axis` are names or loaded objects; `arms` are interventions by name, or texts such as "p50@18-23". The
    baseline comes first, given or not. `force` lets another weight format of the same model pass. Raises `UserError`.
    """
    loaded_axis = load_axis(resolve_axis(axis)) if isinstance(axis, str) else axis
    if not isinstance(arms, Mapping):
        arms = {spec: [loaded_axis.cap(spec)] for spec in arms}
    loaded = load_named(model, load)
    caps = [own for plan in arms.values() for own in plan if isinstance(own, Cap)]
    for name, plan in arms.items():
        if any(isinstance(own, Cap) and own.model.get("fingerprint") is None for own in plan):
            say(f"the arm {name} does not say which weights its cap was made for: only its size was checked")
    steered = steered_model(loaded, loaded_axis, caps, force=force)
    checked = iter(steered.caps)
    by_name = {
        name: [next(checked) if isinstance(own, Cap) else own for own in plan] for name, plan in arms.items()
    }
    return steered, {BASELINE: [], **by_name}


def load_named(model: str | Model, load: ModelOptions) -> Model:
    """The model, loaded unless it is."""
    if isinstance(model, Model):
        return model
    return load_model(model, device=load.device, dtype=load.dtype, chat_template=load.chat_template)
