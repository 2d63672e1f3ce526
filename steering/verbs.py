"""The verb of `steering/`: generate, an answer without and with a cap, side by side."""

import re
from pathlib import Path
from typing import Any

from rich.text import Text

from personaxis.persona.errors import KnownError
from personaxis.persona.options import ModelOptions, SamplingOptions
from personaxis.persona.verbs import Model, console, print_json


def generate(
    model: Model,
    prompt: str,
    /,
    *,
    axis: str,
    cap: str = "p50@18-23",
    system: str = "",
    sampled: SamplingOptions = SamplingOptions(),
    how: ModelOptions = ModelOptions(),
    json: bool = False,
) -> None:
    """Answer a prompt without and with a cap, with the projection of every token.

    Parameters
    ----------
    prompt
        what the user says
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it
    cap
        LEVEL@LAYERS, such as p50@18-23: floors at that percentile of the default's answers; "roles:p75@18-23" takes the roles';
        or the path of a cap file
    system
        a system message; none unless given
    json
        print both answers and their traces as JSON
    """
    from personaxis.persona.axis import load_axis
    from personaxis.persona.fitted import axis_stem
    from personaxis.persona.sampler import Sampling

    if not prompt.strip():
        raise KnownError("the prompt is empty: give what the user says")
    along = load_axis(axis_stem(axis))
    held = cap_named(cap, along)
    sampling = Sampling(sampled.max_new_tokens, sampled.temperature, sampled.top_p)
    messages = [{"role": "system", "content": system}] if system else []
    found = _arms(model, how, along, held, [*messages, {"role": "user", "content": prompt}], sampling, sampled.seed)
    if json:
        print_json({name: _as_json(one) for name, one in found.items()})
    else:
        _print(found, float(held.floor[held.layers.index(along.layer)]) if along.layer in held.layers else None)


def _arms(
    model: str, how: ModelOptions, axis: Any, cap: Any, messages: list[dict[str, str]], sampling: Any, seed: int
) -> dict[str, Any]:
    """Both answers; the cap is proved to bind first."""
    from personaxis.persona.chat import chat_format
    from personaxis.persona.subject import load_subject
    from personaxis.steering.generate import generate as answer
    from personaxis.steering.prove import require_binding

    subject = load_subject(model, device=how.device, dtype=how.dtype, chat_template=how.chat_template)
    axis.require_model(subject.describe())
    require_binding(subject, [cap])
    config = subject.model.generation_config
    chat = chat_format(subject.tokenizer, config.eos_token_id if config is not None else None)
    arms: dict[str, list[Any]] = {"as it is": [], "capped": [cap]}
    return {name: answer(subject, chat, messages, acts, axis, sampling, seed) for name, acts in arms.items()}


def cap_named(text: str, axis: Any) -> Any:
    """A cap from its path, or from "p50@18-23" and "roles:p75@18,20-22". Raises `KnownError` for anything else."""
    from personaxis.persona.axis import load_cap
    from personaxis.steering.interventions import cap_of

    stem = Path(text).with_suffix("") if Path(text).suffix in (".json", ".safetensors") else Path(text)
    if stem.name and stem.with_name(stem.name + ".json").is_file():
        return load_cap(stem)
    match = re.fullmatch(r"(?:(default|roles):)?p(\d+(?:\.\d+)?)@(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)", text)
    if match is None:
        raise KnownError(f"--cap {text!r} is neither a cap file nor LEVEL@LAYERS, such as p50@18-23 or roles:p75@20,22")
    population, level, ranges = match.groups()
    layers: list[int] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        layers += range(int(first), int(last or first) + 1)
    if not layers or len(set(layers)) != len(layers):
        raise KnownError(f"--cap {text!r} names no layer, or one twice")
    return cap_of(axis, layers, float(level) / 100, population or "default")


def _print(found: dict[str, Any], floor: float | None) -> None:
    from personaxis.steering.generate import sparkline

    values = [value for one in found.values() for value in one.trace.answer.tolist()]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    out = console()
    for name, one in found.items():
        trace = one.trace
        mean = float(trace.answer.mean()) if len(trace.answer) else float("nan")
        out.print(
            Text(f"{name}", style="bold"),
            Text(f"mean projection {mean:.1f} at layer {trace.layer}, before its step", style="dim"),
        )
        out.print(Text(one.text))
        line = sparkline(trace.answer.tolist(), low, high)
        fired = f", {trace.fired:.0%} of its tokens changed there" if name == "capped" and len(trace.answer) else ""
        out.print(Text(f"{line}  {low:.0f} to {high:.0f}{fired}\n", style="cyan"))
    if floor is not None:
        out.print(Text(f"floor at that layer {floor:.1f}"))
    capped = found["capped"].trace
    if len(capped.answer) and not float(capped.correction.sum()) and floor is not None:
        out.print(
            Text("the cap changed no token at that layer: this conversation stayed above the floor", style="yellow")
        )


def _as_json(one: Any) -> dict[str, Any]:
    trace = one.trace
    return {
        "text": one.text,
        "stopped": one.stopped,
        "layer": trace.layer,
        "answer_from": trace.answer_from,
        "ids": list(trace.ids),
        "projection": trace.projection.tolist(),
        "correction": trace.correction.tolist(),
    }
