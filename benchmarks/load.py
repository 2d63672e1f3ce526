"""Streaming chats against a server that is up: throughput at several numbers at once, what is dropped, what is left behind.

    personatlas serve smollm2-135m --axis smollm2-135m &
    python benchmarks/load.py --at-once 1 32 --requests 32 --tokens 48          # throughput at 32 against one at a time
    python benchmarks/load.py --at-once 32 --requests 10000 --tokens 4 --leave 0.01 --pid $!     # memory and slots over many requests

A request that is left is a connection closed after its first token. Half of the requests are capped where the server has a cap.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path

import httpx

TOPICS = [
    "the sea",
    "a loaf of bread",
    "prime numbers",
    "trains",
    "the moon",
    "a cough",
    "old maps",
    "taxes",
    "bees",
    "chess",
]


class Load:
    """What happened to the requests."""

    def __init__(self, url: str, tokens: int, leave: float, cap: str | None, seed: int) -> None:
        self.url, self.tokens, self.leave, self.cap = url, tokens, leave, cap
        self.random = random.Random(seed)
        self.first: list[float] = []
        self.written = self.whole = self.left = 0
        self.failed: list[str] = []

    async def ask(self, client: httpx.AsyncClient, number: int) -> None:
        """One streaming chat."""
        leaves = self.random.random() < self.leave
        body = {
            "messages": [
                {"role": "user", "content": f"Tell me about {self.random.choice(TOPICS)}, number {number}."}
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": self.tokens,
            "seed": number,
            "persona": {"cap": self.cap if number % 2 else None},
        }
        began = time.perf_counter()
        try:
            async with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    self.failed.append(f"{answer.status_code} {(await answer.aread())[:200]!r}")
                    return
                done, told = False, None
                async for line in answer.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        done = True
                        break
                    told = json.loads(line.removeprefix("data: "))
                    if "error" in told:
                        self.failed.append(str(told["error"]))
                        return
                    if told["choices"] and told["choices"][0]["delta"].get("content"):
                        if began:
                            self.first.append(time.perf_counter() - began)
                            began = 0.0
                        if leaves:
                            self.left += 1
                            return
                if done and told and told.get("persona"):
                    self.whole += 1
                    self.written += told["usage"]["completion_tokens"]
                else:
                    self.failed.append("a stream that did not end")
        except httpx.HTTPError as error:
            self.failed.append(f"{type(error).__name__}: {error}")


async def run(load: Load, requests: int, at_once: int) -> float:
    """Seconds for all requests, so many at a time."""
    numbers = iter(range(requests))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=at_once)

    async def worker(client: httpx.AsyncClient) -> None:
        for number in numbers:
            await load.ask(client, number)

    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        began = time.perf_counter()
        await asyncio.gather(*(worker(client) for _ in range(at_once)))
        return time.perf_counter() - began


def resident(pid: int | None) -> float | None:
    """A process's resident memory, MiB."""
    path = Path(f"/proc/{pid}/status")
    if pid is None or not path.is_file():
        return None
    return (
        int(next(line for line in path.read_text().splitlines() if line.startswith("VmRSS")).split()[1])
        / 1024
    )


def left_behind(url: str) -> dict[str, float]:
    """Rows and requests that the server still has, when nobody asks any more."""
    deadline = time.monotonic() + 20
    while True:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        found = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith(("personatlas_running ", "personatlas_queue "))}  # fmt: skip
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8377")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--leave", type=float, default=0.0)
    parser.add_argument("--parts", type=int, default=1, help="memory is looked at after each")
    parser.add_argument("--pid", type=int, help="the server's, for its memory")
    given = parser.parse_args()
    caps = httpx.get(f"{given.url}/v1/axis").json()["caps"]
    rates = []
    for at_once in given.at_once:
        memory = [resident(given.pid)]
        load = Load(given.url, given.tokens, given.leave, next(iter(caps), None), seed=at_once)
        seconds = 0.0
        for _ in range(given.parts):
            seconds += asyncio.run(run(load, given.requests // given.parts, at_once))
            memory.append(resident(given.pid))
        rates.append(load.written / seconds)
        told = {
            "at once": at_once,
            "whole": load.whole,
            "left": load.left,
            "failed": len(load.failed),
            "tokens/s": round(rates[-1], 1),
            "first token": round(statistics.median(load.first), 3),
            "left behind": left_behind(given.url),
            "MiB": [round(value) for value in memory if value is not None],
        }
        print(json.dumps(told))
        for reason in sorted(set(load.failed))[:5]:
            print("  failed:", reason)
    if len(rates) > 1:
        print(
            f"{given.at_once[-1]} at once: {rates[-1] / rates[0]:.2f} times the tokens a second of {given.at_once[0]}"
        )


if __name__ == "__main__":
    main()
