"""What a server counts, for Prometheus. Names begin with `personatlas_`; labels are caps that are loaded, never what a request says."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from personatlas.steering.serve.answer_stream import StreamedAnswer

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
Z = (-6, -5, -4, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3)
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
OWN = "described"  # the label of all caps that requests describe themselves


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        told: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "personatlas_requests", "Requests by route and status.", ["route", "status"], **told
        )
        self.tokens = Counter(
            "personatlas_tokens", "Tokens: read, kept from earlier turns, written.", ["kind"], **told
        )
        self.projection = Histogram(
            "personatlas_projection_z",
            "Mean projection of an answer on the axis, in standard deviations of the baseline.",
            ["cap"], buckets=Z, **told,
        )  # fmt: skip
        self.fired = Histogram(
            "personatlas_fired_fraction",
            "Share of an answer's tokens times layers that its cap changed.",
            ["cap"], buckets=SHARES, **told,
        )  # fmt: skip
        self.alarms = Counter("personatlas_drift_alarms", "Drift alarms that were raised.", ["cap"], **told)
        self.drifting = Counter(
            "personatlas_drifting_answers", "Answers after which the alarm was on.", ["cap"], **told
        )
        self.first = Histogram(
            "personatlas_first_token_seconds", "From a request to its first token.", buckets=SECONDS, **told
        )
        self.whole = Histogram(
            "personatlas_answer_seconds", "From a request to its last token.", buckets=SECONDS, **told
        )
        self.running = Gauge("personatlas_running", "Rows that decode now.", **told)
        self.queued = Gauge("personatlas_queue", "Requests that wait for a row.", **told)
        self.cancelled = Counter(
            "personatlas_cancelled", "Answers that were given up by their clients.", **told
        )
        Gauge("personatlas_model_info", "What is served.", ["model"], **told).labels(model).set(1)

    def answered(self, choice: StreamedAnswer, persona: dict[str, Any], named: set[str]) -> None:
        """An answer is whole."""
        cap = persona["cap"] or "none"
        label = cap if cap in named or cap == "none" else OWN
        kept = choice.read.kept if choice.read is not None else 0
        self.tokens.labels("kept").inc(kept)
        self.tokens.labels("read").inc(len(choice.ticket.ask.ids) - kept)
        self.tokens.labels("written").inc(len(choice.ids))
        if persona["z"] is not None:
            self.projection.labels(label).observe(persona["z"])
        if persona["fired"] is not None:
            self.fired.labels(label).observe(persona["fired"])
        if persona["drift"]["raised"]:
            self.alarms.labels(label).inc()
        if persona["drift"]["state"] == "drifting":
            self.drifting.labels(label).inc()

    def text(self, running: int, queued: int) -> bytes:
        """All of it in Prometheus's text format."""
        self.running.set(running)
        self.queued.set(queued)
        return generate_latest(self.registry)


class RequestTimer:
    """The times of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.began, self.spoke = metrics, time.perf_counter(), False

    def token(self) -> None:
        """A token came."""
        if not self.spoke:
            self.spoke = True
            self.metrics.first.observe(time.perf_counter() - self.began)

    def end(self) -> None:
        """The last one came."""
        self.metrics.whole.observe(time.perf_counter() - self.began)
