"""How well a model predicts the answers of conversations that it was not tuned on, by source.

    held_out = HeldOut(conversations, tokens_of_them, world)
    held_out.row(model, step=0, whole=True, most=10_000)["sources"]["all"]
    # {"loss": 2.1, "low": 2.0, "high": 2.2, "perplexity": 8.2, "tokens": 9000, "conversations": 300}

    loss = Σ nats / Σ tokens       over the assistant's tokens, ends included; perplexity = exp(loss)

Conversations of like length are read together, padded behind their ends, which causal attention never sees: no packing, so a
figure does not depend on what else is held out. Intervals are 95%, from drawing questions again with their conversations.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64
from numpy import ndarray as Array
from torch import Tensor

from personatlas.analysis.stats import ratio_interval
from personatlas.persona.distributed import World
from personatlas.training.chat.conversations import Conversation
from personatlas.training.chat.packing import Encoded
from personatlas.training.loop.distributed import summed
from personatlas.training.model.cross_entropy import IGNORED
from personatlas.training.model.gpt import GPT

DRAWS = 1000
TOKENS = 16384  # padded tokens read at once
PIECE = 2048  # answers' tokens whose logits are held at once
FEWEST = 50  # conversations that an evaluation reads, if there are so many


class HeldOut:
    """Held-out conversations and their ids. All ranks share the work and get the same answer. `known` are the answers that
    are trained on: a low loss on an answer that is among them, to whatever question, is memory."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokens: Encoded,
        world: World = World(),
        known: frozenset[str] = frozenset(),
    ) -> None:
        self.conversations, self.tokens, self.world = conversations, tokens, world
        self.met = np.array([all(text in known for text in one.answers) for one in conversations])

    def row(self, model: GPT, step: int, *, whole: bool, most: int) -> dict[str, Any]:
        """As it stands in metrics.jsonl: of about `most` tokens, always the same, of roles that are tuned on; with `whole`
        also `sources`, of all conversations."""
        count, usual = len(self.tokens), self._usual
        few = min(
            len(usual), max(FEWEST, int(most * len(usual) / max(1, int(self.tokens.lengths[usual].sum()))))
        )
        chosen = usual[np.unique(np.linspace(0, len(usual) - 1, few).astype(int))]
        numbers = np.arange(count) if whole else chosen
        nats = np.zeros(count)
        nats[numbers] = self.nats(model, numbers)
        tokens = int(self.tokens.counted[chosen].sum())
        loss = float(nats[chosen].sum() / tokens)
        found = {
            "kind": "held-out",
            "step": step,
            "bits_per_byte": None,
            "loss": loss,
            "tokens": tokens,
            "bytes": None,
        }
        return found | {"sources": self.fits(nats)} if whole else found

    def fits(self, nats: Float64[Array, "N"]) -> dict[str, dict[str, Any]]:
        """What the conversations' nats amount to, by source, held-out roles apart; under "all" without those. `met` are the
        conversations all of whose answers are also given, word for word, in training."""
        groups = np.array([one.group for one in self.conversations], dtype=object)
        found = {}
        for source in ("all", *sorted(set(groups.tolist()))):
            mine = self._usual if source == "all" else np.flatnonzero(groups == source)
            questions = [self.conversations[place].question for place in mine.tolist()]
            found[source] = _fit(nats[mine], self.tokens.counted[mine], questions) | {
                "met": int(self.met[mine].sum())
            }
        return found

    @property
    def _usual(self) -> Int64[Array, "M"]:
        """Conversations of roles that are tuned on; all of them where there are no others."""
        apart = np.array([one.apart for one in self.conversations])
        return np.arange(len(apart)) if apart.all() else np.flatnonzero(~apart)

    @torch.no_grad()
    def nats(self, model: GPT, numbers: Int64[Array, "M"]) -> Float64[Array, "M"]:
        """The summed loss of each conversation's answers."""
        device = model.lm_head.weight.device
        found = torch.zeros(len(self.tokens), dtype=torch.float64)
        for place, group in enumerate(self._groups(numbers)):
            if place % self.world.size == self.world.rank:
                found[group] = _nats(model, *(part.to(device) for part in self._padded(group)))
        on = found.to(device) if self.world.size > 1 else found
        return summed(on, self.world).cpu().numpy()[numbers]

    def _groups(self, numbers: Int64[Array, "M"]) -> list[list[int]]:
        """Conversations to read at once: by length, so that little is padded."""
        groups: list[list[int]] = []
        for number in sorted(numbers.tolist(), key=lambda one: (int(self.tokens.lengths[one]), one)):
            length = int(self.tokens.lengths[number])  # the longest so far
            if groups and (len(groups[-1]) + 1) * length <= TOKENS:
                groups[-1].append(number)
            else:
                groups.append([number])
        return groups

    def _padded(self, group: list[int]) -> tuple[Tensor, Tensor]:
        length = int(self.tokens.lengths[group].max())
        ids, targets = np.zeros((len(group), length), np.int64), np.full((len(group), length), IGNORED)
        for place, number in enumerate(group):
            inputs, wanted = self.tokens.one(number)
            ids[place, : len(inputs)], targets[place, : len(inputs)] = inputs, wanted
        return torch.from_numpy(ids), torch.from_numpy(targets)


def _nats(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """(B, T) and (B, T) -> (B,) on the CPU. Logits are made where they count only, in fp32: in bf16 one of 20 is 0.06 off."""
    h = model.residuals(ids)  # (B, T, D)
    rows, places = torch.nonzero(targets != IGNORED, as_tuple=True)  # (M,)
    total = torch.zeros(len(ids), dtype=torch.float64)
    for start in range(0, len(rows), PIECE):
        part = slice(start, start + PIECE)
        row, place = rows[part], places[part]
        losses = F.cross_entropy(model.lm_head(h[row, place].float()), targets[row, place], reduction="none")
        total.index_add_(0, row.cpu(), losses.double().cpu())
    return total


def _fit(nats: Float64[Array, "M"], tokens: Int64[Array, "M"], questions: Sequence[str]) -> dict[str, Any]:
    loss = float(nats.sum() / tokens.sum())
    low, high = ratio_interval(nats, tokens.astype(float), questions, DRAWS) or (None, None)
    return {
        "loss": loss,
        "low": low,
        "high": high,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": int(tokens.sum()),
        "conversations": len(nats),
    }
