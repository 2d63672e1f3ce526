"""POST /v1/chat/completions: one conversation answered, whole or as a stream."""

from collections.abc import AsyncIterator
from typing import Any

from personaxis.steering.serve.choice import Choice
from personaxis.steering.serve.host import Host, Prepared
from personaxis.steering.serve.metrics import Watch
from personaxis.steering.serve.replies import DONE, Envelope, broken, chat_likely, line, merged, usage
from personaxis.steering.serve.wire import ChatRequest


class Talk:
    """One request on its way to its answer."""

    def __init__(self, host: Host, request: ChatRequest, ready: Prepared) -> None:
        self.host, self.request, self.ready = host, request, ready
        self.watch = Watch(host.metrics)
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self.envelope = Envelope("chatcmpl", kind, request.model or host.name, host.fingerprint)

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
        return self.envelope.of(told, usage=usage(choices, [len(self.ready.ids)]), persona=self._personas(choices))

    async def stream(self) -> AsyncIterator[bytes]:
        """The lines of the stream, ending with `data: [DONE]`, or with an error object."""
        async with self.host.heard(self.host.asks(self.ready, self.request), self.request.stops) as heard:
            for number in range(len(heard.choices)):
                yield self._chunk(number, {"role": "assistant", "content": ""})
            told = {id(choice): (0, 0) for choice in heard.choices}  # tokens whose text, and whose projection, is sent
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

    def _text(self, number: int, choice: Choice, text: str, told: dict[int, tuple[int, int]]) -> bytes:
        shown, seen = told[id(choice)]
        told[id(choice)] = len(choice.ids), len(choice.seen)
        more: dict[str, Any] = {}
        if self.request.per_token:
            more["persona"] = {"tokens": choice.tokens(seen, len(choice.seen))}
        return self._chunk(number, {"content": text}, likely=chat_likely(choice, shown, len(choice.ids)), **more)

    def _chunk(
        self, number: int, delta: dict[str, Any], finish: str | None = None, likely: Any = None, **more: Any
    ) -> bytes:
        usage_field = {"usage": None} if self.request.wants_usage else {}
        choice = {"index": number, "delta": delta, "logprobs": likely, "finish_reason": finish}
        return line(self.envelope.of([choice], **usage_field, **more))

    def _finish(self, choice: Choice, shown: int, told: list[Choice]) -> bytes:
        """The line that ends an answer, with the log-probabilities of tokens that showed no text. The last of them carries the persona
        object, unless the line with the usage follows: a line without choices that nobody asked for breaks loops over `choices[0]`."""
        more = {"persona": self._personas(told)} if told else {}
        rest = chat_likely(choice, shown, len(choice.ids)) if shown < len(choice.ids) else None
        return self._chunk(choice.number, {}, finish=choice.reason, likely=rest, **more)

    def _usage(self, choices: list[Choice]) -> bytes:
        told = usage(choices, [len(self.ready.ids)])
        return line(self.envelope.of([], usage=told, persona=self._personas(choices)))

    def _personas(self, choices: list[Choice]) -> dict[str, Any]:
        return merged([self._persona(choice) for choice in choices])

    def _persona(self, choice: Choice) -> dict[str, Any]:
        host, ready = self.host, self.ready
        turns = ready.turns
        if turns is None:
            turns = host.standing.turns(ready.spans, choice.prompt_projections)
        told = host.standing.told(choice, turns, ready.messages, ready.mode, ready.held)
        host.metrics.answered(choice, told, set(host.engine.plans.caps))
        if self.request.per_token:
            told["per_token"] = choice.tokens(0, len(choice.ids))
        return told
