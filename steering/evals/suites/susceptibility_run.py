"""The susceptibility test from a model's name to a table: arms, answers, classes.

content = run_susceptibility("smollm2-135m", ModelOptions(), "smollm2-135m", ["assistant"], [8.0], TestOptions(), None)
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from personatlas.cli.calibrate import TestOptions
from personatlas.persona.axis import load_space
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE, Interventions
from personatlas.persona.judges.base import Item
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import progress
from personatlas.persona.roles.bank import Bank, load_bank
from personatlas.persona.rollout import Request
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.arms import Arm, run_arms
from personatlas.steering.evals.suites.identity import (
    CLASSES,
    IDENTITY,
    UNCLEAR,
    difference,
    identity_requests,
    lowest_roles,
    measure,
)
from personatlas.steering.session import SteeredModel, load_steered_model


def run_susceptibility(
    model: str,
    how: ModelOptions,
    axis: str,
    caps: Sequence[str],
    amounts: Sequence[float],
    asked: TestOptions,
    bank: Path | None,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Every arm's shares with intervals, and every answer with its class. Raises `UserError` for what cannot be."""
    for least, option, value in ((4, "roles", asked.roles), (1, "prompts", asked.prompts)):
        if value < least:
            raise UserError(f"--{option} {value} is below {least}")
    _require_judge(asked)
    chosen_bank = load_bank(bank)
    held = load_steered_model(model, how, axis, list(caps), force=force)
    roles = lowest_roles(held.axis, load_space(held.axis.folder / "space"), chosen_bank, asked.roles)
    requests = identity_requests(chosen_bank, roles, asked.prompts, held.model.name, asked.seed)
    arms: dict[str, Interventions] = {BASELINE: []} | {
        name: [cap] for name, cap in zip(caps, held.caps, strict=True)
    }
    arms |= {f"add {amount:g}": [held.axis.add(amount, (held.axis.layer,))] for amount in amounts}
    with progress("answering", len(requests) * len(arms)) as advance:
        found = list(
            run_arms(
                held.model,
                held.chat,
                requests,
                arms,
                Sampling(asked.max_new_tokens, asked.temperature),
                advance,
            )
        )
    classes = _classes(found, requests, chosen_bank, asked)
    return _content(held, found, requests, classes, asked, len(roles))


def _content(
    held: SteeredModel,
    arms: Sequence[Arm],
    requests: Sequence[Request],
    classes: Sequence[Sequence[str] | None],
    asked: TestOptions,
    roles: int,
) -> dict[str, Any]:
    measured = [measure(arm, requests, own) for arm, own in zip(arms, classes, strict=True)]
    table = {}
    for one in measured:
        change = difference(one, measured[0])
        shares = {"shares": one.shares, "interval": list(one.interval()), "n": one.n}
        table[one.arm] = shares | {
            "change": change[0],
            "change_interval": list(change[1:]),
            "fired": one.fired,
            "distinct": one.distinct,
        }
    answers = [
        {"key": request.key, "question": request.messages[-1]["content"]}
        | {
            arm.name: {"text": arm.texts[i], "class": one.classes[i]}
            for arm, one in zip(arms, measured, strict=True)
        }
        for i, request in enumerate(requests)
    ]
    asked_of = {"model": held.model.describe(), "asked": asdict(asked), "roles": roles, "judge": asked.judge}
    return {**asked_of, "arms": table, "answers": answers}


def _require_judge(asked: TestOptions) -> None:
    if asked.judge == "rules":
        return
    if not asked.judge.startswith(("http://", "https://")):
        raise UserError(f"--judge {asked.judge!r} is neither rules nor a http(s) URL")
    if not asked.judge_model:
        raise UserError(f"--judge {asked.judge} needs --judge-model NAME")


def _classes(
    arms: Sequence[Arm], requests: Sequence[Request], bank: Bank, asked: TestOptions
) -> list[list[str] | None]:
    """Classes by an endpoint, arm by arm in the requests' order; None leaves them to the rules. What it could not read is unclear."""
    if asked.judge == "rules":
        return [None for _ in arms]
    from personatlas.persona.judges.endpoint import EndpointJudge

    judge = EndpointJudge(asked.judge, asked.judge_model, wording=IDENTITY)
    items = [
        Item(
            f"{number}:{place}",
            bank.role(request.key.split("/", 1)[0]),
            "",
            request.messages[-1]["content"],
            text,
        )
        for number, arm in enumerate(arms)
        for place, (request, text) in enumerate(zip(requests, arm.texts, strict=True))
    ]
    found = [[UNCLEAR] * len(requests) for _ in arms]
    with progress("judging", len(items)) as advance:
        for verdict in judge.verdicts(items):
            number, place = map(int, verdict.key.split(":"))
            found[number][place] = UNCLEAR if verdict.score is None else CLASSES[verdict.score]
            advance(1)
    return list(found)
