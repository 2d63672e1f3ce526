"""Where a conversation stands along the axis: the `persona` object of every answer.

    standing = Standing(axis, chat, monitor)
    turns = standing.turns(messages, spans, projections)       # (message, tokens, projection) of the answers in a prompt
    standing.drifting(turns)                                   # whether the alarm is on after them
    standing.told(choice, turns, ...)                          # all of it, as it is sent

The answers in a prompt are read on the way to the new one, and what a capped request reads is read with the cap on: its turns are
how the model stands while it is held. In adaptive mode they are how the model reads the conversation by itself, since the alarm
that decides whether to hold it must not be calmed by the holding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from personatlas.analysis.drift_alarm import alarm_states
from personatlas.persona.axis import Axis
from personatlas.persona.models.token_spans import Span
from personatlas.steering.drift_monitor import DriftMonitor
from personatlas.steering.serve.answer_stream import StreamedAnswer


class AnswerTurn(NamedTuple):
    """An answer of a conversation: its message's number, its tokens, and their mean projection (residual units)."""

    message: int
    tokens: int
    projection: float


@dataclass(frozen=True)
class PersonaTracker:
    """The axis and how conversations along it are watched."""

    axis: Axis
    monitor: DriftMonitor

    def turns(self, spans: Sequence[Span], projections: Sequence[float]) -> list[AnswerTurn]:
        """The answers that a prompt holds, from the projections of its tokens."""
        found = []
        for span in spans:
            own = projections[span.start : span.stop]
            if span.speaker == "assistant" and len(own) == span.stop - span.start:
                found.append(AnswerTurn(span.message, len(own), sum(own) / len(own)))
        return found

    def drifting(self, turns: Sequence[AnswerTurn]) -> bool:
        """Whether the alarm is on after these turns; never without a calibrated rule."""
        if self.monitor.rule is None:
            return False
        states = alarm_states(self.monitor.rule, self.monitor.reference, [turn.projection for turn in turns])
        return bool(states) and states[-1].alarm

    def told(
        self, choice: StreamedAnswer, turns: Sequence[AnswerTurn], message: int | None, mode: str, held: bool
    ) -> dict[str, Any]:
        """The `persona` object of an answer that is message number `message` (None: no conversation). `held`: adaptive, and the
        cap acts: the alarm stays as it was decided, since this answer has not been read without the cap."""
        cap, projection = choice.ticket.ask.cap, choice.projection
        listed = list(turns)
        if message is not None and projection is not None:
            listed.append(AnswerTurn(message, len(choice.seen), projection))
        shown = self.watched(listed)
        if held and shown and shown[-1]["alarm"] is False:
            shown[-1] |= {"alarm": True, "raised": False}
        last = shown[-1] if shown else {}
        return {
            "layer": self.axis.layer,
            "poles": list(self.axis.poles),
            "projection": projection,
            "z": None if projection is None else self.monitor.reference.z(projection),
            "tokens": len(choice.ids),
            "cap": None if cap is None else cap.name,
            "mode": mode,
            "floor": None if cap is None else cap.floor_at(self.axis.layer),
            "fired": choice.fired,
            "turns": shown,
            "drift": self._drift(last),
            "baseline": self.describe()["baseline"],
        }

    def describe(self) -> dict[str, Any]:
        """Reference distribution and alarm as plain numbers."""
        return self.monitor.describe()

    def watched(self, turns: Sequence[AnswerTurn]) -> list[dict[str, Any]]:
        """Turns with their z and, where a rule is calibrated, the alarm's state."""
        rule, reference = self.monitor.rule, self.monitor.reference
        places = [turn.projection for turn in turns]
        states = alarm_states(rule, reference, places) if rule is not None else [None] * len(places)
        return [
            turn._asdict()
            | {"z": reference.z(turn.projection)}
            | (
                {"alarm": None, "raised": None}
                if state is None
                else {"alarm": state.alarm, "raised": state.raised}
            )
            for turn, state in zip(turns, states, strict=True)
        ]

    def _drift(self, last: dict[str, Any]) -> dict[str, Any]:
        alarm = self.describe()["alarm"]
        if alarm is None:
            return {"state": None, "raised": None, "rule": None, "limit": None, "false_alarms": None}
        state = "drifting" if last.get("alarm") else "calm"
        told = {name: alarm[name] for name in ("rule", "limit", "false_alarms")}
        return {"state": state, "raised": bool(last.get("raised")), **told}
