"""Texts that are read again, prompt and answer, in padded batches.

for batch in batches(subject, rollouts, batch_tokens(subject, 2048, 65536)):
    subject.base(input_ids=batch.ids, use_cache=False)
    batch.losses(batch.log_probs(subject))
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from personaxis.persona.rollouts import Rollout
from personaxis.persona.sampler import batch_end, pad
from personaxis.persona.subject import Subject


class Texts:
    """A padded batch of B texts: `places` are their numbers among all, answers begin at `starts` (B,) and end at `lengths`."""

    def __init__(self, subject: Subject, texts: Sequence[Rollout], places: Sequence[int]) -> None:
        self.texts, self.places, self.device = tuple(texts), tuple(places), subject.device
        self.starts = torch.tensor([len(text.prompt_ids) for text in texts])
        self.lengths = self.starts + torch.tensor([len(text.answer_ids) for text in texts])

    @cached_property
    def ids(self) -> Int[Tensor, "B T"]:
        """Token ids on the subject's device."""
        return pad([text.prompt_ids + text.answer_ids for text in self.texts], self.device)

    @property
    def real(self) -> Bool[Tensor, "B T"]:
        """Which columns hold tokens."""
        return torch.arange(int(self.lengths.max())) < self.lengths[:, None]

    @property
    def answer(self) -> Bool[Tensor, "B T"]:
        """Which columns hold tokens of answers."""
        return self.real & (torch.arange(int(self.lengths.max())) >= self.starts[:, None])

    @cached_property
    def predicted(self) -> tuple[Tensor, Tensor]:
        """Rows and columns (M,) of the answers' tokens, on the subject's device."""
        rows, columns = self.answer.nonzero(as_tuple=True)
        return rows.to(self.device), columns.to(self.device)

    def log_probs(self, subject: Subject) -> Float[Tensor, "M V"]:
        """Log-probabilities, fp32, at the M places before the answers' tokens."""
        first, (rows, columns) = int(self.starts.min()) - 1, self.predicted
        logits = subject.model(
            input_ids=self.ids, use_cache=False, logits_to_keep=self.ids.shape[1] - first
        ).logits  # (B, T - first, V)
        return logits[rows, columns - 1 - first].float().log_softmax(-1)

    def token_losses(self, log_probs: Float[Tensor, "M V"]) -> Float[Tensor, " M"]:
        """Loss of each of the answers' tokens."""
        return -log_probs.gather(1, self.ids[self.predicted][:, None])[:, 0]

    def losses(self, log_probs: Float[Tensor, "M V"]) -> list[float]:
        """Summed loss of each text."""
        return self._by_text(self.token_losses(log_probs))

    def divergences(self, plain: Float[Tensor, "M V"], now: Float[Tensor, "M V"]) -> list[float]:
        """Summed KL(plain || now) of each text."""
        return self._by_text((plain.exp() * (plain - now)).sum(-1))

    def _by_text(self, values: Tensor) -> list[float]:
        total = torch.zeros(len(self.texts), dtype=torch.float64, device=values.device)
        found: list[float] = total.index_add_(0, self.predicted[0], values.double()).tolist()
        return found


def batches(subject: Subject, texts: Sequence[Rollout], tokens: int) -> Iterator[Texts]:
    """All texts, longest first, in batches of at most so many padded tokens (but at least one text)."""
    sizes = [len(text.prompt_ids) + len(text.answer_ids) for text in texts]
    order = sorted(range(len(texts)), key=sizes.__getitem__, reverse=True)
    lengths, first = [sizes[i] for i in order], 0
    while first < len(order):
        stop = batch_end(lengths, first, tokens)
        yield Texts(subject, [texts[i] for i in order[first:stop]], order[first:stop])
        first = stop
