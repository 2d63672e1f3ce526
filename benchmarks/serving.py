"""What serving costs: measuring and capping against neither in one engine, many conversations against one at a time.

    python benchmarks/serving.py                    # first token and tokens a second of each arm; 32 at once against one
    python benchmarks/serving.py --endure 2000      # requests with 1% cancelled: memory, slots, plans afterwards

The bare arm is the same engine without a hook on the model. Arms take turns within one run; medians and their ratios
are printed.
"""

import argparse
import json
import resource
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from personatlas.steering.arms import Arm
from personatlas.steering.serve.engine.batch import TokenEvent
from personatlas.steering.serve.engine.scheduler import (
    Engine,
    EngineEvent,
    EngineLimits,
    FinishEvent,
    GenerationRequest,
    RequestHandle,
)
from personatlas.steering.session import SteeredModel, load_steered_model

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


class Recorder:
    """A listener that notes when each request's first token came, and waits for the last one's end."""

    def __init__(self) -> None:
        self.first: dict[RequestHandle, float] = {}
        self.n_tokens = 0
        self.n_open = 0
        self.errors: list[BaseException] = []
        self.done = threading.Event()

    def expect(self, n_requests: int) -> None:
        """Begins anew."""
        self.done.clear()
        self.first.clear()
        self.n_tokens, self.n_open = 0, n_requests

    def __call__(self, events: Sequence[tuple[RequestHandle, EngineEvent]]) -> None:
        now = time.perf_counter()
        for handle, event in events:
            if isinstance(event, TokenEvent):
                self.first.setdefault(handle, now)
                self.n_tokens += 1
            elif isinstance(event, FinishEvent):
                if event.error is not None:
                    self.errors.append(event.error)
                self.n_open -= 1
                if self.n_open == 0:
                    self.done.set()


class Bench:
    """A steered model, and engines on it."""

    def __init__(self, steered: SteeredModel, cap_name: str) -> None:
        self.steered, self.cap_name = steered, cap_name
        messages = [[{"role": "user", "content": text}] for text in QUESTIONS]
        self.prompts = [tuple(steered.chat.prompt_ids(own)) for own in messages]

    def engine(self, limits: EngineLimits, *, bare: bool = False) -> tuple[Engine, Recorder]:
        """A started engine. `bare`: without a hook on the model, so that its projections mean nothing."""
        recorder = Recorder()
        arms = [Arm(name, tuple(plan)) for name, plan in self.steered.steered_arms.items()]
        engine = Engine(self.steered.model, frozenset(), self.steered.axis, arms, limits, recorder)
        if bare:
            engine.projection_hook.on = nullcontext
            engine.arms.steering.hooks.attached = nullcontext
            engine.batch._prompt_projections = lambda lengths: [[0.0] * length for length in lengths]
        engine.start()
        return engine, recorder

    def request(self, number: int, max_tokens: int, arm: Arm | None = None) -> GenerationRequest:
        """Request number `number`."""
        ids = self.prompts[number % len(self.prompts)]
        return GenerationRequest(ids, number, temperature=0.7, top_p=0.9, max_tokens=max_tokens, arm=arm)


def run(engine: Engine, recorder: Recorder, requests: list[GenerationRequest]) -> tuple[float, float]:
    """Median seconds to the first token, and tokens a second after it."""
    recorder.expect(len(requests))
    engine.prefixes.clear()
    start = time.perf_counter()
    handles = [engine.submit(request) for request in requests]
    recorder.done.wait()
    end = time.perf_counter()
    assert not recorder.errors, recorder.errors
    first = sorted(recorder.first[handle] - start for handle in handles)
    return statistics.median(first), (recorder.n_tokens - len(requests)) / (end - start - first[0])


def compare_arms(bench: Bench, rows: int, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """bare, watched and capped in turns, each with an engine of its own: only one may have hooks on the model."""
    results: dict[str, list[tuple[float, float]]] = {"bare": [], "watched": [], "capped": []}
    for repeat in range(repeats + 1):
        for arm, own in results.items():
            limits = EngineLimits(slots=max(rows, 1), context=512, prefix_bytes=0)
            engine, recorder = bench.engine(limits, bare=arm == "bare")
            cap = engine.arms.resolve(bench.cap_name) if arm == "capped" else None
            requests = [bench.request(n, tokens, cap) for n in range(rows)]
            if engine.model.device.type == "cuda":  # captures the graphs
                run(engine, recorder, requests)
            result = run(engine, recorder, requests)
            engine.close()
            if repeat:  # the first turn warms up
                own.append(result)
    return {
        arm: {
            "first": statistics.median(first for first, _ in own),
            "rate": statistics.median(rate for _, rate in own),
        }
        for arm, own in results.items()
    }


def compare_concurrency(bench: Bench, rows: int, tokens: int) -> dict[str, float]:
    """Tokens a second of all rows at once against one at a time."""
    engine, recorder = bench.engine(EngineLimits(slots=rows, context=512))
    requests = [bench.request(n, tokens) for n in range(rows)]
    run(engine, recorder, requests)
    start = time.perf_counter()
    run(engine, recorder, requests)
    at_once = rows * tokens / (time.perf_counter() - start)
    few = requests[: max(2, rows // 8)]
    start = time.perf_counter()
    for request in few:
        run(engine, recorder, [request])
    one_by_one = len(few) * tokens / (time.perf_counter() - start)
    engine.close()
    return {"at once": at_once, "one by one": one_by_one, "ratio": at_once / one_by_one}


def endure(bench: Bench, n_requests: int) -> dict[str, object]:
    """Many short requests, 1% of them cancelled; memory at ten moments."""
    engine, recorder = bench.engine(EngineLimits(slots=32, context=256, prefix_bytes=64 * 2**20))
    caps = [None, engine.arms.resolve(bench.cap_name)]
    memory, start = [], time.perf_counter()
    for part in range(10):
        recorder.expect(n_requests // 10)
        for n in range(n_requests // 10):
            number = part * n_requests // 10 + n
            handle = engine.submit(bench.request(number, 2 + number % 5, caps[number % 2]))
            if number % 100 == 0:
                threading.Timer(0.01 * (number % 7), handle.cancel).start()
        recorder.done.wait()
        memory.append(resident_mib())
    result = {
        "requests": n_requests,
        "seconds": time.perf_counter() - start,
        "errors": len(recorder.errors),
        "running": engine.running,
        "queued": engine.queued,
        "plans in use": engine.arms.rows_in_use,
        "MiB": memory,
    }
    engine.close()
    return result


def resident_mib() -> float:
    """This process's resident memory."""
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
    options = parser.parse_args()
    steered = load_steered_model(options.model, options.axis, [f"cap:{options.cap}"])
    bench = Bench(steered, options.cap)
    if options.endure:
        print(json.dumps(endure(bench, options.endure)))
        return
    for rows in options.rows:
        results = compare_arms(bench, rows, options.tokens, options.repeats)
        for arm, own in results.items():
            first, rate = own["first"] / results["bare"]["first"], own["rate"] / results["bare"]["rate"]
            print(f"{rows:4d} rows  {arm:8s} first token {1e3 * own['first']:8.1f} ms (x{first:.3f})  {own['rate']:9.1f} tokens/s (x{rate:.3f})")  # fmt: skip
    ratios = compare_concurrency(bench, 32, options.tokens)
    print({name: round(value, 2) for name, value in ratios.items()})


if __name__ == "__main__":
    main()
