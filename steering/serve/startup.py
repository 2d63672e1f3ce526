"""What `serve` and `chat` may be told, and how that becomes a host. What can be wrong without a model is found before one is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions

if TYPE_CHECKING:
    from personatlas.steering.serve.service import PersonaService

ADAPTIVE = "adaptive"  # as a cap: `assistant`, while the conversation drifts
CACHE_CPU, CACHE_GPU = 4 * 2**30, 0.5  # bytes, or the share of what the weights leave, for keys and values
MOST_CONTEXT = 8192  # tokens, unless asked for more


@Parameter(name="*")
@dataclass(frozen=True)
class ServeOptions:
    """How the persona is held and watched."""

    cap: str | None = None
    "the cap that acts unless a request says otherwise: a name saved beside the axis, a file, LEVEL@LAYERS, or adaptive; none unless given"
    mode: Literal["always", "adaptive"] = "always"
    "adaptive: the cap acts only while the conversation's drift alarm is on"
    reference: Path | None = None
    "a reference.json of `personatlas drift`, on which the alarm is calibrated; the one beside the axis unless given"
    rule: Literal["cusum", "two_of_three"] = "cusum"
    "what raises an alarm: cusum (a small drift that lasts) or two_of_three (two of three turns far below)"
    false_alarms: float = 0.05
    "the share of reference conversations that may raise one"
    max_tokens: int = 1024
    "longest answer where a request does not say"
    temperature: float = 0.7
    "sampling temperature where a request does not say; 0 takes the likeliest token"
    top_p: float = 0.9
    "nucleus mass where a request does not say"


@Parameter(name="*")
@dataclass(frozen=True)
class CapacityOptions:
    """How much is answered at once."""

    slots: int = 32
    "conversations that are answered at the same time; others wait"
    context: int | None = None
    "most tokens of a conversation; what the model and the memory hold, unless given"
    prefix_mib: int = 1024
    "memory for conversations that may go on, so that they need not be read again (MiB); 0 reads them anew"
    queue: int = 4096
    "most requests that wait"


def make_service(
    model: str,
    how: ModelOptions,
    axis: str,
    hold: ServeOptions,
    room: CapacityOptions,
    *,
    force: bool = False,
) -> "PersonaService":
    """Load all that is served, and prove that every cap binds. Raises `UserError`."""
    cap, mode = ("assistant", ADAPTIVE) if hold.cap == ADAPTIVE else (hold.cap, hold.mode)
    _require_sane(hold, room)
    from personatlas.persona.axis import load_axis
    from personatlas.persona.runs import resolve_axis
    from personatlas.steering.drift_monitor import load_monitor
    from personatlas.steering.serve.engine.cap_slots import cap_labels
    from personatlas.steering.serve.service import PersonaService, ServiceDefaults
    from personatlas.steering.session import load_steered_model

    stem = resolve_axis(axis)
    along = load_axis(stem)
    monitor = load_monitor(along, hold.reference, hold.rule, hold.false_alarms)
    if mode == ADAPTIVE and monitor.rule is None:
        raise UserError(
            "adaptive capping needs a calibrated alarm: `personatlas drift` makes the reference.json for --reference"
        )
    names = cap_labels(along, [cap] if cap else [])
    held = load_steered_model(model, how, axis, list(names.values()), force=force)
    caps = dict(zip(names, held.caps, strict=True))
    default = next((name for name, given in names.items() if given == cap), None)
    settings = ServiceDefaults(
        default, mode, hold.max_tokens, hold.temperature, hold.top_p, _room(held.model, room)
    )
    return PersonaService(held, caps, settings, monitor)


def _require_sane(hold: ServeOptions, room: CapacityOptions) -> None:
    from personatlas.persona.sampling.sampler import Sampling

    if not 0 < hold.false_alarms < 1:
        raise UserError(f"--false-alarms {hold.false_alarms} is outside 0..1: it is a share of conversations")
    for name, value, least in (
        ("--slots", room.slots, 1),
        ("--context", room.context if room.context is not None else 16, 16),
        ("--prefix-mib", room.prefix_mib, 0),
        ("--queue", room.queue, 1),
        ("--max-tokens", hold.max_tokens, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value} is below {least}")
    Sampling(hold.max_tokens, hold.temperature, hold.top_p)


def _room(model: Any, asked: CapacityOptions) -> Any:
    """As many tokens a conversation as the model holds and the memory has room for, unless it was said."""
    from personatlas.steering.serve.engine.scheduler import EngineLimits

    config = model.hf.config.get_text_config(decoder=True)
    most = model.context or MOST_CONTEXT
    if asked.context is not None and asked.context > most:
        raise UserError(f"--context {asked.context} is more than the {most} tokens that {model.id} holds")
    length = asked.context or min(most, MOST_CONTEXT, _fitting(model, config, asked.slots))
    return EngineLimits(asked.slots, length, asked.prefix_mib * 2**20, asked.queue)


def _fitting(model: Any, config: Any, slots: int) -> int:
    """Tokens a slot that the memory has room for, a multiple of 64."""
    import torch

    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * model.n_layers * heads * width * model.dtype.itemsize
    room: float = CACHE_CPU
    if model.device.type == "cuda":
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.hf.parameters())
        room = CACHE_GPU * (torch.cuda.get_device_properties(model.device).total_memory - weights)
    return max(64, int(room / token / (slots + 1)) // 64 * 64)
