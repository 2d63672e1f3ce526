"""Cap specs: the one notation in which commands, requests and notebooks name a cap, and layers in words.

    p50@18-23            floors at the median of the default's answers, layers 18 to 23
    roles:p75@20,22      floors at the upper quartile of the roles' answers
    assistant            a cap by name, or a cap file
    assistant+0.2        its floors 0.2 interquartile ranges of the default's answers higher

    parse_cap_spec("roles:p75@20,22")    # CapSpec(level=0.75, layers=(20, 22), population="roles")

`axis.cap(spec)` makes the cap.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from personatlas.persona.errors import UserError

QUANTILE_SPEC = re.compile(r"(?:(default|roles):)?p(\d+(?:\.\d+)?)@(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)")
SHIFTED_SPEC = re.compile(r"(.+?)([+-]\d+(?:\.\d+)?)")
MAX_LAYER_DIGITS = 5


@dataclass(frozen=True)
class CapSpec:
    """A parsed cap spec: the `name` (or file) of a cap, or a `level` in 0..1 of a `population` at `layers`.

    `shift` moves all floors by so many interquartile ranges of the default's answers.
    """

    name: str | None = None
    level: float = 0.5
    layers: tuple[int, ...] = ()
    population: str = "default"
    shift: float = 0.0


def parse_cap_spec(text: str, is_name: Callable[[str], bool] = lambda _: False) -> CapSpec:
    """Parses a cap spec; anything that is no quantile spec is a name. `is_name` knows names, which may look
    like specs.

    Raises `UserError` for layers that are named twice or run backwards.
    """
    if is_name(text):
        return CapSpec(text)
    if match := QUANTILE_SPEC.fullmatch(text):
        population, level, ranges = match.groups()
        layers = parse_layers(ranges)
        if len(set(layers)) != len(layers):
            raise UserError(f"cap {text[:80]!r} names no layer, or one twice")
        return CapSpec(None, float(level) / 100, tuple(layers), population or "default")
    if match := SHIFTED_SPEC.fullmatch(text):
        spec = parse_cap_spec(match[1], is_name)
        return replace(spec, shift=spec.shift + float(match[2]))
    return CapSpec(text)


def parse_layers(text: str) -> list[int]:
    """Layers in words: "18-20,23" is 18, 19, 20 and 23. Raises `UserError` for ranges that run backwards."""
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or "0").isdigit():
            raise UserError(f"layers {text[:40]!r} are not numbers and ranges such as 18-20,23")
        # before a list of so many is made: texts come over the network too
        if len(last or first) > MAX_LAYER_DIGITS or len(layers) > 10**MAX_LAYER_DIGITS:
            raise UserError(f"layers {part[:40]}: no model has so many")
        if last and int(last) < int(first):
            raise UserError(f"layers {part} run backwards: write {last}-{first}")
        layers += range(int(first), int(last or first) + 1)
    return layers


def format_layers(layers: Sequence[int]) -> str:
    """The inverse, for people: 18, 19, 20 and 23 are "18-20, 23"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
