"""Bits per byte of held-out text: a loss that does not depend on the tokenizer.

    bits_per_byte = Σ nats / (ln 2 · Σ bytes)

over every target that stands for text: the mark that begins a document is no text, and neither its loss nor a byte of it
counts, as in nanochat. Rows of one context follow one another, so a token sees half a context of text on average.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from personaxis.persona.ranks import Ranks
from personaxis.training.batches import held_out_rows
from personaxis.training.loss import IGNORED
from personaxis.training.tokens import Stream
from personaxis.training.world import summed


@dataclass(frozen=True)
class Fit:
    """How well a model predicts a text."""

    bits_per_byte: float
    loss: float
    "nats a token"
    tokens: int
    bytes: int

    def row(self, step: int) -> dict[str, Any]:
        """As it stands in metrics.jsonl."""
        return {"kind": "held-out", "step": step, **asdict(self)}


@torch.no_grad()
def fit_of(
    forward: Callable[..., Tensor],
    stream: Stream,
    lengths: Tensor,
    context: int,
    rows: int,
    ranks: Ranks = Ranks(),
    most: int | None = None,
) -> Fit:
    """Read a stream and sum its loss: over all of it, or (with `most`) over about so many tokens, spread over all of it.

    `forward(ids, targets)` gives the summed loss in nats of what is not ignored. `lengths` (V,) are the bytes that each id stands
    for, on the device to compute on. All ranks share the work and get the same answer.
    """
    nats, counted, size = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    every = 1 if most is None else max(1, len(stream) // max(most, 1))
    for ids, counts in held_out_rows(stream, context, rows, ranks.rank, ranks.world, every):
        targets = ids[:, 1:].to(lengths.device)
        each = lengths[targets] * counts.to(lengths.device)  # (B, T)
        targets = torch.where(each > 0, targets, IGNORED)
        nats += forward(ids[:, :-1].to(lengths.device), targets).double().cpu()
        counted += (each > 0).sum().cpu()
        size += each.sum().cpu()
    found = summed(torch.stack([nats, counted, size]), ranks).tolist()
    nats_, tokens, bytes_ = found[0], int(found[1]), int(found[2])
    return Fit(nats_ / (math.log(2) * max(bytes_, 1)), nats_ / max(tokens, 1), tokens, bytes_)
