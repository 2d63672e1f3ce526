"""A conversation in the terminal, and how it is put to the engine: no HTTP, the same host that the server has.

    chat = Chat(host, seed=0)
    answer = await chat.say("Who are you?", hear)          # hear(text) for every piece; cancelled, it keeps what was said
    chat.undo()

A conversation is never changed in place: every change keeps the one before it, so that all of them can be undone.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message
from personatlas.steering.serve.answer_stream import StreamedAnswer
from personatlas.steering.serve.engine.cap_slots import NONE
from personatlas.steering.serve.schema import SEEDS, ChatMessage, ChatRequest, PersonaRequest
from personatlas.steering.serve.service import ADAPTIVE, ALWAYS, PersonaService, PreparedPrompt

DEFAULT = "assistant"  # the cap that `adaptive` and `compare` mean where none was chosen


@dataclass(frozen=True)
class ChatAnswer:
    """What the model said and how it stood. `cap` is what was asked for, `acted` whether it was on; `ended` is "stop", "length",
    "you" (stopped by the user), or None for one that was loaded. `alarm` is None where no rule is calibrated."""

    text: str
    tokens: tuple[dict[str, Any], ...] = ()
    cap: str | None = None
    mode: str = ALWAYS
    acted: bool = False
    seed: int | None = None
    count: int = 0
    projection: float | None = None
    z: float | None = None
    floor: float | None = None
    fired: float | None = None
    alarm: bool | None = None
    raised: bool | None = None
    drift: dict[str, Any] | None = None
    ended: str | None = None


class ChatExchange(NamedTuple):
    """What the user said (None: the model began) and what came back (None: nothing yet)."""

    user: str | None
    answer: ChatAnswer | None


@dataclass(frozen=True)
class Transcript:
    """A conversation: its system prompt, "" for none, and the exchanges."""

    system: str = ""
    exchanges: tuple[ChatExchange, ...] = ()

    @property
    def messages(self) -> list[Message]:
        """As a model reads it."""
        found: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for user, answer in self.exchanges:
            found += [{"role": "user", "content": user}] if user is not None else []
            found += [{"role": "assistant", "content": answer.text}] if answer is not None else []
        return found

    @property
    def answers(self) -> list[ChatAnswer]:
        """The answers in order."""
        return [one.answer for one in self.exchanges if one.answer is not None]

    def asking(self) -> "Transcript":
        """As it was when its last message had no answer yet. Raises `UserError` where the user has said nothing."""
        if not self.exchanges or self.exchanges[-1].user is None:
            raise UserError("nothing was asked yet")
        return replace(self, exchanges=(*self.exchanges[:-1], ChatExchange(self.exchanges[-1].user, None)))

    def answered(self, answer: ChatAnswer) -> "Transcript":
        """With an answer to its last message."""
        return replace(self, exchanges=(*self.exchanges[:-1], ChatExchange(self.exchanges[-1].user, answer)))


class CapSetting(NamedTuple):
    """A cap by its name, "none" for none, and when it acts."""

    cap: str
    mode: str = ALWAYS


Hear = Callable[[int, str], None]  # which answer, and the text that it gained


class ChatSession:
    """One conversation with a host's model."""

    def __init__(self, host: PersonaService, seed: int | None = None) -> None:
        self.host, self.told = host, Transcript()
        self.arm = CapSetting(host.cap.name if host.cap is not None else NONE, host.settings.mode)
        self._past: list[Transcript] = []
        self._seed, self._drawn = secrets.randbelow(SEEDS) if seed is None else seed, 0

    def change(self, told: Transcript) -> None:
        """Go on from another conversation; `undo` comes back."""
        self._past.append(self.told)
        self.told = told

    def undo(self) -> None:
        """Take back the last change; of a conversation that was there from the beginning, its last exchange."""
        if self._past:
            self.told = self._past.pop()
        elif self.told.exchanges:
            self.told = replace(self.told, exchanges=self.told.exchanges[:-1])
        else:
            raise UserError("there is nothing to take back")

    def choose(self, name: str) -> None:
        """The cap from now on: its name, none, or adaptive. Raises `UserError` for one that there is not."""
        arm = CapSetting(self.other_cap(), ADAPTIVE) if name == ADAPTIVE else CapSetting(name)
        self.host.wanted(_request([], arm))
        self.arm = arm

    def other_cap(self) -> str:
        """The cap that is on, else the one that is meant. Raises `UserError` where none is loaded."""
        caps = list(self.host.engine.plans.caps)
        if self.arm.cap == NONE and not caps:
            raise UserError(
                "no cap is loaded: `personatlas calibrate` makes one, and /cap p50@18-23 names one by its level"
            )
        return self.arm.cap if self.arm.cap != NONE else DEFAULT if DEFAULT in caps else caps[0]

    async def say(self, text: str, hear: Callable[[str], None]) -> ChatAnswer:
        """Ask and be answered. A cancelled answer is kept as far as it went; nothing is kept where it had not begun."""
        asked = replace(self.told, exchanges=(*self.told.exchanges, ChatExchange(text, None)))
        return await self._answer(asked, hear)

    async def again(self, hear: Callable[[str], None]) -> ChatAnswer:
        """Another answer to the last message, in place of the one that there is."""
        return await self._answer(self.told.asking(), hear)

    async def compared(self, arms: Sequence[CapSetting], hear: Hear) -> list[ChatAnswer]:
        """The last message answered once more in each of the arms, with the seed of the answer that it has. Changes nothing."""
        asking, answers = self.told.asking(), self.told.answers
        seed = answers[-1].seed if answers else None
        return await self._asked(asking.messages, arms, self._next() if seed is None else seed, hear)

    async def load(self, told: Transcript) -> None:
        """Take up a conversation. Its answers are read by the model as it is, without a cap."""
        ready = await self.host.prepare_chat(_request(told.messages, CapSetting(NONE)))
        turns = {turn["message"]: turn for turn in self.host.standing.watched(await self.host.turns(ready))}
        exchanges, at = [], int(bool(told.system))
        for user, answer in told.exchanges:
            at += user is not None
            seen = turns.get(at, {})
            if answer is not None:
                known = {name: seen.get(name) for name in ("projection", "z", "alarm", "raised")}
                answer, at = replace(answer, count=seen.get("tokens", 0), **known), at + 1  # type: ignore[arg-type]
            exchanges.append(ChatExchange(user, answer))
        self.change(replace(told, exchanges=tuple(exchanges)))

    async def _answer(self, asked: Transcript, hear: Callable[[str], None]) -> ChatAnswer:
        (answer,) = await self._asked(asked.messages, [self.arm], self._next(), lambda _, text: hear(text))
        if answer.text or answer.ended != "you":
            self.change(asked.answered(answer))
        return answer

    async def _asked(
        self, messages: list[Message], arms: Sequence[CapSetting], seed: int, hear: Hear
    ) -> list[ChatAnswer]:
        requests = [_request(messages, arm, seed) for arm in arms]
        ready = [await self.host.prepare_chat(request) for request in requests]
        asks = [
            ask for one, request in zip(ready, requests, strict=True) for ask in self.host.asks(one, request)
        ]
        stopped = False
        async with self.host.heard(asks) as heard:
            try:
                async for choice, text in heard:
                    hear(heard.choices.index(choice), text)
            except asyncio.CancelledError:  # Ctrl-C; what was said until then is an answer
                stopped = True
        for choice in heard.choices:
            choice.require_whole()
        told = zip(heard.choices, ready, arms, strict=True)
        return [self._seen(choice, one, arm, seed, stopped) for choice, one, arm in told]

    def _seen(
        self, choice: StreamedAnswer, ready: PreparedPrompt, arm: CapSetting, seed: int, stopped: bool
    ) -> ChatAnswer:
        standing = self.host.standing
        turns = (
            ready.turns if ready.turns is not None else standing.turns(ready.spans, choice.prompt_projections)
        )
        told = standing.told(choice, turns, ready.messages, ready.mode, ready.held)
        last = told["turns"][-1] if told["turns"] else {}
        named = {name: told[name] for name in ("projection", "z", "floor", "fired", "drift")}
        return ChatAnswer(
            text=choice.spoken.text,
            tokens=tuple(choice.tokens(0, len(choice.ids))),
            cap=None if arm.cap == NONE else arm.cap,
            mode=arm.mode,
            acted=told["cap"] is not None,
            seed=seed,
            count=len(choice.ids),
            alarm=last.get("alarm"),
            raised=last.get("raised"),
            ended="you" if stopped and not choice.done else choice.reason,
            **named,
        )

    def _next(self) -> int:
        """A seed for one more answer: the same ones in the same order for the same seed."""
        self._drawn += 1
        return (self._seed + self._drawn - 1) % SEEDS


def _request(messages: Sequence[Message], arm: CapSetting, seed: int | None = None) -> ChatRequest:
    said = [ChatMessage.model_construct(role=one["role"], content=one["content"]) for one in messages]
    persona = PersonaRequest.model_construct(
        cap=None if arm.cap == NONE else arm.cap, mode=arm.mode, per_token=True
    )
    return ChatRequest.model_construct(messages=said, seed=seed, persona=persona)
