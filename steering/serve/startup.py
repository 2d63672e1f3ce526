"""From a model and an axis to a server that listens.

    serve("smollm2-135m", "smollm2-135m", options=ServeOptions(arm="cap:assistant"))     # until Ctrl-C

`make_service` gives what stands behind the routes, for programs with an interface of their own.
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from personatlas.persona.axis import Axis, load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Interventions
from personatlas.persona.models.load import Model
from personatlas.persona.options import ModelOptions, PlanOptions
from personatlas.persona.pipeline.estimate import estimate_axis
from personatlas.persona.progress import format_duration
from personatlas.persona.runs import resolve_axis
from personatlas.persona.sampling.kv_cache import fitting_tokens
from personatlas.steering.arms import Arm, parse_arm, require_no_controls
from personatlas.steering.drift_monitor import load_monitor
from personatlas.steering.serve.engine.scheduler import EngineLimits
from personatlas.steering.serve.options import ADAPTIVE, API_KEY, CapacityOptions, ServeOptions, require_valid
from personatlas.steering.serve.service import PersonaService
from personatlas.steering.session import load_named, load_steered_model

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
CACHE_GPU = 0.5  # share of what the weights leave, for keys and values
MAX_CONTEXT = 8192  # tokens, unless more are asked for


def serve(
    model: str | Model,
    axis: str | Axis | None,
    *,
    host: str = "127.0.0.1",
    port: int = 8377,
    allow_origins: Sequence[str] = (),
    options: ServeOptions = ServeOptions(),
    capacity: CapacityOptions = CapacityOptions(),
    load: ModelOptions = ModelOptions(),
    force: bool = False,
    on_ready: Callable[[PersonaService], None] = lambda _: None,
) -> None:
    """Serves a model to OpenAI's clients and on a page of its own until SIGTERM or Ctrl-C.

    The key that clients must give is read from PERSONATLAS_API_KEY; without one only this machine is served.

    Args:
        model: a model, or what `load_model` loads. axis: an axis that was loaded from a folder, or a run
        folder, an axis file, or a packaged name; without
            one conversations are not measured, and nothing acts.
        host: the address to listen on; one that other machines reach needs a key.
        allow_origins: origins of web pages that may use the server ("*", with a key: all).
        force: whether to accept an axis of the same model in another weight format.
        on_ready: called with the service when all is loaded, before the server listens.

    Raises `UserError` for options out of range, a taken address, and what does not belong together.
    """
    from personatlas.steering.serve.http.app import make_app
    from personatlas.steering.serve.http.security import require_origins
    from personatlas.steering.serve.http.uvicorn_server import listen

    key = _api_key(host)
    require_origins(allow_origins, key)
    _require_free(host, port)
    service = make_service(model, axis, options, capacity, load=load, force=force)
    on_ready(service)
    listen(make_app(service, key, allow_origins), service, host, port)


def make_service(
    model: str | Model,
    axis: str | Axis | None,
    options: ServeOptions = ServeOptions(),
    capacity: CapacityOptions = CapacityOptions(),
    *,
    load: ModelOptions = ModelOptions(),
    force: bool = False,
) -> PersonaService:
    """Loads model, axis, all caps beside it, the default arm and the alarm; proves every arm; starts no
    engine.

    Raises `UserError`; what can be wrong without a model is found before one is loaded.
    """
    require_valid(options, capacity)
    if axis is None:
        return _unmeasured_service(model, options, capacity, load)
    text, mode = options.arm_and_mode
    if isinstance(axis, str):
        axis = load_axis(resolve_axis(axis))
    monitor = load_monitor(axis, options.reference, options.rule, options.false_alarms)
    if mode == ADAPTIVE and monitor.rule is None:
        raise UserError(
            "an adaptive arm needs a calibrated alarm: `personatlas drift` makes the reference.json for "
            "--reference"
        )
    arms: dict[str, Interventions] = {name: [axis.cap(name)] for name in axis.saved_caps}
    default = None
    if text is not None:
        arm = parse_arm(text, axis)
        require_no_controls([arm])
        if arm.interventions:
            default = (
                Path(arm.name).name.removesuffix(".json").removesuffix(".safetensors")
                if arm.caps
                else arm.name
            )
            arms[default] = arm.interventions
    steered = load_steered_model(model, axis, arms, load, force=force)
    options = replace(options, arm=default, mode=mode)
    limits = _engine_limits(steered.model, capacity)
    named = [Arm(name, tuple(plan)) for name, plan in steered.steered_arms.items()]
    return PersonaService(steered.model, steered.axis, named, options, limits, monitor)


def _unmeasured_service(
    model: str | Model, options: ServeOptions, capacity: CapacityOptions, load: ModelOptions
) -> PersonaService:
    """The service of a model without an axis, which says how to make one and how long that takes here."""
    name = model.id if isinstance(model, Model) else model
    command = f"`personatlas axis {name}`"
    for option, value in (("--arm", options.arm), ("--reference", options.reference)):
        if value is not None:
            raise UserError(f"{option} {value} needs an axis, and {name} has none: {command} makes it")
    model = load_named(model, load)
    plan = PlanOptions(plan="standard" if model.device.type == "cuda" else "demo")
    no_axis = (
        f"no axis is loaded, so answers are not measured and nothing can act: {command} makes it "
        f"(about {format_duration(estimate_axis(model, plan))} here)"
    )
    return PersonaService(model, None, (), options, _engine_limits(model, capacity), None, no_axis)


def _engine_limits(model: Model, capacity: CapacityOptions) -> EngineLimits:
    """The context is what was asked for, else what the model holds and the memory has room for."""
    longest = model.context or MAX_CONTEXT
    if capacity.context is not None and capacity.context > longest:
        raise UserError(
            f"--context {capacity.context} is more than the {longest} tokens that {model.id} holds"
        )
    slots = capacity.slots + 2  # beside the rows a prompt is read, and a text is scored
    fitting = max(64, fitting_tokens(model, CACHE_GPU) // slots // 64 * 64)
    context = capacity.context or min(longest, MAX_CONTEXT, fitting)
    return EngineLimits(capacity.slots, context, capacity.prefix_mib * 2**20, capacity.queue)


def _api_key(host: str) -> str | None:
    key = os.environ.get(API_KEY)
    if key is not None and (not key.isascii() or not key.isprintable() or len(key.strip()) < 8):
        raise UserError(f"{API_KEY} must be at least 8 printable ASCII characters")
    if key is None and host not in LOCAL_HOSTS:
        raise UserError(
            f"--host {host} is reached from other machines: set {API_KEY} to a key, or leave --host out"
        )
    return key.strip() if key is not None else None


def _require_free(host: str, port: int) -> None:
    """Raises `UserError` for an address that cannot be had, before a model is loaded for it."""
    if not 0 < port < 65536:
        raise UserError(f"--port {port} is outside 1..65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from None
