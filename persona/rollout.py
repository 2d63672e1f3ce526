"""Rollouts: what a model answered to one question under one role prompt, and the log that they are kept in.

    rollouts = read_rollouts(Path("runs/smollm2-135m"))
    RolloutKey.parse("pirate/2/q014/0")            # role "pirate", prompt 2, question "q014", sample 0

A rollout's key is "role/prompt/question/sample". The key and the run's seed determine the rollout's own seed,
so the same key has the same prompt and the same random numbers whatever else is in the batch.
`rollouts.jsonl` holds one rollout a line, with token ids: they are never tokenised again.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeVar

from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message
from personatlas.persona.logs import mend_log, read_lines
from personatlas.persona.records import Count, JsonObject, JsonRecord
from personatlas.persona.roles.bank import Bank, Question, Role, RoleKind, Trait, role_kind

T = TypeVar("T")


class RolloutKey(NamedTuple):
    """The parts of a rollout's key: role, trait pole or control, prompt (0-based), question id, sample (0-based)."""

    role: str
    prompt: int
    question: str
    sample: int

    @classmethod
    def parse(cls, key: str) -> "RolloutKey":
        """The parts of "pirate/2/q014/0". Raises `ValueError` for another form."""
        parts = key.split("/")
        if len(parts) != 4 or not parts[1].isdigit() or not parts[3].isdigit():
            raise ValueError(f"{key!r} is not a rollout key: role/prompt/question/sample")
        return cls(parts[0], int(parts[1]), parts[2], int(parts[3]))

    def __str__(self) -> str:
        return f"{self.role}/{self.prompt}/{self.question}/{self.sample}"


@dataclass(frozen=True)
class Request:
    """A rollout to be made: the messages to answer and the seed to answer them with."""

    key: str
    messages: tuple[Message, ...]
    seed: int

    @property
    def parts(self) -> RolloutKey:
        """The parts of the key."""
        return RolloutKey.parse(self.key)


def _check_message(message: Message) -> None:
    if set(message) != {"role", "content"}:
        raise ValueError(f"a message has role and content, not {', '.join(message) or 'nothing'}")


def check_token_ids(ids: Sequence[int]) -> None:
    """Raises `ValueError` for what no tokenizer has as an id."""
    if ids and not 0 <= min(ids) <= max(ids) < 1 << 31:
        raise ValueError("a token id is below 0 or above 2^31")


def check_vocabulary(ids: Sequence[int], size: int) -> None:
    """Raises `ValueError` for an id that a vocabulary of that size has not: it is another model's."""
    if ids and max(ids) >= size:
        raise ValueError(f"token id {max(ids)} is not in the model's vocabulary of {size}")


TokenIds = Annotated[tuple[int, ...], check_token_ids]


@dataclass(frozen=True)
class Rollout(JsonRecord):
    """An answer. `answer_ids` end before the end token; `score` is a judge's 0-3, or None where none has
    judged.

    `stopped` is "end" when the model ended its answer and "length" when the token limit did.
    """

    key: Annotated[str, RolloutKey.parse]
    messages: tuple[Annotated[Message, _check_message], ...]
    prompt_ids: TokenIds
    answer_ids: TokenIds
    answer: str
    seed: Count
    stopped: Literal["end", "length"]
    score: Count | None = None

    optional: ClassVar[tuple[str, ...]] = ("score",)

    @property
    def role(self) -> str:
        """The name of the role, of the trait's pole, or of the control."""
        return RolloutKey.parse(self.key).role

    @property
    def question(self) -> str:
        """The question's id."""
        return RolloutKey.parse(self.key).question

    @property
    def n_tokens(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt_ids) + len(self.answer_ids)

    @property
    def is_empty(self) -> bool:
        """Whether there are no tokens, or white space alone: such answers are not recorded."""
        return not self.answer_ids or not self.answer.strip()

    def to_json(self) -> JsonObject:
        """The row of `rollouts.jsonl`; the score lives in `scores.jsonl`."""
        row = super().to_json()
        del row["score"]
        return row


def seed_of(key: str, run_seed: int) -> int:
    """A rollout's seed, 0 <= seed < 2**62, from its key and the run's seed."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}/{key}".encode()).digest()[:8], "big") >> 2


def rollout_requests(bank: Bank, model_name: str, selection: "Selection", run_seed: int) -> list[Request]:
    """All rollouts of a selection, ordered by role, prompt, question and sample; behind the roles come the
    traits' poles and the controls.
    """
    requests = []
    for role in (*selection.roles(bank), *selection.poles(bank), *selection.control_roles(bank)):
        for prompt, question in selection.cells(role, bank.questions[: selection.questions]):
            messages = role_messages(role, prompt, question.question, model_name)
            for sample in range(selection.samples):
                key = str(RolloutKey(role.name, prompt, question.id, sample))
                requests.append(Request(key, messages, seed_of(key, run_seed)))
    return requests


def role_messages(role: Role, prompt: int, question: str, model_name: str) -> tuple[Message, ...]:
    """The messages of one rollout. An empty prompt sends no system message; "{model}" becomes the model's
    name.
    """
    system = role.prompts[prompt].replace("{model}", model_name) if role.is_default else role.prompts[prompt]
    user = {"role": "user", "content": question}
    return ({"role": "system", "content": system}, user) if system else (user,)


@dataclass(frozen=True)
class Selection:
    """Which part of a bank to roll out. None means all; the default role is always in, with all of its
    prompts.

    Traits are left out unless `with_traits`, controls are in if the bank has some.
    """

    role_names: tuple[str, ...] | None = None
    n_roles: int | None = None
    prompts: int | None = None
    questions: int | None = None
    samples: int = 1
    with_traits: bool = False
    trait_names: tuple[str, ...] | None = None
    n_traits: int | None = None
    with_controls: bool = True

    def roles(self, bank: Bank) -> list[Role]:
        """The default role and then the chosen ones: by name, or the first `n_roles` of an even spread over
        the bank.
        """
        others = [role for role in bank.roles if not role.is_default]
        if self.role_names is not None:
            chosen = [bank.role(name) for name in self.role_names if name != bank.default.name]
        else:
            chosen = spread(others, self.n_roles)
        return [bank.default, *chosen]

    def traits(self, bank: Bank) -> list[Trait]:
        """The chosen traits: by name, or an even spread over the bank. `UserError` when the bank has none."""
        if not self.with_traits:
            return []
        if not bank.traits:
            raise UserError("this bank has no traits; they are in its traits.jsonl, or in the packaged bank")
        if self.trait_names is not None:
            return [bank.trait(name) for name in self.trait_names]
        return spread(list(bank.traits), self.n_traits)

    def poles(self, bank: Bank) -> list[Role]:
        """The chosen traits' poles, positive and negative in turn."""
        return [pole for trait in self.traits(bank) for pole in trait.poles]

    def control_roles(self, bank: Bank) -> list[Role]:
        """The bank's controls as roles."""
        return [control.role for control in bank.controls] if self.with_controls else []

    def cells(self, role: Role, questions: Sequence[Question]) -> list[tuple[int, Question]]:
        """Which prompt of a role meets which question: each of its prompts every one.

        The default keeps all of its prompts: they are its whole population. A control takes its prompts in
        turn, as many for each question as a role has prompts, so that all of them are asked.
        """
        n = len(role.prompts)
        used = n if role.is_default or self.prompts is None else min(self.prompts, n)
        if role_kind(role.name) != "control":
            return [(prompt, question) for prompt in range(used) for question in questions]
        cells = [
            ((used * place + turn) % n, question)
            for place, question in enumerate(questions)
            for turn in range(used)
        ]
        return sorted(cells, key=lambda cell: cell[0])


def of_kind(rollouts: Iterable[Rollout], kind: RoleKind) -> list[Rollout]:
    """The rollouts of roles, of traits, or of controls."""
    return [rollout for rollout in rollouts if role_kind(rollout.role) == kind]


def read_rollouts(folder: Path, *, mend: bool = False) -> list[Rollout]:
    """Every rollout of a run folder, from the log and from logs that parallel ranks have not merged yet, each
    key once.

    With `mend` damaged lines are taken out of the logs, else they raise `UserError`. A key that stands twice
    with different answers is two runs mixed into one folder: `UserError`.
    """
    rollouts: dict[str, Rollout] = {}
    for path in sorted(folder.glob("rollouts*.jsonl")):
        rows = (mend_log if mend else read_lines)(path, Rollout.from_json)
        for rollout in map(Rollout.from_json, rows):
            if rollouts.setdefault(rollout.key, rollout) != rollout:
                raise UserError(
                    f"{path}: {rollout.key} is there twice with different answers: two runs were mixed"
                )
    return list(rollouts.values())


def with_scores(rollouts: Iterable[Rollout], scores: dict[str, int | None]) -> list[Rollout]:
    """The same rollouts carrying a judge's scores; a key without one keeps None."""
    return [replace(rollout, score=scores.get(rollout.key)) for rollout in rollouts]


def spread(items: Sequence[T], count: int | None) -> list[T]:
    """An even spread of `count` over the items, in their order; all of them where there are no more, or for
    None.
    """
    count = len(items) if count is None else min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def spread_evenly(items: Sequence[T], count: int, group: Callable[[T], str]) -> list[T]:
    """`count` of the items in their order, from each group alike, with the places in the groups in turn.

    Items that are a product (roles times questions) have a period, and `spread` over them may take the same
    question again and again. Here every group gives one item before any gives two, each from another place.
    """
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(group(item), []).append(index)
    rows = spread(list(groups.values()), count)
    turns = [
        own[(turn + place) % len(own)]
        for turn in range(max(map(len, rows), default=0))
        for place, own in enumerate(rows)
        if turn < len(own)
    ]
    return [items[index] for index in sorted(turns[:count])]
