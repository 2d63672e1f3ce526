"""A model provider for Inspect, the UK AI Security Institute's harness: any of its tasks, with the persona
held.

    inspect eval TASK --model personatlas/smollm2-135m -M axis=smollm2-135m -M cap=assistant

`cap` may be any other arm too (cap=add:8@21). Without it, or with `cap=none`, the baseline answers; its
answers are projected all the same. Other `-M` arguments: device, dtype, chat_template, force, and `batch`,
the most answers that are made together. Calls that wait at the same time are one batch. Noise belongs to a
row whatever its batch, but batches form as calls come, and half precision rounds a little differently in
each: `-M batch=1` or `-M dtype=float32` where runs must repeat to the letter.

Seeds come from the given seed (0 unless given), the messages, the sampling, the epoch and the number of the
choice, so two arms share them. Temperature 0.7 and top_p 0.9 unless given, at most 512 tokens. What a text
model cannot do is refused in one line. Importing this module, as Inspect does to list its providers, loads no
torch.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    modelapi,
)
from inspect_ai.solver._task_state import sample_state
from inspect_ai.tool import ToolChoice, ToolInfo

from personatlas.persona.errors import UserError
from personatlas.persona.records import JsonObject

if TYPE_CHECKING:
    from personatlas.steering.evals.harnesses.batch_answerer import BatchAnswerer, MeasuredAnswer

Request = TypeVar("Request")
Reply = TypeVar("Reply")

MAX_TOKENS, TEMPERATURE, TOP_P = 512, 0.7, 0.9
CPU_BATCH, GPU_BATCH = 32, 256
GATHER = 0.03  # seconds to wait for more calls, again as long as more come
ARGUMENTS = "axis, cap, device, dtype, chat_template, force, batch"
HONOURED = {"max_tokens", "temperature", "top_p", "seed", "stop_seqs", "num_choices"}
# Inspect's own business, or of no consequence to a model without tools, thoughts and a network
ELSEWHERE = {
    "max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections",
    "adaptive_connections", "system_message", "cache", "cache_prompt", "fail_on_refusal",
    "parallel_tool_calls", "internal_tools", "max_tool_output", "reasoning_history",
}  # fmt: skip
STOP_REASONS: dict[str, StopReason] = {"end": "stop", "stop": "stop", "length": "max_tokens"}


class InspectRefusal(PrerequisiteError, UserError):
    """A `UserError` that Inspect, too, shows as the one line that it is."""

    def __init__(self, message: str) -> None:
        UserError.__init__(self, message)
        self.message = message


@dataclass
class _Call(Generic[Request, Reply]):
    requests: Sequence[Request]
    replies: list[Reply] = field(default_factory=list)
    error: Exception | None = None
    is_done: bool = False


class CallBatcher(Generic[Request, Reply]):
    """Makes batches of calls that wait together: who finds nobody at work gathers for a moment and answers
    for all."""

    def __init__(self, answers: Callable[[Sequence[Request]], list[Reply]], most: int) -> None:
        self.answers, self.most = answers, most
        self._waiting: list[_Call[Request, Reply]] = []
        self._turn = anyio.Lock()

    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """What `answers` makes of these, in a batch with others'."""
        call = _Call[Request, Reply](requests)
        self._waiting.append(call)
        try:
            async with self._turn:
                gathered = 0
                while not call.is_done and gathered < len(self._waiting) < self.most:
                    gathered = len(self._waiting)
                    await anyio.sleep(GATHER)
                while not call.is_done:
                    await anyio.to_thread.run_sync(self._answer, self._next_batch())
        finally:
            if call in self._waiting:  # cancelled
                self._waiting.remove(call)
        if call.error is not None:
            raise call.error
        return call.replies

    def _next_batch(self) -> list[_Call[Request, Reply]]:
        batch = [self._waiting.pop(0)]
        size = len(batch[0].requests)
        while self._waiting and (size := size + len(self._waiting[0].requests)) <= self.most:
            batch.append(self._waiting.pop(0))
        return batch

    def _answer(self, batch: list[_Call[Request, Reply]]) -> None:
        """On a thread of its own; a failure is that of every call in the batch."""
        try:
            replies = iter(self.answers([request for call in batch for request in call.requests]))
            for call in batch:
                call.replies = [next(replies) for _ in call.requests]
        except Exception as error:  # noqa: BLE001 (raised again by every call)
            for call in batch:
                call.error = error
        finally:
            for call in batch:
                call.is_done = True


@modelapi(name="personatlas")
class PersonatlasAPI(ModelAPI):
    """The provider. `answerer` is one that is there already, with the cap of that name or none in it."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),
        axis: str | None = None,
        cap: str | None = None,
        batch: int | None = None,
        answerer: "BatchAnswerer | None" = None,
        **load: Any,
    ) -> None:
        self.cap = None if cap in (None, "", "none") else str(cap)
        if not axis:
            raise InspectRefusal(
                "which axis? Give -M axis=RUN: a run folder, an axis file, or the packaged smollm2-135m"
            )
        if batch is not None and (not isinstance(batch, int) or batch < 1):
            raise InspectRefusal(f"-M batch={batch}: give a whole number from 1 on")
        with _refusals():
            self.answerer = answerer or _load_answerer(model_name, str(axis), self.cap, load)
        self.about = self.answerer.describe() | {"axis": str(axis), "cap": self.cap}
        # Inspect's cache tells models apart by name and base_url, not by -M arguments: a capped arm would be
        # given the answers of the other
        parts = self.about["model"] | self.about
        names = "/".join(parts[name] for name in ("fingerprint", "dtype", "direction"))
        url = f"personatlas:{names}/{self.cap or 'none'}"
        super().__init__(model_name=model_name, base_url=url, api_key=api_key, config=config)
        on_gpu = self.answerer.steered.model.device.type == "cuda"
        self.batcher = CallBatcher(self.answerer.answers, batch or (GPU_BATCH if on_gpu else CPU_BATCH))
        self._repeats: Counter[tuple[str, str]] = Counter()

    def max_tokens(self) -> int:
        """Longest answer unless told."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """As many as one batch holds."""
        return self.batcher.most

    def connection_key(self) -> str:
        """Models share nothing."""
        return f"{self.model_name}/{self.cap}"

    def collapse_user_messages(self) -> bool:
        """Many templates refuse two user messages in a row."""
        return True

    async def tokenize(self, text: str) -> list[int]:
        """By the model's own tokenizer, without special tokens."""
        tokenizer = self.answerer.steered.model.tokenizer
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    async def count_text_tokens(self, text: str) -> int:
        """Counted, not estimated; Inspect's own count downloads another model's tokenizer."""
        return len(await self.tokenize(text))

    async def count_tokens(self, input: str | list[ChatMessage], config: GenerateConfig | None = None) -> int:
        """Tokens of a text, or of a conversation as the template writes it down."""
        if isinstance(input, str):
            return await self.count_text_tokens(input)
        with _refusals():
            return len(self.answerer.prompt_ids([_plain(message) for message in input]))

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answers, in one batch with the other calls that wait. Raises `InspectRefusal` for what cannot be
        done."""
        from personatlas.persona.sampling.sampler import Sampling
        from personatlas.steering.evals.harnesses.batch_answerer import AnswerRequest

        _require(tools, config)
        with _refusals():
            messages = [_plain(message) for message in input]
            if messages and messages[-1]["role"] == "assistant":
                reason = "the last message is the assistant's"
                raise InspectRefusal(f"{reason}: personatlas answers, it does not go on with an answer")
            ids = self.answerer.prompt_ids(messages)
            most = MAX_TOKENS if config.max_tokens is None else config.max_tokens
            temperature = TEMPERATURE if config.temperature is None else config.temperature
            sampling = Sampling(most, temperature, TOP_P if config.top_p is None else config.top_p)
        room = most if self.answerer.context is None else min(most, self.answerer.context - len(ids))
        settings = {
            "max_tokens": most,
            "temperature": temperature,
            "top_p": sampling.top_p,
            "seed": config.seed,
        }
        seeds, answers = list[int](), list["MeasuredAnswer"]()
        if room >= 1:
            seeds = self._seeds(messages, settings, config)
            sampling = Sampling(room, temperature, sampling.top_p)
            stops, steered = tuple(filter(None, config.stop_seqs or ())), self.cap is not None
            requests = [AnswerRequest(ids, seed, sampling, steered, stops) for seed in seeds]
            answers = await self.batcher.ask(requests)
        name = self.model_name
        # without answers the messages alone are longer than what the model holds
        choices: list[tuple[str, StopReason]] = [("", "model_length")] if not answers else []
        for answer in answers:
            is_short = room < most and answer.stopped == "length"
            choices.append((answer.text, "model_length" if is_short else STOP_REASONS[answer.stopped]))
        rows = [
            {"seed": seed, "projection": one.projection, "fired": one.fired, "tokens": len(one.ids)}
            for seed, one in zip(seeds, answers, strict=True)
        ]
        written = sum(answer.written for answer in answers)
        return ModelOutput(
            model=name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=text, model=name, source="generate"),
                    stop_reason=reason,
                )
                for text, reason in choices
            ],
            usage=ModelUsage(input_tokens=len(ids), output_tokens=written, total_tokens=len(ids) + written),
            metadata={"personatlas": self.about | {"sampling": settings, "choices": rows}},
        )

    def _seeds(
        self, messages: list[dict[str, str]], settings: JsonObject, config: GenerateConfig
    ) -> list[int]:
        """One for each choice. A sample that asks the same again gets another answer, unless the seed was
        given."""
        from personatlas.persona.rollout import seed_of

        state, key = sample_state(), json.dumps([messages, settings], sort_keys=True)
        epoch, again = 1, 0
        if state is not None:
            epoch = state.epoch
            if config.seed is None:
                again = self._repeats[state.uuid, key]
                self._repeats[state.uuid, key] += 1
        choices = range(config.num_choices or 1)
        return [seed_of(f"{key}/{epoch}/{again}/{choice}", config.seed or 0) for choice in choices]


def _load_answerer(model: str, axis: str, cap: str | None, load: JsonObject) -> "BatchAnswerer":
    """The model with its axis and cap, each checked to belong to the others. Here torch is imported, not
    before."""
    from personatlas.persona.options import ModelOptions
    from personatlas.steering.arm_kinds import as_arm
    from personatlas.steering.evals.harnesses.batch_answerer import BatchAnswerer
    from personatlas.steering.session import load_steered_model

    force, template = load.pop("force", False), load.pop("chat_template", None)
    device, dtype = load.pop("device", None), load.pop("dtype", None)
    if load:
        raise InspectRefusal(f"-M {next(iter(load))} is not one of {ARGUMENTS}")
    options = ModelOptions(device, dtype, None if template is None else Path(template))
    arms = [] if cap is None else [as_arm(cap)]
    return BatchAnswerer(load_steered_model(model, axis, arms, options, force=bool(force)))


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except InspectRefusal:
        raise
    except UserError as error:
        raise InspectRefusal(str(error)) from None


def _require(tools: list[ToolInfo], config: GenerateConfig) -> None:
    """Refuse what would otherwise be left out silently."""
    if tools:
        names = ", ".join(tool.name for tool in tools)
        raise InspectRefusal(
            f"this task gives the model tools ({names}); personatlas answers in text only: take another task"
        )
    for name, value in config.model_dump(exclude_none=True).items():
        if name not in HONOURED | ELSEWHERE and value not in (False, [], {}, 0, "none"):
            allowed = ", ".join(sorted(HONOURED))
            raise InspectRefusal(
                f"{name}={value} is not something that personatlas can do; it takes {allowed}"
            )
    if config.num_choices is not None and config.num_choices < 1:
        raise InspectRefusal(f"num_choices={config.num_choices} is below 1")


def _plain(message: ChatMessage) -> dict[str, str]:
    """Role and text of a message. Raises `InspectRefusal` for one that is not only text."""
    if message.role == "tool" or getattr(message, "tool_calls", None):
        raise InspectRefusal(
            "the conversation holds tool calls; personatlas answers in text only: take a task without tools"
        )
    parts = [] if isinstance(message.content, str) else message.content
    other = [part.type for part in parts if not isinstance(part, ContentText)]
    if other:
        raise InspectRefusal(
            f"a {message.role} message holds {other[0]}; personatlas reads text only: take a task without"
        )
    return {"role": message.role, "content": message.text}
