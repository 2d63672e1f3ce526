"""Caps by name: those saved beside an axis, a file, or a level and layers in words.

cap_named("assistant", axis, stem)              # caps/assistant.* beside the axis
cap_named("p50@18-23", axis, stem)              # floors at the median of the default's answers
cap_named("roles:p75@18,20-22", axis, stem)     # of the roles'
cap_named("assistant+0.2", axis, stem)          # its floors 0.2 interquartile ranges of the default's answers higher
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from personatlas.persona.axis import Axis, Cap, load_cap
from personatlas.persona.errors import UserError
from personatlas.steering.interventions import cap_of

ENDINGS = (".json", ".safetensors")
SPEC = re.compile(r"(?:(default|roles):)?p(\d+(?:\.\d+)?)@(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)")
MOST_DIGITS = 5  # of a layer's number


SHIFTED = re.compile(r"(.+?)([+-]\d+(?:\.\d+)?)")


def caps_folder(stem: Path) -> Path:
    """Where the named caps of an axis lie: caps/ beside it."""
    return stem.parent / "caps"


def cap_names(stem: Path) -> list[str]:
    """Names of the caps saved beside an axis."""
    return sorted(
        path.stem for path in caps_folder(stem).glob("*.json") if path.with_suffix(".safetensors").is_file()
    )


def cap_named(text: str, axis: Axis, stem: Path) -> Cap:
    """A cap by its name, its path, or its level and layers. Raises `UserError` for anything else."""
    if text in cap_names(stem):
        return load_cap(caps_folder(stem) / text)
    path = Path(text)
    path = path.with_suffix("") if path.suffix in ENDINGS else path
    if path.name and any(path.with_name(path.name + ending).is_file() for ending in ENDINGS):
        return load_cap(path)
    match, moved = SPEC.fullmatch(text), SHIFTED.fullmatch(text)
    if match is None and moved is not None:
        return shifted(cap_named(moved[1], axis, stem), axis, float(moved[2]))
    if match is None:
        raise UserError(_no_cap(text, axis, cap_names(stem)))
    population, level, ranges = match.groups()
    layers = layers_named(ranges)
    if not layers or len(set(layers)) != len(layers):
        raise UserError(f"--cap {text!r} names no layer, or one twice")
    return cap_of(axis, layers, float(level) / 100, population or "default")


def _no_cap(text: str, axis: Axis, names: list[str]) -> str:
    """Why a text is no cap, and what would be one for this axis."""
    level, _, where = text.partition("@")
    if where and not level.split(":")[-1].startswith("p"):
        return f"--cap {text!r}: a level is written as p50 (the median), from p0 to p100, such as p50@18-23"
    some = f"p50@{axis.layers[len(axis.layers) // 2]}"
    made = "a name (none is saved beside this axis; `personatlas calibrate RUN` makes some)"
    known = f"one of {', '.join(names)}" if names else made
    return f"--cap {text!r} is not {known}, a cap file, or LEVEL@LAYERS such as {some} or roles:p75@20,22, each with +0.2 or so behind it for higher floors"


def shifted(cap: Cap, axis: Axis, amount: float) -> Cap:
    """The cap with all floors moved by so many interquartile ranges of the default's answers at their layers: its neighbour.

    Raises `UserError` where the axis does not keep those quantiles.
    """
    if not {0.25, 0.75} <= set(axis.levels) or not set(cap.layers) <= set(axis.layers):
        raise UserError("the axis does not keep the quartiles of the default's answers at this cap's layers")
    rows = [axis.layers.index(layer) for layer in cap.layers]
    low, high = (axis.default_quantiles[rows, axis.levels.index(level)] for level in (0.25, 0.75))
    step = amount * (high - low)
    if not torch.isfinite(step).all():
        raise UserError("the axis keeps no quartiles of the default's answers at some of this cap's layers")
    prompt = None if cap.prompt_floor is None else cap.prompt_floor + step
    return replace(cap, floor=cap.floor + step, prompt_floor=prompt, level=None, found={})


def layers_named(text: str) -> list[int]:
    """Layers in words: "18-20,23" is 18, 19, 20 and 23. Raises `UserError` for ranges that run backwards or beyond any model."""
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise UserError(f"layers {part} run backwards: write {last}-{first}")
        if (
            len(last or first) > MOST_DIGITS
        ):  # before a list of so many is made: texts come over the network too
            raise UserError(f"layers {part[:40]}: no model has so many")
        layers += range(int(first), int(last or first) + 1)
    return layers


def layers_in_words(layers: Sequence[int]) -> str:
    """The other way round, for people: 18, 19, 20 and 23 are "18-20, 23"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def require_cap(cap: Cap, axis: Axis) -> None:
    """`UserError` for a cap whose vectors point away from the axis at a layer: the sign trap."""
    for layer, vector in zip(cap.layers, cap.vectors, strict=True):
        if layer in axis.layers and cap.vectors.shape[1] == axis.vectors.shape[1]:
            cosine = float(vector @ axis.at(layer))
            if cosine < -0.5:
                raise UserError(
                    f"this cap's vector at layer {layer} points away from {axis.poles[0]} (cosine {cosine:.2f} with the axis): "
                    "its sign is turned"
                )


def windows_named(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Windows in words: "18-23" is (18, 23). Raises `UserError` for anything else."""
    found = []
    for text in texts:
        match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", text)
        if match is None or int(match[1]) > int(match[2]):
            raise UserError(f"--windows {text!r} is not FIRST-LAST, such as 18-23")
        found.append((int(match[1]), int(match[2])))
    return tuple(found)
