"""Continuous batching: requests decode together and start and end one by one, each in its own arm.

    engine = Engine(model, end_ids, axis, arms, EngineLimits(slots=32, context=2048), listener)
    engine.start()
    handle = engine.submit(GenerationRequest(ids, seed=7, max_tokens=64))
    ...                      # after each step `listener` gets [(handle, event), ...], in the engine's thread
    handle.cancel()          # its row ends before the next step
    engine.close()

One thread owns the model. Each round it takes in new requests, reads at most one chunk of the waiting
prompts, so that decoding rows never wait long, and decodes one token of every row. A forward that fails ends
the rows in it with an error, and the engine goes on. A steering hook that did not fire is such an error,
checked for every row.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Literal

import torch

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.models.load import Model
from personatlas.persona.progress import say
from personatlas.persona.sampling.cuda_graph import use_slot_attention
from personatlas.persona.sampling.sampler import SLOW, Prompt, batch_end, decodes_from_cache
from personatlas.steering.arms import Arm
from personatlas.steering.hooks.steering import HookDidNotFire
from personatlas.steering.serve.engine.arm_slots import ArmSlots
from personatlas.steering.serve.engine.batch import BatchRow, DecodeBatch, TokenEvent, TokenLogprobs
from personatlas.steering.serve.engine.prefix_cache import MIN_TOKENS, CachedPrefix, PrefixCache
from personatlas.steering.serve.engine.projection_hook import ProjectionHook
from personatlas.steering.serve.engine.reread_batch import RereadBatch

log = logging.getLogger(__name__)
CHUNK_CPU, CHUNK_GPU = 256, 4096  # tokens of prompts read between two decoding steps
CROWDED_CHUNKS = 4  # times as many while more requests wait than decode
MIN_PREFIX = 128  # cached tokens that are worth a prefill of their own while others wait
BASELINE_DIGEST = "baseline"  # of prefixes that nothing acted on
FORWARD_ERRORS = (
    RuntimeError,
    ValueError,
    IndexError,
)  # out of memory is a RuntimeError, UserError a ValueError


class ServerBusy(UserError):
    """The queue is full, or the engine is closing."""


@dataclass(frozen=True)
class EngineLimits:
    """Rows that decode at once, tokens of each, bytes of the prefix cache, and requests that may wait."""

    slots: int = 32
    context: int = 2048
    prefix_bytes: int = 2**30
    queue: int = 4096


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how to answer it. With `max_tokens` 0 it is only read."""

    ids: tuple[int, ...]
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1
    arm: Arm | None = None
    logprobs: int | None = None

    @property
    def digest(self) -> str:
        """The digest of the arm: prefixes serve only requests with the same one."""
        return self.arm.digest if self.arm is not None else BASELINE_DIGEST


@dataclass(frozen=True)
class PrefillEvent:
    """The prompt is read: projections of its tokens but the last, which the first step feeds.

    `cached` tokens came from a prefix; `fired` counts tokens times layers that the arm changed.
    """

    projections: tuple[float, ...]
    cached: int
    fired: int

    @classmethod
    def of(cls, row: BatchRow) -> "PrefillEvent":
        """The event of a row whose prompt was just read."""
        return cls(tuple(row.projections), row.cached, row.prompt_fired)


@dataclass(frozen=True)
class FinishEvent:
    """The last event of a request: why it ended, and the error if there was one."""

    reason: Literal["end", "length", "read", "cancelled", "error"]
    error: BaseException | None = None


EngineEvent = PrefillEvent | TokenEvent | FinishEvent


@dataclass(eq=False)
class RequestHandle:
    """A submitted request. `owner` is for the listener."""

    request: GenerationRequest
    owner: object = None
    cancelled: bool = False
    row: BatchRow | None = field(default=None, repr=False)

    def cancel(self) -> None:
        """Ends the request before the next step; from any thread, more than once, or after its end."""
        self.cancelled = True


Listener = Callable[[Sequence[tuple[RequestHandle, EngineEvent]]], None]


class Engine:
    """The thread that owns a model, its queue, and its batch."""

    def __init__(
        self,
        model: Model,
        end_ids: frozenset[int],
        axis: Axis | None,
        arms: Sequence[Arm],
        limits: EngineLimits,
        listener: Listener = lambda _: None,
    ) -> None:
        batch_type = DecodeBatch if decodes_from_cache(model) else RereadBatch
        if batch_type is RereadBatch:
            say(SLOW)
        self.model, self.end_ids, self.limits, self.listener = model, end_ids, limits, listener
        self.arms = ArmSlots(axis, model, arms)
        # without an axis there is nothing to project on, and every projection is NaN
        layer, vector = (
            (0, torch.full((model.d_model,), torch.nan))
            if axis is None
            else (axis.layer, axis.at(axis.layer))
        )
        self.projection_hook = ProjectionHook(model, layer, vector)
        self.batch = batch_type(model, limits.slots, limits.context, self.projection_hook, self.arms.steering)
        self.batch.captured_layers |= {
            tuple(sorted({layer for own in arm.interventions for layer in own.layers})) for arm in arms
        }
        self.prefixes = PrefixCache(limits.prefix_bytes if batch_type is DecodeBatch else 0)
        self.waiting: deque[RequestHandle] = deque()
        self._reading: RequestHandle | None = None  # its prompt is read in chunks
        self._running: dict[BatchRow, RequestHandle] = {}
        self._inbox: SimpleQueue[RequestHandle | _Scoring | None] = SimpleQueue()
        self._scoring: deque[_Scoring] = deque()
        self._outbox: list[tuple[RequestHandle, EngineEvent]] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests will be answered."""
        return self._thread.is_alive() and not self._closing.is_set()

    @property
    def running(self) -> int:
        """Rows that decode."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Requests that wait for a slot or are being read."""
        return len(self.waiting) + len(self._scoring) + self._inbox.qsize() + (self._reading is not None)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, request: GenerationRequest, owner: object = None) -> RequestHandle:
        """Queues a request. Raises `ServerBusy`, and `UserError` for a prompt that does not fit."""
        if not request.ids:
            raise UserError("an empty prompt: there is nothing to answer")
        if len(request.ids) + request.max_tokens > self.limits.context:
            raise UserError(
                f"{len(request.ids)} tokens to read and {request.max_tokens} to write are more than the "
                f"{self.limits.context} of the context"
            )
        handle = RequestHandle(request, owner)
        self._put(handle)
        return handle

    def score(self, request: GenerationRequest) -> "Future[list[TokenLogprobs]]":
        """Log-probabilities of a prompt's own tokens in its arm, read in pieces between steps.

        Raises `ServerBusy` as `submit` does; the future fails with it when the engine closes before.
        """
        scoring = _Scoring(request, Future())
        self._put(scoring)
        return scoring.future

    def close(self, wait: float = 10.0) -> None:
        """Ends all requests with an error and the thread; `wait` is how many seconds to wait for it."""
        self._closing.set()
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(wait)

    def _put(self, item: "RequestHandle | _Scoring") -> None:
        if not self.alive:
            raise ServerBusy("the engine is not running")
        if self.queued >= self.limits.queue:
            raise ServerBusy(f"{self.queued} requests are waiting, which is the most; try again later")
        self._inbox.put(item)
        if not self.alive:  # it closed meanwhile and may not look into its inbox any more
            raise ServerBusy("the server is ending")

    @torch.no_grad()
    def _run(self) -> None:
        try:
            with (
                self.projection_hook.on(),
                self.arms.steering.hooks.attached(),
                use_slot_attention(self.model),
            ):
                while not self._closing.is_set():
                    self._receive()
                    self._guarded(self._read)
                    self._guarded(self._step)
                    self._score()
                    self._flush()
        finally:
            self._closing.set()
            ending = "the server is ending"
            late = [self._inbox.get() for _ in range(self._inbox.qsize())]
            for item in [*self._scoring, *late]:
                if isinstance(item, _Scoring) and item.future.set_running_or_notify_cancel():
                    item.future.set_exception(ServerBusy(ending))
            handles = [item for item in late if isinstance(item, RequestHandle)]
            for handle in [*handles, *self.waiting, *self._active()]:
                self._outbox.append((handle, FinishEvent("error", ServerBusy(ending))))
            self._flush()

    def _active(self) -> list[RequestHandle]:
        """Requests that decode or are being read."""
        return [*self._running.values(), *([self._reading] if self._reading is not None else [])]

    def _guarded(self, part: Callable[[], None]) -> None:
        """Runs a part of the round; a forward that fails ends the requests that were in it."""
        try:
            part()
        except FORWARD_ERRORS as error:
            log.exception("a forward failed: its requests end with an error")
            for handle in self._active():
                self._finish(handle, FinishEvent("error", error), cache=False)
            self.prefixes.clear()
            self.batch.reset()
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _receive(self) -> None:
        """Takes in what was submitted, waiting while there is nothing else to do; ends what was cancelled."""
        idle = not (self.waiting or self._running or self._reading or self._scoring)
        try:
            item = self._inbox.get(block=idle)
            while True:
                if isinstance(item, RequestHandle):
                    self.waiting.append(item)
                elif item is not None:
                    self._scoring.append(item)
                item = self._inbox.get(block=False)
        except Empty:
            pass
        for handle in [*self._active(), *self.waiting]:
            if handle.cancelled:
                if handle in self.waiting:
                    self.waiting.remove(handle)
                self._finish(handle, FinishEvent("cancelled"))

    def _read(self) -> None:
        """Reads a chunk of the waiting prompts: first the rest of a long one, then others in order.

        A request that waits for a spare plan is passed by those that do not.
        """
        chunk = self._chunk_size()
        left, whole, parked = chunk, list[RequestHandle](), list[RequestHandle]()
        if self._reading is not None:
            left -= self._read_chunk(self._reading, chunk)
        try:
            while self.waiting and self.batch.free_slots - (self._reading is not None) > len(whole):
                handle = self.waiting.popleft()
                if handle.row is None and not self._acquire_plan(handle):
                    parked.append(handle)
                    continue
                prefix = self._cached_prefix(handle)
                request = handle.request
                is_short = prefix is None and len(request.ids) <= chunk and request.max_tokens > 0
                lengths = [len(one.request.ids) for one in (*whole, handle)]
                if is_short and batch_end(lengths, 0, chunk) > len(whole):
                    whole.append(handle)
                elif not is_short and self._reading is None and left > 0:
                    self._reading = handle
                    assert handle.row is not None
                    self.batch.open(handle.row, *(prefix or (None, 0)))
                    left -= self._read_chunk(handle, left)
                else:
                    self.waiting.appendleft(handle)
                    break
        except FORWARD_ERRORS:
            self.waiting.extendleft(reversed(whole))  # they have plans, but were not read: next round
            raise
        finally:
            self.waiting.extendleft(reversed(parked))
        if whole:
            rows = {handle.row: handle for handle in whole if handle.row is not None}
            self._running |= rows  # from here on a failure is theirs
            self.batch.prefill(list(rows))
            self._outbox += [(handle, PrefillEvent.of(row)) for row, handle in rows.items()]

    def _cached_prefix(self, handle: RequestHandle) -> tuple[CachedPrefix, int] | None:
        """What is cached of its prompt, where that is worth a prefill of its own."""
        found = self.prefixes.longest(handle.request.digest, handle.request.ids)
        alone = not self.waiting and not self._running
        return found if found is not None and (alone or found[1] >= MIN_PREFIX) else None

    def _acquire_plan(self, handle: RequestHandle) -> bool:
        """Gives a request its row; False while no plan is free. An arm that cannot be applied ends it."""
        request = handle.request
        try:
            plan = self.arms.acquire(request.arm)
        except ValueError as error:
            self._outbox.append((handle, FinishEvent("error", error)))
            handle.cancelled = True
            return False
        if plan is None:
            return False
        prompt = Prompt(request.ids, request.seed, plan)
        handle.row = BatchRow(prompt, request.temperature, request.top_p, request.logprobs)
        return True

    def _read_chunk(self, handle: RequestHandle, max_tokens: int) -> int:
        """Reads on in a long prompt and returns how many tokens that were."""
        row = handle.row
        assert row is not None
        before = row.fed
        if self.batch.prefill_chunk(row, max_tokens):
            self._reading = None
            self._running[row] = handle
            self._outbox.append((handle, PrefillEvent.of(row)))
        return row.fed - before

    def _step(self) -> None:
        if not self._running:
            return
        for row, event in self.batch.step():
            handle = self._running[row]
            self._outbox.append((handle, event))
            if handle.request.max_tokens == 0:  # its last prompt token was fed, and that was all
                self._finish(handle, FinishEvent("read"))
            elif event.token in self.end_ids:
                self._finish(handle, FinishEvent("end"))
            elif len(row.generated) >= handle.request.max_tokens:
                self._finish(handle, FinishEvent("length"))

    def _score(self) -> None:
        """Scores some tokens of the first text that waits for it."""
        if not self._scoring:
            return
        scoring, future = self._scoring[0], self._scoring[0].future
        request, error = scoring.request, None
        try:
            if scoring.parts is None and not future.cancelled():
                plan = self.arms.acquire(request.arm)
                if plan is None:
                    raise ServerBusy("too many different arms are in use; try again later")
                scoring.parts = self.batch.score(Prompt(request.ids, 0, plan), request.logprobs or 0)
            part = None if scoring.parts is None or future.cancelled() else next(scoring.parts, None)
            if part is not None:
                scoring.scores += part
                return
        except FORWARD_ERRORS as failure:
            error = failure
            if scoring.parts is not None:
                self.batch.reset()
        self._scoring.popleft()
        if scoring.parts is not None:
            self.arms.release(request.arm)
        if not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(scoring.scores)

    def _finish(self, handle: RequestHandle, event: FinishEvent, *, cache: bool = True) -> None:
        row = handle.row
        if row is not None:
            if cache and row.fed:
                event = self._checked(handle, row, event)
            if self._running.pop(row, None) is not None:
                self.batch.remove(row)
            self.arms.release(handle.request.arm)
        if handle is self._reading:
            self._reading = None
        self._outbox.append((handle, event))

    def _checked(self, handle: RequestHandle, row: BatchRow, event: FinishEvent) -> FinishEvent:
        """Caches what a row has processed; returns its last event, an error where its arm was not applied.

        In an arm that treats prompts and answers differently only the prompt is cached: as part of the next
        prompt the answer gets other steps, and a conversation must not depend on what is cached.
        """
        arm = handle.request.arm
        length = row.fed if arm is None or arm.is_uniform else min(row.fed, len(row.prompt.ids))
        try:
            self.batch.require_steered(row)
            if self.prefixes.capacity and length >= MIN_TOKENS:
                self.prefixes.add(self.batch.prefix_of(row, handle.request.digest, length))
        except HookDidNotFire as error:
            return FinishEvent("error", error)
        except RuntimeError:  # no memory for it
            log.exception("a prefix is not cached")
            self.prefixes.clear()
        return event

    def _flush(self) -> None:
        if self._outbox:
            events, self._outbox = self._outbox, []
            self.listener(events)

    def _chunk_size(self) -> int:
        """Prompt tokens to read in a round: few while rows decode, more while more wait to decode than do."""
        if not self._running:
            return self.batch.max_prefill_tokens
        small = CHUNK_CPU if self.model.device.type == "cpu" else CHUNK_GPU
        to_decode = sum(handle.request.max_tokens > 0 for handle in self.waiting)
        return small if to_decode <= len(self._running) else CROWDED_CHUNKS * small


@dataclass(eq=False)
class _Scoring:
    """A text to score, and the future of its scores, which fails when the engine closes before."""

    request: GenerationRequest
    future: Future[list[TokenLogprobs]]
    parts: Iterator[list[TokenLogprobs]] | None = None
    scores: list[TokenLogprobs] = field(default_factory=list)
