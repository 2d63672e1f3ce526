"""The same requests answered in several arms: the same prompts, the same seeds, the same engine, other interventions.

    for arm in run_arms(model, chat, requests, {"baseline": [], "capped": [cap]}, Sampling(48)):
        arm.name, arm.texts, arm.tally            # in the order of the requests

On a GPU all arms are rows of the same batches, each following its own plan, so hundreds of caps cost one capture; on a CPU,
where every hooked layer costs, arms run one after the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from personatlas.persona.interventions import Interventions
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model
from personatlas.persona.pipeline.stages import CPU_CHUNK, GPU_CHUNK
from personatlas.persona.rollout import Request
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Answer, Prompt, Sampler, Sampling
from personatlas.steering.hooks.steering import Tally, steer

BASELINE = "baseline"  # the arm without interventions, by this name everywhere


def distinct(ids: Sequence[int], n: int = 1) -> float:
    """Distinct n-grams among those of an answer's tokens; NaN where it is shorter."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


@dataclass(frozen=True)
class Arm:
    """What one arm answered, in the order of the requests; `tally` is None for an arm without interventions."""

    name: str
    texts: tuple[str, ...]
    answers: tuple[Answer, ...]
    tally: Tally | None

    @property
    def distinct(self) -> float:
        """Distinct tokens among the tokens of an answer, mean over the answers that are not empty; NaN if all are."""
        shares = [distinct(answer.ids) for answer in self.answers if answer.ids]
        return sum(shares) / len(shares) if shares else float("nan")


def run_arms(
    model: Model,
    chat: ChatFormat,
    requests: Sequence[Request],
    arms: Mapping[str, Interventions],
    sampling: Sampling,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Arm]:
    """Answer all requests in all arms; `advance` is told how many answers more there are."""
    ids = [tuple(chat.prompt_ids(list(request.messages))) for request in requests]
    sampler = fastest_sampler(model, chat.end_ids, sampling, max(map(len, ids)))
    on_gpu = model.device.type == "cuda"
    for group in [list(arms)] if on_gpu else [[name] for name in arms]:
        acting = [name for name in group if arms[name]]
        plans = {name: acting.index(name) if name in acting else -1 for name in group}
        prompts = [
            Prompt(own, request.seed, plans[name])
            for name in group
            for own, request in zip(ids, requests, strict=True)
        ]
        answers, tally = _answered(
            model,
            sampler,
            prompts,
            [arms[name] for name in acting],
            GPU_CHUNK if on_gpu else CPU_CHUNK,
            advance,
        )
        for number, name in enumerate(group):
            rows = range(number * len(requests), (number + 1) * len(requests))
            own_answers = tuple(answers[row] for row in rows)
            texts = tuple(model.decode(answer.ids) for answer in own_answers)
            yield Arm(
                name, texts, own_answers, tally.rows(rows) if tally is not None and arms[name] else None
            )


def _answered(
    model: Model,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    plans: Sequence[Interventions],
    chunk: int,
    advance: Callable[[int], None],
) -> tuple[list[Answer], Tally | None]:
    """Answers to the prompts in their order, and the account of all of them."""
    answers: list[Answer] = []
    tallies: list[Tally] = []
    with steer(model, *plans) if plans else nullcontext() as held:
        for first in range(0, len(prompts), chunk):
            part = prompts[first : first + chunk]
            found: list[Answer | None] = [None] * len(part)
            for answer in sampler.answers(part, held):
                found[answer.index] = answer
                advance(1)
            answers += [answer for answer in found if answer is not None]
            if held is not None:
                tallies.append(held.tally)
    return answers, joined(tallies) if tallies else None


def joined(tallies: Sequence[Tally]) -> Tally:
    """Accounts of the same layers, row after row."""
    columns = (
        torch.cat([getattr(tally, name) for tally in tallies], dim=1)
        for name in ("seen", "fired", "total", "most")
    )
    return Tally(tallies[0].layers, *columns)
