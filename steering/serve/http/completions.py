"""POST /v1/chat/completions and /v1/completions: requests that are answered whole or as a stream.

    completion = ChatCompletion(service, request, await service.prepare_chat(request))
    await completion.respond()                      # the response object as JSON
    async for line in completion.stream(): ...      # the lines of a stream, the first once all is submitted

With `echo` and `logprobs` a text completion has the log-probabilities of its prompt too.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

from personatlas.persona.records import JsonObject
from personatlas.steering.serve.answer_stream import AnswerStream, StreamedAnswer
from personatlas.steering.serve.engine.batch import TokenLogprobs
from personatlas.steering.serve.http.responses import (
    DONE,
    chat_logprobs,
    error_line,
    persona_object,
    response_fields,
    stream_line,
    text_logprobs,
    usage_object,
)
from personatlas.steering.serve.metrics import RequestTimer
from personatlas.steering.serve.schema import ChatRequest, CompletionRequest
from personatlas.steering.serve.service import PersonaService, PreparedPrompt

MANY_LOGPROBS = 10_000  # more are written outside the event loop
Request = TypeVar("Request", ChatRequest, CompletionRequest)


class _Completion(Generic[Request]):
    """What both kinds share. Leaving `respond` or `stream` early cancels the answers."""

    continues_prompt = False
    kind: tuple[str, str]  # prefix of ids, and kind of objects

    def __init__(self, service: PersonaService, request: Request, prompts: Sequence[PreparedPrompt]) -> None:
        self.service, self.prompts = service, prompts
        self.request: Request = request
        self.requests = [own for prompt in prompts for own in service.generation_requests(prompt, request)]
        self.timer = RequestTimer(service.metrics)
        prefix, kind = self.kind
        self.fields = response_fields(prefix, kind, request.model or service.name, service.fingerprint)

    async def respond(self) -> bytes:
        """The response object as JSON. Raises the error of an answer that failed."""
        scores = await self._scores()
        async with self._submit() as stream:
            async for answer, _ in stream:
                if answer.ids:
                    self.timer.note_token()
        answers = stream.answers
        for answer in answers:
            answer.raise_error()
        self.timer.end()

        def response() -> bytes:
            choices = [self._choice(answer, scores) for answer in answers]
            return json.dumps(
                {**self.fields, "choices": choices, **self._usage(answers)}, allow_nan=False
            ).encode()

        n_logprobs = (self.request.n_logprobs or 0) + 1 if self.request.n_logprobs is not None else 0
        n_tokens = sum(len(answer.ids) for answer in answers) + sum(map(len, scores))
        return await self.service.outside_loop(n_tokens * n_logprobs > MANY_LOGPROBS, response)

    async def stream(self) -> AsyncIterator[bytes]:
        """The lines of the stream, ending with `data: [DONE]` or an error object."""
        wants_usage = self.request.wants_usage
        async with self._submit() as stream:
            for line in self._opening(stream.answers):
                yield line
            async for answer, text in stream:
                if answer.error is not None:
                    yield error_line(answer)
                    return
                if answer.ids:
                    self.timer.note_token()
                # in the last chunk, unless one with the usage follows: an extra chunk without choices would
                # break clients that read `choices[0]` of each
                is_last = answer.done and not stream.n_open and not wants_usage
                more = self._personas(stream.answers) if is_last else {}
                for line in self._chunks(answer, text, more):
                    yield line
        self.timer.end()
        if wants_usage:
            yield stream_line({**self.fields, "choices": [], **self._usage(stream.answers)})
        yield DONE

    def _submit(self) -> AbstractAsyncContextManager[AnswerStream]:
        return self.service.stream(self.requests, self.request.stops, continues_prompt=self.continues_prompt)

    async def _scores(self) -> list[list[TokenLogprobs]]:
        """Log-probabilities of the prompts' own tokens, where they are asked for."""
        return []

    def _choice(self, answer: StreamedAnswer, scores: list[list[TokenLogprobs]]) -> JsonObject:
        raise NotImplementedError

    def _opening(self, answers: Sequence[StreamedAnswer]) -> Iterator[bytes]:
        raise NotImplementedError

    def _chunks(self, answer: StreamedAnswer, text: str, more: JsonObject) -> Iterator[bytes]:
        raise NotImplementedError

    def _usage(self, answers: Sequence[StreamedAnswer]) -> JsonObject:
        usage = usage_object(answers, [len(prompt.ids) for prompt in self.prompts])
        return {"usage": usage, **self._personas(answers)}

    def _personas(self, answers: Sequence[StreamedAnswer]) -> JsonObject:
        """The field `persona` of a response; none where the server has no axis."""
        personas, named = [], set(self.service.arms.named)
        for answer in answers:
            prompt = self.prompts[answer.index // self.request.choices]
            persona = self.service.measure(prompt, answer, per_token=self.request.per_token)
            self.service.metrics.count_answer(answer, persona, named)
            if persona is not None:
                personas.append(persona.to_json())
        return {"persona": persona_object(personas)} if personas else {}


class ChatCompletion(_Completion[ChatRequest]):
    """The answers to one conversation."""

    def __init__(self, service: PersonaService, request: ChatRequest, prompt: PreparedPrompt) -> None:
        self.kind = "chatcmpl", "chat.completion.chunk" if request.stream else "chat.completion"
        super().__init__(service, request, [prompt])
        self._sent: dict[
            int, tuple[int, int]
        ] = {}  # by answer: tokens whose text, and whose projection, was sent

    def _choice(self, answer: StreamedAnswer, scores: list[list[TokenLogprobs]]) -> JsonObject:
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": chat_logprobs(answer, 0, len(answer.ids)),
            "finish_reason": answer.finish_reason,
        }

    def _opening(self, answers: Sequence[StreamedAnswer]) -> Iterator[bytes]:
        for answer in answers:
            yield self._chunk(answer, {"role": "assistant", "content": ""})

    def _chunks(self, answer: StreamedAnswer, text: str, more: JsonObject) -> Iterator[bytes]:
        shown, measured = self._sent.get(answer.index, (0, 0))
        n_tokens, n_measured = len(answer.ids), len(answer.measured)
        per_token = self.request.per_token and self.service.axis is not None
        if text or (per_token and n_measured > measured):
            tokens = answer.tokens(measured, n_measured) if per_token else ()
            persona = {"persona": {"tokens": [token.to_json() for token in tokens]}} if per_token else {}
            logprobs = chat_logprobs(answer, shown, n_tokens)
            yield self._chunk(answer, {"content": text}, logprobs=logprobs, more=persona)
            shown, measured = n_tokens, n_measured
            self._sent[answer.index] = shown, measured
        if answer.done:  # with the log-probabilities of tokens that showed no text
            logprobs = chat_logprobs(answer, shown, n_tokens) if shown < n_tokens else None
            yield self._chunk(answer, {}, answer.finish_reason, logprobs=logprobs, more=more)

    def _chunk(
        self,
        answer: StreamedAnswer,
        delta: JsonObject,
        finish_reason: str | None = None,
        *,
        logprobs: JsonObject | None = None,
        more: JsonObject | None = None,
    ) -> bytes:
        usage = {"usage": None} if self.request.wants_usage else {}
        choice = {"index": answer.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return stream_line({**self.fields, "choices": [choice], **usage, **(more or {})})


class TextCompletion(_Completion[CompletionRequest]):
    """The continuations of one text or several."""

    continues_prompt = True
    kind = ("cmpl", "text_completion")

    def __init__(
        self, service: PersonaService, request: CompletionRequest, prompts: Sequence[PreparedPrompt]
    ) -> None:
        super().__init__(service, request, prompts)
        self.tokenizer = service.model.tokenizer
        self._sent: dict[int, int] = {}  # by answer: tokens that were sent

    async def _scores(self) -> list[list[TokenLogprobs]]:
        if not self.request.echo or self.request.n_logprobs is None:
            return []
        first_of_each = self.requests[:: self.request.choices]
        return [await asyncio.wrap_future(self.service.engine.score(own)) for own in first_of_each]

    def _choice(self, answer: StreamedAnswer, scores: list[list[TokenLogprobs]]) -> JsonObject:
        ids, logprobs, text = list(answer.ids), list(answer.logprobs), answer.text
        if self.request.echo:
            prompt = answer.handle.request.ids
            text = self._echo(answer) + answer.detokenizer.prefix_kept + text
            ids = [*prompt, *ids]
            logprobs = [*(scores[answer.index // self.request.choices] if scores else []), *logprobs]
        if answer.end_token is not None and answer.end_token.logprobs is not None:
            # as other servers: harnesses that ask for one token to score a prompt count on it
            ids.append(answer.end_token.token)
            logprobs.append(answer.end_token.logprobs)
        wanted, begins = self.request.n_logprobs is not None, bool(self.request.echo)
        return {
            "index": answer.index,
            "text": text,
            "logprobs": text_logprobs(self.tokenizer, ids, logprobs, begins=begins) if wanted else None,
            "finish_reason": "length" if answer.handle.request.max_tokens == 0 else answer.finish_reason,
        }

    def _opening(self, answers: Sequence[StreamedAnswer]) -> Iterator[bytes]:
        yield b""  # everything is submitted
        if self.request.echo:
            for answer in answers:
                yield self._chunk(answer, self._echo(answer), None, None, {})

    def _chunks(self, answer: StreamedAnswer, text: str, more: JsonObject) -> Iterator[bytes]:
        if text or answer.done:
            if self.request.echo and answer.index not in self._sent:
                text = answer.detokenizer.prefix_kept + text
            start = self._sent.get(answer.index, 0)
            self._sent[answer.index] = len(answer.ids)
            logprobs = None
            if self.request.n_logprobs is not None:
                own = answer.ids[start:], answer.logprobs[start:]
                offset = sum(map(len, answer.detokenizer.pieces[:start]))
                logprobs = text_logprobs(self.tokenizer, *own, offset=offset)
            reason = answer.finish_reason if answer.done else None
            yield self._chunk(answer, text, logprobs, reason, more)

    def _chunk(
        self,
        answer: StreamedAnswer,
        text: str,
        logprobs: JsonObject | None,
        finish_reason: str | None,
        more: JsonObject,
    ) -> bytes:
        choice = {"index": answer.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return stream_line({**self.fields, "choices": [choice], **more})

    def _echo(self, answer: StreamedAnswer) -> str:
        """The prompt's text, special tokens too, without a character that the answer may complete."""
        decode, ids = self.tokenizer.decode, list(answer.handle.request.ids)
        text = str(decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return text.removesuffix(answer.detokenizer.prefix_tail)
