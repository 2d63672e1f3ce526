"""The commands `generate`, `chat` and `serve`: answers and their projections, at baseline and in arms."""

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
from personatlas.persona.runs import find_axis, own_axis
from personatlas.steering.arm_kinds import arm_words
from personatlas.steering.serve.options import CapacityOptions, ServeOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from personatlas.persona.interventions import Interventions
    from personatlas.steering.generate import Generation

CHAT_CAPACITY = CapacityOptions(slots=2, prefix_mib=256)  # one answer at a time, two when they are compared


@dataclass(frozen=True)
class TalkOptions(ServeOptions):
    """Watching and sampling of conversations; the arm is that of --arm."""

    arm: Annotated[str | None, Parameter(parse=False)] = None


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
    """Answer a prompt at baseline and in every arm, with the projection of every token.

    Without --arm the arm is cap:assistant, the cap saved beside the axis, or where there is none a cap at the
    default's median (p50) around the axis's layer.

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
    from personatlas.steering.generate import generate_arms, random_generation_arms, write_generation_page
    from personatlas.steering.session import load_steered_model

    if not prompt.strip():
        raise UserError("the prompt is empty: give the user's message")
    if html is not None:
        require_writable(html, "--html")
    sampler = Sampling(sampling.max_new_tokens, sampling.temperature, sampling.top_p)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    axis = find_axis(model, steering.axis)
    steered = load_steered_model(model, axis, steering.arms(axis), load, controls=True, force=steering.force)
    if steered.chat.injected and not system:
        say(f"the template adds a system message of its own: {steered.chat.injected!r}")
    arms, cap, seed = steered.arms, steered.control_cap, sampling.seed
    if cap is not None and steered.n_random:
        arms = arms | random_generation_arms(steered.model, messages, cap, steered.n_random, sampler, seed)
    answers = generate_arms(steered.model, messages, arms, steered.axis, sampler, seed)
    if json:
        print_json({name: _as_json(generated) for name, generated in answers.items()})
    else:
        _print(answers, arms, steered.axis.layer)
    if html is not None:
        write_generation_page(html, answers, steered.model, steered.axis, arms, messages)
        say(f"page: {html}")


def _print(answers: "dict[str, Generation]", arms: "Mapping[str, Interventions]", layer: int) -> None:
    from personatlas.steering.arms import Arm
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
    for name, generated in answers.items():
        tally = generated.tally
        if tally is None:
            continue
        # over prompt and answer, by layer
        shares = (tally.fired.sum(1) / tally.seen.sum(1).clamp(min=1)).tolist()
        count = f"{int(tally.fired.sum())} of {int(tally.seen.sum())} tokens times layers"
        text = (
            f"{name} changed {count} ({tally.share:.0%}; by layer {min(shares):.0%} to {max(shares):.0%}), "
        )
        text += f"by {tally.mean:.1f} on average and at most {float(tally.largest.max()):.1f}"
        floor = Arm(name, tuple(arms[name])).floor_at(layer)
        print_line(text if floor is None else f"{text}; floor at layer {layer}: {floor:.1f}")
        if not int(tally.fired.sum()):
            print_warning(f"{name} never fired: no token was changed, the answer is the model's own")


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
        "steered_layers": list(trace.layers),
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
    """Chat with a model in the terminal; a line under every answer says where it lies and what the arm did.

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
    axis = steering.axis or own_axis(model)
    options = _with_arm(options, steering)
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


def _with_arm(options: TalkOptions, steering: SteeringOptions) -> TalkOptions:
    if len(steering.arm) > 1:
        raise UserError(
            f"one arm acts at a time, and {len(steering.arm)} are given: leave --arm {steering.arm[1]} out"
        )
    return replace(options, arm=steering.arm[0]) if steering.arm else options


def serve(
    model: ModelName,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8377,
    allow_origin: tuple[str, ...] = (),
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
    allow_origin
        the origin of web pages that may use the server, as https://chat.example; once for each
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
        text = service.name
        if service.axis is None:
            text += f"; {service.no_axis}"
        else:
            text += f", layer {service.axis.layer}; "
            text += f"{arm_words(options.arm)} ({options.mode})" if options.arm else "no arm unless asked for"
        if service.axis is not None and not service.has_alarm:
            text += "; no alarm is calibrated (`personatlas drift` makes a reference.json)"
        limits = service.limits
        say(f"{text}; {limits.slots} conversations of {limits.context} tokens at once; Ctrl-C ends it")

    serve_model(
        model,
        steering.axis or own_axis(model),
        host=host,
        port=port,
        allow_origins=allow_origin,
        options=_with_arm(options, steering),
        capacity=capacity,
        load=load,
        force=steering.force,
        on_ready=announce,
    )
