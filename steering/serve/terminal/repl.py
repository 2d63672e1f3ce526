"""The loop of a terminal chat, at a terminal or over a pipe: messages, and commands such as /arm none.

    with asyncio.Runner() as runner:
        repl = ChatRepl(runner, service, Console(), Console(stderr=True), seed=None, live=True)
        repl.run(Transcript(), lines=())

Ctrl-C stops an answer; at the prompt it clears the line, and twice it leaves, as Ctrl-D does.
"""

import asyncio
import sys
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from personatlas.persona.errors import UserError
from personatlas.steering.arm_kinds import arm_words
from personatlas.steering.serve.answer_stream import EngineFailure
from personatlas.steering.serve.distress_notice import shows_distress
from personatlas.steering.serve.engine.arm_slots import NONE
from personatlas.steering.serve.options import ADAPTIVE
from personatlas.steering.serve.service import ContextOverflow, PersonaService
from personatlas.steering.serve.terminal.chat_file import load_chat, save_chat
from personatlas.steering.serve.terminal.render import SURROGATE, ChatRenderer, clean
from personatlas.steering.serve.terminal.session import ArmSetting, ChatAnswer, ChatSession, Show, Transcript

PROMPT = "> "
COMMANDS = {  # what follows each, and what it does
    "arm": ("NAME|none|adaptive", "what acts from now on (also /cap); alone, which there are"),
    "system": ("TEXT", "begin anew under this system prompt; alone, show it"),
    "trace": ("", "all answers and where they lie"),
    "tokens": ("", "the last answer's tokens, coloured by projection"),
    "compare": ("", "the last message answered with and without the arm"),
    "retry": ("", "another answer to the last message"),
    "undo": ("", "take back the last exchange, /retry, /load or /reset"),
    "reset": ("", "a new conversation with the same system prompt"),
    "save": ("FILE", "as JSON, with projections; /save! writes over a file"),
    "load": ("FILE", "go on with a stored conversation"),
    "help": ("", "this list; to say something that begins with /, write //"),
    "quit": ("", "leave (also Ctrl-D)"),
}


class AnswerCancelled(Exception):
    """Ctrl-C came before an answer had begun."""


class ChatRepl:
    """A chat with a service's model, which runs in `runner`'s loop.

    Answers go to `out`, remarks to `err`. `live`: somebody is at the terminal. `n_failed`: lines that failed.
    """

    def __init__(
        self,
        runner: asyncio.Runner,
        service: PersonaService,
        out: Console,
        err: Console,
        *,
        seed: int | None = None,
        live: bool,
    ) -> None:
        self.runner, self.service, self.err, self.live = runner, service, err, live
        self.session = ChatSession(service, seed)
        self.renderer = ChatRenderer(out, service.tracker)
        self.n_failed = 0
        self._notice_shown = False

    def run(self, transcript: Transcript, lines: Sequence[str]) -> None:
        """Continues a conversation with these lines, or with those that are typed or piped in."""
        self._greet()
        self.session.transcript = Transcript(transcript.system)
        if transcript.exchanges:
            self._load(transcript)
        for line in lines or (self._typed_lines() if self.live else _piped_lines()):
            if not self.live:
                self.renderer.line(PROMPT + line)
            if not self._handle(line):
                break

    def _handle(self, line: str) -> bool:
        """Does what a line says; False when it is time to leave."""
        try:
            if SURROGATE.search(line):
                raise UserError("this line is not valid UTF-8")
            if line.startswith("/") and not line.startswith("//"):
                return self._command(line)
            text = line.removeprefix("/")
            if shows_distress(text):
                self._notice()
            self._answer(lambda show: self.session.say(text, show))
        except ContextOverflow:
            self._fail(
                f"no room: the context is {self.service.limits.context} tokens; this needs more: "
                "/undo takes an exchange back, /reset begins anew, /save FILE keeps the conversation"
            )
        except UserError as error:
            self._fail(str(error))
        except EngineFailure as error:
            self._fail(f"the engine failed: {error}")
        except (AnswerCancelled, KeyboardInterrupt):
            self.renderer.line("stopped; there was no answer yet, and the message is taken back", "yellow")
            return self.live
        return True

    def _fail(self, message: str) -> None:
        self.n_failed += 1
        self.renderer.line(message, "yellow")

    def _answer(self, ask: Callable[[Show], Coroutine[Any, Any, ChatAnswer]]) -> None:
        answer = self.runner.run(ask(self.renderer.piece))
        self.renderer.line("")
        if not answer.text and answer.ended == "you":
            raise AnswerCancelled
        self.renderer.summary(answer)

    def _command(self, line: str) -> bool:
        """Does a command; False for /quit. Raises `UserError` for what cannot be done."""
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        if name in ("quit", "exit", "q"):
            return False
        known = {"save!": "save", "cap": "arm"}.get(name, name)
        if known not in COMMANDS:
            raise UserError(f"there is no command /{name[:40]}; /help lists them")
        takes = COMMANDS[known][0]
        if argument and not takes:
            raise UserError(f"/{name} takes nothing after it")
        if takes == "FILE" and not argument:
            raise UserError(f"/{known} FILE: a file's name is needed")
        session, renderer = self.session, self.renderer
        match name:
            case "arm" | "cap":
                self._arm(argument)
            case "system" if argument:
                session.change(Transcript(argument))
                renderer.line("a new conversation begins under this system prompt (/undo comes back)")
            case "system":
                injected = self.service.chat.injected
                none = "no system prompt" if not injected else f"none given; the template's own: {injected}"
                renderer.line(session.transcript.system or none)
            case "trace":
                renderer.table(session.transcript)
            case "tokens":
                if not session.transcript.answers:
                    raise UserError("there is no answer yet")
                renderer.tokens(session.transcript.answers[-1])
            case "compare":
                self._compare()
            case "retry":
                self._answer(session.retry)
            case "undo":
                session.undo()
                left = len(session.transcript.exchanges)
                renderer.line(f"taken back; {left} exchange{'' if left == 1 else 's'} in the conversation")
            case "reset":
                session.change(Transcript(session.transcript.system))
                renderer.line("a new conversation (/undo comes back)")
            case "save" | "save!":
                path = Path(argument).expanduser()
                save_chat(path, session, overwrite=name == "save!")
                renderer.line(f"saved: {path}")
            case "load":
                self._load(load_chat(Path(argument).expanduser()))
            case "help":
                rows = [(clean(f"/{command} {takes}"), does) for command, (takes, does) in COMMANDS.items()]
                renderer.rows([[Text(left, "bold"), Text(right)] for left, right in rows])
        return True

    def _arm(self, name: str) -> None:
        if name:
            self.session.set_arm(name)
        self.renderer.line(self._arm_words())
        if not name:
            arms = [f"{arm} (layers {own['layers']})" for arm, own in self.service.arms.describe().items()]
            self.renderer.line("arms: " + ("; ".join(arms) or "none is loaded"))

    def _arm_words(self) -> str:
        arm, mode = self.session.setting
        if arm == NONE:
            return "no arm"
        return arm_words(arm) + (", while the conversation drifts" if mode == ADAPTIVE else "")

    def _compare(self) -> None:
        """Shows the baseline's answer as it comes; the arm's, which comes at the same time, after it."""
        settings = [ArmSetting(NONE), ArmSetting(self.session.other_arm())]
        self.renderer.line("baseline", "bold")
        baseline, steered = self.runner.run(
            self.session.compare(settings, [self.renderer.piece, lambda _: None])
        )
        self.renderer.line("")
        self.renderer.summary(baseline)
        self.renderer.line(arm_words(settings[1].arm), "bold")
        self.renderer.line(steered.text)
        self.renderer.summary(steered)
        self.renderer.line(
            "the same seed for both; the conversation goes on from the answer that it had", "dim"
        )

    def _load(self, transcript: Transcript) -> None:
        self.runner.run(self.session.load(transcript))
        self.renderer.table(self.session.transcript)
        self.renderer.line("its answers as this model reads them, at baseline", "dim")
        if transcript.exchanges[-1].answer is None:
            self.renderer.line("its last message has no answer: /retry asks for one")
        if any(shows_distress(exchange.user or "") for exchange in transcript.exchanges):
            self._notice()

    def _notice(self) -> None:
        if not self._notice_shown:  # once is enough
            self._notice_shown = True
            self.renderer.notice()

    def _remark(self, text: str) -> None:
        self.err.print(Text(clean(text)), soft_wrap=True)

    def _greet(self) -> None:
        axis, model = self.service.axis, self.service.model
        kind = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}"
        text = f"{self.service.name} ({kind}); "
        if axis is None:
            text += str(self.service.no_axis)
        else:
            text += f"layer {axis.layer}, {axis.poles[0]} +, {axis.poles[1]} -; {self._arm_words()}"
        if axis is not None and not self.service.has_alarm:
            text += "; no alarm is calibrated (`personatlas drift` makes a reference.json)"
        self._remark(text)
        self._remark(
            "A research tool: it shows a model's internal state. It is no adviser, and answers can be wrong."
        )
        if self.live:
            self._remark("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")

    def _typed_lines(self) -> Iterator[str]:
        _enable_line_editing(COMMANDS)
        interrupted = False
        while True:
            try:
                line = input(PROMPT).strip()
            except EOFError:
                self.renderer.line("")
                return
            except KeyboardInterrupt:
                self.renderer.line("")
                if interrupted:
                    return
                interrupted = True
                self._remark("Ctrl-C again, or Ctrl-D, leaves")
                continue
            interrupted = False
            if line:
                yield line


def _piped_lines() -> Iterator[str]:
    """The lines of an input that is no terminal."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    yield from (line.strip() for line in sys.stdin if line.strip())


def _enable_line_editing(commands: Collection[str]) -> None:
    """Line editing, a history of this chat, and Tab for commands, where there is a readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        matches = [f"/{name}" for name in commands if f"/{name}".startswith(text)]
        return matches[state] if text.startswith("/") and state < len(matches) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
