"""What a cap is to make likely: the default's own answers about who it is, put after the prompts of roles.

texts = wanted_texts(subject, chat, bank, trial.halves["choose"].requests, seed=0)
"""

from collections.abc import Sequence

from personaxis.persona.bank import Bank
from personaxis.persona.chat import ChatFormat
from personaxis.persona.progress import progress
from personaxis.persona.rollouts import Request, Rollout
from personaxis.persona.sampler import Answer, Sampling
from personaxis.persona.subject import Subject
from personaxis.steering.arms import run_arms
from personaxis.steering.identity import class_of
from personaxis.steering.susceptibility import identity_requests

LONGEST = 32  # tokens: who it is, it says at once
TIMES = 2  # answers to a question under each default prompt


def wanted_texts(
    subject: Subject, chat: ChatFormat, bank: Bank, requests: Sequence[Request], seed: int
) -> list[Rollout]:
    """The requests with an answer of the default in which it calls itself an assistant, to the same question.

    Requests whose question the default never answers so are left out; that may be all of them.
    """
    asked = [
        request
        for time in range(TIMES)
        for request in identity_requests(
            bank, [bank.default.name], len(bank.default.prompts), subject.name, seed + time
        )
    ]
    with progress("asking the default who it is", len(asked)) as advance:
        arm = next(iter(run_arms(subject, chat, asked, {"default": []}, Sampling(LONGEST), advance)))
    found: dict[str, list[tuple[str, Answer]]] = {}
    for request, text, answer in zip(asked, arm.texts, arm.answers, strict=True):
        if class_of(text) == "assistant":
            found.setdefault(_question(request), []).append((text, answer))
    wanted = []
    for number, request in enumerate(request for request in requests if _question(request) in found):
        own = found[_question(request)]
        text, answer = own[number % len(own)]
        ids = tuple(chat.prompt_ids(list(request.messages)))
        wanted.append(
            Rollout(request.key, tuple(request.messages), ids, answer.ids, text, request.seed, answer.stopped)
        )
    return wanted


def _question(request: Request) -> str:
    return request.key.split("/")[2]
