"""The arms of an evaluation, loaded: a model, its axis, and interventions by name that were proved to
bind."""

from collections.abc import Mapping, Sequence

from personatlas.persona.axis import Axis, load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE, Cap, Interventions
from personatlas.persona.models.load import Model, load_model
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import resolve_axis
from personatlas.steering.arms import parse_arms
from personatlas.steering.session import SteeredModel, steered_model

Arms = Mapping[str, Interventions] | Sequence[str]  # interventions by name, or texts such as "cap:p50@18-23"


def load_arms(
    model: str | Model, axis: str | Axis, arms: Arms, load: ModelOptions, *, force: bool = False
) -> tuple[SteeredModel, dict[str, Interventions]]:
    """Loads what is named, the cheap things first, and checks that all belong together; the baseline is the
    first arm.

    `force` lets another weight format of the same model pass. Raises `UserError`, also for random controls,
    which are no arms here.
    """
    axis = load_axis(resolve_axis(axis)) if isinstance(axis, str) else axis
    if not isinstance(arms, Mapping):
        parsed = parse_arms(arms, axis)
        if any(arm.n_random for arm in parsed):
            raise UserError("random:N is no arm here; the number of random controls is EvalOptions.random")
        arms = {arm.name: arm.interventions for arm in parsed}
    for name, plan in arms.items():
        if any(isinstance(own, Cap) and own.model.get("fingerprint") is None for own in plan):
            say(f"the cap of {name} does not say which weights it was made for: only its size was checked")
    caps = [own for plan in arms.values() for own in plan if isinstance(own, Cap)]
    steered = steered_model(load_named(model, load), axis, caps, force=force)
    checked = iter(steered.caps)
    plans = {name: [next(checked) if isinstance(own, Cap) else own for own in arms[name]] for name in arms}
    return steered, {BASELINE: [], **plans}


def load_named(model: str | Model, load: ModelOptions) -> Model:
    """The model, loaded unless it is."""
    if isinstance(model, Model):
        return model
    return load_model(model, device=load.device, dtype=load.dtype, chat_template=load.chat_template)
