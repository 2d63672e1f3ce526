"""Answers as they come out of the engine: their text, their tokens with projections, and why they ended.

    async with service.stream(requests, stops) as answers:   # an `AnswerStream`
        async for answer, text in answers: ...               # a `StreamedAnswer` and the text it gained

An event carries the projection of the token that was fed, so a token's projection comes with the event after
the one that drew it. The last token of an answer that was cut is never fed and has none.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from personatlas.persona.errors import UserError
from personatlas.persona.models.detokenizer import Detokenizer
from personatlas.persona.records import JsonRecord
from personatlas.steering.serve.engine.batch import TokenEvent, TokenLogprobs
from personatlas.steering.serve.engine.scheduler import (
    Engine,
    EngineEvent,
    FinishEvent,
    GenerationRequest,
    PrefillEvent,
    RequestHandle,
)


class EngineFailure(RuntimeError):
    """The engine could not answer, through no fault of the request."""


@dataclass(frozen=True)
class TokenState(JsonRecord):
    """A token: its projection (None while it is not fed) and at how many layers the arm changed it.

    The texts of an answer's tokens, joined, are the answer: a character of several tokens is the last one's.
    """

    id: int
    text: str
    projection: float | None
    fired: int


@dataclass(eq=False)
class StreamedAnswer:
    """One answer so far. `measured[i]` are projection and changed layers of token i, where known."""

    index: int
    handle: RequestHandle
    detokenizer: Detokenizer
    end_ids: frozenset[int]
    prefill: PrefillEvent | None = None
    prompt_end: TokenEvent | None = None  # of the step that fed the prompt's last token
    ids: list[int] = field(default_factory=list)
    measured: list[tuple[float, int]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    end_token: TokenEvent | None = None  # of the token that ended it, which is in no text
    finish_reason: Literal["stop", "length"] | None = None
    error: BaseException | None = None
    done: bool = False

    @property
    def text(self) -> str:
        """The text so far."""
        return self.detokenizer.text

    @property
    def prompt_projections(self) -> list[float]:
        """Projections of the prompt's tokens, without the last one's before the first step."""
        projections = list(self.prefill.projections) if self.prefill is not None else []
        return [*projections, self.prompt_end.projection] if self.prompt_end is not None else projections

    @property
    def projection(self) -> float | None:
        """Mean projection of the answer's tokens, None while none was fed."""
        return sum(value for value, _ in self.measured) / len(self.measured) if self.measured else None

    @property
    def fired(self) -> float | None:
        """Share of the answer's tokens times steered layers that were changed; None at baseline."""
        arm = self.handle.request.arm
        if arm is None or not arm.answer_layers or not self.measured:
            return None
        return sum(fired for _, fired in self.measured) / (len(self.measured) * len(arm.answer_layers))

    def tokens(self, start: int = 0, stop: int | None = None) -> tuple[TokenState, ...]:
        """The answer's tokens [start, stop)."""
        states = []
        for i in range(len(self.ids))[start:stop]:
            projection, fired = self.measured[i] if i < len(self.measured) else (None, 0)
            states.append(TokenState(self.ids[i], self.detokenizer.pieces[i], projection, fired))
        return tuple(states)

    @property
    def failure(self) -> UserError | EngineFailure | None:
        """The error that ended the answer: a `UserError` as it is, others in one line."""
        if self.error is None or isinstance(self.error, UserError):
            return self.error
        return EngineFailure((str(self.error).splitlines() or [type(self.error).__name__])[0][:200])

    def raise_error(self) -> None:
        """Raises the error that ended the answer, if any."""
        if (failure := self.failure) is not None:
            raise failure

    def take(self, event: EngineEvent) -> str:
        """Takes in an event and returns the text that it adds."""
        if self.done:
            return ""
        if isinstance(event, PrefillEvent):
            self.prefill = event
            return ""
        if isinstance(event, FinishEvent):
            self.done, self.error = True, event.error
            self.finish_reason = "length" if event.reason == "length" else "stop"
            text = self.detokenizer.flush()
            if self.detokenizer.stopped:
                self.finish_reason = "stop"
            return text
        if self.prompt_end is None:
            self.prompt_end = event
        else:
            self.measured.append((event.projection, event.fired))
        if self.handle.request.max_tokens == 0:
            return ""
        if event.token in self.end_ids:
            self.end_token = event
            return ""
        self.ids.append(event.token)
        if event.logprobs is not None:
            self.logprobs.append(event.logprobs)
        text = self.detokenizer.add(event.token)
        if self.detokenizer.stopped:
            self.finish_reason, self.done = "stop", True
            self.handle.cancel()
        return text


class AnswerStream:
    """The answers to several requests: an asynchronous iterator of (answer, the text that it gained).

    `continues_prompt`: answers continue the prompt's text. Raises `UserError` for a request that the engine
    refuses; those before it are cancelled.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[GenerationRequest],
        stops: tuple[str, ...] = (),
        *,
        continues_prompt: bool = False,
    ) -> None:
        self._events: asyncio.Queue[tuple[RequestHandle, EngineEvent]] = asyncio.Queue()
        self._by_handle: dict[RequestHandle, StreamedAnswer] = {}
        self.n_open = len(requests)  # answers that have not ended
        try:
            for index, request in enumerate(requests):
                handle = engine.submit(request, owner=self)
                prefix = request.ids if continues_prompt else ()
                detokenizer = Detokenizer(engine.model.tokenizer, stops, prefix)
                self._by_handle[handle] = StreamedAnswer(index, handle, detokenizer, engine.end_ids)
        except UserError:
            self.cancel()
            raise

    @property
    def answers(self) -> list[StreamedAnswer]:
        """The answers in the order of their requests."""
        return list(self._by_handle.values())

    def put(self, handle: RequestHandle, event: EngineEvent) -> None:
        """Adds an event of one of the requests; in the event loop's thread."""
        self._events.put_nowait((handle, event))

    async def __aiter__(self) -> AsyncIterator[tuple[StreamedAnswer, str]]:
        while self.n_open:
            handle, event = await self._events.get()
            answer = self._by_handle[handle]
            if not answer.done:
                text = answer.take(event)
                self.n_open -= answer.done
                yield answer, text

    def cancel(self) -> None:
        """Cancels the answers that have not ended."""
        for answer in self.answers:
            if not answer.done:
                answer.handle.cancel()
