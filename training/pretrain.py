"""A base model from a corpus: tokenizer, tokens, plan, steps, model folder.

    train_base(Path("books"), out=Path("runs/books"))                # depth and length from the corpus
    train_base(Path("books"), depth=12, out=Path("runs/books"), options=PretrainOptions(minutes=3))

The run's folder gets tokenizer/ and tokens/ beside the files that `training/run.py` lists.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer

from personatlas.persona.distributed import get_world
from personatlas.persona.errors import UserError
from personatlas.persona.progress import say
from personatlas.persona.records import JsonObject
from personatlas.training.bits_per_byte import HeldOutLoss, held_out_bits_per_byte
from personatlas.training.data.batches import CorpusBatches
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.token_shards import Tokens, make_tokens, open_tokens
from personatlas.training.data.tokenizer import (
    load_corpus_tokenizer,
    make_tokenizer,
    require_vocabulary,
    token_sizes,
)
from personatlas.training.loop.distributed import init_distributed
from personatlas.training.loop.samples import TextSamples
from personatlas.training.loop.step import Stepper
from personatlas.training.model.gpt import GPT
from personatlas.training.options import CorpusOptions, PretrainOptions
from personatlas.training.plan import Plan, depth_for, describe_epochs, detect_chip, make_plan, shape_at
from personatlas.training.run import TrainingJob, TrainResult, open_training_run, run_training

CPU_MINUTES = 4.0  # of training without --depth, --tokens or --minutes; compute-optimal takes hours there


def train_base(
    corpus: Path | CorpusOptions,
    *,
    depth: int | None = None,
    out: Path,
    options: PretrainOptions = PretrainOptions(),
) -> TrainResult | None:
    """Trains a GPT of some depth on a corpus, or resumes the run in `out`; None on all ranks but the first.

    Without a depth it is `depth_for` the corpus and the device, and a CPU trains for `CPU_MINUTES`. Without a
    length the compute-optimal one is cut at 16 epochs. Raises `UserError` for options and texts that cannot
    be trained on, a folder that holds another run, too little memory, and a loss that is not finite.
    """
    world = get_world()
    texts = corpus if isinstance(corpus, CorpusOptions) else CorpusOptions(corpus=corpus)
    tokenizer, token_folder = texts.tokenizer or out / "tokenizer", texts.token_folder or out / "tokens"
    with open_training_run(out, world) as run:
        if texts.corpus is not None and out.resolve().is_relative_to(texts.corpus.resolve()):
            raise UserError(
                f"--out {out} is in --corpus {texts.corpus} and becomes text to train on; choose another"
            )
        tokens, minutes = options.tokens, options.minutes
        # raises for options that make no run
        make_plan(depth or 2, context=options.context, tokens=tokens, minutes=minutes, batch=options.batch)
        device = init_distributed(world, options.device)
        if options.fp8 and device.type != "cuda":
            raise UserError("--fp8 is for GPUs that multiply 8 bits (Hopper and later), not for a CPU")
        if world.rank == 0:
            _make_tokens(texts, tokenizer, token_folder)
        world.barrier()
        data = open_tokens(token_folder, tokenizer)
        most = len(data.train) if tokens is None and minutes is None else None
        if depth is None:
            if most is not None and device.type == "cpu":
                options = replace(options, minutes=CPU_MINUTES)
            chip = detect_chip(device)
            depth = depth_for(len(data.train), data.vocabulary, chip, world.size, options.minutes or math.inf)
            if world.rank == 0:
                context = options.context or shape_at(depth, data.vocabulary).context
                length = f", {options.minutes:g} minutes" if options.minutes else ""
                say(
                    f"for {data.train.bytes / 1e6:,.2f} MB of text on {chip.name}: vocabulary "
                    f"{data.vocabulary:,}, depth {depth}, context {context:,}{length}; change it with "
                    "--vocabulary, --depth, --context, --minutes"
                )
        job = PretrainJob(out, options, world, device, tokenizer, depth, data, most, fp8=options.fp8)
        return run_training(job, run)


def _make_tokens(texts: CorpusOptions, tokenizer: Path, folder: Path) -> None:
    """Makes tokenizer and tokens, unless they are there."""
    is_finished = (folder / "tokens.json").is_file()
    if texts.corpus is None:
        if not is_finished:
            raise UserError("--corpus PATH is missing (or --token-folder with finished tokens)")
        if not (tokenizer / "tokenizer.json").is_file():
            raise UserError("--tokenizer FOLDER is missing: the one that the tokens were made with")
        return
    if texts.vocabulary is not None:
        require_vocabulary(texts.vocabulary)
    corpus = Corpus.open(
        texts.corpus,
        held_out=texts.held_out,
        held_share=texts.held_share,
        column=texts.text_column,
        keep_licences=texts.keep_licences,
    )
    if texts.tokenizer is None:
        make_tokenizer(corpus, tokenizer, vocabulary=texts.vocabulary)
    elif not (tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {tokenizer} has no tokenizer.json: not a tokenizer's folder")
    if not is_finished:
        for line in corpus.scan().lines():
            say(line)
    make_tokens(corpus, tokenizer, folder)


@dataclass(frozen=True)
class PretrainJob(TrainingJob):
    """Pretraining on tokens of a corpus."""

    options: PretrainOptions
    depth: int
    tokens: Tokens
    corpus: int | None
    "tokens of the corpus where the length follows from it"

    def settings(self) -> JsonObject:
        names = ("context", "batch", "tokens", "minutes", "rate_scale", "fp8", "seed")
        options = {name: getattr(self.options, name) for name in names}
        digests = {"corpus": self.tokens.corpus, "tokenizer": self.tokens.tokenizer}
        return {"stage": "base", "depth": self.depth, **options, **digests}

    def plan(self, speed: float | None = None, unit: int | None = None) -> Plan:
        def derive(batch: int | None) -> Plan:
            return make_plan(
                self.depth,
                vocabulary=self.tokens.vocabulary,
                context=self.options.context,
                tokens=self.options.tokens,
                minutes=self.options.minutes,
                chip=detect_chip(self.device),
                gpus=self.world.size,
                speed=speed,
                batch=batch,
                corpus=self.corpus,
            )

        plan = derive(self.options.batch)
        if speed is None or unit is None:
            return plan
        step = unit * plan.shape.context
        return derive(max(1, round((self.options.batch or plan.batch) / step)) * step)

    def batches(self, plan: Plan) -> CorpusBatches:
        context = plan.shape.context
        return CorpusBatches(self.tokens.train, context, plan.batch // context, self.options.seed)

    def initialise(self, model: GPT) -> None:
        model.initialise(self.options.seed)

    def start(self, plan: Plan) -> None:
        shape = plan.shape
        say(f"depth {shape.depth}, width {shape.width}: {shape.parameters / 1e6:,.1f} M parameters")
        epochs = describe_epochs(plan.tokens, len(self.tokens.train))
        say(f"{plan.tokens:,} tokens in {plan.steps:,} steps of {plan.batch:,}: {epochs}")

    def samples(self) -> TextSamples:
        return TextSamples(self.out, self._tokenizer, self.tokens.held_out)

    def evaluate(self, stepper: Stepper, step: int) -> JsonObject:
        plan, rows, context = stepper.plan, stepper.micro_batch, stepper.plan.shape.context
        most = None if step == plan.steps else max(plan.tokens // 200, rows * context * self.world.size)
        lengths = self._token_lengths.to(stepper.device)
        model, stream = stepper.model, self.tokens.held_out
        loss = held_out_bits_per_byte(model, stream, lengths, context, rows, self.world, most)
        return {"kind": "held-out", "step": step, **loss.to_json()}

    def outcome(self, plan: Plan, rows: Sequence[JsonObject]) -> JsonObject:
        last = [row for row in rows if row["kind"] == "held-out"][-1]
        return {"epochs": plan.tokens / len(self.tokens.train), "held_out": HeldOutLoss.from_json(last)}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_corpus_tokenizer(self.tokenizer)

    @cached_property
    def _token_lengths(self) -> torch.Tensor:
        return torch.from_numpy(token_sizes(self._tokenizer))
