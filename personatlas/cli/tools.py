"""The verb self-test: recording and sampling against plain references, and with an axis, capping through the engine itself."""

from collections.abc import Sequence
from typing import Annotated

from rich.table import Table
from rich.text import Text

from personatlas.cli.options import MODEL, Json, ModelName
from personatlas.cli.output import console, print_json
from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions
from personatlas.persona.pipeline.self_test import Check


def self_test(
    model: ModelName,
    /,
    *,
    axis: str | None = None,
    cap: list[str] | None = None,
    force: bool = False,
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Prove that recording binds on this model and machine, and with --axis that capping does, through the engine that samples.

    Exits with status 2 when any check fails.

    Parameters
    ----------
    axis
        a run folder, an axis file, or smollm2-135m: also cap a probe along it, and check counters, projections and identities
    cap
        a cap to prove besides, by name, file or LEVEL@LAYERS; may be given several times
    force
        use an axis of the same model in another weight format
    """
    from personatlas.persona.models.load import load_model
    from personatlas.persona.pipeline.self_test import run_self_test

    if cap and axis is None:
        raise UserError("--cap needs --axis, beside which it is saved or along which it is made")
    if axis is None:
        decoder = load_model(model, device=load.device, dtype=load.dtype, chat_template=load.chat_template)
        checks = run_self_test(decoder)
    else:
        from personatlas.steering.hooks.binding_check import run_cap_test
        from personatlas.steering.session import load_steered_model

        held = load_steered_model(model, load, axis, cap or [], force=force)
        checks = [*run_self_test(held.model), *run_cap_test(held.model, held.axis)]
    print_json([check.to_json() for check in checks]) if json else _print(checks)
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise UserError(f"self-test of {model} failed: {', '.join(failed)}")


def _print(checks: Sequence[Check]) -> None:
    table = Table("check", "found", "allowed", "")
    for check in checks:
        mark = Text("ok", style="green") if check.passed else Text("FAILED", style="bold red")
        table.add_row(check.name, f"{check.found:.3g}", f"{check.allowed:.3g}", mark)
    console().print(table)
