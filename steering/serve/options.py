"""What a server does where a request does not say, and how much it answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from personatlas.persona.errors import UserError
from personatlas.steering.arm_kinds import as_arm

API_KEY = "PERSONATLAS_API_KEY"  # the environment variable with the key that clients must give
ArmMode = Literal["always", "adaptive"]  # an arm acts in every answer, or only while the drift alarm is on
ALWAYS: ArmMode = "always"
ADAPTIVE: ArmMode = "adaptive"


@dataclass(frozen=True)
class ServeOptions:
    """The arm, the drift alarm and the sampling of requests that do not set their own."""

    arm: str | None = None
    "the arm of requests that name none: as `--arm` takes it, a cap's spec alone, or adaptive"
    mode: ArmMode = ALWAYS
    "adaptive: the arm acts only while the conversation's drift alarm is on"
    reference: Path | None = None
    "a reference.json of `personatlas drift` to calibrate the alarm on; by default the one beside the axis"
    rule: Literal["cusum", "two_of_three"] = "cusum"
    "what raises an alarm: cusum (a small drift that lasts) or two_of_three (turns far below)"
    false_alarms: float = 0.05
    "share of reference conversations that may raise an alarm"
    max_new_tokens: int = 1024
    "longest answer of requests that set no limit"
    temperature: float = 0.7
    "sampling temperature of requests that set none; 0 takes the likeliest token"
    top_p: float = 0.9
    "nucleus mass of requests that set none"

    @property
    def arm_and_mode(self) -> tuple[str | None, ArmMode]:
        """The arm and when it acts; `adaptive` is short for the cap `assistant` in adaptive mode."""
        if self.arm is None:
            return None, self.mode
        text = as_arm(self.arm)
        return ("cap:assistant", ADAPTIVE) if text == f"cap:{ADAPTIVE}" else (text, self.mode)


@dataclass(frozen=True)
class CapacityOptions:
    """How much is answered at once."""

    slots: int = 32
    "conversations that are answered at the same time; others wait"
    context: int | None = None
    "most tokens of a conversation; by default what the model and the memory hold"
    prefix_mib: int = 1024
    "memory for conversations that may continue, so that they are not read again (MiB); 0 reads them anew"
    queue: int = 4096
    "most requests that wait"


def require_valid(options: ServeOptions, capacity: CapacityOptions) -> None:
    """Raises `UserError` for values out of range, before a model is loaded."""
    from personatlas.persona.sampling.sampler import Sampling

    if not 0 < options.false_alarms < 1:
        raise UserError(
            f"--false-alarms {options.false_alarms} is outside 0..1: it is a share of conversations"
        )
    for name, value, least in (
        ("--slots", capacity.slots, 1),
        ("--context", capacity.context if capacity.context is not None else 16, 16),
        ("--prefix-mib", capacity.prefix_mib, 0),
        ("--queue", capacity.queue, 1),
        ("--max-new-tokens", options.max_new_tokens, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value} is below {least}")
    Sampling(options.max_new_tokens, options.temperature, options.top_p)
