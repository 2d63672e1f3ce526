"""What a terminal chat prints. Everything that a model, a user or a file wrote goes through `clean` first.

shown = Shown(console(), monitor.reference, layer=21)
shown.piece("Hello")                       # text as it comes
shown.standing(answer)                     # one line: where it lies on -3 to +3, and what the cap did
"""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from personatlas.analysis.drift_alarm import ReferenceDistribution
from personatlas.cli.drift import WIDE, gauge
from personatlas.steering.serve.distress_notice import phrases
from personatlas.steering.serve.terminal.session import ChatAnswer, Transcript

# control characters but tab and newline (a terminal obeys them), marks that turn the direction of writing, line separators
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069]")
HALF = re.compile("[\ud800-\udfff]")  # half a character, which no terminal can be sent
GREY, TOWARDS, AWAY = (138, 138, 138), (60, 140, 210), (220, 120, 30)  # readable on dark and on light
NARROW = 16  # characters of a gauge in a table
ENDINGS = {"you": "stopped", "length": "cut"}


def clean(text: str) -> str:
    """The text without what a terminal would obey: with no escape character, no sequence is left but its letters."""
    return HALF.sub("\ufffd", CONTROL.sub("", text))


class ChatRenderer:
    """Prints for people: colours on a terminal, the same words without them elsewhere."""

    def __init__(
        self, out: Console, baseline: ReferenceDistribution, layer: int, poles: Sequence[str]
    ) -> None:
        self.out, self.baseline, self.layer, self.poles = out, baseline, layer, poles

    def line(self, text: str, style: str = "") -> None:
        """A line of our own words, maybe with others' names in it."""
        self.out.print(Text(clean(text), style=style), soft_wrap=True)

    def piece(self, text: str) -> None:
        """Some of an answer, as it comes."""
        self.out.out(clean(text), end="", highlight=False)
        self.out.file.flush()

    def notice(self) -> None:
        """Who can help a person in distress."""
        self.line("")
        self.line(phrases().title, "bold")
        for paragraph in phrases().text:
            self.out.print(Text(paragraph))
        self.line("")

    def standing(self, answer: ChatAnswer) -> None:
        """One line under an answer."""
        self.out.print(self._place(answer), soft_wrap=True)

    def table(self, told: Transcript) -> None:
        """All exchanges, one row each."""
        if not told.exchanges:
            self.line("nothing was said yet")
            return
        table = Table(box=None, header_style="dim", pad_edge=False)
        for title in ("", "you", "projection", "z", f"-{WIDE:g} to +{WIDE:g}", "cap", ""):
            table.add_column(title, justify="right" if title in ("projection", "z") else "left", no_wrap=True)
        for number, (user, answer) in enumerate(told.exchanges, 1):
            asked = clean(" ".join((user or "(the model began)").split()))
            table.add_row(str(number), Text(asked, overflow="ellipsis"), *_cells(answer))
        self.out.print(table)

    def tokens(self, answer: ChatAnswer) -> None:
        """An answer's tokens, coloured by their projections, underlined where the cap changed them."""
        if not any(token["projection"] is not None for token in answer.tokens):
            self.line("the projections of this answer's tokens are not known (it was loaded, or empty)")
        elif self.out.is_terminal:
            self.out.print(Text.assemble(*(self._coloured(token) for token in answer.tokens)))
            low, high = (
                Text(f"-{WIDE:g} {self.poles[1]}", _colour(-WIDE)),
                Text(f"{self.poles[0]} +{WIDE:g}", _colour(WIDE)),
            )
            scale = Text.assemble(
                low, " … ", high, Text(f" (z at layer {self.layer}); underlined: changed by the cap", "dim")
            )
            self.out.print(scale)
        else:
            self.line("projection\tz\tlayers changed\ttoken")
            for token in answer.tokens:
                value = token["projection"]
                place = "\t" if value is None else f"{value:.2f}\t{self.baseline.z(value):+.2f}"
                self.line(f"{place}\t{token['fired']}\t{clean(token['text'])!r}")

    def _place(self, answer: ChatAnswer) -> Text:
        ending = Text(ENDINGS.get(answer.ended or "", ""), "dim")
        if answer.z is None or answer.projection is None:
            return _joined(Text("nothing to project: no token of the answer was read", "dim"), ending)
        place = Text(f"z {answer.z:+.1f}  projection {answer.projection:.1f}", "dim")
        return _joined(
            Text(gauge(answer.z), _colour(answer.z)),
            place,
            Text(clean(_acted(answer)), "dim"),
            _state(answer),
            ending,
        )

    def _coloured(self, token: dict) -> Text:
        value = token["projection"]
        style = "dim" if value is None else _colour(self.baseline.z(value))
        return Text(clean(token["text"]), style + (" underline" if token["fired"] else ""))


def _acted(answer: ChatAnswer) -> str:
    """What the cap did, in words."""
    if answer.cap is None:
        return "no cap" if answer.ended is not None else "read as it is"
    if not answer.acted:
        return f"cap {answer.cap} rested"
    floor = "" if answer.floor is None else f", floor {answer.floor:.1f}"
    fired = "acts on prompts alone" if answer.fired is None else f"fired {answer.fired:.0%}"
    return f"cap {answer.cap} {fired}{floor}"


def _state(answer: ChatAnswer) -> Text:
    if answer.alarm is None:
        return Text("")
    if answer.raised:
        return Text(" DRIFT BEGINS ", "bold reverse yellow")
    return Text("drifting", "bold yellow") if answer.alarm else Text("calm", "green")


def _cells(answer: ChatAnswer | None) -> list[Text]:
    """Projection, z, gauge, cap and state, for a table."""
    if answer is None:
        return [Text("")] * 4 + [Text("no answer", "dim")]
    name = answer.cap or ("" if answer.ended is None else "none")  # loaded: it is not known
    cap = Text(clean(name) + ("" if answer.fired is None else f" {answer.fired:.0%}"))
    if answer.z is None or answer.projection is None:
        return [Text(""), Text(""), Text(""), cap, Text("not read", "dim")]
    place = [
        Text(f"{answer.projection:.1f}"),
        Text(f"{answer.z:+.1f}"),
        Text(gauge(answer.z, NARROW), _colour(answer.z)),
    ]
    return [*place, cap, _joined(_state(answer), Text(ENDINGS.get(answer.ended or "", ""), "dim"))]


def _joined(*parts: Text) -> Text:
    """With two blanks between those that say something."""
    return Text("  ").join(part for part in parts if part.plain)


def _colour(z: float) -> str:
    """From grey at the baseline's mean to a colour a pole at z = 3."""
    share, pole = min(abs(z) / WIDE, 1.0), TOWARDS if z > 0 else AWAY
    red, green, blue = (round(grey + (end - grey) * share) for grey, end in zip(GREY, pole, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"
