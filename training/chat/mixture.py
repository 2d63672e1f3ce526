"""Several sources of conversations in one: how often each is read, and which conversations are held out.

    parts = read_parts(["chats.jsonl", "roles.jsonl=2x", "runs/smollm2-135m=30%"], faults)
    sides = split(parts, 0.02)                        # sides.train, sides.held: lists of conversations, by part
    times_of(parts, (800_000, 90_000, 500_000))       # (1.0, 2.0, 0.84): 30% of the answers' tokens come from the third

`=2x` is how many times an epoch reads a source; 0.5x reads another half of it in every epoch. `=30%` is its share of the
answers' tokens, whatever the others hold. A source with neither is read once. Where all sources have a share, an epoch is as long
as it can be without reading anything twice.

From `--data` to what chat tuning reads: read, split, tokenised, weighted, packed, and told in a few lines.

data = prepare(asked.chats, encoder, context=2048, seed=0, world=world)
data.source.rows_at(...), data.held_out.fit(model), data.lines()
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from personatlas.persona.artifacts import digest
from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.training.chat.conversations import (
    MOST,
    Columns,
    Conversation,
    Faults,
    Wanted,
    conversations_of_run,
    is_run,
    read_conversations,
    source_name,
)
from personatlas.training.chat.heldout_loss import HeldOut
from personatlas.training.chat.packing import ChatEncoder, ChatSource, Encoded, encoded
from personatlas.training.data.corpus import share_of
from personatlas.training.data.tokenizer import PAD
from personatlas.training.options import Chats

WEIGHT = re.compile(r"(?P<path>.+)=(?P<number>\d+(\.\d+)?)(?P<unit>x|%|)")


@dataclass(frozen=True)
class Part:
    """One `--data`: its conversations and how much of them is wanted."""

    path: Path
    times: float | None
    "how often an epoch reads it"
    share: float | None
    "of the answers' tokens, 0 to 1, instead"
    conversations: tuple[Conversation, ...] = ()

    def record(self) -> dict[str, Any]:
        """For run.json."""
        files = sorted(self.path.glob("rollouts*.jsonl")) if self.path.is_dir() else [self.path]
        return {
            "path": str(self.path),
            "sha256": [digest(file) for file in files],
            "times": self.times,
            "share": self.share,
            "conversations": len(self.conversations),
        }


def part_of(asked: str) -> Part:
    """A `--data` without its conversations. A path that is there is a path, whatever it ends in."""
    path = Path(asked)
    found = None if path.exists() else WEIGHT.fullmatch(asked)
    if found is None:
        return Part(path, 1.0, None)
    number, unit, path = float(found["number"]), found["unit"], Path(found["path"])
    if not unit:
        raise UserError(
            f"--data {asked}: say {number:g}x (read {number:g} times in an epoch) or {number:g}% (of the answers' tokens)"
        )
    if number == 0 or (unit == "%" and number > 100):
        raise UserError(
            f"--data {asked}: {number:g}{unit} of a source is nothing to train on; give another, or leave it out"
        )
    if unit == "x" and number > MOST:
        raise UserError(
            f"--data {asked}: an epoch reads a source {MOST} times at most; give more --epochs instead"
        )
    return Part(path, number, None) if unit == "x" else Part(path, None, number / 100)


def read_parts(
    asked: Sequence[str], faults: Faults, columns: Columns = Columns(), wanted: Wanted = Wanted()
) -> list[Part]:
    """Read every `--data`, a file or the folder of a run. Raises `UserError` where one gives nothing or shares do not add up."""
    parts = [part_of(one) for one in asked]
    if not parts:
        raise UserError("give conversations with --data FILE, or the folder of a run with rollouts")
    twice = [path for path, count in Counter(part.path.resolve() for part in parts).items() if count > 1]
    if twice:
        raise UserError(f"--data {twice[0]} is given twice; say how often it is read with {twice[0].name}=2x")
    total = sum(part.share or 0.0 for part in parts)
    alone = all(part.share for part in parts)
    if total > 1 + 1e-9 or (alone and total < 1 - 1e-9) or (not alone and total > 1 - 1e-9):
        raise UserError(
            f"the shares of --data add up to {100 * total:g}%: where all have one that must be 100%, else less"
        )
    if wanted != Wanted() and not any(is_run(part.path) for part in parts):
        raise UserError(
            "--score, --per-role and --cut are about rollouts, and no --data is the folder of a run"
        )
    names = Counter(source_name(part.path) for part in parts)
    read = []
    for part in parts:
        name = source_name(part.path)
        if is_run(part.path):
            found = conversations_of_run(part.path, faults, wanted)
        else:
            found = read_conversations(
                part.path, faults, columns, name if names[name] == 1 else str(part.path)
            )
        read.append(replace(part, conversations=tuple(found)))
    return read


@dataclass(frozen=True)
class Sides:
    """Conversations by part, and the questions that are held out."""

    train: list[list[Conversation]]
    held: list[list[Conversation]]
    questions: frozenset[str]


def split(parts: Sequence[Part], share: float, apart: Sequence[str] = ()) -> Sides:
    """Each part's conversations to train on, and those that are held out.

    Held out are whole questions (what the user says in all turns), by the hash of their words: those of each part until
    `share` of its conversations are covered, and the same ones in all other parts, so that no question is on both sides
    whoever answers it. So are all conversations in a style of `apart`: roles that the model is not tuned on.
    """
    if not 0 < share < 1:
        raise UserError(
            f"--held-share {share} is not between 0 and 1 (0.02 holds out one conversation in 50)"
        )
    styles = {one.style for part in parts for one in part.conversations}
    unknown = sorted(set(apart) - styles)
    if unknown:
        some = ", ".join(sorted(styles - {""})[:8]) or "none"
        raise UserError(f"--held-out-roles {unknown[0]} is no role or persona of the data; there are {some}")
    questions = frozenset(
        question
        for part in parts
        for question in _held_questions([one for one in part.conversations if one.style not in apart], share)
    )
    train: list[list[Conversation]] = []
    held: list[list[Conversation]] = []
    for part in parts:
        named = [one for one in part.conversations if one.style and one.style in apart]
        rest = [one for one in part.conversations if not (one.style and one.style in apart)]
        train.append([one for one in rest if one.question not in questions])
        held.append([one for one in rest if one.question in questions])
        held[-1] += [replace(one, apart=True) for one in named]
    if not any(train) or not any(held):
        side = "held out" if not any(held) else "left to train on"
        raise UserError(
            f"no conversation is {side}: there are too few different questions; give more conversations"
        )
    return Sides(train, held, questions)


def _held_questions(conversations: Sequence[Conversation], share: float) -> set[str]:
    counts = Counter(one.question for one in conversations)
    chosen: set[str] = set()
    covered = 0
    for question in sorted(counts, key=lambda words: (share_of(words), words)):
        if covered >= share * len(conversations) or len(chosen) == len(counts) - 1:
            break
        chosen.add(question)
        covered += counts[question]
    return chosen


def times_of(parts: Sequence[Part], tokens: Sequence[int]) -> tuple[float, ...]:
    """How often an epoch reads each part, given the answers' tokens in it (row weights counted)."""
    for part, count in zip(parts, tokens, strict=True):
        if not count:
            raise UserError(f"--data {part.path}: nothing of it is left to train on")
    shared = sum(part.share or 0.0 for part in parts)
    if all(part.share for part in parts):
        whole = min(count / (part.share or 1.0) for part, count in zip(parts, tokens, strict=True))
    else:
        fixed = sum(count * (part.times or 0.0) for part, count in zip(parts, tokens, strict=True))
        whole = fixed / (1 - shared)
    return tuple(
        part.times if part.times is not None else (part.share or 0.0) * whole / count
        for part, count in zip(parts, tokens, strict=True)
    )


@dataclass(frozen=True)
class ChatData:
    """Everything about the conversations of a run."""

    parts: tuple[Part, ...]
    times: tuple[float, ...]
    "how often an epoch reads each part"
    faults: Faults
    sides: Sides
    "before they were tokenised: what is too long is still in it"
    train: tuple[Conversation, ...]
    source: ChatSource
    held_out: HeldOut

    def asked(self) -> list[list[Any]]:
        """What makes the data this data, for run.json: contents, times and shares."""
        return [[one.record()[name] for name in ("sha256", "times", "share")] for one in self.parts]

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "parts": [
                one.record() | {"read": times} for one, times in zip(self.parts, self.times, strict=True)
            ],
            "left_out": self.faults.record(),
            "train": len(self.train),
            "held_out": len(self.held_out.conversations),
            "epoch": self.source.describe(),
        }

    def lines(self) -> list[str]:
        """For people: what is read how often, how full the rows are, and what was left out."""
        told = self.source.describe()
        read = ", ".join(
            f"{one.path.name} {times:.3g}x" for one, times in zip(self.parts, self.times, strict=True)
        )
        held = Counter(one.source for one in self.held_out.conversations)
        return [
            f"{len(self.train):,} conversations ({read} in an epoch), {sum(held.values()):,} held out",
            f"an epoch: {told['conversations']:,} conversations in {told['rows']:,} rows of {self.source.context:,} tokens, "
            f"{told['fill']:.1%} full, {told['counted']:,} tokens of answers",
            *(f"left out: {line}" for line in self.faults.lines()),
        ]


def prepare(
    asked: Chats, encoder: ChatEncoder, *, context: int, seed: int, world: World = World()
) -> ChatData:
    """Read all data. Raises `UserError` for data that cannot be used, and where nothing is left on a side."""
    faults = Faults()
    columns = Columns.of([one for one in asked.columns.split(",") if one])
    wanted = Wanted(asked.score, asked.per_role, asked.cut)
    parts = read_parts(asked.data, faults, columns, wanted)
    sides = split(
        parts, asked.held_share, [one.strip() for one in asked.held_out_roles.split(",") if one.strip()]
    )
    made = [encoded(one, encoder, context, faults) for one in sides.train]
    weights = [np.array([one.weight for one in kept]) for _, kept in made]
    tokens = [int((each.counted * weight).sum()) for (each, _), weight in zip(made, weights, strict=True)]
    times = times_of(parts, tokens)
    train = [one for _, kept in made for one in kept]
    rates = np.concatenate([weight * time for weight, time in zip(weights, times, strict=True)])
    held_tokens, held = encoded([one for part in sides.held for one in part], encoder, context, faults)
    if not held:
        raise UserError(
            f"no held-out conversation fits into the context of {context:,} tokens; give more conversations"
        )
    source = ChatSource(
        joined([each for each, _ in made]),
        context=context,
        rows=1,
        pad=encoder.marks[PAD],
        seed=seed,
        times=rates,
    )
    if not source.epoch(0).rows:
        raise UserError(
            "an epoch of --data reads no conversation: so small a part of so few is none; give a larger one"
        )
    known = frozenset(text for one in train for text in one.answers)
    held_out = HeldOut(held, held_tokens, world, known)
    return ChatData(tuple(parts), times, faults, sides, tuple(train), source, held_out)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Several in one."""
    before = np.cumsum([0, *(len(part.ids) for part in parts)])
    return Encoded(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.marked for part in parts]),
        np.concatenate([part.ends + start for part, start in zip(parts, before, strict=False)]),
    )
