"""Answers for a harness, which asks for one at a time and for many at once: requests in, answers with projections out.

    answerer = Answerer(loaded("smollm2-135m", ModelOptions(), "smollm2-135m", ["assistant"]))
    asked = Asked(answerer.prompt_ids(messages), seed=7, sampling=Sampling(64), capped=True, stops=("\n\n",))
    answerer.answers([asked])[0].text

Rows of one batch may be capped or not. What was answered is read once more, in one batch with the same caps on: the mean
projection of an answer's tokens at the axis's layer, before the cap's step, and the share of tokens that the cap changed.

A model provider for Inspect, the UK AI Security Institute's harness: any of its tasks, with the persona held.

    inspect eval TASK --model personatlas/smollm2-135m -M axis=smollm2-135m -M cap=assistant

Without `cap`, or with `cap=none`, the model answers as it is; its answers are projected all the same. Other `-M` arguments:
device, dtype, chat_template, force, and `batch`, the most answers that are made together. Calls that wait at the same time are
one batch. Noise belongs to a row whatever its batch, but batches form as calls come, and half precision rounds a little
differently in each: `-M batch=1` or `-M dtype=float32` where runs must repeat to the letter.

Seeds come from the given seed (0 unless given), the messages, the sampling, the epoch and the number of the choice, so two arms
share them. Temperature 0.7 and top_p 0.9 unless given, at most 512 tokens. What a text model cannot do is refused in one line.
"""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import anyio
import torch
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
from torch import Tensor

from personatlas.persona.errors import UserError
from personatlas.persona.models.chat_template import Messages
from personatlas.persona.models.hooks import residual
from personatlas.persona.pipeline.record import CPU_TOKENS, GPU_TOKENS
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
    """A loaded model with its caps that answers batches, one batch at a time whoever asks."""

    def __init__(self, held: SteeredModel) -> None:
        self.held = held
        self._one_at_a_time = Lock()
        self._last: tuple[Sampling, Sampler] | None = None

    def prompt_ids(self, messages: Messages) -> tuple[int, ...]:
        """What the model reads. Raises `UserError` for messages that the template refuses."""
        return tuple(self.held.chat.prompt_ids(messages))

    @property
    def context(self) -> int | None:
        """Tokens that the model holds, if it says so."""
        return self.held.model.context

    def describe(self) -> dict[str, Any]:
        """What makes two logs comparable: the model, its dtype, and the direction that projections are on."""
        model, axis = self.held.model, self.held.axis
        dtype = str(model.dtype).removeprefix("torch.")
        return {
            "model": model.describe(),
            "dtype": dtype,
            "layer": axis.layer,
            "direction": direction_digest(axis),
        }

    @torch.no_grad()
    def answers(self, asked: Sequence[Asked]) -> list[Answered]:
        """Answers in the order asked. Requests that sample alike are one batch."""
        with self._one_at_a_time:
            found: dict[int, Answered] = {}
            for sampling in dict.fromkeys(one.sampling for one in asked):
                rows = [row for row, one in enumerate(asked) if one.sampling == sampling]
                answers = self._sampled([asked[row] for row in rows], sampling)
                found |= {
                    row: self._cut(asked[row], answer) for row, answer in zip(rows, answers, strict=True)
                }
            return self._read(asked, [found[row] for row in range(len(asked))])

    def _sampled(self, asked: Sequence[Asked], sampling: Sampling) -> list[Answer]:
        model = self.held.model
        if (
            self._last is None or self._last[0] != sampling
        ):  # building one reads the model again, to prove its cache
            self._last = None  # frees a captured step first
            self._last = sampling, fastest_sampler(model, self.held.chat.end_ids, sampling)
        prompts = [Prompt(one.ids, one.seed, 0 if one.capped else -1) for one in asked]
        with steer(model, self.held.caps) if any(one.capped for one in asked) else nullcontext() as held:
            answers = sorted(
                self._last[1].answers(prompts, None if held is None else held.callback),
                key=lambda answer: answer.index,
            )
            if held is not None:
                _ = held.callback.tally  # HookDidNotFire, unless the caps saw just what was fed
        return answers

    def _cut(self, one: Asked, answer: Answer) -> Answered:
        """The answer up to the first stop text."""

        def text(tokens: int) -> str:
            return self.held.model.decode(answer.ids[:tokens])

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
        order = sorted(
            (row for row, answer in enumerate(answers) if answer.ids), key=lambda row: -lengths[row]
        )
        found, first = list(answers), 0
        while first < len(order):
            tokens = batch_tokens(self.held.model, CPU_TOKENS, GPU_TOKENS)
            stop = batch_end([lengths[row] for row in order], first, tokens)
            rows = order[first:stop]
            read = self._batch_read([asked[row] for row in rows], [answers[row] for row in rows])
            for row, (projection, fired) in zip(rows, read, strict=True):
                one = answers[row]
                found[row] = Answered(one.text, one.ids, one.written, one.stopped, projection, fired)
            first = stop
        return found

    def _batch_read(
        self, asked: Sequence[Asked], answers: Sequence[Answered]
    ) -> list[tuple[float, float | None]]:
        model, axis = self.held.model, self.held.axis
        texts = [one.ids + answer.ids for one, answer in zip(asked, answers, strict=True)]
        starts, lengths = (
            torch.tensor([len(one.ids) for one in asked]),
            torch.tensor([len(text) for text in texts]),
        )
        seen: list[Tensor] = []

        def keep(_module: Any, _args: Any, output: Any) -> None:
            h = residual(output).float()
            seen.append((h @ axis.at(axis.layer).to(h.device)).cpu())  # (B, T)

        is_capped = [one.capped for one in asked]
        with steer(model, self.held.caps) if any(is_capped) else nullcontext() as held:
            if held is not None:
                held.begin(torch.tensor([0 if capped else -1 for capped in is_capped]))
                held.describe(lengths=lengths, answer_from=starts)
            # before the step at the layer
            handle = model.blocks[axis.layer].register_forward_hook(keep, prepend=True)
            try:
                model.base(input_ids=pad(texts, model.device), use_cache=False)
            finally:
                handle.remove()
            tally = None if held is None else held.tally
        found = []
        for row, (start, stop) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            fired = tally.rows([row]).share if tally is not None and is_capped[row] else None
            found.append((float(seen[0][row, start:stop].mean()), fired))
        return found


MAX_TOKENS, TEMPERATURE, TOP_P = 512, 0.7, 0.9
CPU_BATCH, GPU_BATCH = 32, 256
GATHER = 0.03  # seconds to wait for more calls, again as long as more come
ARGUMENTS = "axis, cap, device, dtype, chat_template, force, batch"
HONOURED = {"max_tokens", "temperature", "top_p", "seed", "stop_seqs", "num_choices"}
# Inspect's own business, or of no consequence to a model without tools, thoughts and a network
ELSEWHERE = {
    "max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "adaptive_connections",
    "system_message", "cache", "cache_prompt", "fail_on_refusal", "parallel_tool_calls", "internal_tools", "max_tool_output",
    "reasoning_history",
}  # fmt: skip
STOP_REASONS: dict[str, StopReason] = {"end": "stop", "stop": "stop", "length": "max_tokens"}


class Refused(PrerequisiteError, UserError):
    """A `UserError` that Inspect, too, shows as the one line that it is."""

    def __init__(self, message: str) -> None:
        UserError.__init__(self, message)
        self.message = message


@dataclass
class _Call:
    asked: Sequence[Any]
    found: list[Any] = field(default_factory=list)
    error: Exception | None = None
    is_done: bool = False


class Gatherer:
    """Makes batches of calls that wait together: who finds nobody at work gathers for a moment and answers for all."""

    def __init__(self, answers: Callable[[Sequence[Any]], list[Any]], most: int) -> None:
        self.answers, self.most = answers, most
        self._waiting: list[_Call] = []
        self._turn = anyio.Lock()

    async def ask(self, asked: Sequence[Any]) -> list[Any]:
        """What `answers` makes of these, in a batch with others'."""
        call = _Call(asked)
        self._waiting.append(call)
        try:
            async with self._turn:
                if not call.is_done:
                    await self._gather()
                while not call.is_done:
                    await anyio.to_thread.run_sync(self._answer, self._batch())
        finally:
            if call in self._waiting:  # cancelled
                self._waiting.remove(call)
        if call.error is not None:
            raise call.error
        return call.found

    async def _gather(self) -> None:
        before = 0
        while before < len(self._waiting) < self.most:
            before = len(self._waiting)
            await anyio.sleep(GATHER)

    def _batch(self) -> list[_Call]:
        taken: list[_Call] = []
        while self._waiting and (
            not taken or sum(len(c.asked) for c in [*taken, self._waiting[0]]) <= self.most
        ):
            taken.append(self._waiting.pop(0))
        return taken

    def _answer(self, batch: list[_Call]) -> None:
        """On a thread of its own; a failure is that of every call in the batch."""
        try:
            found = iter(self.answers([one for call in batch for one in call.asked]))
            for call in batch:
                call.found = [next(found) for _ in call.asked]
        except Exception as error:  # noqa: BLE001 (raised again by every call)
            for call in batch:
                call.error = error
        finally:
            for call in batch:
                call.is_done = True


@modelapi(name="personatlas")
class PersonatlasAPI(ModelAPI):
    """The provider. `answerer` is an `Answerer` that is there already, with the cap of that name or none in it."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),
        axis: str | None = None,
        cap: str | None = None,
        batch: int | None = None,
        answerer: Any = None,
        **how: Any,
    ) -> None:
        self.cap = None if cap in (None, "", "none") else str(cap)
        if not axis:
            raise Refused(
                "which axis? Give -M axis=RUN: a run folder, an axis file, or smollm2-135m for the packaged one"
            )
        if batch is not None and (not isinstance(batch, int) or batch < 1):
            raise Refused(f"-M batch={batch}: give a whole number from 1 on")
        with _refusals():
            self.answerer = answerer or _loaded(model_name, str(axis), self.cap, how)
        self.about = self.answerer.describe() | {"axis": str(axis), "cap": self.cap}
        # Inspect's cache tells models apart by name and base_url, not by -M arguments: a capped arm would be given the
        # answers of the other
        ours = f"{self.about['model']['fingerprint']}/{self.about['dtype']}/{self.about['direction']}/{self.cap or 'none'}"
        super().__init__(
            model_name=model_name, base_url=f"personatlas:{ours}", api_key=api_key, config=config
        )
        on_gpu = self.answerer.held.model.device.type == "cuda"
        self.gatherer = Gatherer(self.answerer.answers, batch or (GPU_BATCH if on_gpu else CPU_BATCH))
        self._repeats: Counter[tuple[str, str]] = Counter()

    def max_tokens(self) -> int:
        """Longest answer unless told."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """As many as one batch holds."""
        return self.gatherer.most

    def connection_key(self) -> str:
        """Models share nothing."""
        return f"{self.model_name}/{self.cap}"

    def collapse_user_messages(self) -> bool:
        """Many templates refuse two user messages in a row."""
        return True

    async def tokenize(self, text: str) -> list[int]:
        """By the model's own tokenizer, without special tokens."""
        tokenizer = self.answerer.held.model.tokenizer
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
        """Answer, in one batch with the other calls that wait. Raises `Refused` for what cannot be done."""
        from personatlas.persona.sampling.sampler import Sampling

        _require(tools, config)
        with _refusals():
            messages = [_plain(message) for message in input]
            if messages and messages[-1]["role"] == "assistant":
                raise Refused(
                    "the last message is the assistant's: personatlas answers, it does not go on with an answer"
                )
            ids = self.answerer.prompt_ids(messages)
            most = MAX_TOKENS if config.max_tokens is None else config.max_tokens
            temperature = TEMPERATURE if config.temperature is None else config.temperature
            sampling = Sampling(most, temperature, TOP_P if config.top_p is None else config.top_p)
        room = most if self.answerer.context is None else min(most, self.answerer.context - len(ids))
        told = {"max_tokens": most, "temperature": temperature, "top_p": sampling.top_p, "seed": config.seed}
        if room < 1:
            return self._output(ids, [], told, [])
        seeds = self._seeds(messages, told, config)
        asking = partial(
            Asked, sampling=Sampling(room, temperature, sampling.top_p), capped=self.cap is not None
        )
        asked = [asking(ids, seed, stops=tuple(filter(None, config.stop_seqs or ()))) for seed in seeds]
        return self._output(ids, seeds, told, await self.gatherer.ask(asked), is_short=room < most)

    def _seeds(
        self, messages: list[dict[str, str]], told: dict[str, Any], config: GenerateConfig
    ) -> list[int]:
        """One for each choice. A sample that asks the same again gets another answer, unless the seed was given."""
        from personatlas.persona.rollout import seed_of

        state, key = sample_state(), json.dumps([messages, told], sort_keys=True)
        epoch, again = 1, 0
        if state is not None:
            epoch = state.epoch
            if config.seed is None:
                again = self._repeats[state.uuid, key]
                self._repeats[state.uuid, key] += 1
        choices = range(config.num_choices or 1)
        return [seed_of(f"{key}/{epoch}/{again}/{choice}", config.seed or 0) for choice in choices]

    def _output(
        self,
        ids: Sequence[int],
        seeds: list[int],
        told: dict[str, Any],
        answers: Sequence[Any],
        is_short: bool = False,
    ) -> ModelOutput:
        """Without answers: the messages alone are longer than what the model holds."""
        name, written = self.model_name, sum(one.written for one in answers)
        choices = [
            ChatCompletionChoice(
                message=ChatMessageAssistant(content=one.text, model=name, source="generate"),
                stop_reason="model_length"
                if is_short and one.stopped == "length"
                else STOP_REASONS[one.stopped],
            )
            for one in answers
        ] or [
            ChatCompletionChoice(
                message=ChatMessageAssistant(content="", model=name, source="generate"),
                stop_reason="model_length",
            )
        ]
        rows = [
            {"seed": seed, "projection": one.projection, "fired": one.fired, "tokens": len(one.ids)}
            for seed, one in zip(seeds, answers, strict=True)
        ]
        usage = ModelUsage(input_tokens=len(ids), output_tokens=written, total_tokens=len(ids) + written)
        metadata = {"personatlas": self.about | {"sampling": told, "choices": rows}}
        return ModelOutput(model=name, choices=choices, usage=usage, metadata=metadata)


def _loaded(model: str, axis: str, cap: str | None, how: dict[str, Any]) -> Any:
    """The model with its axis and cap, each checked to belong to the others. Here torch is imported, not before."""
    force = how.pop("force", False)
    template = how.pop("chat_template", None)
    device, dtype = how.pop("device", None), how.pop("dtype", None)
    if how:
        raise Refused(f"-M {next(iter(how))} is not one of {ARGUMENTS}")
    from personatlas.persona.options import ModelOptions
    from personatlas.steering.session import load_steered_model

    options = ModelOptions(device, dtype, None if template is None else Path(template))
    return Answerer(load_steered_model(model, options, axis, [] if cap is None else [cap], force=bool(force)))


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Refused:
        raise
    except UserError as error:
        raise Refused(str(error)) from None


def _require(tools: list[ToolInfo], config: GenerateConfig) -> None:
    """Refuse what would otherwise be left out silently."""
    if tools:
        names = ", ".join(tool.name for tool in tools)
        raise Refused(
            f"this task gives the model tools ({names}); personatlas answers in text only: take a task without"
        )
    for name, value in config.model_dump(exclude_none=True).items():
        if name not in HONOURED | ELSEWHERE and value not in (False, [], {}, 0, "none"):
            raise Refused(
                f"{name}={value} is not something that personatlas can do; it takes {', '.join(sorted(HONOURED))}"
            )
    if config.num_choices is not None and config.num_choices < 1:
        raise Refused(f"num_choices={config.num_choices} is below 1")


def _plain(message: ChatMessage) -> dict[str, str]:
    """Role and text of a message. Raises `Refused` for one that is not only text."""
    if message.role == "tool" or getattr(message, "tool_calls", None):
        raise Refused(
            "the conversation holds tool calls; personatlas answers in text only: take a task without tools"
        )
    parts = [] if isinstance(message.content, str) else message.content
    other = [part.type for part in parts if not isinstance(part, ContentText)]
    if other:
        raise Refused(
            f"a {message.role} message holds {other[0]}; personatlas reads text only: take a task without"
        )
    return {"role": message.role, "content": message.text}
