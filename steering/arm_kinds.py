"""The interventions that `--arm` can name: a new kind is one entry in `ARM_KINDS`, for every command.

    ARM_KINDS["add"].example                              # "add:8@21"

Nothing here imports torch, so that help and mistakes in options need none.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from personatlas.persona.caps import parse_layers
from personatlas.persona.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from personatlas.persona.axis import Axis
    from personatlas.persona.interventions import Intervention


@dataclass(frozen=True)
class ArmKind:
    """An example, what may be written after the kind's name, and how that becomes an intervention along an
    axis.

    An arm is called by its whole text, or by the group `name` of the pattern where there is one.
    """

    example: str
    pattern: str
    make: Callable[["Axis", re.Match[str]], "Intervention"]


NUMBER, LAYERS = r":(?P<number>[+-]?\d+(?:\.\d+)?)", r"(?:@(?P<layers>[\d,-]+))?"


def _layers(axis: "Axis", match: re.Match[str]) -> list[int]:
    return parse_layers(match["layers"]) if match["layers"] else [axis.layer]


ARM_KINDS: dict[str, ArmKind] = {
    "cap": ArmKind("cap:p50@18-23", r":(?P<name>.+)", lambda axis, match: axis.cap(match["name"])),
    "add": ArmKind(
        "add:8@21",
        NUMBER + LAYERS,
        lambda axis, match: axis.add(float(match["number"]), _layers(axis, match)),
    ),
    "ablate": ArmKind("ablate@20-22", LAYERS, lambda axis, match: axis.ablate(_layers(axis, match))),
    "mean-ablate": ArmKind(
        "mean-ablate:0.5@21",
        NUMBER + LAYERS,
        lambda axis, match: axis.mean_ablate(
            [float(match["number"])] * len(_layers(axis, match)), _layers(axis, match)
        ),
    ),
}


def match_arm(text: str) -> tuple[ArmKind, re.Match[str]] | None:
    """The kind that a text names, with its numbers; None for the baseline and random controls.

    Raises `UserError` for a text that names no arm.
    """
    if text == "baseline" or is_control(text):
        return None
    kind, rest = re.fullmatch(r"([a-z-]*)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    match = re.fullmatch(ARM_KINDS[kind].pattern, rest) if kind in ARM_KINDS else None
    if match is None:
        examples = ", ".join(kind.example for kind in ARM_KINDS.values())
        hint = "" if kind == "random" else did_you_mean(kind, [*ARM_KINDS, "baseline", "random"])
        raise UserError(f"arm {text[:80]!r} is not baseline, random:3, or such as {examples}{hint}")
    return ARM_KINDS[kind], match


def as_arm(text: str) -> str:
    """An arm's text, where a cap's spec will do as well: assistant is cap:assistant, add:8@21 is itself."""
    kind = re.match(r"[a-z-]*", text)[0]  # type: ignore[index]
    rest = text.removeprefix(kind)
    is_arm = kind in ARM_KINDS and re.fullmatch(ARM_KINDS[kind].pattern, rest)
    return text if is_arm or is_control(text) or text == "baseline" else f"cap:{text}"


def arm_words(name: str) -> str:
    """An arm's name in a sentence: "cap assistant", "add:8@21"."""
    return as_arm(name).replace("cap:", "cap ", 1)


def is_control(text: str) -> bool:
    """Whether a text asks for random controls: random:3."""
    return re.fullmatch(r"random:\d{1,3}", text) is not None


def with_default(texts: Sequence[str], default: Callable[[], str | None]) -> list[str]:
    """The texts of arms, behind the default one, if any, where they name nothing but random controls."""
    first = default() if all(map(is_control, texts)) else None
    return [*([] if first is None else [first]), *texts]


def arm_help() -> str:
    """The help of `--arm` in every command."""
    examples = ", ".join(kind.example for kind in ARM_KINDS.values())
    return (
        f"an arm beside the baseline: {examples}; a cap is also called by its name beside the axis "
        "(cap:assistant) or its file; random:3 adds random controls where arms are compared; may be repeated"
    )
