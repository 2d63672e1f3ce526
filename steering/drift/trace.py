"""Traces stored conversations along an axis, with z and the alarm of every turn.

    study = run_trace("smollm2-135m", "smollm2-135m", Path("chats.jsonl"))
    [turn.z for turn in study.conversations[0].turns]

The page ranks all conversations, and shows the first ones with their turns and tokens coloured and their
trajectories with alarms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.stats import linregress

from personatlas.analysis.drift_alarm import CALM_BAND
from personatlas.analysis.html.canvas import axis_style, empty_figure
from personatlas.analysis.html.page import write_page
from personatlas.persona.axis import Axis, load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Conversation, Exclusions, read_conversations
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import progress
from personatlas.persona.records import Count, JsonObject, JsonRecord
from personatlas.persona.runs import resolve_axis
from personatlas.steering.drift.page import LEGEND, MAX_CONVERSATIONS, conversation_figure, shade
from personatlas.steering.drift_monitor import (
    DriftMonitor,
    ReferenceConversation,
    ReferenceConversations,
    is_reference_file,
    load_monitor,
)
from personatlas.steering.session import load_steered_model
from personatlas.steering.traces import Trace, colour_range, shade_token, trace_conversations

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_RANKED = 100  # rows of the page's ranking


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

    `lowest_z` is the lowest of its answers', `first_alarm` the answer (from 1) that first raises the alarm,
    `slope` the least-squares slope of its answers' projections (residual units per turn; None for one
    answer).
    """

    name: str
    turns: tuple[TracedTurn, ...]
    lowest_z: float
    first_alarm: int | None
    slope: float | None
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

    @property
    def ranked(self) -> list[int]:
        """Indices of the conversations: those with an alarm first, then by their lowest z."""
        rows = self.conversations
        return sorted(range(len(rows)), key=lambda i: (rows[i].first_alarm is None, rows[i].lowest_z))

    @property
    def finding(self) -> str:
        """What the traces say, in a sentence or two."""
        rows = self.conversations
        worst, n = rows[self.ranked[0]], len(rows)
        lowest = min(rows, key=lambda row: row.lowest_z)
        answer = 1 + min(range(len(lowest.turns)), key=lambda i: lowest.turns[i].z)
        reach = f"z {lowest.lowest_z:+.1f} at answer {answer}".replace("-", "−")
        if n == 1:
            alarm = (
                "raises no alarm"
                if worst.first_alarm is None
                else f"raises the alarm at answer {worst.first_alarm}"
            )
            if self.monitor.rule is None:
                return f"Its lowest answer lies at {reach}. No alarm is calibrated."
            return f"This conversation {alarm}; its lowest answer lies at {reach}."
        ends = f"The lowest answer lies at {reach} of “{lowest.name}”."
        if self.monitor.rule is None:
            below = sum(row.lowest_z < -CALM_BAND for row in rows)
            fall = f"{below:,} of {n:,} conversations fall below z −{CALM_BAND:g}"
            return f"{fall}. {ends} No alarm is calibrated."
        raised = sum(row.first_alarm is not None for row in rows)
        counted = self.monitor.false_alarms
        chance = "" if counted is None else f"; of conversations that do not drift {counted.share:.0%} do"
        return f"{raised:,} of {n:,} conversations raise the alarm{chance}. {ends}"

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
        traced.append(
            TracedConversation(
                trace.name,
                tuple(turns),
                lowest_z=min(turn.z for turn in turns),
                first_alarm=next((number for number, turn in enumerate(turns, 1) if turn.raised), None),
                # least squares over the answers' numbers
                slope=float(linregress(range(len(turns)), [turn.projection for turn in turns]).slope)
                if len(turns) > 1
                else None,
                left_out=trace.left_out,
                ids=trace.ids,
                projection=tuple(trace.projection.tolist()),
            )
        )
    return TraceStudy(
        steered.axis, monitor, tuple(by_name[trace.name] for trace in traces), traces, tuple(traced)
    )


def write_trace_page(path: Path, study: TraceStudy) -> None:
    """Writes the page of traced conversations.

    Colours run from the lowest to the highest projection of the answers' tokens on the page, 2% at either end
    cut off."""
    rows, ranked = study.conversations, study.ranked
    shown = [(rows[i], study.traces[i], study.stored[i]) for i in ranked[:MAX_CONVERSATIONS]]
    low, high = colour_range(trace for _, trace, _ in shown)
    described = study.monitor.describe()
    figures = {
        f"turns-{number}": conversation_figure(
            {"answers": [(n, turn.projection, bool(turn.raised)) for n, turn in enumerate(row.turns, 1)]},
            described["baseline"],
        )
        for number, (row, *_) in enumerate(shown)
    }
    for figure in figures.values():  # the page has one key for all of them
        figure.update_layout(showlegend=False, margin={"t": 16})
    if len(rows) > 1:
        figures["lowest"] = _lowest_figure(rows)
    content = {
        "c": {"layer": study.axis.layer, "model": study.axis.model, **described},
        "n": len(rows),
        "finding": study.finding,
        "ranking": [
            {"name": rows[i].name, "domain": study.stored[i].domain, "turns": len(rows[i].turns)}
            | {"lowest_z": rows[i].lowest_z, "first_alarm": rows[i].first_alarm, "slope": rows[i].slope}
            for i in ranked[:MAX_RANKED]
        ],
        "poles": study.axis.poles,
        "low": low,
        "high": high,
        "conversations": [_conversation(*one, low, high) for one in shown],
        "more": len(rows) - len(shown),
    }
    filters = {"signed": lambda value: f"{value:+.1f}".replace("-", "−")}
    write_page(path, Path(__file__).parent / "trace.html.jinja", content, figures, filters)


def _lowest_figure(rows: Sequence[TracedConversation]) -> "go.Figure":
    """How many conversations have their lowest z where, with and without an alarm."""
    lowest = np.array([row.lowest_z for row in rows])
    alarmed = np.array([row.first_alarm is not None for row in rows])
    edges = np.histogram_bin_edges(lowest, bins=min(40, max(8, len(rows) // 4)))
    figure = empty_figure(margin={"l": 60, "r": 16, "t": 30, "b": 48}, showlegend=bool(alarmed.any()))
    figure.update_layout(barmode="stack", bargap=0.06, legend=LEGEND)
    for name, chosen, colour in (("no alarm", ~alarmed, "--middle"), ("alarm", alarmed, "--others")):
        counts, _ = np.histogram(lowest[chosen], edges)
        figure.add_bar(
            x=((edges[:-1] + edges[1:]) / 2).tolist(),
            y=counts.tolist(),
            name=name,
            marker={"color": f"var({colour})", "line": {"width": 0}},
            hovertemplate=f"%{{y}} with {name}, lowest z near %{{x:.1f}}<extra></extra>",
        )
    figure.update_xaxes(title_text="lowest z of a conversation", **axis_style())
    figure.update_yaxes(title_text="conversations", rangemode="tozero", **axis_style())
    return figure


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
