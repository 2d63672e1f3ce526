"""Answers for a harness, which asks for one at a time and for many at once: requests in, answers with projections out.

    answerer = Answerer(loaded("smollm2-135m", ModelOptions(), "smollm2-135m", ["assistant"]))
    asked = Asked(answerer.prompt_ids(messages), seed=7, sampling=Sampling(64), capped=True, stops=("\\n\\n",))
    answerer.answers([asked])[0].text

Rows of one batch may be capped or not. What was answered is read once more, in one batch with the same caps on: the mean
projection of an answer's tokens at the axis's layer, before the cap's step, and the share of tokens that the cap changed.
"""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

from personaxis.persona.chat import Messages
from personaxis.persona.graph import fastest_sampler
from personaxis.persona.record import CPU_TOKENS, GPU_TOKENS
from personaxis.persona.sampler import Answer, Prompt, Sampler, Sampling, batch_end, batch_tokens, pad
from personaxis.persona.subject import residual
from personaxis.steering.calm import direction_of
from personaxis.steering.steer import steered
from personaxis.steering.verbs import Loaded


@dataclass(frozen=True)
class Asked:
    """A prompt's ids, the seed and the way to sample, whether the caps act, and texts that end the answer."""

    ids: tuple[int, ...]
    seed: int
    sampling: Sampling
    capped: bool
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answered:
    """An answer up to what ended it: an end token, the most tokens, or a stop text, which is not part of `text`.

    `ids` go on to the token that completed the stop text, and `written` counts all tokens that were sampled. `projection` is
    the mean over `ids`, None for an empty answer; `fired` is the share of tokens times layers that the caps changed, over
    prompt and answer, None where no cap acts.
    """

    text: str
    ids: tuple[int, ...]
    written: int
    stopped: Literal["end", "length", "stop"]
    projection: float | None = None
    fired: float | None = None


class Answerer:
    """A loaded subject with its caps that answers batches, one batch at a time whoever asks."""

    def __init__(self, held: Loaded) -> None:
        self.held = held
        self._one_at_a_time = Lock()
        self._last: tuple[Sampling, Sampler] | None = None

    def prompt_ids(self, messages: Messages) -> tuple[int, ...]:
        """What the model reads. Raises `KnownError` for messages that the template refuses."""
        return tuple(self.held.chat.prompt_ids(messages))

    @property
    def context(self) -> int | None:
        """Tokens that the model holds, if it says so."""
        return self.held.subject.context

    def describe(self) -> dict[str, Any]:
        """What makes two logs comparable: the model, its dtype, and the direction that projections are on."""
        subject, axis = self.held.subject, self.held.axis
        dtype = str(subject.dtype).removeprefix("torch.")
        return {"model": subject.describe(), "dtype": dtype, "layer": axis.layer, "direction": direction_of(axis)}

    @torch.no_grad()
    def answers(self, asked: Sequence[Asked]) -> list[Answered]:
        """Answers in the order asked. Requests that sample alike are one batch."""
        with self._one_at_a_time:
            found: dict[int, Answered] = {}
            for sampling in dict.fromkeys(one.sampling for one in asked):
                rows = [row for row, one in enumerate(asked) if one.sampling == sampling]
                answers = self._sampled([asked[row] for row in rows], sampling)
                found |= {row: self._cut(asked[row], answer) for row, answer in zip(rows, answers, strict=True)}
            return self._read(asked, [found[row] for row in range(len(asked))])

    def _sampled(self, asked: Sequence[Asked], sampling: Sampling) -> list[Answer]:
        subject = self.held.subject
        if self._last is None or self._last[0] != sampling:  # building one reads the model again, to prove its cache
            self._last = None  # frees a captured step first
            self._last = sampling, fastest_sampler(subject, self.held.chat.end_ids, sampling)
        prompts = [Prompt(one.ids, one.seed, 0 if one.capped else -1) for one in asked]
        with steered(subject, self.held.caps) if any(one.capped for one in asked) else nullcontext() as held:
            answers = sorted(self._last[1].answers(prompts, held), key=lambda answer: answer.index)
            if held is not None:
                _ = held.tally  # Silent, unless the caps saw just what was fed
        return answers

    def _cut(self, one: Asked, answer: Answer) -> Answered:
        """The answer up to the first stop text."""

        def text(tokens: int) -> str:
            return self.held.subject.tokenizer.decode(list(answer.ids[:tokens]), skip_special_tokens=True)

        def is_over(tokens: int) -> bool:
            return any(stop in text(tokens) for stop in one.stops)

        whole = len(answer.ids)
        if not is_over(whole):
            return Answered(text(whole), answer.ids, whole, answer.stopped)
        tokens = bisect_left(range(whole), True, key=is_over)
        said = text(tokens)
        place = min(said.find(stop) for stop in one.stops if stop in said)
        return Answered(said[:place], answer.ids[:tokens], whole, "stop")

    def _read(self, asked: Sequence[Asked], answers: Sequence[Answered]) -> list[Answered]:
        """The answers with what a reading of all of them shows, longest first."""
        lengths = [len(one.ids) + len(answer.ids) for one, answer in zip(asked, answers, strict=True)]
        order = sorted((row for row, answer in enumerate(answers) if answer.ids), key=lambda row: -lengths[row])
        found, first = list(answers), 0
        while first < len(order):
            tokens = batch_tokens(self.held.subject, CPU_TOKENS, GPU_TOKENS)
            stop = batch_end([lengths[row] for row in order], first, tokens)
            rows = order[first:stop]
            read = self._batch_read([asked[row] for row in rows], [answers[row] for row in rows])
            for row, (projection, fired) in zip(rows, read, strict=True):
                one = answers[row]
                found[row] = Answered(one.text, one.ids, one.written, one.stopped, projection, fired)
            first = stop
        return found

    def _batch_read(self, asked: Sequence[Asked], answers: Sequence[Answered]) -> list[tuple[float, float | None]]:
        subject, axis = self.held.subject, self.held.axis
        texts = [one.ids + answer.ids for one, answer in zip(asked, answers, strict=True)]
        starts, lengths = torch.tensor([len(one.ids) for one in asked]), torch.tensor([len(text) for text in texts])
        seen: list[Tensor] = []

        def keep(_module: Any, _args: Any, output: Any) -> None:
            h = residual(output).float()
            seen.append((h @ axis.at(axis.layer).to(h.device)).cpu())  # (B, T)

        is_capped = [one.capped for one in asked]
        with steered(subject, self.held.caps) if any(is_capped) else nullcontext() as held:
            if held is not None:
                held.begin(torch.tensor([0 if capped else -1 for capped in is_capped]))
                held.describe(lengths=lengths, answer_from=starts)
            # before the step at the layer
            handle = subject.blocks[axis.layer].register_forward_hook(keep, prepend=True)
            try:
                subject.base(input_ids=pad(texts, subject.device), use_cache=False)
            finally:
                handle.remove()
            tally = None if held is None else held.tally
        found = []
        for row, (start, stop) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            fired = tally.rows([row]).share if tally is not None and is_capped[row] else None
            found.append((float(seen[0][row, start:stop].mean()), fired))
        return found
