"""A chat model from a base model and conversations.

    train_chat(Path("runs/books"), ["chats.jsonl", "runs/smollm2-135m=30%"], out=Path("runs/talks"))

The base is the finished model of a training run, one of its checkpoints, or an exported folder.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personatlas.persona.artifacts import REMAKE, digest
from personatlas.persona.distributed import get_world
from personatlas.persona.errors import UserError
from personatlas.persona.progress import say
from personatlas.persona.records import FieldError, JsonObject, NonNegative, read_field
from personatlas.persona.runs import is_training_run, read_manifest
from personatlas.training.chat.heldout_loss import AnswerLoss
from personatlas.training.chat.mixture import ChatData, prepare_chat_data
from personatlas.training.chat.packing import ChatBatches, ChatEncoder
from personatlas.training.chat.plan import EPOCHS, estimate_rows, make_chat_plan
from personatlas.training.chat.samples import ReplySamples
from personatlas.training.export.huggingface import TOKENIZER_FILES, read_shape
from personatlas.training.loop.checkpoints import Checkpoint, checkpoints_in, load_weights
from personatlas.training.loop.distributed import init_distributed
from personatlas.training.loop.step import Stepper
from personatlas.training.model.config import Shape
from personatlas.training.model.gpt import GPT
from personatlas.training.optim.schedule import PeakRates, peak_rates
from personatlas.training.options import ChatDataOptions, FinetuneOptions
from personatlas.training.plan import STORED_RATES, Plan, batch_for, detect_chip, optimal_tokens
from personatlas.training.run import TrainingJob, TrainResult, open_training_run, run_training

MANY_EPOCHS = 4.0  # after which held-out loss mostly rises


@dataclass(frozen=True)
class BaseModel:
    """A model folder with its tokenizer, to be tuned."""

    folder: Path
    shape: Shape
    sha256: str
    "of the weights"
    rates: PeakRates
    "of the run that made it where its run.json is at hand, else of a compute-optimal one"


def find_base_model(path: Path) -> BaseModel:
    """The model in a run, a checkpoint or an export.

    Raises `UserError` for anything that is not a GPT trained here, and for a run that has not finished.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a training run, a checkpoint or an export")
    folder = path
    if (path / "run.json").is_file():
        if not is_training_run(path):
            raise UserError(f"{path} is a run of another kind; give the folder of `personatlas train base`")
        folder = path / "model"
        if not (folder / "config.json").is_file():
            found = checkpoints_in(path)
            newest = f"or name a checkpoint, the newest is {found[-1].path}" if found else ""
            hint = newest or "it has no checkpoint yet"
            raise UserError(f"{path} is a run that has not finished: go on with it first; {hint}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is no training run, checkpoint or export: it has no run.json or config.json")
    shape, weights = read_shape(folder), folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights} does not exist; a checkpoint in several files must be saved as one first")
    rates = peak_rates(batch_for(optimal_tokens(shape), shape.context), shape.width)
    for parent in (path, path.resolve().parent, path.resolve().parent.parent):
        if (parent / "run.json").is_file():
            record = read_manifest(parent)
            plan = record.get("plan") if record.get("asked", {}).get("stage") == "base" else None
            if isinstance(plan, dict):  # of whatever version
                try:
                    rates = PeakRates(*(read_field(plan, name, NonNegative) for name in STORED_RATES))
                except FieldError as error:
                    raise UserError(f"{parent / 'run.json'} is damaged: plan {error}; {REMAKE}") from None
            break
    return BaseModel(folder, shape, digest(weights), rates)


def train_chat(
    base: Path | TrainResult,
    data: Sequence[str | Path] | ChatDataOptions,
    *,
    out: Path,
    options: FinetuneOptions = FinetuneOptions(),
) -> TrainResult | None:
    """Tunes a base model on conversations, or resumes the run in `out`; None on all ranks but the first.

    Raises `UserError` for a base or data that cannot be used, a folder that holds another run, too little
    memory, and a loss that is not finite.
    """
    path = base.folder if isinstance(base, TrainResult) else base
    chats = data if isinstance(data, ChatDataOptions) else ChatDataOptions(tuple(map(str, data)))
    model, world, resolved = find_base_model(path), get_world(), out.resolve()
    if resolved in (path.resolve(), model.folder.resolve(), *model.folder.resolve().parents):
        raise UserError(f"--out {out} holds the base model; choose another folder for what is made of it")
    encoder = ChatEncoder.load(model.folder)
    prepared = prepare_chat_data(chats, encoder, context=model.shape.context, seed=options.seed, world=world)
    with open_training_run(out, world) as run:
        device = init_distributed(world, options.device)
        job = FinetuneJob(out, options, world, device, model.folder, path, model, encoder, chats, prepared)
        return run_training(job, run)


@dataclass(frozen=True)
class FinetuneJob(TrainingJob):
    """Chat tuning of a base model."""

    options: FinetuneOptions
    base: Path
    model: BaseModel
    encoder: ChatEncoder
    chats: ChatDataOptions
    data: ChatData

    def settings(self) -> JsonObject:
        data = ("columns", "held_share", "held_out_roles", "score", "per_role", "cut")
        return {
            "stage": "chat",
            "base": self.model.sha256,
            "data": self.data.settings(),
            **{name: getattr(self.chats, name) for name in data},
            **{name: getattr(self.options, name) for name in ("epochs", "minutes", "rate_scale", "seed")},
            "tokenizer": digest(self.model.folder / "tokenizer.json"),
        }

    def plan(self, speed: float | None = None, unit: int | None = None) -> Plan:
        minutes, batches, shape = self.options.minutes, self.data.batches, self.model.shape
        chip, gpus = detect_chip(self.device), self.world.size
        if minutes is None:
            epochs = EPOCHS if self.options.epochs is None else self.options.epochs
            rows, horizon = batches.rows_in(epochs), f"{epochs:g} epochs"
        else:
            horizon = f"what {minutes:g} minutes hold"
            rows = estimate_rows(minutes, shape, chip, gpus)
            if speed is not None:
                rows = max(batches.rows, int(60 * minutes * speed / batches.context))
        epoch = batches.describe()
        counted = round(rows * epoch["counted"] / epoch["rows"])
        return make_chat_plan(
            shape,
            self.model.rates,
            rows=rows,
            counted=counted,
            chip=chip,
            gpus=gpus,
            unit=unit,
            speed=speed,
            horizon=horizon,
        )

    def batches(self, plan: Plan) -> ChatBatches:
        self.data.batches.rows = plan.batch // self.data.batches.context
        return self.data.batches

    def initialise(self, model: GPT) -> None:
        load_weights(Checkpoint(0, self.model.folder), model)

    def start(self, plan: Plan) -> None:
        folder = self.out / "tokenizer"
        folder.mkdir(exist_ok=True)
        for name in TOKENIZER_FILES:
            if (self.model.folder / name).is_file():
                shutil.copyfile(self.model.folder / name, folder / name)
        for line in self.data.lines():
            say(line)
        rows, epochs = self.data.batches.rows, self.data.batches.epochs_in(plan.steps)
        warning = ", which is more than they usually bear" if epochs > MANY_EPOCHS else ""
        times = f"the conversations are read {epochs:.1f} times{warning}"
        say(f"{plan.steps:,} steps of {rows:,} rows, {plan.horizon}: {times}")

    def record(self) -> JsonObject:
        return {"parent": {"path": str(self.base), "sha256": self.model.sha256}, "data": self.data.to_json()}

    def samples(self) -> ReplySamples:
        return ReplySamples(self.out, self.encoder, self.data.held_out.examples)

    def evaluate(self, stepper: Stepper, step: int) -> JsonObject:
        whole, max_tokens = step in (0, stepper.plan.steps), stepper.plan.tokens // 200
        return self.data.held_out.row(stepper.model, step, whole=whole, max_tokens=max_tokens)

    def outcome(self, plan: Plan, rows: Sequence[JsonObject]) -> JsonObject:
        held_out = [row for row in rows if row["kind"] == "held-out"]
        best, last = min(held_out, key=lambda row: row["loss"]), held_out[-1]
        if last["loss"] > 1.02 * best["loss"]:
            say(
                f"held-out loss was lowest at step {best['step']:,} ({best['loss']:.3f}) and is "
                f"{last['loss']:.3f} at the end: the conversations are learned by heart; "
                "fewer --epochs or --minutes would do better"
            )
        sources = [
            {name: AnswerLoss.from_json(loss) for name, loss in row["sources"].items()}
            for row in held_out
            if "sources" in row
        ]
        losses = {"held_out": sources[-1]["all"], "before": sources[0], "after": sources[-1]}
        return {"epochs": self.data.batches.epochs_in(plan.steps), **losses}
