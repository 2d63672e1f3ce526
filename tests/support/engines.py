"""A serving engine on the tiny model: what to ask, a listener, and the answer that a row would get alone."""

import threading

from personatlas.persona.sampling.sampler import Prompt, Sampler, Sampling
from personatlas.steering.hooks.steering import steer
from personatlas.steering.serve.engine.batch import TokenEvent
from personatlas.steering.serve.engine.scheduler import FinishEvent

ENDS = frozenset(range(0, 320, 12))
PROMPTS = [tuple((7 * i + 3 * j + 1) % 320 for j in range(2 + 5 * i)) for i in range(7)]
LONG = tuple((5 * i + 2) % 320 for i in range(90))


class Listener:
    """Keeps what an engine posts, and waits until tickets have ended."""

    def __init__(self):
        self.events, self._lock = {}, threading.Condition()

    def __call__(self, events):
        with self._lock:
            for ticket, event in events:
                self.events.setdefault(ticket, []).append(event)
            self._lock.notify_all()

    def ended(self, tickets, seconds=60.0):
        done = lambda: all(isinstance(self.events.get(one, [None])[-1], FinishEvent) for one in tickets)  # noqa: E731
        with self._lock:
            assert self._lock.wait_for(done, seconds), "the engine is stuck"
        return [self.events[one][-1] for one in tickets]

    def first(self, ticket, kind, seconds=30.0):
        found = lambda: [event for event in self.events.get(ticket, []) if isinstance(event, kind)]  # noqa: E731
        with self._lock:
            assert self._lock.wait_for(lambda: bool(found()), seconds), f"no {kind.__name__} came"
        return found()[0]

    def answer(self, ticket):
        drawn = [event.token for event in self.events[ticket] if isinstance(event, TokenEvent)]
        return tuple(drawn[:-1] if self.events[ticket][-1].reason == "end" else drawn)


def alone(engine, ids, arm=None, seed=0, max_tokens=10, temperature=0.7, top_p=0.9):
    sampler = Sampler(engine.model, engine.end_ids, Sampling(max_tokens, temperature, top_p))
    plan = [arm.interventions] if arm is not None else []
    if not plan:
        return next(iter(sampler.answers([Prompt(ids, seed, -1)])))
    with steer(engine.model, *plan) as steering:
        return next(iter(sampler.answers([Prompt(ids, seed, 0)], steering.callback)))
