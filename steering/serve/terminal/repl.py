"""Lines in, answers out: the loop of a terminal chat, at a terminal or over a pipe.

Ctrl-C while an answer comes stops that answer; at the prompt it clears the line, and twice it leaves, as Ctrl-D does.
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from personatlas.persona.errors import UserError
from personatlas.persona.progress import console, say
from personatlas.steering.serve.answer_stream import EngineFailure
from personatlas.steering.serve.distress_notice import shows_distress
from personatlas.steering.serve.service import ContextOverflow, PersonaService
from personatlas.steering.serve.terminal.commands import ChatCommands, ReplActions
from personatlas.steering.serve.terminal.render import HALF, ChatRenderer, clean
from personatlas.steering.serve.terminal.session import CapSetting, ChatAnswer, ChatSession, Transcript

PROMPT = "> "


class AnswerCancelled(Exception):
    """Ctrl-C came before an answer had begun."""


class ChatRepl:
    """A chat with a host's model, which runs in `runner`'s loop. `live`: somebody sits there."""

    def __init__(self, runner: asyncio.Runner, host: PersonaService, seed: int | None, *, live: bool) -> None:
        axis = host.held.axis
        self.runner, self.host, self.live = runner, host, live
        self.chat = ChatSession(host, seed)
        self.shown = ChatRenderer(console(), host.standing.monitor.reference, axis.layer, axis.poles)
        self.commands = ChatCommands(
            self.chat, self.shown, ReplActions(self._again, self._compare, self._load, self._notice)
        )
        self.failed = 0
        self._noticed = False

    def run(self, told: Transcript, lines: Sequence[str]) -> None:
        """Go on from a conversation, with these lines or, where there are none, with those that are typed or piped in."""
        self._greet()
        self.chat.told = Transcript(told.system)
        if told.exchanges:
            self._load(told)
            self.commands.tell_loaded()
        for line in lines or (self._typed() if self.live else _piped()):
            if not self.live:
                self.shown.line(PROMPT + line)
            if not self._done(line):
                break

    def _done(self, line: str) -> bool:
        """Do what a line says; False when it is time to leave."""
        try:
            if HALF.search(line):
                raise UserError("this line is not valid UTF-8")
            if line.startswith("/") and not line.startswith("//"):
                return self.commands.obey(line)
            self._say(line.removeprefix("/"))
        except UserError as error:
            self.failed += 1
            self.shown.line(self._advice(error), "yellow")
        except EngineFailure as error:
            self.failed += 1
            self.shown.line(f"the engine failed: {error}", "yellow")
        except (AnswerCancelled, KeyboardInterrupt):
            self.shown.line("stopped; there was no answer yet, and the message is taken back", "yellow")
            return self.live
        return True

    def _say(self, text: str) -> None:
        if shows_distress(text):
            self._notice()
        self._hear(lambda hear: self.chat.say(text, hear))

    def _hear(self, ask: Callable[[Callable[[str], None]], Coroutine[Any, Any, ChatAnswer]]) -> None:
        answer = self.runner.run(ask(self.shown.piece))
        self.shown.line("")
        if not answer.text and answer.ended == "you":
            raise AnswerCancelled
        self.shown.standing(answer)

    def _again(self) -> None:
        self._hear(self.chat.again)

    def _compare(self, arms: list[CapSetting]) -> None:
        """The first answer as it comes; the second, which comes at the same time, after it."""
        self.shown.line("as it is", "bold")
        first, second = self.runner.run(
            self.chat.compared(arms, lambda which, text: self.shown.piece(text if which == 0 else ""))
        )
        self.shown.line("")
        self.shown.standing(first)
        self.shown.line(f"cap {arms[1].cap}", "bold")
        self.shown.line(second.text)
        self.shown.standing(second)
        self.shown.line("the same seed for both; the conversation goes on from the answer that it had", "dim")

    def _load(self, told: Transcript) -> None:
        self.runner.run(self.chat.load(told))

    def _notice(self) -> None:
        """Once is enough."""
        if not self._noticed:
            self._noticed = True
            self.shown.notice()

    def _advice(self, error: UserError) -> str:
        if isinstance(error, ContextOverflow):
            return (
                f"no room: the context is {self.host.settings.room.length} tokens, and the conversation with this message needs more; "
                "/undo takes an exchange back, /reset begins anew, /save FILE keeps what was said"
            )
        return str(error)

    def _greet(self) -> None:
        axis, model, rule = self.host.held.axis, self.host.held.model, self.host.standing.monitor.rule
        kind = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}"
        told = f"{self.host.name} ({kind}); layer {axis.layer}, {axis.poles[0]} +, {axis.poles[1]} -; {self.commands.holding()}"
        told += (
            ""
            if rule is not None
            else "; no alarm is calibrated (`personatlas drift` makes a reference.json)"
        )
        say(clean(told))
        say(
            "A research tool: it shows a language model's internal state. It is no adviser, and answers can be wrong."
        )
        if self.live:
            say("/help lists what else can be said; Ctrl-C stops an answer, Ctrl-D leaves.")

    def _typed(self) -> Iterator[str]:
        _edit(self.commands.known)
        interrupted = False
        while True:
            try:
                line = input(PROMPT).strip()
            except EOFError:
                self.shown.line("")
                return
            except KeyboardInterrupt:
                self.shown.line("")
                if interrupted:
                    return
                interrupted = True
                say("Ctrl-C again, or Ctrl-D, leaves")
                continue
            interrupted = False
            if line:
                yield line


def _piped() -> Iterator[str]:
    """Lines of an input that is no terminal."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _edit(commands: Sequence[str] | dict[str, Any]) -> None:
    """Line editing, the lines of this chat to go back to, and Tab for commands, where there is a readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        found = [f"/{name}" for name in commands if f"/{name}".startswith(text)]
        return found[state] if text.startswith("/") and state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
