"""Continuous batching: requests of many askers decode together, come and go, and are capped or not row by row.

    engine = Engine(model, end_ids, axis, caps, Room(slots=32, length=2048, prefixes=2**30), post)
    engine.start()
    ticket = engine.submit(Ask(ids, seed=7, limit=64, cap=engine.plans.wanted("assistant")))
    ...                                     # `post` gets [(ticket, event), ...] after every step, in the engine's thread
    ticket.cancel()                         # its row is gone before the next step
    engine.close()

One thread owns the model. Each round it takes in what was asked, reads at most one piece of the waiting prompts, so that those who
decode never wait long, and feeds one token to every row. What a forward cannot do is an event of the rows that were in it, and
the engine goes on; that a steering hook was silent is such an error, checked for every row.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Literal

import torch

from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap
from personatlas.persona.models.load import Model
from personatlas.persona.sampling.cuda_graph import slot_attention_on
from personatlas.persona.sampling.sampler import Prompt, decodes_from_cache
from personatlas.steering.hooks.steering import HookDidNotFire
from personatlas.steering.serve.engine.batch import BatchRow, DecodeBatch, ProjectionHook, TokenEvent, fitting
from personatlas.steering.serve.engine.cap_slots import CapSlots, ResolvedCap
from personatlas.steering.serve.engine.prefix_cache import FEWEST, CachedPrefix, PrefixCache

log = logging.getLogger(__name__)
PIECE_CPU, PIECE_GPU = 256, 4096  # tokens of a prompt read between two steps of those who decode
CROWD = 4
WORTH = 128  # tokens that are worth not being read again where others wait
UNCAPPED = "as it is"  # the digest of no plan


class ServerBusy(UserError):
    """As many requests wait as may, or the engine is ending."""


@dataclass(frozen=True)
class EngineLimits:
    """How many rows decode at once, how many tokens each may hold, bytes for prefixes, and how many requests may wait."""

    slots: int = 32
    length: int = 2048
    prefixes: int = 2**30
    waiting: int = 4096


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how to answer it. `limit` 0 only reads it."""

    ids: tuple[int, ...]
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    limit: int = 1
    cap: ResolvedCap | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class PrefillEvent:
    """The prompt is read: projections of its tokens but the last (all of them where nothing is to be answered), tokens that
    were not read again, and tokens times layers changed."""

    projections: tuple[float, ...]
    kept: int
    fired: int


@dataclass(frozen=True)
class FinishEvent:
    """The last event: why it ended, or the error that ended it."""

    reason: Literal["end", "length", "read", "cancelled", "error"]
    error: BaseException | None = None


EngineEvent = PrefillEvent | TokenEvent | FinishEvent


@dataclass(eq=False)
class RequestHandle:
    """A request on its way through the engine. `owner` is whoever asked, for `post`."""

    ask: GenerationRequest
    owner: Any = None
    cancelled: bool = False
    row: BatchRow | None = field(default=None, repr=False)

    def cancel(self) -> None:
        """Give it up: from any thread, at any time, more than once."""
        self.cancelled = True


Post = Callable[[Sequence[tuple[RequestHandle, EngineEvent]]], None]


class Engine:
    """The thread that owns a model, and what is asked of it."""

    def __init__(
        self,
        model: Model,
        end_ids: frozenset[int],
        axis: Axis,
        caps: dict[str, Cap],
        room: EngineLimits,
        post: Post = lambda _: None,
    ) -> None:
        if not decodes_from_cache(model):
            raise UserError(
                f"{model.id} keeps another state than keys and values (recurrent layers, say), which serving needs"
            )
        self.model, self.end_ids, self.room, self.post = model, end_ids, room, post
        self.plans = CapSlots(axis, model, caps)
        self.watching = ProjectionHook(model, axis.layer, axis.at(axis.layer))
        self.rows = DecodeBatch(model, room.slots, room.length, self.watching, self.plans.steering)
        self.rows.usual |= {tuple(sorted(one.cap.layers)) for one in self.plans.caps.values()}
        self.prefixes = PrefixCache(room.prefixes)
        self.waiting: deque[RequestHandle] = deque()
        self._opened: RequestHandle | None = None  # whose prompt is in the reading slot
        self._running: dict[BatchRow, RequestHandle] = {}
        self._asked: SimpleQueue[RequestHandle | Callable[[], None] | None] = SimpleQueue()
        self._told: list[tuple[RequestHandle, EngineEvent]] = []
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
        return len(self.waiting) + self._asked.qsize() + (self._opened is not None)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, ask: GenerationRequest, owner: Any = None) -> RequestHandle:
        """Ask for an answer. Raises `ServerBusy` when too many wait, `UserError` for a prompt that does not fit."""
        if not ask.ids:
            raise UserError("an empty prompt: there is nothing to answer")
        if len(ask.ids) + ask.limit > self.room.length:
            raise UserError(
                f"{len(ask.ids)} tokens to read and {ask.limit} to write are more than the {self.room.length} of the context"
            )
        self._require_room()
        ticket = RequestHandle(ask, owner)
        self._asked.put(ticket)
        if not self.alive:  # it ended meanwhile, and nobody may look at what is asked any more
            raise ServerBusy("the server is ending")
        return ticket

    def _require_room(self) -> None:
        if not self.alive:
            raise ServerBusy("the engine is not running")
        if self.queued >= self.room.waiting:
            raise ServerBusy(f"{self.queued} requests are waiting, which is the most; try again later")

    def between_steps(self, work: Callable[[], None]) -> None:
        """Do something with the model in the engine's thread, where nobody decodes meanwhile. Raises `ServerBusy` as `submit` does."""
        self._require_room()
        self._asked.put(work)

    def close(self, wait: float = 10.0) -> None:
        """End all that is under way as cancelled, and the thread."""
        self._closing.set()
        self._asked.put(None)
        if self._thread.is_alive():
            self._thread.join(wait)

    @torch.no_grad()
    def _run(self) -> None:
        try:
            with self.watching.on(), self.plans.steering.on(), slot_attention_on(self.model):
                while not self._closing.is_set():
                    self._take_in()
                    self._guarded(self._read)
                    self._guarded(self._step)
                    self._flush()
        finally:
            self._closing.set()
            asked = [self._asked.get() for _ in range(self._asked.qsize())]
            late = [one for one in asked if isinstance(one, RequestHandle)]
            for ticket in [
                *late,
                *self.waiting,
                *self._running.values(),
                *([self._opened] if self._opened else []),
            ]:
                self._told.append((ticket, FinishEvent("error", ServerBusy("the server is ending"))))
            self._flush()

    def _guarded(self, part: Callable[[], None]) -> None:
        """What a forward cannot do ends the rows that were in it, and not the engine."""
        try:
            part()
        except (RuntimeError, ValueError, IndexError, UserError) as error:  # out of memory is a RuntimeError
            log.exception("a forward failed: its requests end with an error")
            for ticket in [*self._running.values(), *([self._opened] if self._opened else [])]:
                self._leave(ticket, FinishEvent("error", error), keep=False)
            self.prefixes.clear()
            self.rows.forget()
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _take_in(self) -> None:
        """What was asked since the last round; waits for it where there is nothing else to do."""
        idle = not (self.waiting or self._running or self._opened)
        try:
            one = self._asked.get(block=idle)
            while True:
                if isinstance(one, RequestHandle):
                    self.waiting.append(one)
                elif one is not None:
                    self._guarded(one)
                one = self._asked.get(block=False)
        except Empty:
            pass
        for ticket in [
            one for one in [*self._running.values(), self._opened] if one is not None and one.cancelled
        ]:
            self._leave(ticket, FinishEvent("cancelled"))
        for ticket in [one for one in self.waiting if one.cancelled]:
            self.waiting.remove(ticket)
            self._leave(ticket, FinishEvent("cancelled"))

    def _read(self) -> None:
        """Read a piece of what waits: on with a long prompt, then short ones and conversations that go on, in their order.

        Who waits for a spare plan is passed by those who do not.
        """
        piece = self._piece()
        left, whole, parked = piece, list[RequestHandle](), list[RequestHandle]()
        if self._opened is not None:
            left -= self._read_on(self._opened, piece)
        try:
            while self.waiting and self.rows.free - (self._opened is not None) > len(whole):
                ticket = self.waiting.popleft()
                if ticket.row is None and not self._seat(ticket):
                    parked.append(ticket)
                    continue
                found = self._known(ticket)
                if (
                    found is None
                    and len(ticket.ask.ids) <= piece
                    and ticket.ask.limit > 0
                    and self._fits(whole, ticket, piece)
                ):
                    whole.append(ticket)
                elif (
                    self._opened is None
                    and left > 0
                    and (found is not None or len(ticket.ask.ids) > piece or not ticket.ask.limit)
                ):
                    self._opened = ticket
                    left -= self._open(ticket, found, left)
                else:
                    self.waiting.appendleft(ticket)
                    break
        except (RuntimeError, ValueError, IndexError, UserError):
            self.waiting.extendleft(reversed(whole))  # seated, not read: they go on in the next round
            raise
        finally:
            self.waiting.extendleft(reversed(parked))
        if whole:
            self._read_whole(whole)

    @staticmethod
    def _fits(whole: Sequence[RequestHandle], ticket: RequestHandle, piece: int) -> bool:
        rows = [one.row for one in (*whole, ticket) if one.row is not None]
        return fitting(rows, piece) > len(whole)

    def _open(self, ticket: RequestHandle, found: tuple[CachedPrefix, int] | None, most: int) -> int:
        assert ticket.row is not None
        self.rows.open(ticket.row, *(found or (None, 0)))
        return self._read_on(ticket, most)

    def _known(self, ticket: RequestHandle) -> tuple[CachedPrefix, int] | None:
        """What was said before, where it is worth a forward of its own: prompts are read together faster than one by one."""
        found = self.prefixes.longest(self._digest(ticket), ticket.ask.ids)
        alone = not self.waiting and not self._running
        return found if found is not None and (alone or found[1] >= WORTH) else None

    def _seat(self, ticket: RequestHandle) -> bool:
        """Find its plan; False while none is free. What cannot be put on ends its own request alone."""
        ask = ticket.ask
        try:
            plan = self.plans.place(ask.cap)
        except (ValueError, UserError) as error:
            self._told.append((ticket, FinishEvent("error", error)))
            ticket.cancelled = True
            return False
        if plan is not None:
            ticket.row = BatchRow(Prompt(ask.ids, ask.seed, plan), ask.temperature, ask.top_p, ask.logprobs)
        return plan is not None

    def _read_whole(self, tickets: list[RequestHandle]) -> None:
        rows = [ticket.row for ticket in tickets if ticket.row is not None]
        self._running |= dict(zip(rows, tickets, strict=True))  # from here on an error is theirs
        self.rows.read(rows)
        self._told += [(ticket, _read_of(row)) for row, ticket in zip(rows, tickets, strict=True)]

    def _read_on(self, ticket: RequestHandle, most: int) -> int:
        """Read on in the reading slot; how many tokens that were."""
        row = ticket.row
        assert row is not None
        before = row.fed
        if self.rows.read_part(row, most):
            self._opened = None
            self._running[row] = ticket
            self._told.append((ticket, _read_of(row)))
        return row.fed - before

    def _step(self) -> None:
        if not self._running:
            return
        for row, step in self.rows.step():
            ticket = self._running[row]
            if ticket.ask.limit == 0:  # it was fed its last token, and that was all
                self._told.append((ticket, step))
                self._leave(ticket, FinishEvent("read"))
                continue
            self._told.append((ticket, step))
            if step.token in self.end_ids:
                self._leave(ticket, FinishEvent("end"))
            elif len(row.drawn) >= ticket.ask.limit:
                self._leave(ticket, FinishEvent("length"))

    def _leave(self, ticket: RequestHandle, ended: FinishEvent, *, keep: bool = True) -> None:
        row = ticket.row
        if row is not None:
            if keep and row.fed:
                ended = self._kept(ticket, row, ended)
            if row in self._running:
                del self._running[row]
                self.rows.finish(row)
            self.plans.release(ticket.ask.cap)
        if ticket is self._opened:
            self._opened = None
        self._told.append((ticket, ended))

    def _kept(self, ticket: RequestHandle, row: BatchRow, ended: FinishEvent) -> FinishEvent:
        """Keep what was said, and how the row ends: with an error where its cap was not on.

        Of a cap whose floors differ between prompts and answers only the prompt is kept: as part of the next prompt the answer is
        another matter than when it was spoken, and a conversation must not depend on what is kept.
        """
        columns = (
            row.fed if ticket.ask.cap is None or ticket.ask.cap.is_even else min(row.fed, len(row.prompt.ids))
        )
        try:
            self.rows.require_steered(row)
            if self.prefixes.room and columns >= FEWEST:
                self.prefixes.keep(self.rows.saved(row, self._digest(ticket), columns))
        except HookDidNotFire as error:
            return FinishEvent("error", error)
        except RuntimeError:  # no memory for it
            log.exception("what was said is not kept")
            self.prefixes.clear()
        return ended

    def _flush(self) -> None:
        if self._told:
            told, self._told = self._told, []
            self.post(told)

    def _piece(self) -> int:
        """Tokens to read at once: few while others decode, more while more wait than decode."""
        if not self._running:
            return self.rows.reads_at_once
        small = PIECE_CPU if self.model.device.type == "cpu" else PIECE_GPU
        return small if len(self.waiting) <= len(self._running) else CROWD * small

    @staticmethod
    def _digest(ticket: RequestHandle) -> str:
        return ticket.ask.cap.digest if ticket.ask.cap is not None else UNCAPPED


def _read_of(row: BatchRow) -> PrefillEvent:
    return PrefillEvent(tuple(row.projections), row.kept, row.read_fired)
