"""Prometheus metrics of a server. Labels are loaded arms, never text of a request."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from personatlas.steering.serve.answer_stream import StreamedAnswer
from personatlas.steering.serve.persona_state import PersonaState

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
Z = (-6, -5, -4, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3)
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
DESCRIBED = "described"  # the label of all arms that requests describe


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "personatlas_requests", "Requests by route and status.", ["route", "status"], **more
        )
        self.tokens = Counter(
            "personatlas_tokens", "Tokens: read, kept from earlier turns, written.", ["kind"], **more
        )
        self.projection = Histogram(
            "personatlas_projection_z",
            "Mean projection of an answer on the axis, in standard deviations of the baseline.",
            ["cap"], buckets=Z, **more,
        )  # fmt: skip
        self.fired = Histogram(
            "personatlas_fired_fraction",
            "Share of an answer's tokens times layers that its arm changed.",
            ["cap"], buckets=SHARES, **more,
        )  # fmt: skip
        self.alarms = Counter("personatlas_drift_alarms", "Drift alarms that were raised.", ["cap"], **more)
        self.drifting = Counter(
            "personatlas_drifting_answers", "Answers after which the alarm was on.", ["cap"], **more
        )
        self.first_token = Histogram(
            "personatlas_first_token_seconds", "From a request to its first token.", buckets=SECONDS, **more
        )
        self.last_token = Histogram(
            "personatlas_answer_seconds", "From a request to its last token.", buckets=SECONDS, **more
        )
        self.running = Gauge("personatlas_running", "Rows that decode now.", **more)
        self.queued = Gauge("personatlas_queue", "Requests that wait for a row.", **more)
        self.cancelled = Counter(
            "personatlas_cancelled", "Answers that were given up by their clients.", **more
        )
        Gauge("personatlas_model_info", "What is served.", ["model"], **more).labels(model).set(1)

    def count_answer(self, answer: StreamedAnswer, persona: PersonaState | None, named: set[str]) -> None:
        """Counts an answer that has ended."""
        cached = answer.prefill.cached if answer.prefill is not None else 0
        self.tokens.labels("kept").inc(cached)
        self.tokens.labels("read").inc(len(answer.handle.request.ids) - cached)
        self.tokens.labels("written").inc(len(answer.ids))
        if persona is None:
            return
        arm = persona.arm or "none"
        label = arm if arm in named or arm == "none" else DESCRIBED
        if persona.z is not None:
            self.projection.labels(label).observe(persona.z)
        if persona.fired is not None:
            self.fired.labels(label).observe(persona.fired)
        if persona.drift is not None and persona.drift.raised:
            self.alarms.labels(label).inc()
        if persona.drift is not None and persona.drift.state == "drifting":
            self.drifting.labels(label).inc()

    def to_text(self, running: int, queued: int) -> bytes:
        """All metrics in Prometheus's text format."""
        self.running.set(running)
        self.queued.set(queued)
        return generate_latest(self.registry)


class RequestTimer:
    """The times of one request's first and last token."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.start, self.has_begun = metrics, time.perf_counter(), False

    def note_token(self) -> None:
        """Notes that a token came."""
        if not self.has_begun:
            self.has_begun = True
            self.metrics.first_token.observe(time.perf_counter() - self.start)

    def end(self) -> None:
        """Notes that the last token came."""
        self.metrics.last_token.observe(time.perf_counter() - self.start)
