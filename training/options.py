"""Options of pretraining and chat tuning; a string behind a field is its help on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from personatlas.persona.errors import UserError


@dataclass(frozen=True)
class ReadingOptions:
    """How a corpus is read and tokenised. Raises `UserError` for a vocabulary beside a tokenizer."""

    held_out: Path | None = None
    "texts for validation instead of a share of the corpus; taken out of the corpus if they are in it"
    held_share: float | None = None
    (
        "the share that is held out: documents by the hash of their names, a passage of each of a few; "
        "0.01 unless given, more of a small corpus"
    )
    keep_licences: bool = False
    "keep Project Gutenberg's headers and licences in the text"
    text_column: str = "text"
    "the key or column with the text in .jsonl and .parquet"
    tokenizer: Path | None = None
    "the folder of a tokenizer; trained on the corpus, into the run, unless given"
    vocabulary: int | None = None
    "tokens of a tokenizer that is trained here; up to 32,768, from the size of the corpus, unless given"
    token_folder: Path | None = None
    "where the tokenised corpus is kept; in the run unless given. With finished tokens no --corpus is needed"

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.vocabulary is not None:
            raise UserError(
                f"--vocabulary {self.vocabulary} is for a tokenizer made here; --tokenizer names one"
            )


@dataclass(frozen=True)
class CorpusOptions(ReadingOptions):
    """Texts to pretrain on, and how they are read."""

    corpus: Path | None = None


@dataclass(frozen=True)
class TrainOptions:
    """What pretraining and chat tuning share. Raises `UserError` for values that are not allowed."""

    rate_scale: float = 1.0
    "factor of all learning rates"
    micro_batch: int | None = None
    "rows at once on one GPU; changes memory, not the result"
    recompute: bool = False
    "compute the blocks' insides again in the backward pass: less memory, a third more time"
    minutes: float | None = None
    "train for what these GPUs do in so many minutes"
    keep: Literal["log", "last"] = "log"
    "checkpoints to keep: log (step 0, powers of two, the last) or last"
    seed: int = 0
    "seed for initialisation and data order"
    tensorboard: bool = False
    "write metrics for TensorBoard as well, into the run's folder"
    wandb: str | None = None
    "send metrics to this project of Weights & Biases as well"
    device: str | None = None
    "cuda or cpu instead of the first GPU there is"

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed} is not in 0..{2**63 - 1}")
        if not 0 < self.rate_scale < 100:
            raise UserError(f"--rate-scale {self.rate_scale} is no factor for rates; 1 changes nothing")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"--micro-batch {self.micro_batch}: give 1 row or more")


@dataclass(frozen=True)
class PretrainOptions(TrainOptions):
    """How long to pretrain, and what replaces the plan's own values."""

    tokens: int | None = None
    (
        "train on so many tokens; as many as are compute-optimal, and at most 16 epochs, unless --tokens or "
        "--minutes is given"
    )
    context: int | None = None
    "tokens that the model sees at once"
    batch: int | None = None
    "tokens of a step, over all GPUs; rates follow it"
    fp8: bool = False
    "multiply the blocks' matrices in 8 bits, on Hopper and later: 1.08 times as fast at depth 20, not at 12"


@dataclass(frozen=True)
class ChatDataOptions:
    """Conversations to tune on."""

    data: tuple[str, ...] = ()
    (
        "conversations (JSON, JSONL, CSV, Parquet, also packed), a run's folder with rollouts, or demo "
        "(packaged chats in 36 roles); again for more. "
        "PATH=2x is read twice in an epoch, PATH=30% gives 30% of the answers' tokens"
    )
    columns: str = ""
    (
        "names of a file's own: question=title,answer=text "
        "(messages, system, persona, question, more, answer, source, weight)"
    )
    held_share: float = 0.02
    "the share of conversations that are held out, by the hash of their questions"
    held_out_roles: str = ""
    "roles or personas to hold out altogether: pirate,ghost"
    score: int | None = None
    "of rollouts: only answers with at least this judge's score, 0 to 3"
    per_role: int | None = None
    "of rollouts: at most so many answers of a role"
    cut: bool = False
    "of rollouts: also answers that the token limit cut"


@dataclass(frozen=True)
class FinetuneOptions(TrainOptions):
    """How long to tune. Raises `UserError` for both lengths and for lengths that are not allowed."""

    epochs: float | None = None
    "read the conversations so often; 2 times unless --epochs or --minutes is given"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.minutes is not None:
            raise UserError("--epochs and --minutes both say how long to tune; give one of them")
        for name, value in (("epochs", self.epochs), ("minutes", self.minutes)):
            if value is not None and not 0 < value < 1e6:
                raise UserError(f"--{name} {value:g} is no time to tune in")
