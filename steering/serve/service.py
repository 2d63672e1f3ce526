"""A steered model behind HTTP routes or a terminal: requests to engine, answers to `persona` objects.

service = PersonaService(model, axis, arms, ServeOptions(), EngineLimits(), monitor)
await service.start()
prompt = await service.prepare_chat(request)
async with service.stream(service.generation_requests(prompt, request)) as answers:
    async for answer, text in answers: ...               # leaving the context cancels what has not ended
service.measure(prompt, answer)                          # a `PersonaState`, None without an axis
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.models.load import Model
from personatlas.persona.models.token_spans import Span, SpanError, prompt_spans
from personatlas.steering.arms import Arm
from personatlas.steering.drift_monitor import DriftMonitor
from personatlas.steering.serve.answer_stream import AnswerStream, StreamedAnswer
from personatlas.steering.serve.engine.arm_slots import NONE
from personatlas.steering.serve.engine.scheduler import (
    Engine,
    EngineEvent,
    EngineLimits,
    GenerationRequest,
    RequestHandle,
)
from personatlas.steering.serve.memory import return_memory
from personatlas.steering.serve.metrics import Metrics
from personatlas.steering.serve.options import ADAPTIVE, ArmMode, ServeOptions
from personatlas.steering.serve.persona_state import AnswerTurn, PersonaState, PersonaTracker
from personatlas.steering.serve.schema import FITTING, SEEDS, ChatRequest, CompletionRequest, SamplingRequest

MIN_TEMPERATURE = 1e-5  # a lower one is 0: logits divided by it would overflow
LONG_TEXT, MANY_MESSAGES = 20_000, 20  # a longer prompt (characters) is tokenized outside the event loop
HEAD = 16  # characters for each token of the context: so much of a long text is tokenized first
MAX_LOGPROBS = 2**20  # log-probabilities of prompts in one answer


T = TypeVar("T")


class UnknownModel(UserError):
    """A request for a model that is not served."""


class InvalidField(UserError):
    """A field of a request that is well formed and cannot be served; `param` names it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class ContextOverflow(InvalidField):
    """A prompt that is longer than the context."""


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt that is ready to be answered, with the arm that acts (None while an adaptive one rests).

    `message` is the index of the answer's message, None where the prompt is no conversation. `spans` are
    those of the prompt's answers, `turns` what is already known of them. `is_clipped`: a longer answer than
    `max_tokens` was asked for, and does not fit.
    """

    ids: tuple[int, ...]
    max_tokens: int
    is_clipped: bool
    arm: Arm | None
    mode: ArmMode
    message: int | None = None
    spans: tuple[Span, ...] = ()
    turns: tuple[AnswerTurn, ...] | None = None


class PersonaService:
    """One model with its engine and, where it has an axis, arms and drift alarm; `no_axis` says that there is
    none and how to make one.

    Raises `UserError` for an unknown default arm.
    """

    def __init__(
        self,
        model: Model,
        axis: Axis | None,
        arms: Sequence[Arm],
        options: ServeOptions,
        limits: EngineLimits,
        monitor: DriftMonitor | None,
        no_axis: str | None = None,
    ) -> None:
        self.model, self.chat, self.axis, self.no_axis = model, model.chat, axis, no_axis
        self.options, self.limits = options, limits
        self.name: str = self.model.name
        self.fingerprint = (
            f"fp_{self.model.fingerprint[:12]}"  # in answers: other weights, another fingerprint
        )
        self.tracker = None if axis is None or monitor is None else PersonaTracker(axis, monitor)
        self.metrics = Metrics(self.name)
        self.engine = Engine(self.model, self.chat.end_ids, self.axis, arms, limits, self._deliver)
        self.arms = self.engine.arms
        self.default_arm = self.arms.resolve(options.arm)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._long_work = asyncio.Semaphore(1)

    async def start(self) -> None:
        """Starts the engine, whose events go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def abort(self) -> None:
        """Ends all answers without waiting for it."""
        self.engine.close(wait=0.0)

    def close(self) -> None:
        """Ends all answers and the engine's thread."""
        self.engine.close()

    @property
    def has_alarm(self) -> bool:
        """Whether a drift alarm is calibrated."""
        return self.tracker is not None and self.tracker.monitor.rule is not None

    @property
    def model_names(self) -> list[str]:
        """What requests may give as `model`: the model's own name, and with each arm."""
        return [self.name, *(f"{self.name}:{arm}" for arm in (NONE, *self.arms.named))]

    def require_model(self, name: str) -> None:
        """Raises `UnknownModel` for a name that is not served."""
        if name not in self.model_names:
            raise UnknownModel(f"the model {not_one_of(name, self.model_names)}")

    def resolve_arm(self, request: SamplingRequest) -> tuple[Arm | None, ArmMode]:
        """The arm of a request and when it acts. Raises `UserError` for an unknown model or arm."""
        arm, persona = self.default_arm, request.persona
        if request.model and request.model != self.model.id:
            self.require_model(request.model.removesuffix(":"))
            alias = request.model.partition(":")[2]
            arm = self.arms.resolve(alias) if alias else arm
        for field in ("cap", "arm"):
            if persona is not None and field in persona.model_fields_set:
                try:
                    arm = self.arms.resolve(getattr(persona, field))
                except UserError as error:
                    raise InvalidField(str(error), f"persona.{field}") from None
        mode = (persona.mode if persona is not None else None) or self.options.mode
        if mode == ADAPTIVE and arm is not None and not self.has_alarm:
            raise InvalidField(
                "an adaptive arm needs a calibrated alarm, and this server has none: "
                "`personatlas drift` makes the reference.json for `serve --reference`",
                "persona.mode",
            )
        return arm, mode

    async def prepare_chat(self, request: ChatRequest) -> PreparedPrompt:
        """Makes the prompt of a conversation. Raises `UserError` for one that cannot be answered.

        In adaptive mode the conversation is first read without the arm, which then acts if the alarm is on,
        or if there are answers that cannot be located in the prompt.
        """
        arm, mode = self.resolve_arm(request)
        messages = [message.plain for message in request.messages]
        length = sum(len(m["content"]) for m in messages)
        is_long = len(messages) > MANY_MESSAGES or length > LONG_TEXT
        try:
            if is_long:
                ids, spans = await self.outside_loop(is_long, lambda: self._tokenize(messages))
            else:  # in a thread as well: a template may take its whole time for some message
                ids, spans = await asyncio.to_thread(self._tokenize, messages)
        except InvalidField:
            raise
        except UserError as error:
            raise InvalidField(str(error), "messages") from None
        max_tokens, is_clipped = self._max_tokens(len(ids), request.max_new_tokens, "messages")
        turns = None
        if mode == ADAPTIVE and arm is not None and self.tracker is not None:
            turns = tuple(await self.read_turns(ids, spans))
            has_answers = any(m["role"] == "assistant" and m["content"].strip() for m in messages)
            is_unread = has_answers and not any(span.speaker == "assistant" for span in spans)
            arm = arm if is_unread or self.tracker.drifting(turns) else None
        return PreparedPrompt(ids, max_tokens, is_clipped, arm, mode, len(messages), spans, turns)

    async def prepare_texts(self, request: CompletionRequest) -> list[PreparedPrompt]:
        """Makes the prompts of texts to continue. Raises `UserError` for those that cannot be."""
        arm, mode = self.resolve_arm(request)
        prompts = request.prompts
        is_long = sum(map(len, prompts)) > LONG_TEXT
        all_ids = await self.outside_loop(is_long, lambda: [self._text_ids(prompt) for prompt in prompts])
        if request.echo and request.n_logprobs is not None:
            n_logprobs = sum(map(len, all_ids)) * request.choices * (request.n_logprobs + 1)
            if n_logprobs > MAX_LOGPROBS:
                raise InvalidField(
                    f"{n_logprobs} log-probabilities of prompts are more than the {MAX_LOGPROBS} of one "
                    "answer; send fewer prompts at once",
                    "logprobs",
                )
        prepared = []
        for ids in all_ids:
            limits = self._max_tokens(len(ids), request.max_new_tokens, "prompt")
            prepared.append(PreparedPrompt(ids, *limits, None if mode == ADAPTIVE else arm, mode))
        return prepared

    def generation_requests(
        self, prompt: PreparedPrompt, request: SamplingRequest
    ) -> list[GenerationRequest]:
        """One request to the engine for each answer that is wanted, with seeds that follow each other."""
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        temperature = self.options.temperature if request.temperature is None else request.temperature
        top_p = self.options.top_p if request.top_p is None else request.top_p
        return [
            GenerationRequest(
                prompt.ids,
                seed=(seed + index) % SEEDS,
                temperature=0.0 if temperature < MIN_TEMPERATURE else float(temperature),
                top_p=float(top_p),
                max_tokens=prompt.max_tokens,
                arm=prompt.arm,
                logprobs=request.n_logprobs,
            )
            for index in range(request.choices)
        ]

    @asynccontextmanager
    async def stream(
        self,
        requests: Sequence[GenerationRequest],
        stops: tuple[str, ...] = (),
        *,
        continues_prompt: bool = False,
    ) -> AsyncIterator[AnswerStream]:
        """The answers as they come; those that have not ended when the context is left are cancelled."""
        answers = AnswerStream(self.engine, requests, stops, continues_prompt=continues_prompt)
        try:
            yield answers
        finally:
            answers.cancel()

    async def read_turns(self, ids: tuple[int, ...], spans: Sequence[Span]) -> list[AnswerTurn]:
        """The answers in a prompt as the model reads them at baseline."""
        if self.tracker is None or not any(span.speaker == "assistant" for span in spans):
            return []
        async with self.stream([GenerationRequest(ids, max_tokens=0)]) as answers:
            async for _ in answers:
                pass
        (answer,) = answers.answers
        answer.raise_error()
        return self.tracker.turns(spans, answer.prompt_projections)

    def measure(
        self, prompt: PreparedPrompt, answer: StreamedAnswer, *, per_token: bool = False
    ) -> PersonaState | None:
        """The persona object of an answer to a prompt; None without an axis."""
        if self.tracker is None:
            return None
        turns = prompt.turns
        if turns is None:
            turns = tuple(self.tracker.turns(prompt.spans, answer.prompt_projections))
        state = self.tracker.measure(answer, turns, prompt.message, prompt.mode, per_token=per_token)
        return replace(state, max_tokens=prompt.max_tokens if prompt.is_clipped else None)

    async def outside_loop(self, is_long: bool, work: Callable[[], T]) -> T:
        """The result of `work`; long work is done in a thread, one at a time, and its memory given back."""
        if not is_long:
            return work()
        async with self._long_work:
            try:
                return await asyncio.to_thread(work)
            finally:
                await asyncio.to_thread(return_memory)

    def _require_fits(self, text: str, param: str) -> None:
        """Refuses a text whose first part alone is too long, without tokenizing the rest.

        How a text goes on changes the tokens at its end only, so a part of twice the context is enough.
        """
        context = self.limits.context
        size = HEAD * context
        while size < len(text):
            n_tokens = len(
                self.model.tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
            )
            if n_tokens > 2 * context:
                raise ContextOverflow(
                    f"this model's context is {context} tokens here (--context), and the first {size} of the "
                    f"prompt's {len(text)} characters are {n_tokens}; shorten it",
                    param,
                )
            size *= 4

    def _tokenize(self, messages: list[dict[str, str]]) -> tuple[tuple[int, ...], tuple[Span, ...]]:
        """Ids of a prompt and spans of its messages, none where they cannot be located exactly."""
        if sum(len(message["content"]) for message in messages) > HEAD * self.limits.context:
            self._require_fits(self.chat.prompt_text(messages), "messages")
        ids = tuple(self.chat.prompt_ids(messages))
        # a prompt that is too long is refused, and finding its spans takes longer than reading it
        fits = len(ids) < self.limits.context
        if fits and any(message["role"] == "assistant" for message in messages):
            try:
                found = prompt_spans(self.chat, messages)
            except SpanError:
                return ids, ()
            return found.ids, found.spans
        return ids, ()

    def _text_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        """Ids of a text, or checked ids."""
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                reason = f"{error.reason} at {error.start}"
                raise InvalidField(f"the prompt is not valid Unicode text: {reason}", "prompt") from None
            self._require_fits(prompt, "prompt")
            ids = tuple(self.model.tokenizer(prompt, verbose=False)["input_ids"])
        else:
            size = self.model.vocab_size
            unknown = next((token for token in prompt if token >= size), None)
            if unknown is not None:
                raise InvalidField(f"token {unknown} is not in the vocabulary of {size}", "prompt")
            ids = tuple(prompt)
        if not ids:
            raise InvalidField("the prompt is empty: there is nothing to continue", "prompt")
        return ids

    def _max_tokens(self, n_prompt: int, requested: int | None, param: str) -> tuple[int, bool]:
        """The longest answer to a prompt of so many tokens, and whether a longer one was asked for."""
        context = self.limits.context
        if n_prompt > context or (n_prompt == context and requested != 0):
            raise ContextOverflow(
                f"this model's context is {context} tokens here (--context) and the prompt has {n_prompt}; "
                "shorten it",
                param,
            )
        wanted = self.options.max_new_tokens if requested is None else requested
        fitting = context - n_prompt
        return (
            fitting if wanted == FITTING else min(wanted, fitting)
        ), requested is not None and wanted > fitting

    def _deliver(self, events: Sequence[tuple[RequestHandle, EngineEvent]]) -> None:
        """Hands events from the engine's thread over to the event loop."""

        def put() -> None:
            for handle, event in events:
                assert isinstance(handle.owner, AnswerStream)
                handle.owner.put(handle, event)

        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)
