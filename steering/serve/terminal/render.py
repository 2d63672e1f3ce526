"""What a terminal chat writes. Everything that a model, a user or a file wrote goes through `clean` first.

renderer = ChatRenderer(Console(), service.tracker)
renderer.piece("Hello")                    # text as it comes
renderer.summary(answer)                   # one line: where the answer lies on -3 to +3, and what the arm did
"""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from personatlas.analysis.drift_alarm import CALM_BAND, GAUGE_LIMIT, z_gauge
from personatlas.persona.errors import UserError
from personatlas.steering.arm_kinds import arm_words
from personatlas.steering.serve.distress_notice import distress_phrases
from personatlas.steering.serve.persona_state import PersonaTracker
from personatlas.steering.serve.terminal.session import ChatAnswer, Transcript

# control characters but tab and newline, marks of writing direction, line separators
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069]")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no terminal can be sent
GREY, TOWARDS, AWAY = (138, 138, 138), (60, 140, 210), (220, 120, 30)  # readable on dark and on light
NARROW = 16  # characters of a gauge in a table
ENDINGS = {"you": "stopped", "length": "cut"}


def clean(text: str) -> str:
    """The text without what a terminal would obey."""
    return SURROGATE.sub("\ufffd", CONTROL.sub("", text))


class ChatRenderer:
    """Writes for people: colours on a terminal, the same words without them elsewhere.

    Without a `tracker` nothing is measured, and nothing said of it.
    """

    def __init__(self, out: Console, tracker: PersonaTracker | None) -> None:
        self.out, self.tracker = out, tracker

    def line(self, text: str, style: str = "") -> None:
        """Writes a line of the program's own, maybe with names of others in it."""
        self.out.print(Text(clean(text), style=style), soft_wrap=True)

    def piece(self, text: str) -> None:
        """Writes a part of an answer as it comes."""
        self.out.out(clean(text), end="", highlight=False)
        self.out.file.flush()

    def notice(self) -> None:
        """Writes who can help a person in distress."""
        self.line("")
        self.line(distress_phrases().title, "bold")
        for paragraph in distress_phrases().text:
            self.out.print(Text(paragraph))
        self.line("")

    def summary(self, answer: ChatAnswer) -> None:
        """Writes the line under an answer."""
        persona, ending = answer.persona, Text(ENDINGS.get(answer.ended or "", ""), "dim")
        if self.tracker is None:
            text = ending
        elif persona is None or persona.z is None:
            text = _join(Text("nothing to project: no token of the answer was read", "dim"), ending)
        else:
            text = _join(
                Text(z_gauge(persona.z), _colour(persona.z)),
                Text(f"z {persona.z:+.1f}  projection {persona.projection:.1f}", "dim"),
                Text(clean(_arm_words(answer)), "dim"),
                self._alarm(answer),
                ending,
            )
        if text.plain:
            self.out.print(text, soft_wrap=True)

    def table(self, transcript: Transcript) -> None:
        """Writes all exchanges, one row each."""
        if not transcript.exchanges:
            self.line("nothing was said yet")
            return
        if self.tracker is None:
            for number, (user, answer) in enumerate(transcript.exchanges, 1):
                text = " ".join(answer.text.split()) if answer is not None else "(no answer)"
                self.line(f"{number}  {user or '(the model began)'}  {text}")
            return
        gauge_title = f"-{GAUGE_LIMIT:g} to +{GAUGE_LIMIT:g}"
        rows = [[Text(title, "dim") for title in ("", "you", "projection", "z", gauge_title, "arm", "")]]
        for number, (user, answer) in enumerate(transcript.exchanges, 1):
            message = clean(" ".join((user or "(the model began)").split()))
            rows.append([Text(str(number)), Text(message), *self._cells(answer)])
        self.rows(rows, right=(2, 3), flexible=1)

    def rows(self, rows: Sequence[Sequence[Text]], right: Sequence[int] = (), flexible: int = -1) -> None:
        """Writes aligned columns; the column `flexible` is cut where they are wider than the console."""
        widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
        excess = sum(widths) + 2 * (len(widths) - 1) - self.out.width
        if flexible >= 0 and excess > 0:
            widths[flexible] = max(widths[flexible] - excess, 4)
        for row in rows:
            for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
                cell.truncate(width, overflow="ellipsis")
                cell.align("right" if column in right else "left", width)
            line = Text("  ").join(row)
            line.rstrip()
            self.out.print(line, soft_wrap=True)

    def tokens(self, answer: ChatAnswer) -> None:
        """Writes an answer's tokens, coloured by projection, underlined where the arm changed them."""
        if self.tracker is None:
            raise UserError(
                "no axis is loaded, so tokens have no projections: `personatlas axis MODEL` makes one"
            )
        tokens = (answer.persona.per_token if answer.persona is not None else None) or ()
        reference, turn = (
            self.tracker.monitor.reference,
            len(answer.persona.turns) - 1 if answer.persona else None,
        )
        positive, negative = self.tracker.axis.poles
        if not any(token.projection is not None for token in tokens):
            self.line("the projections of this answer's tokens are not known (it was loaded, or empty)")
        elif self.out.is_terminal:
            text = Text()
            for token in tokens:
                style = "dim" if token.projection is None else _colour(reference.z(token.projection, turn))
                text.append(clean(token.text), style + (" underline" if token.fired else ""))
            self.out.print(text)
            scale = Text.assemble(
                Text(f"-{GAUGE_LIMIT:g} {negative}", _colour(-GAUGE_LIMIT)),
                " … ",
                Text(f"{positive} +{GAUGE_LIMIT:g}", _colour(GAUGE_LIMIT)),
                Text(f" (z at layer {self.tracker.axis.layer}); underlined: changed by the arm", "dim"),
            )
            self.out.print(scale)
            if tokens[-1].projection is None:
                self.line(
                    "the last token has no projection: the answer ended there, and it was never read", "dim"
                )
        else:
            self.line("projection\tz\tlayers changed\ttoken")
            for token in tokens:
                value = token.projection
                numbers = "\t" if value is None else f"{value:.2f}\t{reference.z(value, turn):+.2f}"
                self.line(f"{numbers}\t{token.fired}\t{clean(token.text)!r}")

    def _alarm(self, answer: ChatAnswer) -> Text:
        """The alarm after an answer, and where a calm one stands: "below the calm band, 6.1 of 8.3"."""
        turn = answer.persona.turn if answer.persona is not None else None
        rule = None if self.tracker is None else self.tracker.monitor.rule
        if turn is None or turn.alarm is None or rule is None:
            return Text("")
        if turn.raised:
            return Text(" DRIFT BEGINS ", "bold reverse yellow")
        if turn.alarm:
            return Text("drifting", "bold yellow")
        stands = "" if turn.statistic is None else f", {turn.statistic:.1f} of {rule.limit:.1f}"
        is_below = turn.z < -CALM_BAND
        return Text(
            f"{'below the calm band' if is_below else 'calm'}{stands}", "yellow" if is_below else "green"
        )

    def _cells(self, answer: ChatAnswer | None) -> list[Text]:
        """Projection, z, gauge, arm and alarm of a table's row."""
        if answer is None:
            return [Text("") for _ in range(4)] + [Text("no answer", "dim")]
        persona = answer.persona
        name = answer.arm or ("" if answer.ended is None else "none")  # that of a loaded answer is not known
        fired = "" if persona is None or persona.fired is None else f" {persona.fired:.0%}"
        arm = Text(clean(name) + fired)
        if persona is None or persona.z is None:
            return [Text(""), Text(""), Text(""), arm, Text("not read", "dim")]
        return [
            Text(f"{persona.projection:.1f}"),
            Text(f"{persona.z:+.1f}"),
            Text(z_gauge(persona.z, NARROW), _colour(persona.z)),
            arm,
            _join(self._alarm(answer), Text(ENDINGS.get(answer.ended or "", ""), "dim")),
        ]


def _arm_words(answer: ChatAnswer) -> str:
    """What the arm did, in words."""
    persona = answer.persona
    if answer.arm is None or persona is None:
        return "no arm" if answer.ended is not None else "read at baseline"
    if persona.arm is None:
        return f"{arm_words(answer.arm)} rested"
    floor = "" if persona.floor is None else f", floor {persona.floor:.1f}"
    fired = "acts on prompts alone" if persona.fired is None else f"fired {persona.fired:.0%}"
    return f"{arm_words(answer.arm)} {fired}{floor}"


def _join(*parts: Text) -> Text:
    """With two blanks between the parts that are not empty."""
    return Text("  ").join(part for part in parts if part.plain)


def _colour(z: float) -> str:
    """From grey at the baseline's mean to a colour for each pole at z = 3."""
    share, pole = min(abs(z) / GAUGE_LIMIT, 1.0), TOWARDS if z > 0 else AWAY
    red, green, blue = (round(grey + (end - grey) * share) for grey, end in zip(GREY, pole, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"
