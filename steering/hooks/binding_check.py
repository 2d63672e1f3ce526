"""Checks that steering binds on a model, through the engine that will be used.

Short, before anything is generated: what leaves every steered block is what the reference step makes of the
block's output; the engine's account has seen exactly the tokens that it fed, at every layer; and no logit
differs by a bit once the steering has ended.

    require_binding(model, [cap])      # raises UserError and says what is off

Long, for `personatlas tools self-test --axis`: besides, with floors that fire on half of the probe's tokens,
no projection lies below its floor afterwards, the engine's account is that of the reference, a floor of
-infinity gives the answer of a row that is left alone (set in place, so that a captured step is shown to
notice it), a floor above everything fires on every token, and capping twice is capping once.

    run_cap_test(model, axis)
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, Interventions, apply_steps, steps_by_layer
from personatlas.persona.models.hooks import Captured, capture
from personatlas.persona.models.load import Model
from personatlas.persona.models.parity import count_changed, relative_error
from personatlas.persona.pipeline.self_test import Check
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Answer, Prompt, Sampler, SamplerCallback, Sampling
from personatlas.steering.hooks.account import HookDidNotFire
from personatlas.steering.hooks.steering import steer

PROBE_TOKENS = 24
NEW_TOKENS = 5  # that the engine samples for each probe


@torch.no_grad()
def check_binding(model: Model, interventions: Interventions) -> list[Check]:
    """The short check on made-up tokens; nothing is raised for a failed one. Raises `HookDidNotFire`."""
    ids = _probe(model, PROBE_TOKENS)[None]
    sampler = _sampler(model)
    plain = model.hf(input_ids=ids, use_cache=False).logits
    with steer(model, interventions) as steering:
        steering.describe(answer_from=torch.tensor([PROBE_TOKENS // 2]))
        entered, left = _capture_both(model, steering.layers, ids)
        silent = float((steering.tally.seen.sum(1) == 0).sum())
        _answer(sampler, steering.callback, _prompts(model))
        _ = steering.callback.tally  # HookDidNotFire, if it has not seen just what was fed
    answer = (torch.arange(PROBE_TOKENS) >= PROBE_TOKENS // 2)[None]
    errors = [0.0]
    for layer, steps in steps_by_layer(interventions).items():
        side = answer.to(entered[layer].device)
        expected = apply_steps(entered[layer], steps, ~side, side)[0].float()
        errors.append(float((left[layer].float() - expected).norm() / expected.norm()))
    after = model.hf(input_ids=ids, use_cache=False).logits
    allowed = 1e-5 if _is_exact(model) else 2e-2
    return [
        Check(
            "steered blocks against the reference step, relative", float(torch.tensor(errors).max()), allowed
        ),
        Check("layers whose hooks saw no token", silent, 0.0),
        Check("logits changed after the steering ended", float(count_changed(plain, after)), 0.0),
    ]


def require_binding(model: Model, interventions: Interventions) -> None:
    """Raises `UserError` unless every hook fires and every short check passes."""
    try:
        failed = [check for check in check_binding(model, interventions) if not check.passed]
        reason = "; ".join(
            f"{check.name}: {check.found:.3g}, allowed {check.allowed:.3g}" for check in failed
        )
    except HookDidNotFire as silent:
        reason = str(silent)
    if reason:
        raise UserError(f"steering does not bind on {model.id}, so nothing was generated ({reason})")


@torch.no_grad()
def run_cap_test(model: Model, axis: Axis) -> list[Check]:
    """The long check, with caps at all layers of the axis whose floors are the probe's own medians.

    Raises `UserError` for an axis of another model.
    """
    axis.require_model(model.describe())
    with capture(model, axis.layers, _clone) as entered:
        model.base(input_ids=_probe(model, PROBE_TOKENS)[None], use_cache=False)
    # position 0 is an attention sink with a projection of its own
    projections = torch.stack([entered[i][0, 1:].float().cpu() @ axis.at(i) for i in axis.layers])
    floors = projections.median(1).values
    cap = Cap(axis.layers, axis.vectors, floors, population="probe", model=axis.model)
    try:
        return [
            *check_binding(model, [cap]),
            *_check_floors(model, cap, projections.std(1)),
            *_check_engine(model, cap),
        ]
    except HookDidNotFire as silent:
        return [Check(f"hooks that fire ({silent})", float("nan"), 0.0)]


def _check_floors(model: Model, cap: Cap, spread: Tensor) -> list[Check]:
    """Projections below the floor after the cap, in spreads (C,), and what a second cap changes."""
    ids = _probe(model, PROBE_TOKENS)[None]
    with steer(model, [cap]) as steering:
        _, left = _capture_both(model, cap.layers, ids)
        tally = steering.tally
        once = model.hf(input_ids=ids, use_cache=False).logits.float()
    idle = 1 - float(tally.fired[0].sum() / tally.seen[0].sum())  # later layers are lifted by this one too
    rows = zip(cap.layers, cap.vectors, strict=True)
    projections = torch.stack([left[layer][0].float().cpu() @ vector for layer, vector in rows])
    below = float(((cap.floor[:, None] - projections) / spread[:, None]).max())
    with steer(model, [cap, cap]):
        twice = model.hf(input_ids=ids, use_cache=False).logits.float()
    changed = relative_error(twice, once)
    # half precision rounds the capped residual itself, by up to 2^-9 of its largest entries
    allowed_below, allowed_change = (1e-3, 1e-4) if _is_exact(model) else (0.2, 5e-2)
    return [
        Check("projections below the floor after the cap, in standard deviations", below, allowed_below),
        Check("share of tokens that a floor at their median leaves unchanged at the first layer", idle, 0.75),
        Check("logits of capping twice against once, relative", changed, allowed_change),
    ]


def _check_engine(model: Model, cap: Cap) -> list[Check]:
    """The engine's account against the reference's, and floors that are changed in place."""
    sampler, prompts = _sampler(model), _prompts(model)
    idle = replace(cap, floor=torch.full_like(cap.floor, -torch.inf))
    longest = _capture_both(model, cap.layers[:1], _probe(model, PROBE_TOKENS)[None])[0][cap.layers[0]].norm(
        dim=-1
    )
    above = max(1e4, 10 * float(longest.max()))  # no projection is longer than its residual
    high = replace(cap, floor=idle.floor.index_fill(0, torch.tensor([0]), above))
    with steer(model, [cap]) as steering:
        answers = _answer(sampler, steering.callback, prompts)
        tally = steering.callback.tally
        steering.set([idle])
        idle_answers = _answer(sampler, steering.callback, prompts)
        idle_fired = float(steering.callback.tally.fired.sum())
        steering.set([high])
        _answer(sampler, steering.callback, prompts)
        unlifted = float((steering.callback.tally.seen[0] - steering.callback.tally.fired[0]).sum())
    plain_answers = _answer(_sampler(model), None, prompts)
    acting = [i for i, prompt in enumerate(prompts) if prompt.plan == 0]
    expected = [_reference_counts(model, cap, prompts[i].ids, answers[i]) for i in acting]
    fired, total = (sum(counts[k] for counts in expected) for k in (0, 1))
    differing = sum(a.ids != b.ids for a, b in zip(idle_answers, plain_answers, strict=True))
    spared = 1 + cap.spare_first  # the last token that is sampled is not fed
    fed = [len(prompt.ids) + NEW_TOKENS - spared if prompt.plan == 0 else 0 for prompt in prompts]
    unseen = float((tally.seen - torch.tensor(fed)).abs().max())
    fired_error = abs(float(tally.fired.sum()) - fired) / max(fired, 1e-9)
    total_error = abs(float(tally.total.sum()) - total) / max(total, 1e-9)
    close, equal = (1e-2, 0.0) if _is_exact(model) else (0.1, 1.0)
    return [
        Check("tokens that the engine's account saw against those fed", unseen, 0.0),
        Check("tokens that the engine fired on against the reference, relative", fired_error, close),
        Check("sum of the engine's corrections against the reference, relative", total_error, close),
        Check("tokens fired on by floors of -infinity", idle_fired, 0.0),
        Check("answers under floors of -infinity that differ from those without", float(differing), equal),
        Check("tokens not fired on by a floor above everything, at the first layer", unlifted, 0.0),
    ]


def _reference_counts(model: Model, cap: Cap, prompt: tuple[int, ...], answer: Answer) -> tuple[int, float]:
    """Tokens fired and the sum of the corrections over all layers, by the reference step in one reading."""
    fed = answer.ids[:-1] if answer.stopped == "length" else answer.ids
    ids = torch.tensor([prompt + fed], device=model.device)
    with steer(model, [cap]):
        entered, _ = _capture_both(model, cap.layers, ids)
    steps, fired, total = steps_by_layer([cap]), 0, 0.0
    for layer in cap.layers:
        answer_side = torch.ones(ids.shape, dtype=torch.bool, device=entered[layer].device)
        length = apply_steps(entered[layer], steps[layer], ~answer_side, answer_side)[1]
        fired, total = fired + int((length > 0).sum()), total + float(length.sum())
    return fired, total


def _sampler(model: Model) -> Sampler:
    return fastest_sampler(model, frozenset(), Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0))


def _prompts(model: Model) -> list[Prompt]:
    """Uneven probes; the second is left alone."""
    rows = ((9, 0), (9, -1), (17, 0), (2, 0))
    return [Prompt(tuple(_probe(model, n).tolist()), seed=n, plan=plan) for n, plan in rows]


def _probe(model: Model, length: int) -> Tensor:
    vocabulary = model.vocab_size
    return (torch.arange(length, device=model.device) * 37 + 11 + length) % vocabulary


def _answer(sampler: Sampler, callback: SamplerCallback | None, prompts: Sequence[Prompt]) -> list[Answer]:
    return sorted(sampler.answers(prompts, callback), key=lambda answer: answer.index)


def _is_exact(model: Model) -> bool:
    return model.dtype == torch.float32


def _capture_both(model: Model, layers: Sequence[int], ids: Tensor) -> tuple[Captured, Captured]:
    """The blocks' outputs before and after the steering's own hooks, layer by layer."""
    with (
        capture(model, layers, _clone, before_others=True) as entered,
        capture(model, layers, _clone) as left,
    ):
        model.base(input_ids=ids, use_cache=False)
    return entered, left


def _clone(_layer: int, h: Tensor) -> Tensor:
    return h.clone()  # a later block may write into it
