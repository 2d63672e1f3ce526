"""What `train chat` is asked for: options, without anything that is heavy to import."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from personaxis.persona.errors import KnownError
from personaxis.training.asked import require_seed


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
            raise KnownError("--epochs and --minutes both say how long to tune; give one of them")
        for name, value in (("epochs", self.epochs), ("minutes", self.minutes)):
            if value is not None and not 0 < value < 1e6:
                raise KnownError(f"--{name} {value:g} is no time to tune in")


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
    style_answers: int = 200
    "answers to held-out questions that are generated to look at their style; 0 leaves that out"

    def __post_init__(self) -> None:
        require_seed(self.seed)
        if not 0 < self.rate_scale < 100:
            raise KnownError(f"--rate-scale {self.rate_scale} is no factor for rates (1 leaves them as they are)")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise KnownError(f"--micro-batch {self.micro_batch}: give 1 row or more")
        if self.style_answers < 0:
            raise KnownError(f"--style-answers {self.style_answers} is below 0")


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
