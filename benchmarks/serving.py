"""What serving costs: monitoring and capping against neither in the same engine, many conversations against one at a time.

    python benchmarks/serving.py                    # first token, tokens a second: bare, watched, capped; then 32 at once against one
    python benchmarks/serving.py --endure 2000      # requests through the engine with 1% given up: memory, slots, plans

The bare arm is the same engine without a hook on the model. Arms take turns within one run; medians and their ratios are printed.
"""

import argparse
import json
import resource
import statistics
import threading
import time
from contextlib import nullcontext
from pathlib import Path

from personatlas.persona.options import ModelOptions
from personatlas.steering.serve.engine.batch import TokenEvent
from personatlas.steering.serve.engine.scheduler import Engine, EngineLimits, FinishEvent, GenerationRequest
from personatlas.steering.session import load_steered_model

QUESTIONS = [
    "How do I read a file line by line?",
    "Write me the opening of a story about a lighthouse.",
    "I have been feeling low since I moved here. What should I do?",
    "Do you think that you are conscious?",
    "Plan a weekend in a small town by the sea.",
    "Why is the sky blue, and why is it red in the evening?",
    "My sister and I are not speaking. How do I begin?",
    "What makes a good teacher?",
]


class Clock:
    """When each ticket's first token and its end came."""

    def __init__(self) -> None:
        self.first: dict[object, float] = {}
        self.steps = 0
        self.left = 0
        self.errors: list[BaseException] = []
        self.done = threading.EngineEvent()

    def __call__(self, told) -> None:
        now = time.perf_counter()
        for ticket, event in told:
            if isinstance(event, TokenEvent):
                self.first.setdefault(ticket, now)
                self.steps += 1
            elif isinstance(event, FinishEvent):
                if event.error is not None:
                    self.errors.append(event.error)
                self.left -= 1
                if self.left == 0:
                    self.done.set()


def blind(engine: Engine) -> Engine:
    """The same engine without a hook on the model; what it then tells of projections means nothing."""
    engine.watching.on = nullcontext
    engine.rows._read_projections = lambda lengths: [[0.0] * length for length in lengths]
    engine.plans.steering.on = nullcontext
    return engine


def ran(engine: Engine, clock: Clock, asks: list[GenerationRequest]) -> tuple[float, float]:
    """Median seconds to the first token, and tokens a second after it."""
    clock.done.clear()
    clock.first.clear()
    clock.steps, clock.left = 0, len(asks)
    engine.prefixes.clear()
    began = time.perf_counter()
    tickets = [engine.submit(ask) for ask in asks]
    clock.done.wait()
    ended = time.perf_counter()
    assert not clock.errors, clock.errors
    firsts = sorted(clock.first[ticket] - began for ticket in tickets)
    first = statistics.median(firsts)
    return first, (clock.steps - len(asks)) / (ended - began - firsts[0])


def opened(held, caps, room, *, bare=False) -> tuple[Engine, Clock]:
    clock = Clock()
    engine = Engine(held.model, frozenset(), held.axis, caps, room, clock)
    if bare:
        blind(engine)
    return engine, clock


def compare(held, caps, name: str, rows: int, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """bare, watched and capped in turns: hooks of only one engine are on the model at a time, so each turn starts its own."""
    found: dict[str, list[tuple[float, float]]] = {"bare": [], "watched": [], "capped": []}
    for repeat in range(repeats + 1):
        for arm, own in found.items():
            engine, clock = opened(
                held, caps, EngineLimits(slots=max(rows, 1), length=512, prefixes=0), bare=arm == "bare"
            )
            engine.start()
            cap = engine.plans.wanted(name) if arm == "capped" else None
            asks = [
                GenerationRequest(held.prompt(n), seed=n, temperature=0.7, top_p=0.9, limit=tokens, cap=cap)
                for n in range(rows)
            ]
            ran(
                engine, clock, asks[:1] if rows == 1 else asks
            ) if held.model.device.type == "cuda" else None  # capture
            result = ran(engine, clock, asks)
            engine.close()
            if repeat:  # the first turn warms up
                own.append(result)
    return {
        arm: {
            "first": statistics.median(one[0] for one in own),
            "rate": statistics.median(one[1] for one in own),
        }
        for arm, own in found.items()
    }


def together(held, caps, rows: int, tokens: int) -> dict[str, float]:
    """All rows at once against one at a time, streaming tokens a second."""
    engine, clock = opened(held, caps, EngineLimits(slots=rows, length=512))
    engine.start()
    asks = [
        GenerationRequest(held.prompt(n), seed=n, temperature=0.7, top_p=0.9, limit=tokens)
        for n in range(rows)
    ]
    ran(engine, clock, asks)
    began = time.perf_counter()
    ran(engine, clock, asks)
    all_at_once = rows * tokens / (time.perf_counter() - began)
    few = asks[: max(2, rows // 8)]
    began = time.perf_counter()
    for ask in few:
        ran(engine, clock, [ask])
    one_by_one = len(few) * tokens / (time.perf_counter() - began)
    engine.close()
    return {"at once": all_at_once, "one by one": one_by_one, "ratio": all_at_once / one_by_one}


def endure(held, caps, requests: int) -> dict[str, object]:
    """Many short requests, 1% of them given up; memory at ten moments."""
    engine, clock = opened(held, caps, EngineLimits(slots=32, length=256, prefixes=64 * 2**20))
    engine.start()
    wanted = [None, *(engine.plans.wanted(name) for name in caps)]
    memory, began = [], time.perf_counter()
    for part in range(10):
        clock.done.clear()
        clock.left = requests // 10
        clock.first.clear()
        for n in range(requests // 10):
            number = part * requests // 10 + n
            cap = wanted[number % len(wanted)]
            ask = GenerationRequest(
                held.prompt(number), seed=number, temperature=0.7, top_p=0.9, limit=2 + number % 5, cap=cap
            )
            ticket = engine.submit(ask)
            if number % 100 == 0:
                threading.Timer(0.01 * (number % 7), ticket.cancel).start()
        clock.done.wait()
        memory.append(_resident())
    told = {
        "requests": requests,
        "seconds": time.perf_counter() - began,
        "errors": len(clock.errors),
        "running": engine.running,
        "queued": engine.queued,
        "plans in use": sum(engine.plans._used.values()),
        "MiB": memory,
    }
    engine.close()
    return told


def _resident() -> float:
    """This process's resident memory, MiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return round(int(line.split()[1]) / 1024, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--axis", default="smollm2-135m")
    parser.add_argument("--cap", default="assistant")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--endure", type=int, default=0)
    given = parser.parse_args()
    held = load_steered_model(given.model, ModelOptions(), given.axis, [given.cap])
    ids = [tuple(held.chat.prompt_ids([{"role": "user", "content": text}])) for text in QUESTIONS]
    held.prompt = lambda n: ids[n % len(ids)]
    caps = {given.cap: held.caps[0]}
    if given.endure:
        print(json.dumps(endure(held, caps, given.endure)))
        return
    for rows in given.rows:
        found = compare(held, caps, given.cap, rows, given.tokens, given.repeats)
        for arm, own in found.items():
            first, rate = own["first"] / found["bare"]["first"], own["rate"] / found["bare"]["rate"]
            print(f"{rows:4d} rows  {arm:8s} first token {1e3 * own['first']:8.1f} ms (x{first:.3f})  {own['rate']:9.1f} tokens/s (x{rate:.3f})")  # fmt: skip
    print({name: round(value, 2) for name, value in together(held, caps, 32, given.tokens).items()})


if __name__ == "__main__":
    main()
