"""The data of chat tuning: read, split, tokenised, weighted and packed.

    datasets = read_datasets(["chats.jsonl", "roles.jsonl=2x", "runs/smollm2-135m=30%"], left_out)
    parts = split_examples(datasets, 0.02)                # parts.train, parts.held_out: examples by data set
    epoch_times(datasets, (800_000, 90_000, 500_000))     # (1.0, 2.0, 0.84): 30% of the tokens of the third
    data = prepare_chat_data(options, encoder, context=2048, seed=0, world=world)
    data.batches.rows_at(...), data.held_out.row(model, ...), data.lines()

`=2x` is how many times an epoch reads a data set; 0.5x reads another half of it in every epoch. `=30%` is its
share of the answers' tokens, whatever the others hold. A data set with neither is read once. Where all have a
share, an epoch is as long as it can be without reading anything twice.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from personatlas.persona.artifacts import digest
from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.formats import Columns, Exclusions
from personatlas.persona.records import JsonObject
from personatlas.training.chat.conversations import (
    MAX_WEIGHT,
    ChatExample,
    RolloutFilter,
    has_rollouts,
    read_examples,
    read_rollout_examples,
    source_name,
)
from personatlas.training.chat.heldout_loss import HeldOutAnswers
from personatlas.training.chat.packing import ChatBatches, ChatEncoder, EncodedExamples, encode_examples
from personatlas.training.data.split import hash_share
from personatlas.training.data.tokenizer import PAD
from personatlas.training.options import ChatDataOptions

# 783 answers of the packaged model (SmolLM2-135M-Instruct) to 24 questions, as itself and in 35 roles of the
# bank, at most 64 tokens long and cut at a sentence's end; those that repeat a sentence are left out
DEMO = Path(__file__).parent / "demo.jsonl.xz"
WEIGHT = re.compile(r"(?P<path>.+)=(?P<number>\d+(\.\d+)?)(?P<unit>x|%|)")


@dataclass(frozen=True)
class ChatDataset:
    """One `--data`: its conversations and how much of them is wanted."""

    path: Path
    times: float | None
    "how often an epoch reads it"
    share: float | None
    "of the answers' tokens, 0 to 1, instead"
    examples: tuple[ChatExample, ...] = ()

    def to_json(self) -> JsonObject:
        """As in run.json."""
        files = sorted(self.path.glob("rollouts*.jsonl")) if self.path.is_dir() else [self.path]
        return {
            "path": str(self.path),
            "sha256": [digest(file) for file in files],
            "times": self.times,
            "share": self.share,
            "conversations": len(self.examples),
        }


def parse_dataset(text: str) -> ChatDataset:
    """PATH, PATH=2x or PATH=30%, not yet read. A path that exists is a path, whatever it is called."""
    path = Path(text)
    match = None if path.exists() else WEIGHT.fullmatch(text)
    path = path if match is None else Path(match["path"])
    path = DEMO if str(path) == "demo" and not path.exists() else path
    if match is None:
        return ChatDataset(path, 1.0, None)
    number, unit = float(match["number"]), match["unit"]
    if not unit:
        raise UserError(
            f"--data {text}: say {number:g}x (times an epoch) or {number:g}% (of the answers' tokens)"
        )
    if number == 0 or (unit == "%" and number > 100):
        raise UserError(f"--data {text}: {number:g}{unit} cannot be read; give another, or leave it out")
    if unit == "x" and number > MAX_WEIGHT:
        raise UserError(f"--data {text}: an epoch reads it {MAX_WEIGHT} times at most; give more --epochs")
    return ChatDataset(path, number, None) if unit == "x" else ChatDataset(path, None, number / 100)


def read_datasets(
    texts: Sequence[str],
    left_out: Exclusions,
    columns: Columns = Columns(),
    selection: RolloutFilter = RolloutFilter(),
) -> list[ChatDataset]:
    """Reads every `--data`, a file or the folder of a run.

    Raises `UserError` where one gives nothing, is given twice, or shares do not add up.
    """
    datasets = [parse_dataset(text) for text in texts]
    if not datasets:
        raise UserError(
            "give conversations: --data FILE, --data RUN (a run's folder with rollouts), or --data demo, the "
            "packaged ones"
        )
    twice = [
        path for path, count in Counter(dataset.path.resolve() for dataset in datasets).items() if count > 1
    ]
    if twice:
        raise UserError(f"--data {twice[0]} is given twice; say how often it is read with {twice[0].name}=2x")
    total = sum(dataset.share or 0.0 for dataset in datasets)
    all_shared = all(dataset.share for dataset in datasets)
    if total > 1 + 1e-9 or (all_shared and total < 1 - 1e-9) or (not all_shared and total > 1 - 1e-9):
        raise UserError(
            f"the shares of --data add up to {100 * total:g}%: 100% where all have one, else less"
        )
    if selection != RolloutFilter() and not any(has_rollouts(dataset.path) for dataset in datasets):
        raise UserError("--score, --per-role and --cut are about rollouts; no --data is the folder of a run")
    names = Counter(source_name(dataset.path) for dataset in datasets)
    read = []
    for dataset in datasets:
        path, name = dataset.path, source_name(dataset.path)
        if has_rollouts(path):
            examples = read_rollout_examples(path, left_out, selection)
        else:
            examples = read_examples(path, left_out, columns, name if names[name] == 1 else str(path))
        read.append(replace(dataset, examples=tuple(examples)))
    return read


@dataclass(frozen=True)
class ChatSplit:
    """Examples by data set, and the questions that are held out."""

    train: list[list[ChatExample]]
    held_out: list[list[ChatExample]]
    questions: frozenset[str]


def split_examples(
    datasets: Sequence[ChatDataset], share: float, held_out_roles: Sequence[str] = ()
) -> ChatSplit:
    """Each data set's examples to train on, and those that are held out.

    Held out are whole questions (what the user says in all turns), by the hash of their words: those of each
    data set until `share` of its examples are covered, and the same ones in all others, so that no question
    is on both sides. So are all examples of the `held_out_roles`, which the model is not tuned on.
    """
    if not 0 < share < 1:
        raise UserError(f"--held-share {share} is not between 0 and 1 (0.02: one conversation in 50)")
    roles = {example.role for dataset in datasets for example in dataset.examples}
    if unknown := sorted(set(held_out_roles) - roles):
        names = not_one_of(unknown[0], sorted(roles - {""}))
        raise UserError(f"--held-out-roles {names} (the roles and personas of the data)")
    questions: set[str] = set()
    for dataset in datasets:
        eligible = [example for example in dataset.examples if example.role not in held_out_roles]
        questions |= _held_out_questions(eligible, share)
    train: list[list[ChatExample]] = []
    held_out: list[list[ChatExample]] = []
    for dataset in datasets:
        of_roles = [
            example for example in dataset.examples if example.role and example.role in held_out_roles
        ]
        others = [
            example for example in dataset.examples if not (example.role and example.role in held_out_roles)
        ]
        train.append([example for example in others if example.question not in questions])
        held_out.append([example for example in others if example.question in questions])
        held_out[-1] += [replace(example, is_role_held_out=True) for example in of_roles]
    if not any(train) or not any(held_out):
        side = "held out" if not any(held_out) else "left to train on"
        raise UserError(f"no conversation is {side}: too few different questions; give more conversations")
    return ChatSplit(train, held_out, frozenset(questions))


def _held_out_questions(examples: Sequence[ChatExample], share: float) -> set[str]:
    """The first questions by hash until `share` of the examples are covered, but never all of them."""
    counts = Counter(example.question for example in examples)
    selected: set[str] = set()
    covered = 0
    for question in sorted(counts, key=lambda words: (hash_share(words), words)):
        if covered >= share * len(examples) or len(selected) == len(counts) - 1:
            break
        selected.add(question)
        covered += counts[question]
    return selected


def epoch_times(datasets: Sequence[ChatDataset], tokens: Sequence[int]) -> tuple[float, ...]:
    """How often an epoch reads each data set, given the answers' tokens in it (row weights counted)."""
    pairs = list(zip(datasets, tokens, strict=True))
    for dataset, count in pairs:
        if not count:
            raise UserError(f"--data {dataset.path}: nothing of it is left to train on")
    if all(dataset.share for dataset in datasets):
        total = min(count / (dataset.share or 1.0) for dataset, count in pairs)
    else:
        fixed = sum(count * (dataset.times or 0.0) for dataset, count in pairs)
        total = fixed / (1 - sum(dataset.share or 0.0 for dataset in datasets))
    return tuple(
        dataset.times if dataset.times is not None else (dataset.share or 0.0) * total / count
        for dataset, count in pairs
    )


@dataclass(frozen=True)
class ChatData:
    """Everything about the conversations of a run."""

    datasets: tuple[ChatDataset, ...]
    times: tuple[float, ...]
    "how often an epoch reads each data set"
    left_out: Exclusions
    train: tuple[ChatExample, ...]
    batches: ChatBatches
    held_out: HeldOutAnswers

    def settings(self) -> list[list[object]]:
        """What makes the data this data, for run.json: contents, times and shares."""
        rows = [dataset.to_json() for dataset in self.datasets]
        return [[row[name] for name in ("sha256", "times", "share")] for row in rows]

    def to_json(self) -> JsonObject:
        """As in run.json."""
        pairs = zip(self.datasets, self.times, strict=True)
        return {
            "parts": [dataset.to_json() | {"read": times} for dataset, times in pairs],
            "left_out": self.left_out.to_json(),
            "train": len(self.train),
            "held_out": len(self.held_out.examples),
            "epoch": self.batches.describe(),
        }

    def lines(self) -> list[str]:
        """For people: what is read how often, how full the rows are, and what was left out."""
        epoch = self.batches.describe()
        pairs = zip(self.datasets, self.times, strict=True)
        read = ", ".join(f"{dataset.path.name} {times:.3g}x" for dataset, times in pairs)
        held_out, context = len(self.held_out.examples), self.batches.context
        return [
            f"{len(self.train):,} conversations ({read} in an epoch), {held_out:,} held out",
            f"an epoch: {epoch['conversations']:,} conversations in {epoch['rows']:,} rows of {context:,} "
            f"tokens, {epoch['fill']:.1%} full, {epoch['counted']:,} tokens of answers",
            *(f"left out: {line}" for line in self.left_out.lines()),
        ]


def prepare_chat_data(
    options: ChatDataOptions, encoder: ChatEncoder, *, context: int, seed: int, world: World = World()
) -> ChatData:
    """Reads all data. Raises `UserError` for unusable data, and where nothing is left on a side."""
    left_out = Exclusions()
    selection = RolloutFilter(options.score, options.per_role, options.cut)
    datasets = read_datasets(options.data, left_out, Columns.parse(options.columns), selection)
    roles = [role.strip() for role in options.held_out_roles.split(",") if role.strip()]
    split = split_examples(datasets, options.held_share, roles)
    encoded = [encode_examples(examples, encoder, context, left_out) for examples in split.train]
    for dataset, examples, (_, fitting) in zip(datasets, split.train, encoded, strict=True):
        if len(examples) > 2 * len(fitting):
            raise UserError(
                f"--data {dataset.path}: {len(examples) - len(fitting):,} of {len(examples):,} conversations "
                f"are longer than the base's context of {context:,} tokens; give shorter ones, or train a base "
                "with a longer --context"
            )
    weights = [np.array([example.weight for example in fitting]) for _, fitting in encoded]
    tokens = [int((part.counted * weight).sum()) for (part, _), weight in zip(encoded, weights, strict=True)]
    times = epoch_times(datasets, tokens)
    train = tuple(example for _, fitting in encoded for example in fitting)
    held_out_part, held_out = encode_examples(
        [example for examples in split.held_out for example in examples], encoder, context, left_out
    )
    if not held_out:
        raise UserError(f"no held-out conversation fits into {context:,} tokens; give more conversations")
    batches = ChatBatches(
        EncodedExamples.concatenate([part for part, _ in encoded]),
        context=context,
        rows=1,
        pad=encoder.marks[PAD],
        seed=seed,
        times=np.concatenate([weight * time for weight, time in zip(weights, times, strict=True)]),
    )
    if not batches.epoch(0).rows:
        raise UserError("an epoch of --data reads no conversation: give a larger part")
    known = frozenset(text for example in train for text in example.answers)
    answers = HeldOutAnswers(held_out, held_out_part, world, known)
    return ChatData(tuple(datasets), times, left_out, train, batches, answers)
