"""What can be said to a terminal chat besides messages: `/cap none`, `/trace`, ... One function a command.

commands = Commands(chat, shown, ask)
commands.obey("/cap none")                 # False: it is time to leave. Raises `UserError` for what cannot be done
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from personatlas.persona.errors import UserError
from personatlas.steering.serve.distress_notice import shows_distress
from personatlas.steering.serve.engine.cap_slots import NONE
from personatlas.steering.serve.service import ADAPTIVE
from personatlas.steering.serve.terminal.chat_file import load_told, save_chat
from personatlas.steering.serve.terminal.render import ChatRenderer, clean
from personatlas.steering.serve.terminal.session import CapSetting, ChatSession, Transcript

PLAIN = "as it is"


class ReplActions(NamedTuple):
    """What the terminal does for a command: answer anew, compare, read a conversation, show the notice once."""

    again: Callable[[], None]
    compare: Callable[[list[CapSetting]], None]
    load: Callable[[Transcript], None]
    notice: Callable[[], None]


class ChatCommands:
    """The commands by name: what follows them, what they do, in words and in fact."""

    def __init__(self, chat: ChatSession, shown: ChatRenderer, asking: ReplActions) -> None:
        self.chat, self.shown, self.asking = chat, shown, asking
        self.known: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "cap": ("NAME|none|adaptive", "the cap from now on; alone, which there are", self._cap),
            "system": ("TEXT", "begin anew under this system prompt; alone, show it", self._system),
            "trace": ("", "all answers and where they lie", self._trace),
            "tokens": ("", "the last answer's tokens, coloured by projection", self._tokens),
            "compare": ("", "the last message answered with and without the cap", self._compare),
            "retry": ("", "another answer to the last message", self._retry),
            "undo": ("", "take back the last exchange, /retry, /load or /reset", self._undo),
            "reset": ("", "a new conversation with the same system prompt", self._reset),
            "save": ("FILE", "as JSON, with projections; /save! writes over a file", self._save),
            "save!": ("FILE", "", self._save_over),
            "load": ("FILE", "go on with a stored conversation", self._load),
            "help": ("", "this list; to say something that begins with /, write //", self._help),
        }  # fmt: skip

    def obey(self, line: str) -> bool:
        """Do what a line beginning with / says; False for /quit."""
        name, _, rest = line[1:].strip().partition(" ")
        if name in ("quit", "exit", "q"):
            return False
        if name not in self.known:
            raise UserError(f"there is no command /{name[:40]}; /help lists them")
        takes, _, act = self.known[name]
        if rest.strip() and not takes:
            raise UserError(f"/{name} takes nothing after it")
        act(rest.strip())
        return True

    def _cap(self, name: str) -> None:
        if name:
            self.chat.choose(name)
        self.shown.line(self.holding())
        if not name:
            caps = self.chat.host.engine.plans.describe()
            self.shown.line(
                "caps: "
                + (
                    "; ".join(f"{one} (layers {told['layers']})" for one, told in caps.items())
                    or "none is loaded"
                )
            )

    def holding(self) -> str:
        """Which cap is on, in words."""
        cap, mode = self.chat.arm
        if cap == NONE:
            return "no cap"
        return f"cap {cap}" + (", while the conversation drifts" if mode == ADAPTIVE else "")

    def _system(self, text: str) -> None:
        if text:
            self.chat.change(Transcript(text))
            self.shown.line("a new conversation begins under this system prompt (/undo comes back)")
        else:
            self.shown.line(self.chat.told.system or "no system prompt")

    def _trace(self, _: str) -> None:
        self.shown.table(self.chat.told)

    def _tokens(self, _: str) -> None:
        if not self.chat.told.answers:
            raise UserError("there is no answer yet")
        self.shown.tokens(self.chat.told.answers[-1])

    def _compare(self, _: str) -> None:
        self.asking.compare([CapSetting(NONE), CapSetting(self.chat.other_cap())])

    def _retry(self, _: str) -> None:
        self.asking.again()

    def _undo(self, _: str) -> None:
        self.chat.undo()
        left = len(self.chat.told.exchanges)
        self.shown.line(f"taken back; {left} exchange{'' if left == 1 else 's'} in the conversation")

    def _reset(self, _: str) -> None:
        self.chat.change(Transcript(self.chat.told.system))
        self.shown.line("a new conversation (/undo comes back)")

    def _save(self, name: str, *, over: bool = False) -> None:
        if not name:
            raise UserError("/save FILE: a file's name is needed")
        path = Path(name).expanduser()
        save_chat(path, self.chat, over=over)
        self.shown.line(f"saved: {path}")

    def _save_over(self, name: str) -> None:
        self._save(name, over=True)

    def _load(self, name: str) -> None:
        if not name:
            raise UserError("/load FILE: a file's name is needed")
        self.asking.load(load_told(Path(name).expanduser()))
        self.tell_loaded()

    def tell_loaded(self) -> None:
        """Show a conversation that was loaded."""
        told = self.chat.told
        self.shown.table(told)
        self.shown.line("its answers as this model reads them, without a cap", "dim")
        if told.exchanges[-1].answer is None:
            self.shown.line("its last message has no answer: /retry asks for one")
        if any(shows_distress(one.user or "") for one in told.exchanges):
            self.asking.notice()

    def _help(self, _: str) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, (takes, does, _act) in [*self.known.items(), ("quit", ("", "leave (also Ctrl-D)", None))]:
            if does:
                table.add_row(Text(clean(f"/{name} {takes}"), "bold"), Text(does))
        self.shown.out.print(table)
