"""The commands `generate`, `chat` and `serve`: answers and their projections, with and without a cap."""

import asyncio
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.text import Text

from personatlas.cli.options import (
    MODEL,
    OPTIONS,
    SAMPLING,
    SIZE,
    STEERING,
    Html,
    Json,
    ModelName,
    SteeringOptions,
)
from personatlas.cli.output import console, print_json, print_line, print_warning
from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions, SamplingOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import find_axis
from personatlas.steering.serve.options import CapacityOptions, ServeOptions

if TYPE_CHECKING:
    from personatlas.persona.interventions import Cap
    from personatlas.steering.generate import Generation

BASELINE, CAPPED = "baseline", "capped"
CHAT_CAPACITY = CapacityOptions(slots=2, prefix_mib=256)  # one answer at a time, two when they are compared


@dataclass(frozen=True)
class TalkOptions(ServeOptions):
    """Watching and sampling of conversations; the cap is that of --arm."""

    cap: Annotated[str | None, Parameter(parse=False)] = None


def generate(
    model: ModelName,
    prompt: str,
    /,
    *,
    system: str = "",
    steering: Annotated[SteeringOptions, STEERING] = SteeringOptions(),
    sampling: Annotated[SamplingOptions, SAMPLING] = SamplingOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    html: Html = None,
    json: Json = False,
) -> None:
    """Answer a prompt without and with a cap, with the projection of every token.

    Parameters
    ----------
    prompt
        the user's message
    system
        a system message; none unless given
    html
        write a page here with every token coloured by its projection
    """
    from personatlas.persona.artifacts import require_writable
    from personatlas.persona.sampling.sampler import Sampling
    from personatlas.steering.generate import generate_arms, write_generation_page
    from personatlas.steering.session import load_steered_model

    if not prompt.strip():
        raise UserError("the prompt is empty: give the user's message")
    if html is not None:
        require_writable(html, "--html")
    sampler = Sampling(sampling.max_new_tokens, sampling.temperature, sampling.top_p)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    spec = steering.cap("assistant")
    steered = load_steered_model(model, load, find_axis(model, steering.axis), [spec], force=steering.force)
    if steered.chat.injected and not system:
        say(f"the template adds a system message of its own: {steered.chat.injected!r}")
    arms = {BASELINE: [], CAPPED: list(steered.caps)}
    answers = generate_arms(steered.model, messages, arms, steered.axis, sampler, sampling.seed)
    if json:
        print_json({name: _as_json(generated) for name, generated in answers.items()})
    else:
        _print(answers, steered.caps[0], steered.axis.layer)
    if html is not None:
        write_generation_page(html, answers, steered.model, steered.axis, steered.caps[0], spec, messages)
        say(f"page: {html}")


def _print(answers: "dict[str, Generation]", cap: "Cap", layer: int) -> None:
    from personatlas.steering.generate import sparkline

    traces = {name: generated.trace for name, generated in answers.items() if generated.trace is not None}
    values = [value for trace in traces.values() for value in trace.answer.tolist()]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    out = console()
    for name, trace in traces.items():
        mean = float(trace.answer.mean()) if len(trace.answer) else float("nan")
        remark = f"mean projection {mean:.1f} at layer {trace.layer}, before its step"
        out.print(Text(name, style="bold"), Text(remark, style="dim"))
        out.print(Text(answers[name].text))
        line = f"{sparkline(trace.answer.tolist(), low, high)}  {low:z.1f} to {high:z.1f}\n"
        out.print(Text(line, style="cyan"))
    tally = answers[CAPPED].tally
    assert tally is not None
    shares = (
        tally.fired.sum(1) / tally.seen.sum(1).clamp(min=1)
    ).tolist()  # over prompt and answer, by layer
    count = f"{int(tally.fired.sum())} of {int(tally.seen.sum())} tokens times layers"
    text = f"the cap changed {count} ({tally.share:.0%}; by layer {min(shares):.0%} to {max(shares):.0%}), "
    text += f"by {tally.mean:.1f} on average and at most {float(tally.largest.max()):.1f}"
    if layer in cap.layers:
        text += f"; floor at layer {layer}: {float(cap.floor[cap.layers.index(layer)]):.1f}"
    print_line(text)
    if not int(tally.fired.sum()):
        print_warning(
            "the cap never fired: every token stayed above its floor, the answers are the model's own"
        )


def _as_json(generated: "Generation") -> dict[str, object]:
    trace, tally = generated.trace, generated.tally
    assert trace is not None
    sums = {"seen": "seen", "fired": "fired", "total": "total", "most": "largest"}
    account = (
        {} if tally is None else {key: getattr(tally, name)[:, 0].tolist() for key, name in sums.items()}
    )
    return {
        "text": generated.text,
        "stopped": generated.stopped,
        "layer": trace.layer,
        "answer_from": trace.answer_from,
        "ids": list(trace.ids),
        "projection": trace.projection.tolist(),
        "capped_layers": list(trace.layers),
        "corrections": trace.corrections.tolist(),
        "account": account,
    }


def chat(
    model: ModelName,
    /,
    *,
    system: str = "",
    message: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True)] = (),
    chat_file: Annotated[Path | None, Parameter(name="--load")] = None,
    seed: int | None = None,
    context: int | None = None,
    steering: Annotated[SteeringOptions, STEERING] = SteeringOptions(),
    options: Annotated[TalkOptions, OPTIONS] = TalkOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
) -> None:
    """Chat with a model in the terminal; a line under every answer says where it lies and what the cap did.

    Where the input is no terminal, every line of it is a message or a command, and the program ends with it.

    Parameters
    ----------
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
    axis = find_axis(model, steering.axis)
    options = _with_cap(options, steering)
    service = make_service(model, axis, options, capacity, load=load, force=steering.force)
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


def _with_cap(options: TalkOptions, steering: SteeringOptions) -> TalkOptions:
    return replace(options, cap=steering.cap()) if steering.arm else options


def serve(
    model: ModelName,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8377,
    steering: Annotated[SteeringOptions, STEERING] = SteeringOptions(),
    options: Annotated[TalkOptions, OPTIONS] = TalkOptions(),
    capacity: Annotated[CapacityOptions, SIZE] = CapacityOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
) -> None:
    """Serve a model to OpenAI's clients and on a page of its own, with every conversation's persona measured.

    The key that clients must give is read from PERSONATLAS_API_KEY; without one only this machine is served.

    Parameters
    ----------
    host
        the address to listen on; another than this machine's own needs a key
    port
        the port to listen on
    """
    from personatlas.steering.serve.service import PersonaService
    from personatlas.steering.serve.startup import serve as serve_model

    def announce(service: PersonaService) -> None:
        options = service.options
        address = f"[{host}]" if ":" in host else host
        console().print(
            Text(f"http://{address}:{port}", style="bold"),
            Text("the page; /v1 for OpenAI's clients", style="dim"),
        )
        text = f"{service.name}, layer {service.axis.layer}"
        text += f"; cap {options.cap} ({options.mode})" if options.cap else "; no cap unless asked for"
        if service.tracker.monitor.rule is None:
            text += "; no alarm is calibrated (`personatlas drift` makes a reference.json)"
        limits = service.limits
        say(f"{text}; {limits.slots} conversations of {limits.context} tokens at once; Ctrl-C ends it")

    serve_model(
        model,
        find_axis(model, steering.axis),
        host=host,
        port=port,
        options=_with_cap(options, steering),
        capacity=capacity,
        load=load,
        force=steering.force,
        on_ready=announce,
    )
