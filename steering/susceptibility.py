"""Role susceptibility, the paper's behavioural test: under a role prompt, who does the model say that it is?

    requests = identity_requests(bank, lowest_roles(axis, space, 50), prompts=2, model_name="SmolLM2", seed=0)
    for arm in run_arms(subject, chat, requests, arms, Sampling(48)):
        measure(arm, requests).shares["assistant"]

Roles x prompts x identity questions, every answer classed by `personaxis.steering.identity`, in several arms on the same
prompts and seeds (arXiv 2601.10387, section on role susceptibility; the paper takes the 50 most Assistant-like roles, the
lowest ones are the harder test).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from personaxis.persona.axis import Axis, PersonaSpace
from personaxis.persona.bank import Bank
from personaxis.persona.errors import KnownError
from personaxis.persona.rollouts import Request, role_messages, seed_of
from personaxis.steering.arms import Arm
from personaxis.steering.identity import CLASSES, QUESTIONS, UNCLEAR, class_of

SAMPLES = 2000  # of a bootstrap


def ranked_roles(axis: Axis, space: PersonaSpace) -> list[tuple[str, float]]:
    """Every role of the space but the default with its projection at the space's layer, lowest first."""
    vectors = space.mean + space.coordinates @ space.components  # (R, D)
    places = (vectors @ axis.at(space.layer)).tolist()
    positive = axis.fit.get("positive", "default")
    ranked = [
        (role, place) for role, place in zip(space.roles, places, strict=True) if role not in ("default", positive)
    ]
    return sorted(ranked, key=lambda pair: pair[1])


def lowest_roles(axis: Axis, space: PersonaSpace, bank: Bank, count: int) -> list[str]:
    """The roles furthest from the Assistant that the bank knows, lowest first. `KnownError` when there are fewer than 4."""
    known = {role.name for role in bank.roles}
    roles = [role for role, _ in ranked_roles(axis, space) if role in known][:count]
    if len(roles) < 4:
        raise KnownError(f"{len(roles)} roles to test with, at least 4 are needed; fit an axis on more roles")
    return roles


def identity_requests(bank: Bank, roles: Sequence[str], prompts: int, model_name: str, seed: int) -> list[Request]:
    """One request per role, prompt and identity question; keys are "pirate/0/identity3/0"."""
    made = []
    for name in roles:
        role = bank.role(name)
        for number in range(min(prompts, len(role.prompts))):
            for place, question in enumerate(QUESTIONS):
                key = f"{name}/{number}/identity{place}/0"
                made.append(Request(key, role_messages(role, number, question, model_name), seed_of(key, seed)))
    return made


@dataclass(frozen=True)
class Susceptibility:
    """How one arm's answers were classed. `by_role` is (answers of each class, ..., unclear) by role, in order of `roles`;
    `fired` is the share of tokens that the arm changed, `distinct` the share of distinct tokens in an answer."""

    arm: str
    roles: tuple[str, ...]
    by_role: np.ndarray
    classes: tuple[str, ...]
    fired: float
    distinct: float

    @property
    def n(self) -> int:
        """Answers."""
        return int(self.by_role.sum())

    @property
    def shares(self) -> dict[str, float]:
        """Share of each class, "unclear" included."""
        total = self.by_role.sum(0) / max(self.n, 1)
        return dict(zip((*CLASSES, UNCLEAR), map(float, total), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "by_role": self.by_role.tolist()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Susceptibility":
        """What `to_json` wrote."""
        own = {field.name: row[field.name] for field in fields(cls)}
        return cls(
            **own
            | {"by_role": np.array(row["by_role"]), "roles": tuple(row["roles"]), "classes": tuple(row["classes"])}
        )

    def interval(self, name: str = "assistant") -> tuple[float, float]:
        """95% interval of a class's share: bootstrap over roles, whose answers are not independent."""
        return _interval(self.by_role[:, (*CLASSES, UNCLEAR).index(name)], self.by_role.sum(1))


def measure(arm: Arm, requests: Sequence[Request], classes: Sequence[str] | None = None) -> Susceptibility:
    """Class an arm's answers by the rules, or take the classes of another judge."""
    found = tuple(classes if classes is not None else map(class_of, arm.texts))
    roles = tuple(dict.fromkeys(request.key.split("/", 1)[0] for request in requests))
    table = np.zeros((len(roles), len(CLASSES) + 1))
    for request, name in zip(requests, found, strict=True):
        table[roles.index(request.key.split("/", 1)[0]), (*CLASSES, UNCLEAR).index(name)] += 1
    fired = 0.0 if arm.tally is None else arm.tally.share
    return Susceptibility(arm.name, roles, table, found, fired, arm.distinct)


def difference(one: Susceptibility, other: Susceptibility, name: str = "assistant") -> tuple[float, float, float]:
    """Share of a class in `one` less that in `other`, with its 95% interval: paired bootstrap over roles."""
    column = (*CLASSES, UNCLEAR).index(name)
    change = one.by_role[:, column] - other.by_role[:, column]
    return float(change.sum() / max(one.n, 1)), *_interval(change, one.by_role.sum(1))


def _interval(part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    draws = np.random.default_rng(0).integers(0, len(part), (SAMPLES, len(part)))
    shares = part[draws].sum(1) / np.maximum(whole[draws].sum(1), 1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)
