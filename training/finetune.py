"""A chat model from a base model and conversations: `train chat` in one call.

    train_chat(ChatAsked(Path("runs/books"), Path("runs/talks"), Chats(data=("chats.jsonl", "runs/smollm2-135m"))))

    RUN/run.json  tokenizer/  metrics.jsonl  samples.jsonl  checkpoints/step-*/  model/  report.html

The loop is the base model's (`training/loop.py`); its rows come from `training/packing.py`, its plan from `training/chat_plan.py`.

What chat tuning begins with: the finished model of a training run, one of its checkpoints, or an exported folder.
"""

import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from personatlas.persona.artifacts import digest, read_json
from personatlas.persona.distributed import World, get_world
from personatlas.persona.errors import UserError
from personatlas.persona.progress import say
from personatlas.persona.runs import RunFolder, is_training_run, open_run, versions
from personatlas.training.chat.mixture import ChatData, prepare
from personatlas.training.chat.packing import ChatEncoder
from personatlas.training.chat.plan import EPOCHS, chat_plan, estimated_rows, peaks_of
from personatlas.training.chat.samples import Replies
from personatlas.training.export.huggingface import TOKENIZER_FILES, shape_of
from personatlas.training.loop.checkpoints import Checkpoint, checkpoints_in, load_weights
from personatlas.training.loop.distributed import join
from personatlas.training.loop.run_log import Record, read_metrics, recorded
from personatlas.training.loop.step import Stepper
from personatlas.training.loop.trainer import Loop
from personatlas.training.model.config import Shape
from personatlas.training.model.gpt import GPT
from personatlas.training.options import ChatAsked
from personatlas.training.plan import Plan, chip_of
from personatlas.training.run import finish, require_same

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Parent:
    """A model folder with its tokenizer."""

    folder: Path
    shape: Shape
    weights: str
    "SHA-256"
    plan: dict[str, Any] | None = None
    "of the run that made the base model, where its run.json is at hand"


def parent_of(base: Path) -> Parent:
    """Raises `UserError` for anything that is not a GPT of ours, and for a run that has not finished."""
    if not base.exists():
        raise UserError(
            f"{base} does not exist; give the folder of a training run, of a checkpoint or of an export"
        )
    folder = base
    if (base / "run.json").is_file():
        if not is_training_run(base):
            raise UserError(f"{base} is a run of another kind; give the folder of `personatlas train base`")
        folder = base / "model"
        if not (folder / "config.json").is_file():
            found = checkpoints_in(base)
            hint = (
                f"or name a checkpoint, the newest is {found[-1].path}"
                if found
                else "it has no checkpoint yet"
            )
            raise UserError(f"{base} is a run that has not finished: go on with it first; {hint}")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{base} is no training run, checkpoint or exported folder: it has no run.json or config.json"
        )
    shape = shape_of(read_json(folder / "config.json"), folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder / WEIGHTS} does not exist; a checkpoint in several files must be saved as one first"
        )
    return Parent(folder, shape, digest(folder / WEIGHTS), _plan(base))


def _plan(base: Path) -> dict[str, Any] | None:
    """From the run's folder, or from that of a checkpoint or model in it."""
    for folder in (base, base.resolve().parent, base.resolve().parent.parent):
        if (folder / "run.json").is_file():
            record = read_json(folder / "run.json")
            found = record.get("plan") if record.get("asked", {}).get("stage") == "base" else None
            return found if isinstance(found, dict) else None
    return None


MANY = 4.0  # readings of a small set of conversations after which held-out loss mostly rises


@dataclass(frozen=True)
class FinetuneContext:
    """One run of chat tuning, its data read."""

    asked: ChatAsked
    parent: Parent
    encoder: ChatEncoder
    data: ChatData
    world: World
    device: torch.device


def train_chat(asked: ChatAsked) -> dict[str, Any] | None:
    """Tune, or go on where the run was stopped. The result on rank 0, None on others.

    Raises `UserError` for a base or data that cannot be used, a folder that holds another run, and a loss that is no number.
    """
    parent, world = parent_of(asked.base), get_world()
    if asked.out.resolve() in (
        asked.base.resolve(),
        *parent.folder.resolve().parents,
        parent.folder.resolve(),
    ):
        raise UserError(
            f"--out {asked.out} holds the base model; choose another folder for what is made of it"
        )
    encoder = ChatEncoder.load(parent.folder)
    data = prepare(asked.chats, encoder, context=parent.shape.context, seed=asked.tuning.seed, world=world)
    with open_run(asked.out, create=True, rank=world.rank) as run:
        if run.manifest.get("kind", "training") != "training":
            raise UserError(f"--out {asked.out} holds a run of another kind; choose another folder")
        device = join(world, asked.device)
        try:
            return _train(FinetuneContext(asked, parent, encoder, data, world, device), run)
        finally:
            world.close()


def _facts(work: FinetuneContext) -> dict[str, Any]:
    """What makes a run this run: going on with other values would be another one."""
    chats, length, tuning = work.asked.chats, work.asked.length, work.asked.tuning
    return {
        "stage": "chat",
        "base": work.parent.weights,
        "data": work.data.asked(),
        "columns": chats.columns,
        "held_share": chats.held_share,
        "held_out_roles": chats.held_out_roles,
        "score": chats.score,
        "per_role": chats.per_role,
        "cut": chats.cut,
        "epochs": length.epochs,
        "minutes": length.minutes,
        "rate_scale": tuning.rate_scale,
        "seed": tuning.seed,
        "tokenizer": digest(work.parent.folder / "tokenizer.json"),
    }


def _first_plan(work: FinetuneContext) -> Plan:
    """Before a speed is measured."""
    length, source = work.asked.length, work.data.source
    if length.minutes is not None:
        rows = estimated_rows(length.minutes, work.parent.shape, chip_of(work.device), work.world.size)
        return _plan_for(work, rows, f"what {length.minutes:g} minutes hold")
    epochs = EPOCHS if length.epochs is None else length.epochs
    return _plan_for(work, source.rows_in(epochs), f"{epochs:g} epochs")


def _plan_for(
    work: FinetuneContext, rows: int, horizon: str, *, speed: float | None = None, unit: int | None = None
) -> Plan:
    told = work.data.source.describe()
    return chat_plan(
        work.parent.shape,
        peaks_of(work.parent.shape, work.parent.plan),
        rows=rows,
        counted=round(rows * told["counted"] / told["rows"]),
        chip=chip_of(work.device),
        gpus=work.world.size,
        horizon=horizon,
        unit=unit,
        speed=speed,
    )


def _train(work: FinetuneContext, run: RunFolder) -> dict[str, Any] | None:
    facts, known, tuning, source = _facts(work), run.manifest, work.asked.tuning, work.data.source
    require_same(work.asked.out, known.get("asked", {}), facts)
    fresh = "plan" not in known
    plan = _first_plan(work) if fresh else Plan.from_json(known["plan"])
    plan = replace(
        plan,
        micro_batch=tuning.micro_batch or plan.micro_batch,
        checkpointing=tuning.recompute or plan.checkpointing,
    )
    source.rows = plan.batch // source.context
    compute = torch.bfloat16 if work.device.type == "cuda" else torch.float32
    model = GPT(plan.shape, compute=compute, checkpointing=plan.checkpointing).to(work.device)
    load_weights(Checkpoint(0, work.parent.folder), model)
    stepper = Stepper(model, source, plan, work.world, work.device)
    threads = stepper.settle(known.get("threads"))
    plan = _timed(work, stepper, fresh=fresh)
    if work.world.rank == 0:
        _copy_tokenizer(work)
        for line in (*work.data.lines(), _told(plan, source.rows, source.epochs_in(plan.steps))):
            say(line)
    origin = {"path": str(work.asked.base), "sha256": work.parent.weights}
    content = {"asked": facts, "plan": plan.to_json(), "parent": origin, "data": work.data.record()}
    run.note(kind="training", versions=versions(), threads=threads, **content)
    with _record(work, stepper) as record:
        loop = _loop(work, stepper, record)
        loop.run()
        return None if work.world.rank else _finished(work, run, loop)


def _timed(work: FinetuneContext, stepper: Stepper, *, fresh: bool) -> Plan:
    """Compile; and where minutes were asked for, as many steps as they hold at the speed that is measured here."""
    plan, minutes, source = stepper.plan, work.asked.length.minutes, work.data.source
    measures = fresh and minutes is not None
    if stepper.device.type == "cuda" or measures:
        try:
            speed = stepper.speed()
        except torch.OutOfMemoryError:
            raise stepper.out_of_memory() from None
        if measures and minutes is not None:
            rows = max(source.rows, int(60 * minutes * speed / source.context))
            plan = replace(
                _plan_for(work, rows, plan.horizon, speed=speed, unit=stepper.unit),
                micro_batch=plan.micro_batch,
                checkpointing=plan.checkpointing,
            )
            source.rows = plan.batch // source.context
    stepper.replan(plan.scaled(work.asked.tuning.rate_scale) if fresh else plan, source)
    return stepper.plan


def _told(plan: Plan, rows: int, epochs: float) -> str:
    text = f"{plan.steps:,} steps of {rows:,} rows, {plan.horizon}: the conversations are read {epochs:.1f} times"
    return text if epochs <= MANY else f"{text}, which is more than they usually bear"


def _by_heart(rows: list[dict[str, Any]]) -> str | None:
    """What to do where held-out loss rose again: the model has learned its conversations by heart."""
    held = [row for row in rows if row["kind"] == "held-out"]
    best, last = min(held, key=lambda row: row["loss"]), held[-1]
    if last["loss"] <= 1.02 * best["loss"]:
        return None
    return (
        f"held-out loss was lowest at step {best['step']:,} ({best['loss']:.3f}) and is {last['loss']:.3f} at the end: "
        "the conversations are learned by heart; fewer --epochs or --minutes would do better"
    )


def _copy_tokenizer(work: FinetuneContext) -> None:
    folder = work.asked.out / "tokenizer"
    folder.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (work.parent.folder / name).is_file():
            shutil.copyfile(work.parent.folder / name, folder / name)


def _record(work: FinetuneContext, stepper: Stepper) -> AbstractContextManager[Record]:
    if work.world.rank:
        return nullcontext(Record())
    asked = work.asked
    replies = Replies(asked.out, work.encoder, work.data.held_out.conversations)
    return recorded(asked.out, stepper.plan.steps, replies, tensorboard=asked.tensorboard, wandb=asked.wandb)


def _loop(work: FinetuneContext, stepper: Stepper, record: Record) -> Loop:
    asked, plan, held_out = work.asked, stepper.plan, work.data.held_out

    def evaluate(step: int) -> dict[str, Any]:
        return held_out.row(stepper.model, step, whole=step in (0, plan.steps), most=plan.tokens // 200)

    def initialise() -> None:
        load_weights(Checkpoint(0, work.parent.folder), stepper.model)

    facts = {"tokenizer": digest(work.parent.folder / "tokenizer.json"), "asked": _facts(work)}
    keep_all = asked.tuning.keep == "log"
    return Loop(asked.out, stepper, work.parent.folder, initialise, evaluate, record, facts, keep_all)


def _finished(work: FinetuneContext, run: RunFolder, loop: Loop) -> dict[str, Any]:
    """The model folder and the result."""
    rows = read_metrics(work.asked.out)
    whole = [row["sources"] for row in rows if row["kind"] == "held-out" and "sources" in row]
    if advice := _by_heart(rows):
        say(advice)
    more = {
        "epochs": work.data.source.epochs_in(loop.plan.steps),
        "held_out": whole[-1]["all"],
        "sources": {"before": whole[0], "after": whole[-1]},
    }
    return finish(run, loop, work.asked.out, more)
