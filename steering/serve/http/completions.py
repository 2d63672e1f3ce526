"""POST /v1/chat/completions: one conversation answered, whole or as a stream.

POST /v1/completions: texts gone on with, no template; with `echo` and `logprobs` the prompt's own log-probabilities.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from personatlas.persona.errors import UserError
from personatlas.persona.sampling.sampler import Prompt
from personatlas.steering.serve.answer_stream import StreamedAnswer
from personatlas.steering.serve.engine.scheduler import GenerationRequest, ServerBusy
from personatlas.steering.serve.http.responses import (
    DONE,
    ResponseEnvelope,
    broken,
    chat_likely,
    line,
    merged,
    text_likely,
    usage,
)
from personatlas.steering.serve.metrics import RequestTimer
from personatlas.steering.serve.schema import ChatRequest, CompletionRequest
from personatlas.steering.serve.service import PersonaService, PreparedPrompt


class ChatCompletionHandler:
    """One request on its way to its answer."""

    def __init__(self, host: PersonaService, request: ChatRequest, ready: PreparedPrompt) -> None:
        self.host, self.request, self.ready = host, request, ready
        self.watch = RequestTimer(host.metrics)
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self.envelope = ResponseEnvelope("chatcmpl", kind, request.model or host.name, host.fingerprint)

    async def whole(self) -> dict[str, Any]:
        """The answer object. Leaving it early cancels the work."""
        async with self.host.heard(self.host.asks(self.ready, self.request), self.request.stops) as heard:
            choices = await heard.whole(self.watch)
        told = [
            {
                "index": number,
                "message": {"role": "assistant", "content": choice.spoken.text, "refusal": None},
                "logprobs": chat_likely(choice, 0, len(choice.ids)),
                "finish_reason": choice.reason,
            }
            for number, choice in enumerate(choices)
        ]
        return self.envelope.of(
            told, usage=usage(choices, [len(self.ready.ids)]), persona=self._personas(choices)
        )

    async def stream(self) -> AsyncIterator[bytes]:
        """The lines of the stream, ending with `data: [DONE]`, or with an error object."""
        async with self.host.heard(self.host.asks(self.ready, self.request), self.request.stops) as heard:
            for number in range(len(heard.choices)):
                yield self._chunk(number, {"role": "assistant", "content": ""})
            told = {
                id(choice): (0, 0) for choice in heard.choices
            }  # tokens whose text, and whose projection, is sent
            async for choice, text in heard:
                if choice.error is not None:
                    yield broken(choice)
                    return
                if choice.ids:
                    self.watch.token()
                number = choice.number
                if text or (self.request.per_token and len(choice.seen) > told[id(choice)][1]):
                    yield self._text(number, choice, text, told)
                if choice.done:
                    is_last = not heard.open and not self.request.wants_usage
                    yield self._finish(choice, told[id(choice)][0], heard.choices if is_last else [])
        self.watch.end()
        if self.request.wants_usage:
            yield self._usage(heard.choices)
        yield DONE

    def _text(
        self, number: int, choice: StreamedAnswer, text: str, told: dict[int, tuple[int, int]]
    ) -> bytes:
        shown, seen = told[id(choice)]
        told[id(choice)] = len(choice.ids), len(choice.seen)
        more: dict[str, Any] = {}
        if self.request.per_token:
            more["persona"] = {"tokens": choice.tokens(seen, len(choice.seen))}
        return self._chunk(
            number, {"content": text}, likely=chat_likely(choice, shown, len(choice.ids)), **more
        )

    def _chunk(
        self, number: int, delta: dict[str, Any], finish: str | None = None, likely: Any = None, **more: Any
    ) -> bytes:
        usage_field = {"usage": None} if self.request.wants_usage else {}
        choice = {"index": number, "delta": delta, "logprobs": likely, "finish_reason": finish}
        return line(self.envelope.of([choice], **usage_field, **more))

    def _finish(self, choice: StreamedAnswer, shown: int, told: list[StreamedAnswer]) -> bytes:
        """The line that ends an answer, with the log-probabilities of tokens that showed no text. The last of them carries the persona
        object, unless the line with the usage follows: a line without choices that nobody asked for breaks loops over `choices[0]`."""
        more = {"persona": self._personas(told)} if told else {}
        rest = chat_likely(choice, shown, len(choice.ids)) if shown < len(choice.ids) else None
        return self._chunk(choice.number, {}, finish=choice.reason, likely=rest, **more)

    def _usage(self, choices: list[StreamedAnswer]) -> bytes:
        told = usage(choices, [len(self.ready.ids)])
        return line(self.envelope.of([], usage=told, persona=self._personas(choices)))

    def _personas(self, choices: list[StreamedAnswer]) -> dict[str, Any]:
        return merged([self._persona(choice) for choice in choices])

    def _persona(self, choice: StreamedAnswer) -> dict[str, Any]:
        host, ready = self.host, self.ready
        turns = ready.turns
        if turns is None:
            turns = host.standing.turns(ready.spans, choice.prompt_projections)
        told = host.standing.told(choice, turns, ready.messages, ready.mode, ready.held)
        host.metrics.answered(choice, told, set(host.engine.plans.caps))
        if self.request.per_token:
            told["per_token"] = choice.tokens(0, len(choice.ids))
        return told


Scores = list[tuple[float | None, dict[int, float]]]


class CompletionHandler:
    """One request, of one prompt or several, on its way to its answers."""

    def __init__(self, host: PersonaService, request: CompletionRequest, ready: list[PreparedPrompt]) -> None:
        self.host, self.request, self.ready = host, request, ready
        self.watch = RequestTimer(host.metrics)
        self.envelope = ResponseEnvelope(
            "cmpl", "text_completion", request.model or host.name, host.fingerprint
        )
        self.asks = [ask for one in ready for ask in host.asks(one, request)]
        self.modes = [one.mode for one in ready for _ in range(request.choices)]

    async def whole(self) -> dict[str, Any]:
        """The answer object."""
        scores = await self._scores() if self.request.echo and self.request.likely is not None else []
        async with self.host.heard(self.asks, self.request.stops, goes_on=True) as heard:
            choices = await heard.whole(self.watch)
        told = [
            self._choice(number, choice, scores[number // self.request.choices] if scores else None)
            for number, choice in enumerate(choices)
        ]
        lengths = [len(one.ids) for one in self.ready]
        return self.envelope.of(told, usage=usage(choices, lengths), persona=self._personas(choices))

    async def stream(self) -> AsyncIterator[bytes]:
        """The lines of the stream."""
        async with self.host.heard(self.asks, self.request.stops, goes_on=True) as heard:
            yield b""  # everything is submitted
            if self.request.echo:
                for number, choice in enumerate(heard.choices):
                    yield self._chunk(number, self._decoded(list(choice.ticket.ask.ids)))
            shown = {id(choice): 0 for choice in heard.choices}
            async for choice, text in heard:
                if choice.error is not None:
                    yield broken(choice)
                    return
                if choice.ids:
                    self.watch.token()
                number = choice.number
                if text or choice.done:
                    first, last = shown[id(choice)], len(choice.ids)
                    shown[id(choice)] = last
                    is_last = not heard.open and not self.request.wants_usage
                    more = {"persona": self._personas(heard.choices)} if is_last else {}
                    reason = choice.reason if choice.done else None
                    yield self._chunk(number, text, reason, self._likely(choice, first), **more)
        self.watch.end()
        if self.request.wants_usage:
            told = usage(heard.choices, [len(one.ids) for one in self.ready])
            yield line(self.envelope.of([], usage=told, persona=self._personas(heard.choices)))
        yield DONE

    def _chunk(
        self, number: int, text: str, finish: str | None = None, likely: Any = None, **more: Any
    ) -> bytes:
        choice = {"index": number, "text": text, "logprobs": likely, "finish_reason": finish}
        return line(self.envelope.of([choice], **more))

    def _personas(self, choices: list[StreamedAnswer]) -> dict[str, Any]:
        return merged([self._persona(number, choice) for number, choice in enumerate(choices)])

    def _likely(self, choice: StreamedAnswer, first: int) -> dict[str, Any] | None:
        if self.request.likely is None:
            return None
        return text_likely(
            self._tokenizer, choice.ids[first:], [(own, best) for own, best in choice.likely[first:]]
        )

    def _choice(self, number: int, choice: StreamedAnswer, scores: Scores | None) -> dict[str, Any]:
        ids, likely = list(choice.ids), list[tuple[float | None, dict[int, float]]](choice.likely)
        text, reason = choice.spoken.text, choice.reason
        if self.request.echo:
            prompt = list(choice.ticket.ask.ids)
            text = self._decoded(prompt) + text
            ids, likely = prompt + ids, (scores or []) + likely
        if choice.ticket.ask.limit == 0:
            reason = "length"
        if choice.closing is not None and choice.closing[1] is not None:
            # log-probabilities have the token that ended it too, as other servers': harnesses that ask for one token to score a
            # prompt count on it
            ids, likely = [*ids, choice.closing[0]], [*likely, choice.closing[1]]
        told = text_likely(self._tokenizer, ids, likely) if self.request.likely is not None else None
        return {"index": number, "text": text, "logprobs": told, "finish_reason": reason}

    async def _scores(self) -> list[Scores]:
        """The log-probabilities of every prompt's tokens, read between the steps of those who decode."""
        return [await self._scored(self.host.asks(one, self.request)[0]) for one in self.ready]

    async def _scored(self, ask: GenerationRequest) -> Scores:
        loop, engine = asyncio.get_running_loop(), self.host.engine
        future: asyncio.Future[Scores] = loop.create_future()

        def settle(value: Scores | None, error: BaseException | None) -> None:
            if not future.done():
                future.set_exception(error) if error is not None else future.set_result(value or [])

        def work() -> None:
            plan = None
            try:
                plan = engine.plans.place(ask.cap)
                # where all spare plans are taken (None) the cap cannot be put on just now
                if plan is None:
                    raise ServerBusy("too many different caps are in use; try again later")
                found = engine.rows.scored(Prompt(ask.ids, 0, plan), ask.logprobs or 0)
            except (RuntimeError, ValueError, IndexError, UserError) as error:
                engine.rows.forget()
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, found, None)
            finally:
                if plan is not None:
                    engine.plans.release(ask.cap)

        engine.between_steps(work)
        while not future.done():
            await asyncio.wait({future}, timeout=1.0)
            if not future.done() and not engine.alive:
                raise ServerBusy("the server is ending")
        return future.result()

    def _persona(self, number: int, choice: StreamedAnswer) -> dict[str, Any]:
        told = self.host.standing.told(choice, [], None, self.modes[number], False)
        self.host.metrics.answered(choice, told, set(self.host.engine.plans.caps))
        if self.request.per_token:
            told["per_token"] = choice.tokens(0, len(choice.ids))
        return told

    @property
    def _tokenizer(self) -> Any:
        return self.host.held.model.tokenizer

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
