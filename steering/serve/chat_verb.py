"""The verb `chat`: talk to a model in the terminal, with a line under every answer that says where it stands."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from personaxis.persona.errors import KnownError
from personaxis.persona.options import ModelOptions
from personaxis.persona.verbs import Model, axis_of
from personaxis.steering.serve.ready import HoldOptions, RoomOptions, make_host

ROOM = RoomOptions(slots=2, prefix_mib=256)  # one answer at a time, two when they are compared


def chat(
    model: Model,
    /,
    *,
    axis: str | None = None,
    system: str = "",
    message: Annotated[tuple[str, ...], Parameter(negative=(), allow_leading_hyphen=True)] = (),
    load: Path | None = None,
    seed: int | None = None,
    context: int | None = None,
    force: bool = False,
    hold: HoldOptions = HoldOptions(),
    how: ModelOptions = ModelOptions(),
) -> None:
    """Talk to a model in the terminal; after every answer a line says where it lies on the axis and what the cap did.

    Where the input is no terminal, every line of it is a message or a command, and the program ends with it.

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m; the one that `personaxis axis MODEL` made or that comes with it unless given
    system
        a system prompt; none unless given
    message
        ask this and leave; may be given several times, and may be a command such as /trace
    load
        go on with a stored conversation
    seed
        for the same answers again; another one each time unless given
    context
        most tokens of the conversation; what the model and the memory hold, unless given
    force
        use an axis of the same model in another weight format
    """
    if system and load is not None:
        raise KnownError("give --system or --load: a stored conversation has its own system prompt")
    from personaxis.steering.serve.exchange import Told
    from personaxis.steering.serve.kept import load_told

    told = load_told(load) if load is not None else Told(system)
    host = make_host(model, how, axis_of(model, axis), hold, replace(ROOM, context=context), force=force)
    failed = _talked(host, told, message, seed)
    if failed:
        raise KnownError(f"{failed} of the lines could not be done (see above)")


def _talked(host: Any, told: Any, lines: tuple[str, ...], seed: int | None) -> int:
    """Talk until there is nothing more to say; how many lines could not be done where nobody sat there to see it."""
    from personaxis.steering.serve.terminal import Terminal

    with asyncio.Runner() as runner:
        runner.run(host.open())
        terminal = Terminal(runner, host, seed, live=not lines and sys.stdin.isatty())
        try:
            terminal.run(told, lines)
        finally:
            host.close()
    return 0 if terminal.live else terminal.failed
