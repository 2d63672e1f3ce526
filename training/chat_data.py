"""From `--data` to what chat tuning reads: read, split, tokenised, weighted, packed, and told in a few lines.

data = prepare(asked.chats, encoder, context=2048, seed=0, ranks=place)
data.source.rows_at(...), data.held_out.fit(model), data.lines()
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from personaxis.persona.errors import KnownError
from personaxis.persona.ranks import Ranks
from personaxis.training.chat_asked import Chats
from personaxis.training.chat_tokens import ChatEncoder, Encoded, encoded
from personaxis.training.conversations import Columns, Conversation, Faults
from personaxis.training.from_rollouts import Wanted
from personaxis.training.held_out import HeldOut
from personaxis.training.mixture import Part, Sides, read_parts, split, times_of
from personaxis.training.packing import ChatSource
from personaxis.training.tokenizer import PAD


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
            "parts": [one.record() | {"read": times} for one, times in zip(self.parts, self.times, strict=True)],
            "left_out": self.faults.record(),
            "train": len(self.train),
            "held_out": len(self.held_out.conversations),
            "epoch": self.source.describe(),
        }

    def lines(self) -> list[str]:
        """For people: what is read how often, how full the rows are, and what was left out."""
        told = self.source.describe()
        read = ", ".join(f"{one.path.name} {times:.3g}x" for one, times in zip(self.parts, self.times, strict=True))
        held = Counter(one.source for one in self.held_out.conversations)
        return [
            f"{len(self.train):,} conversations ({read} in an epoch), {sum(held.values()):,} held out",
            f"an epoch: {told['conversations']:,} conversations in {told['rows']:,} rows of {self.source.context:,} tokens, "
            f"{told['fill']:.1%} full, {told['counted']:,} tokens of answers",
            *(f"left out: {line}" for line in self.faults.lines()),
        ]


def prepare(asked: Chats, encoder: ChatEncoder, *, context: int, seed: int, ranks: Ranks = Ranks()) -> ChatData:
    """Read all data. Raises `KnownError` for data that cannot be used, and where nothing is left on a side."""
    faults = Faults()
    columns = Columns.of([one for one in asked.columns.split(",") if one])
    wanted = Wanted(asked.score, asked.per_role, asked.cut)
    parts = read_parts(asked.data, faults, columns, wanted)
    sides = split(parts, asked.held_share, [one.strip() for one in asked.held_out_roles.split(",") if one.strip()])
    made = [encoded(one, encoder, context, faults) for one in sides.train]
    weights = [np.array([one.weight for one in kept]) for _, kept in made]
    tokens = [int((each.counted * weight).sum()) for (each, _), weight in zip(made, weights, strict=True)]
    times = times_of(parts, tokens)
    train = [one for _, kept in made for one in kept]
    rates = np.concatenate([weight * time for weight, time in zip(weights, times, strict=True)])
    held_tokens, held = encoded([one for part in sides.held for one in part], encoder, context, faults)
    if not held:
        raise KnownError(
            f"no held-out conversation fits into the context of {context:,} tokens; give more conversations"
        )
    source = ChatSource(
        joined([each for each, _ in made]), context=context, rows=1, pad=encoder.marks[PAD], seed=seed, times=rates
    )
    if not source.epoch(0).rows:
        raise KnownError(
            "an epoch of --data reads no conversation: so small a part of so few is none; give a larger one"
        )
    known = frozenset(text for one in train for text in one.answers)
    held_out = HeldOut(held, held_tokens, ranks, known)
    return ChatData(tuple(parts), times, faults, sides, tuple(train), source, held_out)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Several in one."""
    before = np.cumsum([0, *(len(part.ids) for part in parts)])
    return Encoded(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.marked for part in parts]),
        np.concatenate([part.ends + start for part, start in zip(parts, before, strict=False)]),
    )
