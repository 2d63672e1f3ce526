"""The `persona` object of every answer: place on the axis, what the arm did, whether the persona drifts.

    tracker = PersonaTracker(axis, monitor)
    turns = tracker.turns(spans, projections)               # the answers in a prompt
    tracker.drifting(turns)                                 # whether the alarm is on after them
    tracker.measure(answer, turns, message=3).to_json()     # the object as it is sent

To add a field: declare it in `PersonaState`, which is the schema, and compute it in `PersonaTracker.measure`
below. Responses, streams and the terminal chat pass the object on whole; the page keeps it if
`PERSONA_FIELDS` in static/persona.js says how to read it.

The answers in a prompt are measured while the prompt is read. In a steered request they are read in its arm
on, so they say where the model is while it is capped. In adaptive mode they are read without it, because the
alarm that decides whether to cap must not be calmed by the cap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

from personatlas.analysis.drift_alarm import alarm_states
from personatlas.persona.axis import Axis
from personatlas.persona.models.token_spans import Span
from personatlas.persona.records import JsonRecord
from personatlas.steering.drift_monitor import DriftMonitor
from personatlas.steering.serve.answer_stream import StreamedAnswer, TokenState
from personatlas.steering.serve.options import ADAPTIVE, ALWAYS, ArmMode


class AnswerTurn(NamedTuple):
    """An answer of a conversation: index of its message, tokens, mean projection (residual units)."""

    message: int
    tokens: int
    projection: float


@dataclass(frozen=True)
class TurnState(JsonRecord):
    """An answer with its z, and whether the alarm is on after it and raised by it (None: no alarm).

    `statistic` is the alarm rule's after it, None without a rule and while the alarm is on.
    """

    message: int
    tokens: int
    projection: float
    z: float
    alarm: bool | None
    raised: bool | None
    statistic: float | None = None


@dataclass(frozen=True)
class DriftState(JsonRecord):
    """The alarm after an answer and its calibration; all None where none is calibrated.

    A `statistic` above `limit` raises the alarm; it is None while an earlier answer's alarm is on.
    """

    state: Literal["calm", "drifting"] | None = None
    raised: bool | None = None
    rule: str | None = None
    statistic: float | None = None
    limit: float | None = None
    false_alarms: float | None = None


@dataclass(frozen=True)
class BaselineState(JsonRecord):
    """What z = (projection - mean) / spread is relative to, and what it was measured on.

    `by_turn` holds the means at each answer of a conversation, used instead of `mean`; the last one for later
    answers, and `mean` where it is empty.
    """

    mean: float
    spread: float
    of: str
    by_turn: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PersonaState(JsonRecord):
    """The `persona` object of an answer. Projections are before the arm's step, in residual units."""

    layer: int
    poles: tuple[str, ...]
    projection: float | None
    "mean over the answer's tokens, None where none was fed"
    z: float | None
    tokens: int
    arm: str | None = None
    "the arm that acted, None at baseline and while an adaptive one rests"
    cap: str | None = None
    "its name where it is a cap"
    mode: ArmMode = ALWAYS
    floor: float | None = None
    "the floor of the arm's cap for answers at `layer`, None where none acts there"
    fired: float | None = None
    "share of the answer's tokens times steered layers that the arm changed"
    turns: tuple[TurnState, ...]
    "all answers of the conversation, this one last"
    drift: DriftState | None = None
    "None for an answer that this server did not write"
    baseline: BaselineState
    per_token: tuple[TokenState, ...] | None = None
    "the answer's tokens, where a request asks for them"
    max_tokens: int | None = None
    "the longest answer that fitted, where a request asked for a longer one"

    omit_none: ClassVar[tuple[str, ...]] = ("per_token", "max_tokens")

    @property
    def turn(self) -> TurnState | None:
        """The last answer of the conversation."""
        return self.turns[-1] if self.turns else None


@dataclass(frozen=True)
class PersonaTracker:
    """Measures conversations along an axis: z and, where one is calibrated, a drift alarm."""

    axis: Axis
    monitor: DriftMonitor

    @property
    def baseline(self) -> BaselineState:
        """What z is relative to."""
        reference = self.monitor.reference
        return BaselineState(reference.mean, reference.std, self.monitor.population, reference.by_turn)

    def turns(self, spans: Sequence[Span], projections: Sequence[float]) -> list[AnswerTurn]:
        """The answers in a prompt that were read whole, from the projections of its tokens."""
        turns = []
        for span in spans:
            values = projections[span.start : span.stop]
            if span.speaker == "assistant" and len(values) == span.stop - span.start:
                turns.append(AnswerTurn(span.message, len(values), sum(values) / len(values)))
        return turns

    def drifting(self, turns: Sequence[AnswerTurn]) -> bool:
        """Whether the alarm is on after these turns; False where none is calibrated."""
        states = self.watch(turns)
        return bool(states and states[-1].alarm)

    def watch(self, turns: Sequence[AnswerTurn]) -> list[TurnState]:
        """The state after each turn."""
        rule, reference = self.monitor.rule, self.monitor.reference
        if rule is None:
            return [
                TurnState(*turn, reference.z(turn.projection, number), None, None)
                for number, turn in enumerate(turns)
            ]
        states = alarm_states(rule, reference, [turn.projection for turn in turns])
        return [
            TurnState(*turn, state.z, state.alarm, state.raised, state.statistic)
            for turn, state in zip(turns, states, strict=True)
        ]

    def measure(
        self,
        answer: StreamedAnswer,
        turns: Sequence[AnswerTurn] = (),
        message: int | None = None,
        mode: ArmMode = ALWAYS,
        *,
        per_token: bool = False,
    ) -> PersonaState:
        """The persona object of an answer after `turns`, which is message number `message` if any.

        While an adaptive arm acts the alarm stays on: its answer has not been read without it.
        """
        arm, projection = answer.handle.request.arm, answer.projection
        if message is not None and projection is not None:
            turns = [*turns, AnswerTurn(message, len(answer.measured), projection)]
        states = self.watch(turns)
        if mode == ADAPTIVE and arm is not None and states and states[-1].alarm is False:
            states[-1] = replace(states[-1], alarm=True, raised=False, statistic=None)
        monitor, drift = self.monitor, DriftState()
        if monitor.rule is not None and monitor.false_alarms is not None:
            last = states[-1] if states else None
            state: Literal["calm", "drifting"] = "drifting" if last and last.alarm else "calm"
            drift = DriftState(
                state,
                raised=bool(last and last.raised),
                rule=monitor.rule_name,
                statistic=last.statistic if last else 0.0,
                limit=monitor.rule.limit,
                false_alarms=monitor.false_alarms.share,
            )
        return PersonaState(
            layer=self.axis.layer,
            poles=tuple(self.axis.poles),
            projection=projection,
            z=None if projection is None else monitor.reference.z(projection, max(len(turns) - 1, 0)),
            tokens=len(answer.ids),
            arm=None if arm is None else arm.name,
            cap=arm.name if arm is not None and arm.caps else None,
            mode=mode,
            floor=None if arm is None else arm.floor_at(self.axis.layer),
            fired=answer.fired,
            turns=tuple(states),
            drift=drift,
            baseline=self.baseline,
            per_token=answer.tokens() if per_token else None,
        )

    def measure_loaded(self, states: Sequence[TurnState]) -> PersonaState:
        """The persona object of the last of these turns, which this server did not write."""
        axis, last = self.axis, states[-1]
        return PersonaState(
            layer=axis.layer,
            poles=tuple(axis.poles),
            projection=last.projection,
            z=last.z,
            tokens=last.tokens,
            turns=tuple(states),
            baseline=self.baseline,
        )
