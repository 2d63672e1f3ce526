"""What a training verb is asked for: options, without anything that is heavy to import."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from personaxis.persona.errors import KnownError


def require_seed(seed: int) -> None:
    """`KnownError` for a number that no generator takes."""
    if not 0 <= seed < 2**63:
        raise KnownError(f"--seed {seed} is not in 0..{2**63 - 1}")


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
            raise KnownError(
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
