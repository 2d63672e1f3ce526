"""A model with its axis and arms, each checked to belong to the others.

steered = load_steered_model("smollm2-135m", "smollm2-135m", ["cap:p50@18-23", "add:8@21"])
steered = load_steered_model(model, axis, {"mine": [axis.cap("p50@18-23")]})     # what is loaded already
steered.arms                                                                     # the baseline first
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from personatlas.persona.axis import Axis, load_axis, require_origin
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE, Cap, Interventions
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model, load_model
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import resolve_axis
from personatlas.steering.arms import Arm, parse_arms, require_no_controls
from personatlas.steering.hooks.binding_check import require_binding

Arms = Mapping[str, Interventions] | Sequence[str]  # interventions by name, or texts such as "cap:p50@18-23"


@dataclass(frozen=True)
class SteeredModel:
    """A model, an axis of it, and arms whose interventions were proved to bind on it, the baseline first.

    `n_random` random controls were asked for beside the arms; None where nobody did.
    """

    model: Model
    axis: Axis
    arms: dict[str, Interventions]
    n_random: int | None = None

    @property
    def chat(self) -> ChatFormat:
        """The model's chat format."""
        return self.model.chat

    @property
    def steered_arms(self) -> dict[str, Interventions]:
        """The arms without the baseline."""
        return {name: plan for name, plan in self.arms.items() if plan}

    @property
    def only_arm(self) -> tuple[str, Interventions]:
        """Name and interventions of the arm beside the baseline; the baseline itself where there is none.

        Raises `UserError` for several.
        """
        name, *others = [*self.steered_arms, BASELINE]
        if others[1:]:
            raise UserError(f"one arm acts here, and {len(others)} are given: {', '.join(self.steered_arms)}")
        return name, self.arms[name]

    @property
    def control_cap(self) -> Cap | None:
        """The cap that random controls are matched to: the first one. Raises `UserError` where controls are
        asked for and no arm is a cap.
        """
        cap = next((own for plan in self.arms.values() for own in plan if isinstance(own, Cap)), None)
        if cap is None and self.n_random:
            raise UserError(
                f"random:{self.n_random} is matched to a cap, and no arm is one: add --arm cap:..."
            )
        return cap


def load_steered_model(
    model: str | Model,
    axis: str | Axis,
    arms: Arms = (),
    load: ModelOptions = ModelOptions(),
    *,
    controls: bool = False,
    reserved: str = "",
    force: bool = False,
) -> SteeredModel:
    """Loads axis, arms and model, the cheap ones first, and proves that every arm binds.

    Parameters
    ----------
    model, load
        a model, or its name and how to load it
    axis
        an axis, or a run folder, an axis file or a packaged axis
    arms
        interventions by name, or texts as `--arm` takes them
    controls
        whether random controls (random:3) make sense here
    reserved
        a pattern of names that other arms of the caller have
    force
        use an axis of the same model in another weight format

    Raises `UserError` for what does not belong together.
    """
    axis = load_axis(resolve_axis(axis)) if isinstance(axis, str) else axis
    if isinstance(arms, Mapping):
        parsed = [Arm(name, tuple(plan)) for name, plan in arms.items()]
    else:
        parsed = parse_arms(arms, axis)
    if not controls:
        require_no_controls(parsed)
    if taken := [arm.name for arm in parsed if re.fullmatch(reserved, arm.name)]:
        raise UserError(f"{taken[0]} is the name of another arm here: save the cap under another name")
    asked = [arm.n_random for arm in parsed if arm.n_random is not None]
    named = {arm.name: list(arm.interventions) for arm in parsed if arm.n_random is None}
    model = load_named(model, load)
    arms = _checked(model, axis, named, force=force)
    axis = replace(axis, model=model.describe()) if force else axis
    return SteeredModel(model, axis, arms, sum(asked) if asked else None)


def load_named(model: str | Model, load: ModelOptions) -> Model:
    """The model, loaded unless it is."""
    if isinstance(model, Model):
        return model
    return load_model(model, device=load.device, dtype=load.dtype, chat_template=load.chat_template)


def _checked(
    model: Model, axis: Axis, arms: Mapping[str, Interventions], *, force: bool
) -> dict[str, Interventions]:
    """The arms, the baseline first, after axis and interventions were checked to be the model's and to
    bind."""
    description = model.describe()
    require_origin("axis", axis.model, description, force=force)
    checked: dict[str, Interventions] = {BASELINE: []}
    for name, plan in arms.items():
        for own in plan:
            kind = "cap" if isinstance(own, Cap) else "intervention"
            require_origin(kind, own.model, description, force=force)
            if isinstance(own, Cap):
                axis.require_sign(own)
            if own.model.get("fingerprint") is None:
                say(f"the {kind} of {name} does not say for which weights: only its size was checked")
        checked[name] = [replace(own, model=description) if force else own for own in plan]
        if plan:
            require_binding(model, checked[name])
    return checked
