"""The locked set: roles, identity questions and everyday questions that no fit, search or table of this project uses.

    python benchmarks/locked.py

Reads the packaged cap on them, once for a version of the package: a set that is read whenever something is tried
becomes part of the fit. Appends the figures to locked_readings.jsonl, and refuses to read a version twice.
"""

import hashlib
import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import personatlas as pa
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE, Interventions, interventions_digest
from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.models.load import Model
from personatlas.persona.roles.bank import Bank, Question, Role, load_bank
from personatlas.persona.rollout import Rollout, Selection, rollout_requests
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.arms import run_arms
from personatlas.steering.identity import IdentityShares, identity_requests, measure_identity
from personatlas.steering.loss_cost import benign_costs

MODEL, CAP, SEED = "smollm2-135m", "assistant", 0
SET, READINGS = Path(__file__).with_name("locked.json"), Path(__file__).with_name("locked_readings.jsonl")


def main() -> None:
    release, content = version("personatlas"), json.loads(SET.read_text(encoding="utf-8"))
    before = read_lines(READINGS) if READINGS.exists() else []
    if any(row["version"] == release for row in before):
        raise UserError(f"version {release} was read: its figures are in {READINGS}")
    model, axis = pa.load(MODEL), pa.load_axis(MODEL)
    cap = axis.cap(CAP)
    arms: dict[str, Interventions] = {BASELINE: [], CAP: [cap]}
    default = load_bank().default
    roles = tuple(Role(name, tuple(prompts)) for name, prompts in content["roles"].items())
    questions = tuple(Question(f"locked{i}", text) for i, text in enumerate(content["benign"]))
    bank = Bank((default, *roles), questions)
    identity = _identity(model, bank, [role.name for role in roles], content["identity"], arms)
    change = identity[CAP].change(identity[BASELINE])
    cost = benign_costs(model, _benign_answers(model, bank), {CAP: [cap]})[CAP]
    row = {
        "version": release,
        "date": datetime.now(UTC).date().isoformat(),
        "set": hashlib.sha256(SET.read_bytes()).hexdigest()[:16],
        "cap": interventions_digest([cap]),
        "model": model.fingerprint[:16],
        "assistant": {name: [own.shares["assistant"], *own.interval()] for name, own in identity.items()},
        "change": [change.value, change.low, change.high],
        "more_loss": [cost.more, *cost.more_interval],
        "kl": cost.kl,
    }
    append_lines(READINGS, [row])
    print(json.dumps(row, indent=1))


def _identity(
    model: Model, bank: Bank, roles: list[str], questions: dict[str, str], arms: dict[str, Interventions]
) -> dict[str, IdentityShares]:
    requests = identity_requests(bank, roles, 2, model.name, SEED, questions)
    answered = run_arms(model, requests, arms, Sampling(48))
    return {arm.name: measure_identity(arm, requests) for arm in answered}


def _benign_answers(model: Model, bank: Bank) -> list[Rollout]:
    """The baseline's answers to the everyday questions, each under the next prompt of the default."""
    requests = rollout_requests(Bank(bank.roles[:1], bank.questions), model.name, Selection(), SEED)
    n = len(bank.default.prompts)
    own = [
        request
        for request in requests
        if request.parts.prompt == int(request.parts.question.removeprefix("locked")) % n
    ]
    (arm,) = run_arms(model, own, {BASELINE: []}, Sampling(96))
    return [
        Rollout(request.key, request.messages, tuple(model.chat.prompt_ids(list(request.messages))), answer.ids, text, request.seed, answer.stopped)
        for request, answer, text in zip(own, arm.answers, arm.texts, strict=True)
        if answer.ids
    ]  # fmt: skip


if __name__ == "__main__":
    main()
