"""The plan of chat tuning, derived like the base model's (`training/dial.py`) from what there is to learn from.

    plan = chat_plan(shape, rows=2_400, counted=1_900_000, chip=CHIPS["h100"], gpus=1)

Only the assistant's tokens teach, so they, not the tokens that are read, are the horizon that batch and rates follow.
"""

from personaxis.persona.errors import KnownError
from personaxis.training.dial import CHIPS, Chip, Plan, flops_a_token, micro_batch_for
from personaxis.training.rates import (
    embedding_rate_for,
    gain_rate_for,
    head_rate_for,
    matrix_rate_for,
    second_for,
    warmup_for,
)
from personaxis.training.shape import Shape

EPOCHS = 2.0
RELATIVE = 0.5
SHARE_OF_PEAK = 0.3  # a guess: masked attention and short runs; it decides nothing but the batch of a run in minutes


def batch_of(counted: int) -> float:
    """Answers' tokens in a batch: the dial's rule, 262,144 · (horizon / 1e9)^0.383 and never more than a 400th of it.

    The noise of a gradient is that of the targets it is summed over; prompts and padding add none.
    """
    return min(2**18 * (counted / 1e9) ** 0.383, counted / 400)


def rows_of(rows: int, counted: int, unit: int) -> int:
    """Rows in a step when `counted` answers' tokens are spread over `rows` rows: a multiple of `unit`, once at least."""
    wanted = batch_of(counted) * rows / counted
    return max(1, round(wanted / unit)) * unit


def estimated_rows(minutes: float, shape: Shape, chip: Chip, gpus: int) -> int:
    """Rows that some minutes hold, before a speed is measured."""
    speed = SHARE_OF_PEAK * chip.peak * gpus / flops_a_token(shape)
    return max(1, int(60 * minutes * speed / shape.context))


def chat_plan(
    shape: Shape,
    *,
    rows: int,
    counted: int,
    chip: Chip = CHIPS["h100"],
    gpus: int = 1,
    unit: int | None = None,
    speed: float | None = None,
    horizon: str = "",
) -> Plan:
    """A run over `rows` rows with `counted` answers' tokens in them; a step has a multiple of `unit` rows (`gpus` unless given).

    Rates are the dial's for such a batch, times `RELATIVE`; they rise over the usual warm-up, while AdamW's moments, which a
    base model does not hand on, settle, and fall straight to zero from there: a flat part would only read what is repeated
    anyway. Matrices are not decayed: what the base model knows should stay. Raises `KnownError` for a run of nothing.
    """
    if rows < 1 or counted < 1:
        raise KnownError("there is nothing to tune on: no row of conversations in so little time or so few epochs")
    rows_a_step = rows_of(rows, counted, unit or gpus)
    steps = max(1, round(rows / rows_a_step))
    learned = max(1, round(counted / rows * rows_a_step))  # answers' tokens in a batch
    warmup = warmup_for(steps)
    micro_batch, checkpointing, fits = micro_batch_for(shape, rows_a_step // gpus, chip, gpus)
    plan = Plan(
        shape=shape,
        horizon=horizon,
        tokens=steps * rows_a_step * shape.context,
        batch=rows_a_step * shape.context,
        steps=steps,
        warmup=warmup,
        decay=max(1, steps - warmup),
        matrix_rate=matrix_rate_for(learned),
        embedding_rate=embedding_rate_for(learned),
        head_rate=head_rate_for(learned, shape.width),
        gain_rate=gain_rate_for(learned),
        weight_decay=0.0,
        second=second_for(learned),
        chip=chip,
        gpus=gpus,
        tokens_a_second=speed or SHARE_OF_PEAK * chip.peak * gpus / flops_a_token(shape),
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        fits=fits,
    )
    return plan.scaled(RELATIVE)
