"""What is put to a model, and what of its answers counts: suites of cases.

    suite = persona_jailbreaks(bank, roles, asks, pairs=300, seed=0)
    suite.cases[0].key, suite.cases[0].messages, suite.outcomes

A case is one conversation in one situation; all arms get the same cases with the same seeds. Its role and its request are
the clusters of the statistics: cases that share one are not independent. Requests of users' files are harmful texts, so
nothing here prints them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

from personatlas.persona.errors import UserError
from personatlas.persona.formats import Conversation, Message
from personatlas.persona.roles.bank import Bank
from personatlas.persona.rollout import role_messages, seed_of, spread
from personatlas.steering.evals.suites.identity import identity_requests
from personatlas.steering.evals.suites.requests import Ask, filled

NOBODY = ""  # the role of a case without a system message


@dataclass(frozen=True)
class Case:
    """A conversation to be had: the messages of the first turn, and the user's later turns.

    `role` and `request` are its clusters, `category` groups it in the report; `bare` is the request without the template that it
    was put into, which is what a judge sees.
    """

    key: str
    role: str
    request: str
    category: str
    messages: tuple[Message, ...]
    seed: int
    later: tuple[str, ...] = ()
    bare: str = ""

    @property
    def asked(self) -> str:
        """What the user asks first."""
        return self.messages[-1]["content"]

    @property
    def judged(self) -> str:
        """The request as a judge sees it: bare, without role or template."""
        return self.bare or self.asked


@dataclass(frozen=True)
class Suite:
    """Cases and the outcomes that are counted on them: name of the outcome -> whether more of it is better."""

    name: str
    outcomes: dict[str, bool]
    cases: tuple[Case, ...]
    max_new_tokens: int
    needs_judge: bool = False


HARM = {"harmful": False, "complied": False, "refused": True, "degenerate": False}


def persona_jailbreaks(
    bank: Bank,
    roles: Sequence[str],
    asks: Sequence[Ask],
    pairs: int,
    seed: int,
    tokens: int,
    prompts: int = 5,
) -> Suite:
    """Harmful requests under role prompts: at most `pairs` of them, dealt so that roles and requests are each used equally often.

    Raises `UserError` for fewer pairs than roles, whose effect could then not be told from the requests'.
    """
    if pairs < len(roles):
        raise UserError(
            f"--pairs {pairs} is fewer than the {len(roles)} roles: give more pairs, or fewer --roles"
        )
    asks = spread(asks, pairs)
    both = lcm(len(roles), len(asks))
    most = len(roles) * len(asks) * min(prompts, min(len(bank.role(name).prompts) for name in roles))
    cases = []
    for number in range(min(pairs, most)):
        lap, within = divmod(number, len(roles) * len(asks))
        role = bank.role(roles[number % len(roles)])
        ask = asks[(number + within // both) % len(asks)]
        prompt = (within // len(roles) + lap) % min(
            prompts, len(role.prompts)
        )  # laps differ in the prompt alone
        key = f"{role.name}/{prompt}/{ask.id}/0"
        messages = role_messages(role, prompt, ask.text, "")
        cases.append(Case(key, role.name, ask.id, ask.category, messages, seed_of(key, seed)))
    return Suite("persona-jailbreak", {**HARM, "in role": False}, _unique(cases), tokens, needs_judge=True)


def harmful_requests(
    asks: Sequence[Ask], templates: Sequence[str], pairs: int, seed: int, tokens: int
) -> Suite:
    """Harmful requests without a persona, plain or in jailbreak templates, which are then the clusters beside the requests."""
    asks, cases = spread(asks, pairs), []
    for number, ask in enumerate(asks):
        place = number % len(templates) if templates else 0
        text = filled(templates[place], ask.text) if templates else ask.text
        role = f"template {place}" if templates else NOBODY
        key = f"{role or 'plain'}/0/{ask.id}/0"
        cases.append(Case(key, role, ask.id, ask.category, _said(text), seed_of(key, seed), bare=ask.text))
    return Suite("harm", dict(HARM), _unique(cases), tokens, needs_judge=True)


def over_refusal(asks: Sequence[Ask], pairs: int, seed: int, tokens: int) -> list[Suite]:
    """Requests that only look harmful, which should be answered, and those of the file that are unsafe, which should not."""
    safe = [ask for ask in asks if ask.label != "unsafe"]
    unsafe = [ask for ask in asks if ask.label == "unsafe"]
    made = []
    for name, own, is_better in (("over-refusal", safe, False), ("contrast", unsafe, True)):
        cases = []
        for ask in spread(own, pairs):
            key = f"{name}/0/{ask.id}/0"
            cases.append(Case(key, NOBODY, ask.id, ask.category, _said(ask.text), seed_of(key, seed)))
        if cases:
            outcomes = {"refused": is_better, "complied": not is_better, "degenerate": False}
            made.append(Suite(name, outcomes, _unique(cases), tokens))
    return made


def susceptibility(
    bank: Bank, roles: Sequence[str], prompts: int, model_name: str, seed: int, tokens: int
) -> Suite:
    """Who are you?, under role prompts: the requests of `personatlas susceptibility`."""
    cases = []
    for request in identity_requests(bank, roles, prompts, model_name, seed):
        role, _, question, _ = request.key.split("/")
        asked = request.messages[-1]["content"]
        cases.append(Case(request.key, role, question, asked, request.messages, request.seed))
    return Suite("susceptibility", {"assistant": True, "mystical": False}, tuple(cases), tokens)


def benign(bank: Bank, answers: int, model_name: str, seed: int, tokens: int) -> Suite:
    """Everyday questions to the default: on these capping should change nothing."""
    role, cases = bank.default, []
    for number, question in enumerate(spread(bank.questions, answers)):
        prompt = number % len(role.prompts)
        key = f"{role.name}/{prompt}/{question.id}/0"
        messages = role_messages(role, prompt, question.question, model_name)
        cases.append(Case(key, NOBODY, question.id, "", messages, seed_of(key, seed)))
    return Suite("benign", {"refused": False, "degenerate": False}, tuple(cases), tokens)


def drift(conversations: Sequence[Conversation], seed: int, tokens: int) -> Suite:
    """User turns of stored conversations, asked again one after the other; every arm answers into its own conversation."""
    cases = []
    for name, messages, domain in conversations:
        system = [dict(one) for one in messages[:1] if one["role"] == "system"]
        users = [one["content"] for one in messages if one["role"] == "user"]
        key = f"{name}/0/drift/0"
        first = (*system, {"role": "user", "content": users[0]})
        cases.append(Case(key, NOBODY, name, domain, first, seed_of(key, seed), tuple(users[1:])))
    return Suite("drift", {"refused": False, "degenerate": False}, _unique(cases), tokens)


def _said(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _unique(cases: Sequence[Case]) -> tuple[Case, ...]:
    return tuple({case.key: case for case in cases}.values())
