"""The course of a training run, which pretraining and chat tuning share: plan, speed, log, loop, model,
result.

    RUN/run.json  tokenizer/  metrics.jsonl  samples.jsonl  checkpoints/step-*/  model/  report.html

`pretrain.py` and `finetune.py` say what differs, as a `TrainingJob`; `run_training` does the rest and
resumes:

    with open_training_run(out, world) as run:
        result = run_training(job, run)         # a TrainResult, stored in run.json under "result"
"""

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from personatlas.persona.artifacts import REMAKE, atomic_folder, digest
from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.persona.progress import say
from personatlas.persona.records import Count, FieldError, JsonObject, JsonRecord, NonNegative, check_fields
from personatlas.persona.runs import RunFolder, open_run, read_manifest, versions
from personatlas.training.bits_per_byte import HeldOutLoss
from personatlas.training.chat.heldout_loss import AnswerLoss
from personatlas.training.data.batches import BatchSource
from personatlas.training.loop.checkpoints import checkpoints_in, newest_resumable
from personatlas.training.loop.run_log import METRICS, RunLog, SampleWriter, open_run_log, read_metrics
from personatlas.training.loop.step import Stepper
from personatlas.training.loop.trainer import Trainer
from personatlas.training.model.gpt import GPT
from personatlas.training.options import TrainOptions
from personatlas.training.plan import Plan
from personatlas.training.report.page import write_training_report

RESUME_ONLY = ("optimizer.safetensors", "state.json")  # files of a checkpoint that a model does without


@dataclass(frozen=True)
class TrainResult(JsonRecord):
    """What a training run came to; "result" in run.json.

    `seconds` are those of training, without compiling, evaluations and pauses; `utilisation` is the share of
    the GPUs' peak in model FLOPs. `held_out` is the loss on text (bits per byte) or on answers that were
    never trained on. `before` and `after` are losses by source of chat tuning, "all" first.
    """

    folder: Path
    steps: Count
    tokens: Count
    seconds: NonNegative
    tokens_a_second: NonNegative
    utilisation: NonNegative | None
    epochs: NonNegative
    held_out: AnswerLoss | HeldOutLoss
    before: Mapping[str, AnswerLoss] = field(default_factory=dict)
    after: Mapping[str, AnswerLoss] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """The trained model, an ordinary Hugging Face folder."""
        return self.folder / "model"

    def to_json(self) -> JsonObject:
        """The content of "result" in run.json."""
        row = super().to_json()
        sources = {name: row.pop(name) for name in ("before", "after")}
        del row["folder"]
        return {**row, "sources": sources} if self.after else row

    @staticmethod
    def load(folder: Path) -> "TrainResult":
        """The result of a finished run. Raises `UserError` where there is none."""
        result = read_manifest(folder).get("result")
        if result is None:
            raise UserError(f"{folder} is no finished training run")
        try:
            check_fields(result, {"sources": dict[str, dict[str, AnswerLoss]]})
            row = {"before": {}, "after": {}, **result, **result.get("sources", {})}
            return TrainResult.from_json({**row, "folder": folder})
        except FieldError as error:
            raise UserError(f"{folder / 'run.json'} has a result whose {error}: damaged; {REMAKE}") from None


@dataclass(frozen=True)
class TrainingJob(ABC):
    """What pretraining and chat tuning differ in. `tokenizer` is its folder."""

    out: Path
    options: TrainOptions
    world: World
    device: torch.device
    tokenizer: Path
    fp8: bool = field(default=False, kw_only=True)

    @abstractmethod
    def settings(self) -> JsonObject:
        """What makes this run this run: "asked" in run.json, which a resumed run must agree with."""

    @abstractmethod
    def plan(self, speed: float | None = None, unit: int | None = None) -> Plan:
        """The first plan, or one for a measured speed and with a multiple of `unit` rows in a step."""

    @abstractmethod
    def batches(self, plan: Plan) -> BatchSource:
        """The rows of a plan's steps."""

    @abstractmethod
    def initialise(self, model: GPT) -> None:
        """Fills the parameters of the model in place."""

    @abstractmethod
    def start(self, plan: Plan) -> None:
        """Says what is about to be trained, on rank 0, and writes what the run's folder needs first."""

    def record(self) -> JsonObject:
        """What run.json holds beside settings and plan."""
        return {}

    @abstractmethod
    def samples(self) -> SampleWriter:
        """The writer of samples.jsonl."""

    @abstractmethod
    def evaluate(self, stepper: Stepper, step: int) -> JsonObject:
        """A row of metrics.jsonl with the held-out loss."""

    @abstractmethod
    def outcome(self, plan: Plan, rows: Sequence[JsonObject]) -> JsonObject:
        """`epochs`, `held_out` and losses by source of the result, given the rows of metrics.jsonl."""


@contextmanager
def open_training_run(out: Path, world: World) -> Iterator[RunFolder]:
    """Locks and opens the folder of a training run. Raises `UserError` for a run of another kind."""
    with open_run(out, create=True, rank=world.rank) as run:
        if run.manifest and run.manifest.get("kind") != "training":
            raise UserError(f"--out {out} holds a run of another kind; choose another folder")
        yield run


def run_training(job: TrainingJob, run: RunFolder) -> TrainResult | None:
    """Trains, or resumes; the result on rank 0, None on others.

    Raises `UserError` for a folder that holds a run with other settings, too little memory, and a loss that
    is not finite.
    """
    with contextlib.closing(job.world):
        return _run(job, run)


def _run(job: TrainingJob, run: RunFolder) -> TrainResult | None:
    settings, known, options = job.settings(), run.manifest, job.options
    require_same(job.out, known.get("asked", {}), settings)
    is_new = "plan" not in known
    if is_new and (orphan := newest_resumable(job.out)) is not None:
        raise UserError(
            f"{job.out / 'run.json'} has no plan, though {orphan.path} was made by one: remove "
            f"{orphan.path.parent} to begin again, or choose another folder"
        )
    try:
        plan = job.plan() if is_new else Plan.from_json(known["plan"])
    except FieldError as error:
        raise UserError(
            f"{job.out / 'run.json'} has a plan whose {error}: damaged, or of another version; start anew in "
            "another folder"
        ) from None
    plan = replace(
        plan,
        micro_batch=options.micro_batch or plan.micro_batch,
        checkpointing=options.recompute or plan.checkpointing,
    )
    if job.world.rank == 0 and not plan.fits:
        need, there = plan.memory.total / 1e9, plan.chip.memory / 1e9
        hint = "a lower --depth or --context does"
        say(f"by estimate it does not fit: one row needs {need:,.1f} GB of {there:,.1f}; {hint}")
    compute = torch.bfloat16 if job.device.type == "cuda" else torch.float32
    model = GPT(plan.shape, compute=compute, checkpointing=plan.checkpointing, fp8=job.fp8)
    job.initialise(model)
    stepper = Stepper(model.to(job.device), job.batches(plan), plan, job.world, job.device)
    threads = stepper.set_threads(known.get("threads"))
    measures = is_new and options.minutes is not None
    if job.device.type == "cuda" or measures:
        try:
            speed = stepper.measure_speed()
        except torch.OutOfMemoryError:
            raise stepper.out_of_memory() from None
        if measures:
            at_speed = job.plan(speed, stepper.unit)
            plan = replace(at_speed, micro_batch=plan.micro_batch, checkpointing=plan.checkpointing)
    plan = plan.scaled(options.rate_scale) if is_new else plan
    stepper.set_plan(plan, job.batches(plan))
    if job.world.rank == 0:
        job.start(plan)
    content = {"kind": "training", "asked": settings, "plan": plan.to_json(), "threads": threads}
    run.note(**content, versions=versions(), **job.record())
    facts = {"tokenizer": digest(job.tokenizer / "tokenizer.json"), "asked": settings}
    logs: AbstractContextManager[RunLog] = nullcontext(RunLog())
    if job.world.rank == 0:
        tensorboard, wandb = options.tensorboard, options.wandb
        logs = open_run_log(job.out, plan.steps, job.samples(), tensorboard=tensorboard, wandb=wandb)
    with logs as log:
        trainer = Trainer(
            job.out,
            stepper,
            job.tokenizer,
            lambda: job.initialise(stepper.model),
            lambda step: job.evaluate(stepper, step),
            log,
            facts,
            keep_permanent=options.keep == "log",
        )
        trainer.run()
        return None if job.world.rank else _finish(job, run, trainer)


def require_same(folder: Path, before: Mapping[str, object], settings: Mapping[str, object]) -> None:
    """Raises `UserError` where a run would go on with other settings than it began with."""
    for name, value in settings.items():
        if name in before and before[name] != value:
            label = name.replace("_", "-")
            old, new = ("as derived" if one is None else str(one)[:16] for one in (before[name], value))
            raise UserError(
                f"--out {folder} holds a run with {label} {old}, not {new}; choose another folder"
            )


def _finish(job: TrainingJob, run: RunFolder, trainer: Trainer) -> TrainResult:
    """Makes RUN/model of the last checkpoint, stores the result in run.json, and writes the report."""
    make_model_folder(job.out)
    rows = read_metrics(job.out)
    held_out = [row for row in rows if row["kind"] == "held-out"]
    steps = [row for row in rows if row["kind"] == "step"]
    if not held_out or not steps:
        raise UserError(
            f"{job.out / METRICS} does not tell of the last steps: the model is in {job.out / 'model'}, "
            f"but its figures are lost; remove {checkpoints_in(job.out)[-1].path} to make those steps again"
        )
    plan, seconds = trainer.plan, steps[-1]["seconds"]
    speed = plan.tokens / seconds
    numbers = {"seconds": seconds, "tokens_a_second": speed, "utilisation": trainer.utilisation(speed)}
    outcome = job.outcome(plan, rows)
    result = TrainResult(folder=job.out, steps=plan.steps, tokens=plan.tokens, **numbers, **outcome)
    run.note(result=result.to_json())
    write_training_report(job.out)
    return result


def make_model_folder(folder: Path) -> Path:
    """Makes RUN/model of the last checkpoint, without what only resuming needs.

    The weights are a link where the file system has them; files that people edit are copies, since a
    checkpoint stays as it was made.
    """
    last, path = checkpoints_in(folder)[-1], folder / "model"
    with atomic_folder(path, replace=True) as temporary:
        for file in last.path.iterdir():
            copy = temporary / file.name
            if file.name == "model.safetensors":
                with contextlib.suppress(OSError):  # another file system, or one without links
                    os.link(file, copy)
            if file.name not in RESUME_ONLY and not copy.exists():
                shutil.copyfile(file, copy)
    return path
