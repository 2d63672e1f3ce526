"""A conversation in the terminal, put to the engine without HTTP through the service that the server has too.

    session = ChatSession(service, seed=0)
    answer = await session.say("Who are you?", show)      # show(text) for every piece of the answer
    session.undo()

A transcript is never changed in place: every change keeps the one before it, so that all changes can be
undone. A cancelled answer is kept as far as it went.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message
from personatlas.steering.serve.engine.arm_slots import NONE
from personatlas.steering.serve.options import ADAPTIVE, ALWAYS, ArmMode
from personatlas.steering.serve.persona_state import PersonaState
from personatlas.steering.serve.schema import SEEDS, ChatMessage, ChatRequest, PersonaRequest
from personatlas.steering.serve.service import PersonaService

DEFAULT_ARM = "assistant"  # the arm of `adaptive` and `compare` where none was chosen
Show = Callable[[str], None]  # is given the text that an answer gained


@dataclass(frozen=True)
class ChatAnswer:
    """An answer with the server's persona object, None where the model did not read it.

    `arm` is the chosen arm (`persona.arm` is None while an adaptive one rests). `ended` is "stop", "length",
    "you" (stopped by the user), or None for an answer that was loaded.
    """

    text: str
    persona: PersonaState | None = None
    arm: str | None = None
    seed: int | None = None
    ended: Literal["stop", "length", "you"] | None = None


class ChatExchange(NamedTuple):
    """A message of the user (None: the model began) and its answer (None: none yet)."""

    user: str | None
    answer: ChatAnswer | None


@dataclass(frozen=True)
class Transcript:
    """A conversation: its system prompt ("" for none) and its exchanges."""

    system: str = ""
    exchanges: tuple[ChatExchange, ...] = ()

    @property
    def messages(self) -> list[Message]:
        """The conversation as a model reads it."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for user, answer in self.exchanges:
            messages += [{"role": "user", "content": user}] if user is not None else []
            messages += [{"role": "assistant", "content": answer.text}] if answer is not None else []
        return messages

    @property
    def answers(self) -> list[ChatAnswer]:
        """The answers in order."""
        return [exchange.answer for exchange in self.exchanges if exchange.answer is not None]

    def with_answer(self, answer: ChatAnswer | None) -> "Transcript":
        """With another answer, or none, to its last message. Raises `UserError` where there is no message."""
        if not self.exchanges or self.exchanges[-1].user is None:
            raise UserError("nothing was asked yet")
        last = ChatExchange(self.exchanges[-1].user, answer)
        return replace(self, exchanges=(*self.exchanges[:-1], last))


class ArmSetting(NamedTuple):
    """An arm by its name, "none" for the baseline, and when it acts."""

    arm: str
    mode: ArmMode = ALWAYS


class ChatSession:
    """One conversation with a service's model. The same `seed` gives the same answers."""

    def __init__(self, service: PersonaService, seed: int | None = None) -> None:
        self.service, self.transcript = service, Transcript()
        default = service.default_arm
        self.setting = ArmSetting(default.name if default is not None else NONE, service.options.mode)
        self._undo: list[Transcript] = []
        self._next_seed = secrets.randbelow(SEEDS) if seed is None else seed

    def change(self, transcript: Transcript) -> None:
        """Continues with another transcript; `undo` comes back."""
        self._undo.append(self.transcript)
        self.transcript = transcript

    def undo(self) -> None:
        """Takes back the last change, or the last exchange of a conversation that was loaded at the start."""
        if self._undo:
            self.transcript = self._undo.pop()
        elif self.transcript.exchanges:
            self.transcript = replace(self.transcript, exchanges=self.transcript.exchanges[:-1])
        else:
            raise UserError("there is nothing to take back")

    def set_arm(self, name: str) -> None:
        """Sets the arm of the next answers: a name, none, or adaptive. `UserError` for an unknown one."""
        setting = ArmSetting(self.other_arm(), ADAPTIVE) if name == ADAPTIVE else ArmSetting(name)
        self.service.resolve_arm(_request([], setting))
        self.setting = setting

    def other_arm(self) -> str:
        """The arm to compare with the baseline: the chosen one, else the default. `UserError` without any."""
        names = list(self.service.arms.named)
        if self.setting.arm == NONE and not names:
            if self.service.no_axis is not None:
                raise UserError(self.service.no_axis)
            raise UserError(
                "no cap is loaded: `personatlas calibrate` makes one, or name one as /arm p50@18-23"
            )
        if self.setting.arm != NONE:
            return self.setting.arm
        return DEFAULT_ARM if DEFAULT_ARM in names else names[0]

    async def say(self, text: str, show: Show) -> ChatAnswer:
        """Answers a message. Keeps neither where the answer was cancelled before it began."""
        exchanges = (*self.transcript.exchanges, ChatExchange(text, None))
        return await self._answer(replace(self.transcript, exchanges=exchanges), show)

    async def retry(self, show: Show) -> ChatAnswer:
        """Answers the last message again, in place of its answer."""
        return await self._answer(self.transcript.with_answer(None), show)

    async def compare(self, settings: Sequence[ArmSetting], show: Sequence[Show]) -> list[ChatAnswer]:
        """Answers the last message in several arms, with the seed of its answer; changes nothing."""
        question, answers = self.transcript.with_answer(None), self.transcript.answers
        seed = answers[-1].seed if answers else None
        return await self._generate(question, settings, self._draw_seed() if seed is None else seed, show)

    async def load(self, transcript: Transcript) -> None:
        """Takes over a conversation. The model reads its answers at baseline."""
        prompt = await self.service.prepare_chat(_request(transcript.messages, ArmSetting(NONE)))
        personas: dict[int, PersonaState] = {}
        if (tracker := self.service.tracker) is not None:
            states = tracker.watch(await self.service.read_turns(prompt.ids, prompt.spans))
            personas = {s.message: tracker.measure_loaded(states[: i + 1]) for i, s in enumerate(states)}
        exchanges, index = [], int(bool(transcript.system))
        for user, answer in transcript.exchanges:
            index += user is not None
            if answer is not None:
                answer = replace(answer, persona=personas.get(index))
                index += 1
            exchanges.append(ChatExchange(user, answer))
        self.change(replace(transcript, exchanges=tuple(exchanges)))

    async def _answer(self, question: Transcript, show: Show) -> ChatAnswer:
        (answer,) = await self._generate(question, [self.setting], self._draw_seed(), [show])
        if answer.text or answer.ended != "you":
            self.change(question.with_answer(answer))
        return answer

    async def _generate(
        self, question: Transcript, settings: Sequence[ArmSetting], seed: int, show: Sequence[Show]
    ) -> list[ChatAnswer]:
        service = self.service
        requests = [_request(question.messages, setting, seed) for setting in settings]
        prompts = [await service.prepare_chat(request) for request in requests]
        pairs = zip(prompts, requests, strict=True)
        stopped = False
        async with service.stream([service.generation_requests(*pair)[0] for pair in pairs]) as stream:
            try:
                async for answer, text in stream:
                    show[answer.index](text)
            except asyncio.CancelledError:  # Ctrl-C: what was said until then is an answer
                stopped = True
        answers = []
        for answer, prompt, setting in zip(stream.answers, prompts, settings, strict=True):
            answer.raise_error()
            persona = service.measure(prompt, answer, per_token=True)
            ended = "you" if stopped and not answer.done else answer.finish_reason
            arm = None if setting.arm == NONE else setting.arm
            answers.append(ChatAnswer(answer.text, persona, arm, seed, ended))
        return answers

    def _draw_seed(self) -> int:
        seed = self._next_seed % SEEDS
        self._next_seed += 1
        return seed


def _request(messages: Sequence[Message], setting: ArmSetting, seed: int | None = None) -> ChatRequest:
    own = [ChatMessage.model_construct(role=m["role"], content=m["content"]) for m in messages]
    persona = PersonaRequest.model_construct(
        arm=None if setting.arm == NONE else setting.arm, mode=setting.mode, per_token=True
    )
    return ChatRequest.model_construct(messages=own, seed=seed, persona=persona)
