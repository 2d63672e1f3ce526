"""The plan of chat tuning, derived like the base model's from what there is to learn from.

    plan = make_chat_plan(shape, base_rates, rows=2_400, counted=1_900_000, gpus=1)

Only the assistant's tokens teach, so they, not the tokens that are read, are the batch's horizon.
"""

from personatlas.persona.errors import UserError
from personatlas.training.model.config import Shape
from personatlas.training.optim.schedule import PeakRates, adam_beta2_for, warmup_for
from personatlas.training.plan import CHIPS, Chip, Plan, critical_batch, flops_a_token, micro_batch_for

EPOCHS = 2.0
# Of the base model's highest rates. Measured on a base of depth 2 alone (2.1 bits per byte, 14 minutes of two
# cores), where held-out answers cost, in nats a token, at a matrix rate of
#     0.05   0.2    0.7    3    times the base's
#     2.92   1.87   0.60   0.26   57,000 tokens of short answers, twice
#     0.07   0.3    1.1    2.1   4.3
#     4.58   4.26   4.13   4.05  3.93   103,000 tokens of role play, twice
# Rates that shrink with √batch, as in pretraining, were the leftmost column: too low for little data. Such
# a base still gains from any text; half of its rates leaves room for bases that have more to forget.
RELATIVE_RATE = 0.5
SHARE_OF_PEAK = 0.3  # a guess: it decides nothing but the first batch of a run in minutes


def rows_per_step(rows: int, counted: int, unit: int) -> int:
    """Rows in a step when `counted` answers' tokens are spread over `rows` rows: a multiple of `unit`.

    The rule of pretraining, on answers' tokens: the noise of a gradient is that of the targets it is summed
    over; prompts and padding add none.
    """
    wanted = critical_batch(counted) * rows / counted
    return max(1, round(wanted / unit)) * unit


def estimate_rows(minutes: float, shape: Shape, chip: Chip, gpus: int) -> int:
    """Rows that some minutes hold, before a speed is measured."""
    speed = SHARE_OF_PEAK * chip.peak * gpus / flops_a_token(shape)
    return max(1, int(60 * minutes * speed / shape.context))


def make_chat_plan(
    shape: Shape,
    peaks: PeakRates,
    *,
    rows: int,
    counted: int,
    chip: Chip = CHIPS["h100"],
    gpus: int = 1,
    unit: int | None = None,
    speed: float | None = None,
    horizon: str = "",
) -> Plan:
    """A run over `rows` rows with `counted` answers' tokens; a step has a multiple of `unit` rows (`gpus`
    unless given).

    Rates are `RELATIVE_RATE` of the base's. They rise over the usual warm-up, while the optimizers' moments,
    which a base model does not hand on, settle, and fall straight to zero from there: a flat part would only
    read what is repeated anyway. Matrices are not decayed: what the base model knows should stay. Raises
    `UserError` for an empty run.
    """
    if rows < 1 or counted < 1:
        raise UserError("there is nothing to tune on: no row of conversations in such a time or share")
    step_rows = rows_per_step(rows, counted, unit or gpus)
    steps = max(1, round(rows / step_rows))
    warmup = warmup_for(steps)
    micro_batch, checkpointing, fits = micro_batch_for(shape, step_rows // gpus, chip, gpus)
    return Plan(
        shape=shape,
        horizon=horizon,
        tokens=steps * step_rows * shape.context,
        batch=step_rows * shape.context,
        steps=steps,
        warmup=warmup,
        decay=max(1, steps - warmup),
        matrix_rate=RELATIVE_RATE * peaks.matrix,
        embedding_rate=RELATIVE_RATE * peaks.embedding,
        head_rate=RELATIVE_RATE * peaks.head,
        norm_rate=RELATIVE_RATE * peaks.norm,
        weight_decay=0.0,
        adam_beta2=adam_beta2_for(max(1, round(counted / rows * step_rows))),
        chip=chip,
        gpus=gpus,
        tokens_a_second=speed or SHARE_OF_PEAK * chip.peak * gpus / flops_a_token(shape),
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        fits=fits,
    )
