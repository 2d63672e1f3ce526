"""The verb `chat`: talk to a model in the terminal, with a line under every answer that says where it stands.

The verb `serve`: an OpenAI-compatible server that watches every conversation along the axis, and holds it if asked.
"""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.text import Text

from personatlas.cli.options import MODEL, OPTIONS, SIZE, Json, ModelName
from personatlas.cli.output import console, print_json
from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions, SamplingOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import find_axis
from personatlas.steering.serve.options import CapacityOptions, ServeOptions
from personatlas.steering.session import SteeredModel, load_steered_model

PLAIN, CAPPED = "baseline", "capped"


def generate(
    model: ModelName,
    prompt: str,
    /,
    *,
    axis: str | None = None,
    cap: str = "assistant",
    system: str = "",
    html: Path | None = None,
    force: bool = False,
    sampled: SamplingOptions = SamplingOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
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
    """
    _require_asked(prompt, html)
    sampling = _sampling(sampled)
    messages = [{"role": "system", "content": system}] if system else []
    said = [*messages, {"role": "user", "content": prompt}]
    held = load_steered_model(model, load, find_axis(model, axis), [cap], force=force)
    if held.chat.injected and not system:
        say(f"the template adds a system message of its own: {held.chat.injected!r}")
    found = _arms(held, said, sampling, sampled.seed)
    _print_json(found) if json else _print(found, held.caps[0], held.axis.layer)
    if html is not None:
        _write_page(html, found, held, cap, said)


def _write_page(
    html: Path, found: dict[str, Any], held: "SteeredModel", cap: str, said: list[dict[str, str]]
) -> None:
    from personatlas.steering.generate import write_page

    write_page(html, found, held.model, held.axis, held.caps[0], cap, said)
    say(f"page: {html}")


def _require_asked(prompt: str, html: Path | None) -> None:
    if not prompt.strip():
        raise UserError("the prompt is empty: give what the user says")
    if html is not None:
        from personatlas.persona.artifacts import require_writable

        require_writable(html, "--html")


def _sampling(sampled: SamplingOptions) -> Any:
    from personatlas.persona.sampling.sampler import Sampling

    return Sampling(sampled.max_new_tokens, sampled.temperature, sampled.top_p)


def _arms(held: SteeredModel, messages: list[dict[str, str]], sampling: Any, seed: int) -> dict[str, Any]:
    from personatlas.steering.generate import generate as answer

    return answer(held.model, held.chat, messages, {PLAIN: [], CAPPED: held.caps}, held.axis, sampling, seed)


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
        f"{least:.0%} to {most:.0%}), by {tally.mean:.1f} on average and at most {float(tally.largest.max()):.1f}"
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
        "most": tally.largest[:, 0].tolist(),
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


CHAT_CAPACITY = CapacityOptions(slots=2, prefix_mib=256)  # one answer at a time, two when they are compared


def chat(
    model: ModelName,
    /,
    *,
    axis: str | None = None,
    system: str = "",
    message: Annotated[tuple[str, ...], Parameter(negative=(), allow_leading_hyphen=True)] = (),
    chat_file: Annotated[Path | None, Parameter(name="--load")] = None,
    seed: int | None = None,
    context: int | None = None,
    force: bool = False,
    options: Annotated[ServeOptions, OPTIONS] = ServeOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
) -> None:
    """Talk to a model in the terminal; after every answer a line says where it lies on the axis and what the cap did.

    Where the input is no terminal, every line of it is a message or a command, and the program ends with it.

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m; the one that `personatlas axis MODEL` made or that comes with it unless given
    system
        a system prompt; none unless given
    message
        ask this and leave; may be given several times, and may be a command such as /trace
    chat_file
        go on with a stored conversation
    seed
        for the same answers again; another one each time unless given
    context
        most tokens of the conversation; what the model and the memory hold, unless given
    force
        use an axis of the same model in another weight format
    """
    if system and chat_file is not None:
        raise UserError("give --system or --load: a stored conversation has its own system prompt")
    from rich.console import Console

    from personatlas.steering.serve.startup import make_service
    from personatlas.steering.serve.terminal.chat_file import load_chat
    from personatlas.steering.serve.terminal.repl import ChatRepl
    from personatlas.steering.serve.terminal.session import Transcript

    transcript = load_chat(chat_file) if chat_file is not None else Transcript(system)
    capacity = replace(CHAT_CAPACITY, context=context)
    service = make_service(model, find_axis(model, axis), options, capacity, load=load, force=force)
    live = not message and sys.stdin.isatty()
    with asyncio.Runner() as runner:
        runner.run(service.start())
        repl = ChatRepl(runner, service, console(), Console(stderr=True), seed=seed, live=live)
        try:
            repl.run(transcript, message)
        finally:
            service.close()
    if not live and repl.n_failed:
        raise UserError(f"{repl.n_failed} of the lines could not be done (see above)")


def serve(
    model: ModelName,
    /,
    *,
    axis: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8377,
    force: bool = False,
    options: Annotated[ServeOptions, OPTIONS] = ServeOptions(),
    capacity: Annotated[CapacityOptions, SIZE] = CapacityOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
) -> None:
    """Serve a model to OpenAI's clients and on a page of its own, with every conversation's persona measured.

    The key that clients must give is read from PERSONATLAS_API_KEY; without one only this machine is served.

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m; the one that `personatlas axis MODEL` made or that comes with it unless given
    host
        the address to listen on; another than this machine's own needs a key
    port
        the port to listen on
    force
        use an axis of the same model in another weight format
    """
    from personatlas.steering.serve.service import PersonaService
    from personatlas.steering.serve.startup import serve as serve_model

    def announce(service: PersonaService) -> None:
        defaults = service.defaults
        address = f"[{host}]" if ":" in host else host
        console().print(
            Text(f"http://{address}:{port}", style="bold"),
            Text("the page; /v1 for OpenAI's clients", style="dim"),
        )
        text = f"{service.name}, layer {service.axis.layer}"
        text += f"; cap {defaults.cap} ({defaults.mode})" if defaults.cap else "; no cap unless asked for"
        if service.tracker.monitor.rule is None:
            text += "; no alarm is calibrated (`personatlas drift` makes a reference.json)"
        limits = defaults.limits
        say(f"{text}; {limits.slots} conversations of {limits.context} tokens at once; Ctrl-C ends it")

    serve_model(
        model,
        find_axis(model, axis),
        host=host,
        port=port,
        options=options,
        capacity=capacity,
        load=load,
        force=force,
        on_ready=announce,
    )
