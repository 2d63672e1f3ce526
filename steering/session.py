"""The verbs of `steering/` that answer: generate, an answer without and with a cap, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from personatlas.cli.runs import Model, axis_of, console, print_json
from personatlas.persona.errors import KnownError
from personatlas.persona.options import ModelOptions, SamplingOptions
from personatlas.persona.progress import say

PLAIN, CAPPED = "as it is", "capped"


def generate(
    model: Model,
    prompt: str,
    /,
    *,
    axis: str | None = None,
    cap: str = "assistant",
    system: str = "",
    html: Path | None = None,
    force: bool = False,
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
        a run folder, an axis file, or smollm2-135m; the one that `personatlas axis MODEL` made or that comes with it unless given
    cap
        a cap saved beside the axis (`personatlas calibrate` makes one), a cap file, or LEVEL@LAYERS: p50@18-23, roles:p75@20,22
    system
        a system message; none unless given
    html
        write a page here with every token coloured by its projection
    force
        use an axis of the same model in another weight format
    json
        print both answers and their traces as JSON
    """
    _require_asked(prompt, html)
    sampling = _sampling(sampled)
    messages = [{"role": "system", "content": system}] if system else []
    said = [*messages, {"role": "user", "content": prompt}]
    held = loaded(model, how, axis_of(model, axis), [cap], force=force)
    if held.chat.injected and not system:
        say(f"the template adds a system message of its own: {held.chat.injected!r}")
    found = _arms(held, said, sampling, sampled.seed)
    _print_json(found) if json else _print(found, held.caps[0], held.axis.layer)
    if html is not None:
        _write_page(html, found, held, cap, said)


def _write_page(
    html: Path, found: dict[str, Any], held: "Loaded", cap: str, said: list[dict[str, str]]
) -> None:
    from personatlas.steering.generate import write_page

    write_page(html, found, held.subject, held.axis, held.caps[0], cap, said)
    say(f"page: {html}")


def _require_asked(prompt: str, html: Path | None) -> None:
    if not prompt.strip():
        raise KnownError("the prompt is empty: give what the user says")
    if html is not None:
        from personatlas.persona.artifacts import require_writable

        require_writable(html, "--html")


class Loaded:
    """A subject with an axis and caps that were checked to belong to it."""

    def __init__(self, subject: Any, chat: Any, axis: Any, stem: Path, caps: list[Any]) -> None:
        self.subject, self.chat, self.axis, self.stem, self.caps = subject, chat, axis, stem, caps


def loaded(model: str, how: ModelOptions, axis: str, caps: list[str], *, force: bool = False) -> Loaded:
    """Load axis, caps and model, the cheap ones first, and prove that every cap binds. Raises `KnownError` for what does not
    belong together; `force` lets another weight format of the same model pass."""
    from dataclasses import replace

    from personatlas.persona.axis import load_axis, require_origin
    from personatlas.persona.models.load import load_subject
    from personatlas.persona.runs import axis_stem
    from personatlas.steering.caps import cap_named, require_cap
    from personatlas.steering.hooks.binding_check import require_binding

    stem = axis_stem(axis)
    along = load_axis(stem)
    held = [cap_named(cap, along, stem) for cap in caps]
    subject = load_subject(model, device=how.device, dtype=how.dtype, chat_template=how.chat_template)
    own = subject.describe()
    require_origin("axis", along.model, own, force=force)
    for name, cap in zip(caps, held, strict=True):
        require_origin("cap", cap.model, own, force=force)
        if cap.model.get("fingerprint") is None:
            say(f"the cap {name} does not say which weights it was made for: only its size was checked")
        require_cap(cap, along)
    if force:
        along, held = replace(along, model=own), [replace(cap, model=own) for cap in held]
    for cap in held:
        require_binding(subject, [cap])
    return Loaded(subject, _chat(subject), along, stem, held)


def _chat(subject: Any) -> Any:
    from personatlas.persona.models.chat_template import chat_format

    config = subject.model.generation_config
    return chat_format(subject.tokenizer, config.eos_token_id if config is not None else None)


@dataclass(frozen=True)
class AsItIs:
    """A model without an axis, in the place of `Loaded`."""

    subject: Any
    chat: Any
    caps: tuple[()] = ()


def as_it_is(model: str, how: ModelOptions) -> AsItIs:
    """Load a model that nothing is to be done to."""
    from personatlas.persona.models.load import load_subject

    subject = load_subject(model, device=how.device, dtype=how.dtype, chat_template=how.chat_template)
    return AsItIs(subject, _chat(subject))


def _sampling(sampled: SamplingOptions) -> Any:
    from personatlas.persona.sampling.sampler import Sampling

    return Sampling(sampled.max_new_tokens, sampled.temperature, sampled.top_p)


def _arms(held: Loaded, messages: list[dict[str, str]], sampling: Any, seed: int) -> dict[str, Any]:
    from personatlas.steering.generate import generate as answer

    return answer(
        held.subject, held.chat, messages, {PLAIN: [], CAPPED: held.caps}, held.axis, sampling, seed
    )


def _print(found: dict[str, Any], cap: Any, layer: int) -> None:
    from personatlas.steering.generate import sparkline

    values = [value for one in found.values() for value in one.trace.answer.tolist()]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    out = console()
    for name, one in found.items():
        trace = one.trace
        mean = float(trace.answer.mean()) if len(trace.answer) else float("nan")
        out.print(
            Text(name, style="bold"),
            Text(f"mean projection {mean:.1f} at layer {trace.layer}, before its step", style="dim"),
        )
        out.print(Text(one.text))
        out.print(
            Text(f"{sparkline(trace.answer.tolist(), low, high)}  {low:.0f} to {high:.0f}\n", style="cyan")
        )
    out.print(Text(_account(found[CAPPED].tally, cap, layer)))
    if not int(found[CAPPED].tally.fired.sum()):
        out.print(Text("the cap never fired: every token stayed above its floor, and both answers are the model's own", style="yellow"))  # fmt: skip


def _account(tally: Any, cap: Any, layer: int) -> str:
    """What the cap did, over prompt and answer, at all of its layers."""
    shares = (tally.fired.sum(1) / tally.seen.sum(1).clamp(min=1)).tolist()
    least, most = min(shares), max(shares)
    said = (
        f"the cap changed {int(tally.fired.sum())} of {int(tally.seen.sum())} tokens times layers ({tally.share:.0%}; by layer "
        f"{least:.0%} to {most:.0%}), by {tally.mean:.1f} on average and at most {float(tally.most.max()):.1f}"
    )
    if layer in cap.layers:
        said += f"; floor at layer {layer}: {float(cap.floor[cap.layers.index(layer)]):.1f}"
    return said


def _print_json(found: dict[str, Any]) -> None:
    print_json({name: _as_json(one) for name, one in found.items()})


def _as_json(one: Any) -> dict[str, Any]:
    trace, tally = one.trace, one.tally
    account = {} if tally is None else {
        "seen": tally.seen[:, 0].tolist(), "fired": tally.fired[:, 0].tolist(), "total": tally.total[:, 0].tolist(),
        "most": tally.most[:, 0].tolist(),
    }  # fmt: skip
    return {
        "text": one.text,
        "stopped": one.stopped,
        "layer": trace.layer,
        "answer_from": trace.answer_from,
        "ids": list(trace.ids),
        "projection": trace.projection.tolist(),
        "capped_layers": list(trace.layers),
        "corrections": trace.corrections.tolist(),
        "account": account,
    }
