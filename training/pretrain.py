"""A base model from a corpus: tokenizer, tokens, plan, steps, model folder. `train base` in one call.

train_base(BaseAsked(depth=12, out=Path("runs/books"), texts=Texts(corpus=Path("books")), length=Length(minutes=3)))

RUN/run.json  tokenizer/  tokens/  metrics.jsonl  samples.jsonl  checkpoints/step-*/  model/  report.html
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from personatlas.persona.artifacts import digest
from personatlas.persona.distributed import World, get_world
from personatlas.persona.errors import UserError
from personatlas.persona.progress import say
from personatlas.persona.runs import RunFolder, open_run, versions
from personatlas.training.bits_per_byte import fit_of
from personatlas.training.data.batches import Batches, BooksSource
from personatlas.training.data.corpus import corpus_of
from personatlas.training.data.token_shards import Tokens, make_tokens, open_tokens
from personatlas.training.data.tokenizer import (
    VOCABULARY,
    load_tokenizer,
    make_tokenizer,
    require_vocabulary,
    token_bytes,
)
from personatlas.training.loop.distributed import join
from personatlas.training.loop.run_log import Record, recorded
from personatlas.training.loop.samples import Samples
from personatlas.training.loop.step import Stepper
from personatlas.training.loop.trainer import Loop
from personatlas.training.model.gpt import GPT
from personatlas.training.options import BaseAsked, require_seed
from personatlas.training.plan import Plan, chip_of, plan_of, repeats
from personatlas.training.run import finish, require_same

TOKENIZER = "tokenizer.json"


def train_base(asked: BaseAsked) -> dict[str, Any] | None:
    """Train, or go on where the run was stopped. The result on rank 0, None on others.

    Raises `UserError` for whatever cannot be trained on, a folder that holds another run, and a loss that is no number.
    """
    world = get_world()
    with open_run(asked.out, create=True, rank=world.rank) as run:
        if run.manifest and run.manifest.get("kind") != "training":
            raise UserError(f"--out {asked.out} holds a run of another kind; choose another folder")
        require_sensible(asked)
        device = join(world, asked.device)
        if asked.tuning.fp8 and device.type != "cuda":
            raise UserError("--fp8 is for GPUs that multiply 8 bits (Hopper and later), not for a CPU")
        if world.rank == 0:
            _prepare(asked)
        world.barrier()
        tokens = open_tokens(_token_folder(asked), _tokenizer_folder(asked))
        try:
            return _train(asked, run, tokens, world, device)
        finally:
            world.close()


def require_sensible(asked: BaseAsked) -> None:
    """What can be said before anything is read."""
    tuning, length, corpus = asked.tuning, asked.length, asked.texts.corpus
    if corpus is not None and asked.out.resolve().is_relative_to(corpus.resolve()):
        raise UserError(
            f"--out {asked.out} is in --corpus {corpus}, where what the run writes becomes text to train on; choose another"
        )
    require_seed(tuning.seed)
    if not 0 < tuning.rate_scale < 100:
        raise UserError(
            f"--rate-scale {tuning.rate_scale} is no factor for rates (1 leaves them as they are)"
        )
    if tuning.micro_batch is not None and tuning.micro_batch < 1:
        raise UserError(f"--micro-batch {tuning.micro_batch}: give 1 row or more")
    plan_of(
        asked.depth, context=tuning.context, tokens=length.tokens, minutes=length.minutes, batch=tuning.batch
    )  # what makes no run


def _prepare(asked: BaseAsked) -> None:
    """Tokenizer and tokens, made unless they are there."""
    texts, tokenizer, folder = asked.texts, _tokenizer_folder(asked), _token_folder(asked)
    finished = (folder / "tokens.json").is_file()
    if texts.corpus is None:
        if not finished:
            raise UserError(
                "--corpus PATH is missing: what shall it be trained on? (or --token-folder with finished tokens)"
            )
        if not (tokenizer / TOKENIZER).is_file():
            raise UserError("--tokenizer FOLDER is missing: the one that the tokens were made with")
        return
    corpus = corpus_of(
        texts.corpus, held_out=texts.held_out, held_share=texts.held_share, column=texts.text_column
    )
    if texts.tokenizer is None:
        vocabulary = VOCABULARY if texts.vocabulary is None else texts.vocabulary
        require_vocabulary(vocabulary)
        make_tokenizer(corpus, tokenizer, vocabulary=vocabulary)
    elif not (tokenizer / TOKENIZER).is_file():
        raise UserError(f"--tokenizer {tokenizer} has no {TOKENIZER}: not a tokenizer's folder")
    if not finished and (notes := corpus.scan().notes()):
        say(f"the corpus has {notes}")
    make_tokens(corpus, tokenizer, folder)


def _tokenizer_folder(asked: BaseAsked) -> Path:
    return asked.texts.tokenizer or asked.out / "tokenizer"


def _token_folder(asked: BaseAsked) -> Path:
    return asked.texts.token_folder or asked.out / "tokens"


def _facts(asked: BaseAsked, tokens: Tokens) -> dict[str, Any]:
    """What makes a run this run: going on with other values would be another one."""
    return {
        "stage": "base",
        "depth": asked.depth,
        "context": asked.tuning.context,
        "batch": asked.tuning.batch,
        "tokens": asked.length.tokens,
        "minutes": asked.length.minutes,
        "rate_scale": asked.tuning.rate_scale,
        "fp8": asked.tuning.fp8,
        "seed": asked.tuning.seed,
        "corpus": tokens.corpus,
        "tokenizer": tokens.tokenizer,
    }


def _plan(asked: BaseAsked, tokens: Tokens, device: torch.device, world: int, **more: Any) -> Plan:
    """From the dial."""
    tuning, length = asked.tuning, asked.length
    return plan_of(
        asked.depth,
        vocabulary=tokens.vocabulary,
        context=tuning.context,
        tokens=length.tokens,
        minutes=length.minutes,
        chip=chip_of(device),
        gpus=world,
        **{"batch": tuning.batch, **more},
    )


def _train(
    asked: BaseAsked, run: RunFolder, tokens: Tokens, world: World, device: torch.device
) -> dict[str, Any] | None:
    facts, known = _facts(asked, tokens), run.manifest
    require_same(asked.out, known.get("asked", {}), facts)
    plan = Plan.from_json(known["plan"]) if "plan" in known else _plan(asked, tokens, device, world.size)
    plan = replace(
        plan,
        micro_batch=asked.tuning.micro_batch or plan.micro_batch,
        checkpointing=asked.tuning.recompute or plan.checkpointing,
    )
    _say_fit(plan, world)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = GPT(plan.shape, compute=compute, checkpointing=plan.checkpointing, fp8=asked.tuning.fp8)
    model = model.initialise(asked.tuning.seed).to(device)
    stepper = Stepper(model, _source(asked, tokens, plan), plan, world, device)
    threads = stepper.settle(known.get("threads"))
    plan = _timed(asked, stepper, tokens, fresh="plan" not in known)
    _say_plan(plan, tokens, world)
    content = {
        "kind": "training",
        "asked": facts,
        "plan": plan.to_json(),
        "threads": threads,
        "versions": versions(),
    }
    run.note(**content)
    with _record(asked, stepper, tokens) as record:
        loop = _loop(asked, stepper, tokens, record)
        loop.run()
        if world.rank:
            return None
        return finish(run, loop, asked.out, {"epochs": plan.tokens / len(tokens.train)})


def _source(asked: BaseAsked, tokens: Tokens, plan: Plan) -> BooksSource:
    context = plan.shape.context
    return BooksSource(Batches(tokens.train, context, plan.batch // context, asked.tuning.seed))


def _timed(asked: BaseAsked, stepper: Stepper, tokens: Tokens, *, fresh: bool) -> Plan:
    """Compile; and where minutes were asked for, derive the run anew from the speed that is measured here."""
    plan = stepper.plan
    measures = fresh and asked.length.minutes is not None
    if stepper.device.type == "cuda" or measures:
        try:
            speed = stepper.speed()
        except torch.OutOfMemoryError:
            raise stepper.out_of_memory() from None
        if measures:
            plan = _at_speed(asked, stepper, tokens, speed)
    stepper.replan(plan.scaled(asked.tuning.rate_scale) if fresh else plan, _source(asked, tokens, plan))
    return stepper.plan


def _at_speed(asked: BaseAsked, stepper: Stepper, tokens: Tokens, speed: float) -> Plan:
    before, world = stepper.plan, stepper.world.size
    unit = stepper.unit * before.shape.context
    batch = asked.tuning.batch or _plan(asked, tokens, stepper.device, world, speed=speed).batch
    batch = max(1, round(batch / unit)) * unit
    plan = _plan(asked, tokens, stepper.device, world, speed=speed, batch=batch)
    return replace(plan, micro_batch=before.micro_batch, checkpointing=before.checkpointing)


def _say_fit(plan: Plan, world: World) -> None:
    """Before it is tried: the estimate is on the high side."""
    if world.rank == 0 and not plan.fits:
        need, there = plan.memory.total / 1e9, plan.chip.memory / 1e9
        say(
            f"by estimate it does not fit: one row needs {need:,.1f} GB of {there:,.1f}; a lower --depth or --context does"
        )


def _say_plan(plan: Plan, tokens: Tokens, world: World) -> None:
    if world.rank == 0:
        shape = plan.shape
        say(f"depth {shape.depth}, width {shape.width}: {shape.parameters / 1e6:,.1f} M parameters")
        say(
            f"{plan.tokens:,} tokens in {plan.steps:,} steps of {plan.batch:,}: {repeats(plan.tokens, len(tokens.train))}"
        )


def _record(asked: BaseAsked, stepper: Stepper, tokens: Tokens) -> AbstractContextManager[Record]:
    if stepper.world.rank:
        return nullcontext(Record())
    samples = Samples(asked.out, load_tokenizer(_tokenizer_folder(asked)), tokens.held_out)
    return recorded(asked.out, stepper.plan.steps, samples, tensorboard=asked.tensorboard, wandb=asked.wandb)


def _loop(asked: BaseAsked, stepper: Stepper, tokens: Tokens, record: Record) -> Loop:
    world, plan, folder = stepper.world, stepper.plan, _tokenizer_folder(asked)
    lengths = torch.from_numpy(token_bytes(load_tokenizer(folder))).to(stepper.device)
    most = max(plan.tokens // 200, stepper.micro_batch * plan.shape.context * world.size)

    def evaluate(step: int) -> dict[str, Any]:
        whole = step == plan.steps
        rows, context = stepper.micro_batch, plan.shape.context
        fit = fit_of(stepper.model, tokens.held_out, lengths, context, rows, world, None if whole else most)
        return fit.row(step)

    def initialise() -> None:
        stepper.model.initialise(asked.tuning.seed)

    facts = {"tokenizer": digest(folder / TOKENIZER), "asked": _facts(asked, tokens)}
    return Loop(asked.out, stepper, folder, initialise, evaluate, record, facts, asked.tuning.keep == "log")
