"""Answers for a harness, which asks for one at a time and for many at once: requests in, answers with
projections out.

    answerer = BatchAnswerer(load_steered_model(model, axis, ["cap:assistant"]))
    request = AnswerRequest(answerer.prompt_ids(messages), seed=7, sampling=Sampling(64), steered=True)
    answerer.answers([request])[0].text

Rows of one batch may be steered or not. What was answered is read once more, in one batch with the same
interventions: the mean projection of an answer's tokens at the axis's layer, before the interventions' step,
and the share of tokens that they changed.
"""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import Literal

import torch

from personatlas.persona.models.chat_template import Messages
from personatlas.persona.models.hooks import capture
from personatlas.persona.pipeline.record import CPU_TOKENS, GPU_TOKENS
from personatlas.persona.records import JsonObject
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import (
    Answer,
    Prompt,
    Sampler,
    Sampling,
    batch_end,
    batch_tokens,
    pad,
)
from personatlas.steering.drift_monitor import direction_digest
from personatlas.steering.hooks.steering import steer
from personatlas.steering.session import SteeredModel


@dataclass(frozen=True)
class AnswerRequest:
    """A prompt's ids, its seed and sampling, whether the interventions act, and texts that end the answer."""

    ids: tuple[int, ...]
    seed: int
    sampling: Sampling
    steered: bool
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeasuredAnswer:
    """An answer up to what ended it: an end token, the most tokens, or a stop text, which is not part of
    `text`.

    `ids` go on to the token that completed the stop text, and `written` counts all tokens that were sampled.
    `projection` is the mean over `ids`, None for an empty answer; `fired` is the share of tokens times layers
    that were changed, over prompt and answer, None where nothing acts.
    """

    text: str
    ids: tuple[int, ...]
    written: int
    stopped: Literal["end", "length", "stop"]
    projection: float | None = None
    fired: float | None = None


class BatchAnswerer:
    """A loaded model that answers batches, one batch at a time whoever asks, at baseline or in its only arm.

    Raises `UserError` for a model with several arms.
    """

    def __init__(self, steered: SteeredModel) -> None:
        self.steered = steered
        self.interventions = steered.only_arm[1]
        self._one_at_a_time = Lock()
        self._last: tuple[Sampling, Sampler] | None = None

    def prompt_ids(self, messages: Messages) -> tuple[int, ...]:
        """What the model reads. Raises `UserError` for messages that the template refuses."""
        return tuple(self.steered.chat.prompt_ids(messages))

    @property
    def context(self) -> int | None:
        """Tokens that the model holds, if it says so."""
        return self.steered.model.context

    def describe(self) -> JsonObject:
        """What makes two logs comparable: the model, its dtype, and the direction that projections are on."""
        model, axis = self.steered.model, self.steered.axis
        dtype = str(model.dtype).removeprefix("torch.")
        return {
            "model": model.describe(),
            "dtype": dtype,
            "layer": axis.layer,
            "direction": direction_digest(axis),
        }

    @torch.no_grad()
    def answers(self, requests: Sequence[AnswerRequest]) -> list[MeasuredAnswer]:
        """Answers in the requests' order. Requests that sample alike are one batch."""
        with self._one_at_a_time:
            found: dict[int, MeasuredAnswer] = {}
            for sampling in dict.fromkeys(request.sampling for request in requests):
                rows = [row for row, request in enumerate(requests) if request.sampling == sampling]
                answers = self._sample([requests[row] for row in rows], sampling)
                found |= {
                    row: self._cut(requests[row], answer) for row, answer in zip(rows, answers, strict=True)
                }
            return self._measure(requests, [found[row] for row in range(len(requests))])

    def _sample(self, requests: Sequence[AnswerRequest], sampling: Sampling) -> list[Answer]:
        model = self.steered.model
        if self._last is None or self._last[0] != sampling:  # building one reads the model again
            self._last = None  # frees a captured step first
            self._last = sampling, fastest_sampler(model, self.steered.chat.end_ids, sampling)
        prompts = [Prompt(request.ids, request.seed, 0 if request.steered else -1) for request in requests]
        is_steered = any(request.steered for request in requests)
        with steer(model, self.interventions) if is_steered else nullcontext() as steering:
            callback = None if steering is None else steering.callback
            answers = sorted(self._last[1].answers(prompts, callback), key=lambda answer: answer.index)
            if callback is not None:
                _ = callback.tally  # HookDidNotFire, unless the interventions saw just what was fed
        return answers

    def _cut(self, request: AnswerRequest, answer: Answer) -> MeasuredAnswer:
        """The answer up to the first stop text."""

        def text(tokens: int) -> str:
            return self.steered.model.decode(answer.ids[:tokens])

        def is_over(tokens: int) -> bool:
            return any(stop in text(tokens) for stop in request.stops)

        whole = len(answer.ids)
        if not is_over(whole):
            return MeasuredAnswer(text(whole), answer.ids, whole, answer.stopped)
        tokens = bisect_left(range(whole), True, key=is_over)
        written = text(tokens)
        end = min(written.find(stop) for stop in request.stops if stop in written)
        return MeasuredAnswer(written[:end], answer.ids[:tokens], whole, "stop")

    def _measure(
        self, requests: Sequence[AnswerRequest], answers: Sequence[MeasuredAnswer]
    ) -> list[MeasuredAnswer]:
        """The answers with projections and fired shares, from a reading of all of them, longest first."""
        lengths = [
            len(request.ids) + len(answer.ids) for request, answer in zip(requests, answers, strict=True)
        ]
        order = [row for row, answer in enumerate(answers) if answer.ids]
        order.sort(key=lambda row: -lengths[row])
        found, first = list(answers), 0
        tokens = batch_tokens(self.steered.model, CPU_TOKENS, GPU_TOKENS)
        while first < len(order):
            stop = batch_end([lengths[row] for row in order], first, tokens)
            rows = order[first:stop]
            measured = self._read([requests[row] for row in rows], [answers[row] for row in rows])
            for row, (projection, fired) in zip(rows, measured, strict=True):
                found[row] = replace(answers[row], projection=projection, fired=fired)
            first = stop
        return found

    def _read(
        self, requests: Sequence[AnswerRequest], answers: Sequence[MeasuredAnswer]
    ) -> list[tuple[float, float | None]]:
        """Mean projection and fired share of each answer, in one forward."""
        model, axis = self.steered.model, self.steered.axis
        texts = [request.ids + answer.ids for request, answer in zip(requests, answers, strict=True)]
        starts = torch.tensor([len(request.ids) for request in requests])
        lengths = torch.tensor([len(text) for text in texts])
        vector, layer = axis.at(axis.layer), axis.layer
        plans = [0 if request.steered else -1 for request in requests]
        with steer(model, self.interventions) if 0 in plans else nullcontext() as steering:
            if steering is not None:
                steering.begin(torch.tensor(plans))
                steering.describe(lengths=lengths, answer_from=starts)

            def project(_layer: int, h: torch.Tensor) -> torch.Tensor:
                return (h.float() @ vector.to(h.device)).cpu()  # (B, T)

            with capture(model, [layer], project, before_others=True) as projections:
                model.base(input_ids=pad(texts, model.device), use_cache=False)
            tally = None if steering is None else steering.tally
        measured = []
        for row, (start, stop) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            fired = tally.rows([row]).share if tally is not None and plans[row] == 0 else None
            measured.append((float(projections[layer][row, start:stop].mean()), fired))
        return measured
