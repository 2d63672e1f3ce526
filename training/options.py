"""What a training verb is asked for: options, without anything that is heavy to import.

What `train chat` is asked for: options, without anything that is heavy to import.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from personatlas.persona.errors import UserError


def require_seed(seed: int) -> None:
    """`UserError` for a number that no generator takes."""
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed} is not in 0..{2**63 - 1}")


@Parameter(name="*")
@dataclass(frozen=True)
class Length:
    """How long to train; for the compute-optimal number of tokens unless given."""

    tokens: int | None = None
    "so many tokens"
    minutes: float | None = None
    "what these GPUs do in so many minutes"


@Parameter(name="*")
@dataclass(frozen=True)
class Texts:
    """What to train on."""

    corpus: Path | None = None
    "a folder or file: .txt, .jsonl, .parquet, tar archives of .txt; each plain or packed; or hub:OWNER/NAME[/FOLDER][@REVISION]"
    held_out: Path | None = None
    "texts for validation instead of a share of the corpus; taken out of the corpus if they are in it"
    held_share: float = 0.01
    "the share of documents that are held out, by the hash of their names"
    text_column: str = "text"
    "the key or column with the text in .jsonl and .parquet"
    tokenizer: Path | None = None
    "the folder of a tokenizer; trained on the corpus, into the run, unless given"
    vocabulary: int | None = None
    "tokens of a tokenizer that is trained here; 32,768 unless given"
    token_folder: Path | None = None
    "where the tokenised corpus is kept; in the run unless given. With finished tokens no --corpus is needed"

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.vocabulary is not None:
            raise UserError(
                f"--vocabulary {self.vocabulary} is for a tokenizer that is trained, and --tokenizer names one"
            )


@Parameter(name="*")
@dataclass(frozen=True)
class Tuning:
    """What the dial derives, overridden."""

    context: int | None = None
    "tokens that the model sees at once"
    batch: int | None = None
    "tokens of a step, over all GPUs; rates follow it"
    rate_scale: float = 1.0
    "all rates times this"
    micro_batch: int | None = None
    "rows at once on one GPU; changes memory, not the result"
    recompute: bool = False
    "compute the blocks' insides again in the backward pass: less memory, a third more time"
    fp8: bool = False
    "multiply the blocks' matrices in 8 bits, on Hopper GPUs and later: 1.08 times as fast at depth 20, slower at 12"
    keep: Literal["log", "last"] = "log"
    "checkpoints to keep: log (step 0, powers of two, the last) or last"
    seed: int = 0
    "of the first weights and of the order of the text"


@Parameter(name="*")
@dataclass(frozen=True)
class Around:
    """Where a run is and who hears of it."""

    tensorboard: bool = False
    "write metrics for TensorBoard as well, into the run's folder"
    wandb: str | None = None
    "send metrics to this project of Weights & Biases as well"
    device: str | None = None
    "cuda or cpu instead of the first GPU there is"


@dataclass(frozen=True)
class BaseAsked:
    """All that `train base` is asked for."""

    depth: int
    out: Path
    texts: Texts = Texts()
    length: Length = Length()
    tuning: Tuning = Tuning()
    tensorboard: bool = False
    wandb: str | None = None
    device: str | None = None


@Parameter(name="*")
@dataclass(frozen=True)
class Chats:
    """What to tune on."""

    data: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative=())] = ()
    "conversations (.jsonl or .json, also packed) or the folder of a run with rollouts; again for more. PATH=2x is read twice in an epoch, PATH=30% gives 30% of the answers' tokens"
    columns: str = ""
    "names of a file's own: question=title,answer=text (messages, system, persona, question, more, answer, source, weight)"
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


@Parameter(name="*")
@dataclass(frozen=True)
class ChatLength:
    """How long to tune."""

    epochs: float | None = None
    "how often the conversations are read; 2 unless given"
    minutes: float | None = None
    "what these GPUs do in so many minutes, instead"

    def __post_init__(self) -> None:
        if self.epochs is not None and self.minutes is not None:
            raise UserError("--epochs and --minutes both say how long to tune; give one of them")
        for name, value in (("epochs", self.epochs), ("minutes", self.minutes)):
            if value is not None and not 0 < value < 1e6:
                raise UserError(f"--{name} {value:g} is no time to tune in")


@Parameter(name="*")
@dataclass(frozen=True)
class ChatTuning:
    """What is derived, overridden."""

    rate_scale: float = 1.0
    "all rates times this"
    micro_batch: int | None = None
    "rows at once on one GPU; changes memory, not the result"
    recompute: bool = False
    "compute the blocks' insides again in the backward pass: less memory, a third more time"
    keep: Literal["log", "last"] = "log"
    "checkpoints to keep: log (step 0, powers of two, the last) or last"
    seed: int = 0
    "of the order of the conversations"

    def __post_init__(self) -> None:
        require_seed(self.seed)
        if not 0 < self.rate_scale < 100:
            raise UserError(
                f"--rate-scale {self.rate_scale} is no factor for rates (1 leaves them as they are)"
            )
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"--micro-batch {self.micro_batch}: give 1 row or more")


@dataclass(frozen=True)
class ChatAsked:
    """All that `train chat` is asked for."""

    base: Path
    out: Path
    chats: Chats = Chats()
    length: ChatLength = ChatLength()
    tuning: ChatTuning = ChatTuning()
    tensorboard: bool = False
    wandb: str | None = None
    device: str | None = None
