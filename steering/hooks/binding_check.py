"""The proof that a steering binds on this model, through the engine that will be used.

Short, before anything is generated: what leaves every steered block is what the reference step makes of what the block put
out; the engine's own account has seen exactly the tokens that it fed, at every layer; and no logit differs by a bit once
the steering has ended.

    require_binding(model, [cap])      # raises UserError and says what is off

Long, for `personatlas tools self-test --axis`: besides, with floors that fire on half of the probe's tokens, no projection lies
below its floor afterwards, the engine's account is that of the reference, a floor of -infinity gives the answer of a row that
is left alone (set in place, so that a captured step is shown to notice it), a floor above everything fires on every token,
and capping twice is capping once.

    run_cap_test(model, axis)
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, Interventions, apply_steps, steps_by_layer
from personatlas.persona.models.hooks import residual
from personatlas.persona.models.load import Model
from personatlas.persona.pipeline.self_test import Check
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Answer, Prompt, Sampler, Sampling
from personatlas.steering.hooks.steering import HookDidNotFire, Steering, steer

PROBE = 24  # tokens
WRITTEN = 5  # tokens that the engine writes to each probe


@torch.no_grad()
def prove(model: Model, plan: Interventions) -> list[Check]:
    """The short proof on made-up tokens; nothing is raised for a failed check."""
    ids = _probe(model, PROBE)[None]
    sampler = _engine(model)
    plain = model.hf(input_ids=ids, use_cache=False).logits
    with steer(model, plan) as held:
        held.describe(answer_from=torch.tensor([PROBE // 2]))
        entered, left = _watched(model, held.layers, ids)
        silent = float((held.tally.seen.sum(1) == 0).sum())
        _answers(sampler, held, _prompts(model))
        _ = held.tally  # HookDidNotFire, if it has not seen just what was fed
    steps = steps_by_layer(plan)
    answer = (torch.arange(PROBE, device=model.device) >= PROBE // 2)[None]
    worst = 0.0
    for layer, own in steps.items():
        side = answer.to(entered[layer].device)
        expected = apply_steps(entered[layer], own, ~side, side)[0].float()
        worst = max(worst, float((left[layer].float() - expected).norm() / expected.norm()))
    after = model.hf(input_ids=ids, use_cache=False).logits
    return [
        Check("steered blocks against the reference step, relative", worst, 1e-5 if _exact(model) else 2e-2),
        Check("layers whose hooks saw no token", silent, 0.0),
        Check("logits changed after the steering ended", float((after - plain).abs().max()), 0.0),
    ]


def require_binding(model: Model, plan: Interventions) -> None:
    """`UserError` unless every hook fires and every check of the short proof passes."""
    try:
        failed = [proof for proof in prove(model, plan) if not proof.passed]
        said = "; ".join(f"{proof.name}: {proof.found:.3g}, allowed {proof.allowed:.3g}" for proof in failed)
    except HookDidNotFire as silent:
        said = str(silent)
    if said:
        raise UserError(f"steering does not bind on {model.id}, so nothing was generated ({said})")


@torch.no_grad()
def run_cap_test(model: Model, axis: Axis) -> list[Check]:
    """The long proof, with caps along the axis at all of its layers whose floors are the probe's own medians.

    Raises `UserError` for an axis of another model.
    """
    axis.require_model(model.describe())
    cap, spread = _median_cap(model, axis)
    try:
        return [*prove(model, [cap]), *_after(model, cap, spread), *_engine_checks(model, cap)]
    except HookDidNotFire as silent:
        return [Check(f"hooks that fire ({silent})", float("nan"), 0.0)]


def _median_cap(model: Model, axis: Axis) -> tuple[Cap, Tensor]:
    """Floors at the medians of a probe's projections (C,), and the projections' spreads (C,)."""
    with _hooked(model, axis.layers, prepend=True) as entered:
        model.base(input_ids=_probe(model, PROBE)[None], use_cache=False)
    # position 0 is an attention sink with a projection of its own
    places = torch.stack([(entered[layer][0, 1:].float().cpu() @ axis.at(layer)) for layer in axis.layers])
    cap = Cap(axis.layers, axis.vectors, places.median(1).values, population="probe", model=axis.model)
    return cap, places.std(1)


def _after(model: Model, cap: Cap, spread: Tensor) -> list[Check]:
    """Projections below the floor after the cap, in spreads, and what a second cap changes."""
    ids = _probe(model, PROBE)[None]
    with steer(model, [cap]) as held:
        _, left = _watched(model, cap.layers, ids)
        idle = 1 - float(
            held.tally.fired[0].sum() / held.tally.seen[0].sum()
        )  # later layers are lifted by this one too
        once = model.hf(input_ids=ids, use_cache=False).logits.float()
    places = torch.stack(
        [left[layer][0].float().cpu() @ v for layer, v in zip(cap.layers, cap.vectors, strict=True)]
    )
    below = float(((cap.floor[:, None] - places) / spread[:, None]).max())
    with steer(model, [cap, cap]):
        twice = model.hf(input_ids=ids, use_cache=False).logits.float()
    # half precision rounds the capped residual itself, by up to 2^-9 of its largest entries
    return [
        Check("projections below the floor after the cap, in standard deviations", below, 1e-3 if _exact(model) else 0.2),
        Check("share of tokens that a floor at their median leaves unchanged at the first layer", idle, 0.75),
        Check(
            "logits of capping twice against once, relative",
            float((twice - once).norm() / once.norm()),
            1e-4 if _exact(model) else 5e-2,
        ),
    ]  # fmt: skip


def _engine_checks(model: Model, cap: Cap) -> list[Check]:
    """The engine's account against the reference's, and floors that are changed in place."""
    sampler, prompts = _engine(model), _prompts(model)
    idle = replace(cap, floor=torch.full_like(cap.floor, -torch.inf))
    sky = replace(cap, floor=torch.full_like(cap.floor, -torch.inf).index_fill(0, torch.tensor([0]), 1e4))
    with steer(model, [cap]) as held:
        answers = _answers(sampler, held, prompts)
        tally = held.tally
        held.set([idle])
        still = _answers(sampler, held, prompts)
        unchanged = held.tally
        held.set([sky])
        _answers(sampler, held, prompts)
        unlifted = held.tally.seen[0] - held.tally.fired[0]
    alone = _answers(_engine(model), None, prompts)
    expected = [_reference(model, cap, prompts[i].ids, answer) for i, answer in enumerate(answers)]
    acting = [i for i, prompt in enumerate(prompts) if prompt.plan == 0]
    fired, total = (sum(expected[i][k] for i in acting) for k in (0, 1))
    differing = sum(a.ids != b.ids for a, b in zip(still, alone, strict=True))
    spared = 1 + cap.spare_first  # the last token that is written is not fed
    fed = torch.tensor(
        [len(prompts[i].ids) + WRITTEN - spared if i in acting else 0 for i in range(len(prompts))]
    )
    return [
        Check("tokens that the engine's account saw against those fed", float((tally.seen - fed).abs().max()), 0.0),
        Check("tokens that the engine fired on against the reference, relative", _off(float(tally.fired.sum()), float(fired)), _near(model)),
        Check("sum of the engine's corrections against the reference, relative", _off(float(tally.total.sum()), total), _near(model)),
        Check("tokens fired on by floors of -infinity", float(unchanged.fired.sum()), 0.0),
        Check("answers under floors of -infinity that differ from those without", float(differing), 0.0 if _exact(model) else 1.0),
        Check("tokens not fired on by a floor above everything, at the first layer", float(unlifted.sum()), 0.0),
    ]  # fmt: skip


def _reference(model: Model, cap: Cap, prompt: tuple[int, ...], answer: Answer) -> tuple[int, float]:
    """Tokens fired and the sum of the corrections over all layers, by the reference step in one reading."""
    fed = answer.ids[:-1] if answer.stopped == "length" else answer.ids
    ids = torch.tensor([prompt + fed], device=model.device)
    with steer(model, [cap]) as held:
        entered, _ = _watched(model, cap.layers, ids)
        del held
    steps, fired, total = steps_by_layer([cap]), 0, 0.0
    for layer, h in entered.items():
        everything = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        length = apply_steps(h, steps[layer], ~everything, everything)[1]
        fired, total = fired + int((length > 0).sum()), total + float(length.sum())
    return fired, total


def _engine(model: Model) -> Sampler:
    return fastest_sampler(model, frozenset(), Sampling(max_new_tokens=WRITTEN, temperature=0.0))


def _prompts(model: Model) -> list[Prompt]:
    """Uneven probes; the second is left alone."""
    return [
        Prompt(tuple(_probe(model, length).tolist()), seed=length, plan=plan)
        for length, plan in ((9, 0), (9, -1), (17, 0), (2, 0))
    ]


def _probe(model: Model, length: int) -> Tensor:
    vocabulary = model.vocab_size
    return (torch.arange(length, device=model.device) * 37 + 11 + length) % vocabulary


def _answers(sampler: Sampler, held: Steering | None, prompts: Sequence[Prompt]) -> list[Answer]:
    return sorted(sampler.answers(prompts, held), key=lambda answer: answer.index)


def _exact(model: Model) -> bool:
    return model.dtype == torch.float32


def _near(model: Model) -> float:
    return 1e-2 if _exact(model) else 0.1


def _off(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-9)


def _watched(model: Model, layers: Sequence[int], ids: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What blocks put out before and after the steering's own hooks, layer by layer."""
    with _hooked(model, layers, prepend=True) as entered, _hooked(model, layers) as left:
        model.base(input_ids=ids, use_cache=False)
    return entered, left


@contextmanager
def _hooked(model: Model, layers: Sequence[int], *, prepend: bool = False) -> Iterator[dict[int, Tensor]]:
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            found[layer] = residual(output).clone()

        return hook

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(model.blocks[layer].register_forward_hook(keep(layer), prepend=prepend).remove)
        yield found
