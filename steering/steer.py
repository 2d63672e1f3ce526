"""Steering a subject: interventions as hooks on its blocks for the length of a context, with an account of what they did.

    with steered(subject, [cap]) as held:
        held.begin()                                          # a batch, with an account of its own
        held.describe(lengths=lengths, answer_from=starts)    # what is padding, what is the answer
        subject.model(input_ids=ids)
    held.tally.fired                                        # (C, B) tokens that were changed, by layer and row

The step is computed in fp32 whatever the model's dtype, and a token that it does not change is bitwise what it was. The
model is left as it was found, also after an exception. A hook that did not fire is an error when the account is read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from personaxis.persona.errors import KnownError
from personaxis.persona.subject import Subject, residual
from personaxis.steering.interventions import Intervention, Step, steps_of


class Silent(RuntimeError):
    """A hook did not fire in a forward: something goes around the blocks, and what was made is not steered."""


@dataclass(frozen=True)
class Tally:
    """What was done, by layer and row of the batch. C steered layers, B rows.

    `seen` tokens were in the phase of a step at that layer, `fired` were changed; `total` and `most` are the sum and the
    largest size of the corrections (residual units). A layer with several steps counts a token once, with the whole
    correction's length.
    """

    layers: tuple[int, ...]
    seen: Int[Tensor, "C B"]
    fired: Int[Tensor, "C B"]
    total: Float[Tensor, "C B"]
    most: Float[Tensor, "C B"]

    @property
    def share(self) -> float:
        """Fired tokens among those seen, over all layers and rows; NaN when none was seen."""
        seen = int(self.seen.sum())
        return int(self.fired.sum()) / seen if seen else float("nan")


def correct(
    h: Float[Tensor, "B T D"], steps: Sequence[Step], prompt: Bool[Tensor, "B T"], answer: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T"]]:
    """The steps in order on the tokens of their phase, and the length of each token's whole correction; fp32 inside."""
    moved = h.float()
    changed = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
    for step in steps:
        vector = step.vector.to(h.device, torch.float32)
        projection = moved @ vector  # (B, T)
        delta = projection.clamp(step.floor, step.ceiling) - projection + step.add
        there = {"prompt": prompt, "answer": answer, "both": prompt | answer}[step.phase]
        delta = torch.where(there, delta, torch.zeros_like(delta))
        changed = changed | (delta != 0)
        moved = moved + delta[..., None] * vector
    length = torch.where(changed, (moved - h.float()).norm(dim=-1), torch.zeros_like(moved[..., 0]))
    return torch.where(changed[..., None], moved.to(h.dtype), h), length


class Steering:
    """Interventions that are on. Without `begin` and `describe` every row is steered and every token is an answer's."""

    def __init__(self, subject: Subject, interventions: Sequence[Intervention]) -> None:
        self.subject = subject
        self.steps = steps_of(interventions)
        _require(subject, interventions, self.steps)
        self.layers = tuple(sorted(self.steps))
        self._forwards, self._fires = 0, dict.fromkeys(self.layers, 0)
        self.begin()

    def begin(self, rows: Bool[Tensor, " B"] | None = None) -> None:
        """Start a batch with an account of its own; `rows` are those that are steered at all."""
        self._rows = rows
        self._counts: dict[int, list[Tensor]] = {}
        self.describe()

    def describe(self, lengths: Int[Tensor, " B"] | None = None, answer_from: Int[Tensor, " B"] | None = None) -> None:
        """What the columns of the next forwards are: real tokens of each row (padding on the right is ignored), and the column at
        which its answer begins; 0, or nothing, where all are answer tokens, as when decoding."""
        self._spans = lengths, answer_from

    @property
    def tally(self) -> Tally:
        """The account of this batch. Raises `Silent` when a layer's hook did not fire in every forward."""
        silent = [layer for layer in self.layers if self._fires[layer] != self._forwards]
        if silent or not self._counts:
            raise Silent(f"the hooks of layers {silent or list(self.layers)} did not fire: nothing was steered")
        columns = [torch.stack([self._counts[layer][i].cpu() for layer in self.layers]) for i in range(4)]
        return Tally(self.layers, columns[0].long(), columns[1].long(), columns[2].float(), columns[3].float())

    def _hook(self, layer: int) -> Any:
        def act(_module: nn.Module, _args: Any, output: Any) -> Any:
            h = residual(output)
            prompt, answer = self._phases(h)
            moved, length = correct(h, self.steps[layer], prompt, answer)
            self._count(layer, prompt, answer, length)
            return moved if isinstance(output, Tensor) else (moved, *output[1:])

        return act

    def _phases(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens (B, T) are the prompt's and which the answer's; padding and rows left alone are neither."""
        (rows, columns), device = h.shape[:2], h.device
        spans = (*self._spans, self._rows)
        lengths, answer_from, chosen = (None if span is None else span.to(device) for span in spans)
        at = torch.arange(columns, device=device).expand(rows, columns)
        real = torch.ones(rows, columns, dtype=torch.bool, device=device)
        if lengths is not None:
            real = real & (at < lengths[:, None])
        if chosen is not None:
            real = real & chosen[:, None]
        answer = real if answer_from is None else real & (at >= answer_from[:, None])
        return real & ~answer, answer

    def _count(self, layer: int, prompt: Tensor, answer: Tensor, length: Tensor) -> None:
        phases = {step.phase for step in self.steps[layer]}
        there = prompt | answer if "both" in phases or len(phases) == 2 else prompt if phases == {"prompt"} else answer
        now = [there.sum(1), (length > 0).sum(1), length.double().sum(1), length.amax(1)]
        self._fires[layer] += 1
        before = self._counts.get(layer)
        if before is None:
            self._counts[layer] = now
        elif before[0].shape != now[0].shape:
            raise ValueError(
                f"{len(now[0])} rows in a batch that began with {len(before[0])}: call begin() for another batch"
            )
        else:
            self._counts[layer] = [
                *(a + b for a, b in zip(before[:3], now[:3], strict=True)),
                before[3].maximum(now[3]),
            ]

    def _forwarded(self, *_: Any) -> None:
        self._forwards += 1


@contextmanager
def steered(subject: Subject, interventions: Sequence[Intervention]) -> Iterator[Steering]:
    """Interventions on the subject's blocks inside; nothing of them outside. They act in the order given.

    Raises `KnownError` for an intervention of another model or width, or at a layer that the subject does not have.
    """
    held = Steering(subject, interventions)
    handles = [subject.blocks[layer].register_forward_hook(held._hook(layer)) for layer in held.layers]
    handles.append(subject.base.register_forward_hook(held._forwarded))
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def _require(subject: Subject, interventions: Sequence[Intervention], steps: dict[int, list[Step]]) -> None:
    if not steps:
        raise KnownError("there is nothing to steer with: no intervention, or none with a layer")
    outside = [layer for layer in steps if not 0 <= layer < subject.n_layers]
    if outside:
        raise KnownError(f"layer {outside[0]} is not in {subject.id} (0..{subject.n_layers - 1})")
    for intervention in interventions:
        width = intervention.vectors.shape[1]
        if width != subject.d_model:
            raise KnownError(
                f"this intervention is {width} wide and {subject.id} is {subject.d_model}: another model's"
            )
        made_for = intervention.model.get("fingerprint")
        if made_for is not None and made_for != subject.fingerprint:
            raise KnownError(
                f"this intervention came from {intervention.model.get('id')} ({intervention.model.get('weights')}), not from "
                f"{subject.id} ({subject.weights}); fit an axis on this model"
            )
