"""What stands behind the routes: a loaded model, its engine, its caps, and how conversations with it are watched.

host = Host(held, caps, Settings(), monitor)
await host.open()                                      # inside the server's event loop
async with host.heard(asks, stops) as answers:         # leaving it cancels what is not done
    async for choice, text in answers: ...
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap
from personatlas.persona.models.token_spans import SpanError, prompt_spans
from personatlas.steering.drift_monitor import DriftMonitor
from personatlas.steering.serve.answer_stream import Detokenizer, StreamedAnswer
from personatlas.steering.serve.engine.cap_slots import NONE, ResolvedCap
from personatlas.steering.serve.engine.scheduler import (
    Engine,
    EngineEvent,
    EngineLimits,
    GenerationRequest,
    RequestHandle,
)
from personatlas.steering.serve.metrics import Metrics, RequestTimer
from personatlas.steering.serve.persona_state import AnswerTurn, PersonaTracker
from personatlas.steering.serve.schema import SEEDS, ChatRequest, CompletionRequest, SamplingRequest
from personatlas.steering.session import SteeredModel

COLDEST = 1e-5  # a temperature below it is 0: logits divided by it would overflow
ADAPTIVE, ALWAYS = "adaptive", "always"
LONG, MANY = 20_000, 20  # characters, and messages, beyond which reading a prompt leaves the event loop


class UnknownModel(UserError):
    """A request for a model that is not served."""


class ContextOverflow(UserError):
    """A prompt, or a prompt and its answer, beyond the context."""


@dataclass(frozen=True)
class ServiceDefaults:
    """What a server does where a request does not say."""

    cap: str | None = None
    mode: str = ALWAYS
    max_tokens: int = 1024
    temperature: float = 0.7
    top_p: float = 0.9
    room: EngineLimits = field(default_factory=EngineLimits)


@dataclass(frozen=True)
class PreparedPrompt:
    """A conversation ready to be answered: ids, most tokens, the cap that acts, and its turns so far if they are known already."""

    ids: tuple[int, ...]
    limit: int
    cap: ResolvedCap | None
    mode: str
    messages: int | None = None
    spans: tuple[Any, ...] = ()
    turns: list[AnswerTurn] | None = None

    @property
    def held(self) -> bool:
        """Whether the cap acts since the conversation drifts."""
        return self.mode == ADAPTIVE and self.cap is not None


class PersonaService:
    """One model and all that is asked of it."""

    def __init__(
        self, held: SteeredModel, caps: dict[str, Cap], settings: ServiceDefaults, monitor: DriftMonitor
    ) -> None:
        self.held, self.settings = held, settings
        self.standing = PersonaTracker(held.axis, monitor)
        self.name = held.model.name
        self.metrics = Metrics(self.name)
        self.fingerprint = f"fp_{held.model.fingerprint[:12]}"  # of answers: other weights, another one
        self.engine = Engine(held.model, held.chat.end_ids, held.axis, caps, settings.room, self._post)
        self.cap = self.engine.plans.wanted(settings.cap)  # a wrong name fails here, at the start
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self) -> None:
        """Start the engine; its events come to this loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def end(self) -> None:
        """End what is under way, without waiting for it."""
        self.engine.close(wait=0.0)

    def close(self) -> None:
        """End what is under way, and the engine's thread."""
        self.engine.close()

    @property
    def models(self) -> list[str]:
        """The names that requests may give as `model`: the model's own, and with each cap."""
        return [self.name, *(f"{self.name}:{cap}" for cap in (NONE, *self.engine.plans.caps))]

    def wanted(self, request: SamplingRequest) -> tuple[ResolvedCap | None, str]:
        """The cap that a request is to be answered with, and when it acts. Raises `UserError` for an unknown model or cap."""
        name, _, alias = (
            (request.model or self.name).partition(":")
            if request.model != self.held.model.id
            else ("", "", "")
        )
        if name and (name != self.name or (alias and alias != NONE and alias not in self.engine.plans.caps)):
            raise UnknownModel(
                f"the model {(request.model or '')[:80]!r} does not exist; served are {', '.join(self.models)}"
            )
        cap = self.engine.plans.wanted(alias) if alias else self.cap
        persona = request.persona
        if persona is not None and "cap" in persona.model_fields_set:
            cap = self.engine.plans.wanted(persona.asked)
        mode = (persona.mode if persona is not None else None) or self.settings.mode
        if mode == ADAPTIVE and cap is not None and self.standing.monitor.rule is None:
            raise UserError(
                "adaptive capping needs a calibrated alarm, and this server has none: "
                "`personatlas drift` makes the reference.json for `serve --reference`"
            )
        return cap, mode

    async def prepare_chat(self, request: ChatRequest) -> PreparedPrompt:
        """A conversation ready to be answered. Raises `UserError` for one that cannot be."""
        cap, mode = self.wanted(request)
        messages = [message.plain for message in request.messages]
        long = len(messages) > MANY or sum(len(message["content"]) for message in messages) > LONG
        ids, spans = await asyncio.to_thread(self._read, messages) if long else self._read(messages)
        ready = PreparedPrompt(ids, self._limit(len(ids), request.limit), cap, mode, len(messages), spans)
        if mode != ADAPTIVE or cap is None:
            return ready
        turns = await self.turns(ready)
        answered = any(message["role"] == "assistant" and message["content"].strip() for message in messages)
        unread = answered and not any(span.speaker == "assistant" for span in spans)
        acting = (
            cap if unread or self.standing.drifting(turns) else None
        )  # where answers cannot be read it holds
        return PreparedPrompt(ids, ready.limit, acting, mode, len(messages), spans, turns)

    async def prepare_completion(self, request: CompletionRequest, prompt: str | list[int]) -> PreparedPrompt:
        """A text to go on with, as it is: no template. Raises `UserError` for one that cannot be."""
        if len(prompt) > LONG:
            return await asyncio.to_thread(self._prepare_completion, request, prompt)
        return self._prepare_completion(request, prompt)

    def _prepare_completion(self, request: CompletionRequest, prompt: str | list[int]) -> PreparedPrompt:
        cap, mode = self.wanted(request)
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"the prompt is not valid Unicode text: {error.reason} at {error.start}"
                ) from None
            ids = tuple(self.held.model.tokenizer(prompt, verbose=False)["input_ids"])
        else:
            size = self.held.model.vocab_size
            wrong = next((id for id in prompt if id >= size), None)
            if wrong is not None:
                raise UserError(f"token {wrong} is not in the vocabulary of {size}")
            ids = tuple(prompt)
        if not ids:
            raise UserError("an empty prompt: there is nothing to go on with")
        limit = self._limit(len(ids), request.limit)
        return PreparedPrompt(ids, limit, None if mode == ADAPTIVE else cap, mode)

    def asks(self, ready: PreparedPrompt, request: SamplingRequest) -> list[GenerationRequest]:
        """One for each answer that a request wants."""
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        temperature = self.settings.temperature if request.temperature is None else request.temperature
        temperature = 0.0 if temperature < COLDEST else temperature
        top_p = self.settings.top_p if request.top_p is None else request.top_p
        likely = request.likely if isinstance(request, ChatRequest | CompletionRequest) else None
        return [
            GenerationRequest(
                ready.ids,
                (seed + choice) % SEEDS,
                float(temperature),
                float(top_p),
                ready.limit,
                ready.cap,
                likely,
            )
            for choice in range(request.choices)
        ]

    @asynccontextmanager
    async def heard(
        self, asks: Sequence[GenerationRequest], stops: tuple[str, ...] = (), *, goes_on: bool = False
    ) -> AsyncIterator["AnswerStream"]:
        """The answers as they come; what is not done when it is left is cancelled. `goes_on`: they continue the prompt's text."""
        heard = AnswerStream(self, asks, stops, goes_on=goes_on)
        try:
            yield heard
        finally:
            heard.cancel()

    def _read(self, messages: list[dict[str, str]]) -> tuple[tuple[int, ...], tuple[Any, ...]]:
        """Ids of the prompt, and the spans of the answers in it; none where they cannot be told apart without guessing."""
        ids = tuple(self.held.chat.prompt_ids(messages))
        fits = (
            len(ids) < self.settings.room.length
        )  # what does not is refused, and finding spans takes longer than reading
        if fits and any(message["role"] == "assistant" for message in messages):
            try:
                found = prompt_spans(self.held.chat, messages)
            except SpanError:
                pass
            else:
                return found.ids, found.spans
        return ids, ()

    def _limit(self, read: int, asked: int | None) -> int:
        """Most tokens of the answer."""
        room = self.settings.room.length
        if read > room or (read == room and asked != 0):
            raise ContextOverflow(
                f"this model's context is {room} tokens here and the prompt has {read}; shorten it"
            )
        if asked is None:
            return min(self.settings.max_tokens, room - read)
        if read + asked > room:
            raise ContextOverflow(
                f"this model's context is {room} tokens here; the prompt has {read} and {asked} were asked for the answer"
            )
        return asked

    async def turns(self, ready: PreparedPrompt) -> list[AnswerTurn]:
        """The answers in a prompt as the model itself reads them, without a cap."""
        if not any(span.speaker == "assistant" for span in ready.spans):
            return []
        async with self.heard([GenerationRequest(ready.ids, limit=0)]) as heard:
            async for _ in heard:
                pass
            (choice,) = heard.choices
        choice.require_whole()
        return self.standing.turns(ready.spans, choice.prompt_projections)

    def _post(self, told: Sequence[tuple[RequestHandle, EngineEvent]]) -> None:
        """From the engine's thread: hand the events over to the loop."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, told)


class AnswerStream:
    """The answers to some asks: an iterator of (choice, the text that it gained)."""

    def __init__(
        self,
        host: PersonaService,
        asks: Sequence[GenerationRequest],
        stops: tuple[str, ...],
        *,
        goes_on: bool = False,
    ) -> None:
        self._queue: asyncio.Queue[tuple[int, EngineEvent]] = asyncio.Queue()
        self.choices: list[StreamedAnswer] = []
        self.open = len(asks)  # answers that are not done
        try:
            for number, ask in enumerate(asks):
                ticket = host.engine.submit(ask, owner=(self._queue, number))
                spoken = Detokenizer(host.held.model.tokenizer, stops, ask.ids if goes_on else ())
                self.choices.append(StreamedAnswer(number, ticket, spoken, host.held.chat.end_ids))
        except UserError:
            self.cancel()
            raise

    async def __aiter__(self) -> AsyncIterator[tuple[StreamedAnswer, str]]:
        while self.open:
            number, event = await self._queue.get()
            choice = self.choices[number]
            if not choice.done:
                text = choice.take(event)
                self.open -= choice.done
                yield choice, text

    async def whole(self, watch: RequestTimer) -> list[StreamedAnswer]:
        """All answers, when the last has ended. Raises what ended one with an error."""
        async for choice, _ in self:
            if choice.ids:
                watch.token()
        for choice in self.choices:
            choice.require_whole()
        watch.end()
        return self.choices

    def cancel(self) -> None:
        """Give up what is not done."""
        for choice in self.choices:
            if not choice.done:
                choice.ticket.cancel()


def _deliver(told: Sequence[tuple[RequestHandle, EngineEvent]]) -> None:
    for ticket, event in told:
        queue, number = ticket.owner
        queue.put_nowait((number, event))
