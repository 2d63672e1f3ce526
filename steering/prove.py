"""The short proof that a steering binds on this subject, run before anything is generated with it.

A probe goes through the blocks with the interventions on, and a reading hook after them sees what really left each block:

    every hook fired, and what left a block is what the reference step makes of what the block had put out;
    every steered layer saw tokens;
    no logit differs by a bit once the steering has ended.

    require_binding(subject, [cap])      # raises KnownError and says what is off
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from personaxis.persona.errors import KnownError
from personaxis.persona.selftest import Check
from personaxis.persona.subject import Subject, residual
from personaxis.steering.interventions import Intervention, Step
from personaxis.steering.steer import Silent, correct, steered

PROBE = 24  # tokens


@torch.no_grad()
def prove(subject: Subject, interventions: Sequence[Intervention]) -> list[Check]:
    """Run the checks on one made-up row of tokens; nothing is raised for a failed one."""
    vocabulary = subject.model.get_input_embeddings().weight.shape[0]
    ids = ((torch.arange(PROBE, device=subject.device) * 37 + 11) % vocabulary)[None]
    plain = subject.model(input_ids=ids, use_cache=False).logits
    with steered(subject, interventions) as held:
        held.describe(answer_from=torch.tensor([PROBE // 2]))
        entered, left = _watched(subject, held.layers, ids)
        tally, steps = held.tally, held.steps
    answer = (torch.arange(PROBE, device=subject.device) >= PROBE // 2)[None]
    worst = max(_difference(entered[layer], left[layer], steps[layer], answer) for layer in steps)
    after = subject.model(input_ids=ids, use_cache=False).logits
    rounding = 1e-5 if subject.dtype == torch.float32 else 2e-2
    silent = float(sum(int(seen) == 0 for seen in tally.seen.sum(1)))
    return [
        Check("steered blocks against the reference step, relative", worst, rounding),
        Check("layers whose hooks saw no token", silent, 0.0),
        Check("logits changed after the steering ended", float((after - plain).abs().max()), 0.0),
    ]


def require_binding(subject: Subject, interventions: Sequence[Intervention]) -> None:
    """`KnownError` unless every hook fires and every check passes."""
    try:
        failed = [proof for proof in prove(subject, interventions) if not proof.passed]
        said = "; ".join(f"{proof.name}: {proof.found:.3g}, allowed {proof.allowed:.3g}" for proof in failed)
    except Silent as silent:
        said = str(silent)
    if said:
        raise KnownError(f"steering does not bind on {subject.id}, so nothing was generated ({said})")


def _watched(subject: Subject, layers: Sequence[int], ids: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What the steered blocks put out before and after the steering's own hooks, layer by layer."""
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}

    def keep(into: dict[int, Tensor], layer: int):  # type: ignore[no-untyped-def]
        def hook(_module, _args, output) -> None:  # type: ignore[no-untyped-def]
            into[layer] = residual(output).clone()

        return hook

    with ExitStack() as stack:
        for layer in layers:
            block = subject.blocks[layer]
            first = block.register_forward_hook(keep(entered, layer), prepend=True)
            last = block.register_forward_hook(keep(left, layer))
            stack.callback(first.remove)
            stack.callback(last.remove)
        subject.base(input_ids=ids, use_cache=False)
    return entered, left


def _difference(entered: Tensor, left: Tensor, steps: Sequence[Step], answer: Tensor) -> float:
    expected, _ = correct(entered, steps, ~answer.to(entered.device), answer.to(entered.device))
    return float((left.float() - expected.float()).norm() / expected.float().norm())
