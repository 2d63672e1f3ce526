"""How well a model predicts the answers of conversations that it was not tuned on, by source.

    held_out = HeldOutAnswers(examples, encoded, world)
    held_out.row(model, step=0, whole=True, max_tokens=10_000)["sources"]["all"]
    # {"loss": 2.1, "low": 2.0, "high": 2.2, "perplexity": 8.2, "tokens": 9000, "conversations": 300, ...}

    loss = Σ nats / Σ tokens       over the assistant's tokens, ends included; perplexity = exp(loss)

Conversations of similar length are read together, padded at their ends, which causal attention never sees: no
packing, so a figure does not depend on what else is held out. Intervals are 95%, from drawing questions again
with their conversations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64
from numpy import ndarray as Array
from torch import Tensor

from personatlas.analysis.stats import ratio_interval
from personatlas.persona.distributed import World
from personatlas.persona.records import Count, JsonObject, JsonRecord, NonNegative
from personatlas.training.chat.conversations import ChatExample
from personatlas.training.chat.packing import EncodedExamples
from personatlas.training.loop.distributed import all_sum
from personatlas.training.model.cross_entropy import IGNORED
from personatlas.training.model.gpt import GPT

BATCH_TOKENS = 16384  # padded tokens read at once
PIECE = 2048  # answers' tokens whose logits are held at once
MIN_EXAMPLES = 50  # that an evaluation reads, if there are so many


@dataclass(frozen=True)
class AnswerLoss(JsonRecord):
    """The loss on answers in nats a token, with its 95% interval (None for a single question)."""

    loss: NonNegative
    low: float | None
    high: float | None
    perplexity: NonNegative
    tokens: Count
    conversations: Count
    met: Count
    "conversations all of whose answers are also given, word for word, in training: their loss is memory"


class HeldOutAnswers:
    """Held-out conversations and their ids. `known` are the answers that are trained on.

    All ranks share the work and get the same answer.
    """

    def __init__(
        self,
        examples: Sequence[ChatExample],
        encoded: EncodedExamples,
        world: World = World(),
        known: frozenset[str] = frozenset(),
    ) -> None:
        self.examples, self.encoded, self.world = examples, encoded, world
        self.met = np.array([all(text in known for text in example.answers) for example in examples])

    def row(self, model: GPT, step: int, *, whole: bool, max_tokens: int) -> JsonObject:
        """A row of metrics.jsonl: the loss over about `max_tokens`, always the same, of roles that are tuned
        on.

        With `whole`, all conversations are read, and `sources` has the loss of each source.
        """
        n, tuned = len(self.encoded), self._tuned_roles
        tokens_each = int(self.encoded.lengths[tuned].sum())
        few = min(len(tuned), max(MIN_EXAMPLES, int(max_tokens * len(tuned) / max(1, tokens_each))))
        part = tuned[np.unique(np.linspace(0, len(tuned) - 1, few).astype(int))]
        numbers = np.arange(n) if whole else part
        nats = np.zeros(n)
        nats[numbers] = self.nats(model, numbers)
        tokens = int(self.encoded.counted[part].sum())
        loss = float(nats[part].sum() / tokens)
        row = {"kind": "held-out", "step": step, "bits_per_byte": None, "loss": loss, "tokens": tokens}
        row["bytes"] = None
        if whole:
            row["sources"] = {name: loss.to_json() for name, loss in self.losses(nats).items()}
        return row

    def losses(self, nats: Float64[Array, "N"]) -> dict[str, AnswerLoss]:
        """Losses by source, given all conversations' nats; held-out roles apart, and "all" without those."""
        groups = np.array([example.group for example in self.examples], dtype=object)
        losses = {}
        for source in ("all", *sorted(set(groups.tolist()))):
            part = self._tuned_roles if source == "all" else np.flatnonzero(groups == source)
            questions = [self.examples[number].question for number in part.tolist()]
            tokens = self.encoded.counted[part]
            found = ratio_interval(nats[part], tokens.astype(float), questions)
            loss, low, high = found.value, found.low, found.high
            perplexity, met = math.exp(min(loss, 700.0)), int(self.met[part].sum())
            losses[source] = AnswerLoss(loss, low, high, perplexity, int(tokens.sum()), len(part), met)
        return losses

    @property
    def _tuned_roles(self) -> Int64[Array, "M"]:
        """Conversations of roles that are tuned on; all of them where there are no others."""
        held_out = np.array([example.is_role_held_out for example in self.examples])
        return np.arange(len(held_out)) if held_out.all() else np.flatnonzero(~held_out)

    @torch.no_grad()
    def nats(self, model: GPT, numbers: Int64[Array, "M"]) -> Float64[Array, "M"]:
        """The summed loss of each conversation's answers."""
        device = model.lm_head.weight.device
        total = torch.zeros(len(self.encoded), dtype=torch.float64)
        groups: list[list[int]] = []  # read at once: by length, so that little is padded
        for number in sorted(
            numbers.tolist(), key=lambda number: (int(self.encoded.lengths[number]), number)
        ):
            length = int(self.encoded.lengths[number])  # the longest so far
            if groups and (len(groups[-1]) + 1) * length <= BATCH_TOKENS:
                groups[-1].append(number)
            else:
                groups.append([number])
        for index, group in enumerate(groups):
            if self.world.owns(index):
                total[group] = _summed_losses(model, *(part.to(device) for part in self._padded(group)))
        shared = total.to(device) if self.world.size > 1 else total
        return all_sum(shared, self.world).cpu().numpy()[numbers]

    def _padded(self, group: list[int]) -> tuple[Tensor, Tensor]:
        length = int(self.encoded.lengths[group].max())
        ids, targets = np.zeros((len(group), length), np.int64), np.full((len(group), length), IGNORED)
        for row, number in enumerate(group):
            inputs, wanted = self.encoded.inputs_and_targets(number)
            ids[row, : len(inputs)], targets[row, : len(inputs)] = inputs, wanted
        return torch.from_numpy(ids), torch.from_numpy(targets)


def _summed_losses(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """(B, T), (B, T) -> (B,) on the CPU. Logits are made where they count, in fp32: bf16 is off by 0.06."""
    h = model.hidden_states(ids)  # (B, T, D)
    rows, positions = torch.nonzero(targets != IGNORED, as_tuple=True)  # (M,)
    total = torch.zeros(len(ids), dtype=torch.float64)
    for start in range(0, len(rows), PIECE):
        piece = slice(start, start + PIECE)
        row, position = rows[piece], positions[piece]
        logits = model.lm_head(h[row, position].float())
        losses = F.cross_entropy(logits, targets[row, position], reduction="none")
        total.index_add_(0, row.cpu(), losses.double().cpu())
    return total
