"""Traces stored conversations along an axis, with z and the alarm of every turn.

    study = run_trace("smollm2-135m", "smollm2-135m", Path("chats.jsonl"))
    [turn.z for turn in study.conversations[0].turns]

The page has conversations with their turns and tokens coloured, and their trajectories with alarms.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from personatlas.analysis.html.page import write_page
from personatlas.persona.axis import Axis, load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Conversation, Exclusions, read_conversations
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import progress
from personatlas.persona.records import Count, JsonObject, JsonRecord
from personatlas.persona.runs import resolve_axis
from personatlas.steering.drift.page import MAX_CONVERSATIONS, conversation_figure, shade
from personatlas.steering.drift_monitor import (
    DriftMonitor,
    ReferenceConversation,
    ReferenceConversations,
    is_reference_file,
    load_monitor,
)
from personatlas.steering.session import load_steered_model
from personatlas.steering.traces import Trace, colour_range, shade_token, trace_conversations


@dataclass(frozen=True)
class TracedTurn(JsonRecord):
    """An answer: index of its message, tokens [start, stop), mean projection, z; the alarm's state where
    there is a rule.
    """

    message: Count
    tokens: tuple[Count, Count]
    projection: float
    z: float
    alarm: bool | None = None
    raised: bool | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("alarm", "raised")


@dataclass(frozen=True)
class TracedConversation(JsonRecord):
    """A conversation's answers, its token ids, and their projections; `left_out` answers are beyond the
    context.
    """

    name: str
    turns: tuple[TracedTurn, ...]
    left_out: Count
    ids: tuple[Count, ...]
    projection: tuple[float, ...]


@dataclass(frozen=True)
class TraceStudy:
    """Traced conversations, as stored and as read, and the axis and monitor that they were measured with."""

    axis: Axis
    monitor: DriftMonitor
    stored: tuple[Conversation, ...]
    traces: tuple[Trace, ...]
    conversations: tuple[TracedConversation, ...]

    def to_json(self) -> JsonObject:
        """What `personatlas trace --json` prints."""
        rows = [conversation.to_json() for conversation in self.conversations]
        origin = {"layer": self.axis.layer, "model": self.axis.model}
        return {**origin, **self.monitor.describe(), "conversations": rows}


def run_trace(
    model: str,
    axis: str,
    conversations: Path,
    *,
    reference: Path | None = None,
    rule: str = "cusum",
    false_alarms: float = 0.05,
    load: ModelOptions = ModelOptions(),
    force: bool = False,
) -> TraceStudy:
    """Traces the conversations of a file.

    The alarm is calibrated on `reference`, a reference.json or stored conversations that do not drift, else
    on the reference.json beside the axis. Raises `UserError` for what cannot be, before a model is loaded
    where possible."""
    if not 0 < false_alarms < 1:
        raise UserError(f"--false-alarms {false_alarms} is outside 0..1: it is a share of conversations")
    stored = read_conversations(conversations)
    is_stored = reference is not None and not is_reference_file(reference)
    quiet = read_conversations(reference) if reference is not None and is_stored else []
    if is_stored:
        rows = tuple(ReferenceConversation(one.name, one.domain, ()) for one in quiet)
        ReferenceConversations(rows, {}).require_enough(false_alarms)
    else:
        monitor = load_monitor(load_axis(resolve_axis(axis)), reference, rule, false_alarms)
    steered, left_out = load_steered_model(model, axis, [], load, force=force), Exclusions()
    with progress("reading", len(stored) + len(quiet)) as advance:
        traces = trace_conversations(steered.model, steered.axis, stored, advance, left_out)
        if not traces:
            raise UserError(f"{conversations} has nothing to trace: {'; '.join(left_out.lines())}")
        if is_stored:
            domains = {one.name: one.domain for one in quiet}
            rows = tuple(
                ReferenceConversation(
                    read.name, domains[read.name], tuple(turn.projection for turn in read.turns)
                )
                for read in trace_conversations(steered.model, steered.axis, quiet, advance, left_out)
            )
            provenance = {"how": "stored conversations, read again"}
            monitor = ReferenceConversations(rows, provenance).monitor(rule, false_alarms)
    left_out.say(str(conversations))
    by_name, traced = {one.name: one for one in stored}, []
    for trace in traces:
        alarm, turns = monitor.start(), []
        for number, turn in enumerate(trace.turns):
            state = None if alarm is None else alarm.update(turn.projection)
            flags = (None, None) if state is None else (state.alarm, state.raised)
            z = monitor.reference.z(turn.projection, number)
            turns.append(TracedTurn(turn.message, (turn.start, turn.stop), turn.projection, z, *flags))
        projection = tuple(trace.projection.tolist())
        traced.append(TracedConversation(trace.name, tuple(turns), trace.left_out, trace.ids, projection))
    return TraceStudy(
        steered.axis, monitor, tuple(by_name[trace.name] for trace in traces), traces, tuple(traced)
    )


def write_trace_page(path: Path, study: TraceStudy) -> None:
    """Writes the page of traced conversations.

    Colours run from the lowest to the highest projection of the answers' tokens on the page, 2% at either end
    cut off."""
    shown = list(zip(study.conversations, study.traces, study.stored, strict=True))[:MAX_CONVERSATIONS]
    low, high = colour_range(trace for _, trace, _ in shown)
    described = study.monitor.describe()
    figures = {
        f"turns-{number}": conversation_figure(
            {"answers": [(n, turn.projection, bool(turn.raised)) for n, turn in enumerate(row.turns, 1)]},
            described["baseline"],
        )
        for number, (row, *_) in enumerate(shown)
    }
    content = {
        "c": {"layer": study.axis.layer, "model": study.axis.model, **described},
        "n": len(study.conversations),
        "poles": study.axis.poles,
        "low": low,
        "high": high,
        "conversations": [_conversation(*one, low, high) for one in shown],
        "more": len(study.conversations) - len(shown),
    }
    write_page(path, Path(__file__).parent / "trace.html.jinja", content, figures, {})


def _conversation(
    row: TracedConversation, trace: Trace, stored: Conversation, low: float, high: float
) -> JsonObject:
    """Its messages in order: what users said, and answers with their tokens."""
    turns = {turn.message: turn for turn in row.turns}
    messages: list[JsonObject] = []
    for index, message in enumerate(stored.messages):
        turn = turns.get(index)
        if turn is None:
            messages.append({"speaker": message["role"], "text": message["content"]})
            continue
        tokens = [shade_token(trace, i, low, high) for i in range(*turn.tokens)]
        cell = turn.to_json() | {"acted": False} | shade(turn.z)
        messages.append({"speaker": "assistant", "cell": cell, "tokens": tokens})
    return {"name": row.name, "domain": stored.domain, "messages": messages, "left_out": row.left_out}
