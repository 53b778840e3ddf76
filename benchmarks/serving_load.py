"""Many clients at once against `elutq serve`: right answers, flat memory, honest counts, a clean end.

Starts the server on the bundled model, or another, asks each of a set of requests alone, then lets clients
ask them at random: whole and streamed, some leaving in the middle, more of them than the queue holds. At the
end SIGTERM comes while all are busy. Prints one JSON object; the exit status is 1 if anything was wrong.

    python benchmarks/serving_load.py --minutes 5
"""

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from elutq.models import bundled_model

_OPENINGS = ("Once upon a time", "The dog", "One day a girl named Lily", "In the forest", "A king had a ship")
_PARALLEL, _QUEUE, _DRAIN_SECONDS = 8, 16, 30


@dataclass
class Tally:
    """What the clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)


def request(number: int) -> dict[str, Any]:
    """One of the requests: greedy and sampled, short and long, alike and different at their beginnings."""
    rng = random.Random(number)
    prompt = rng.choice(_OPENINGS) + " and the sea" * rng.choice((0, 0, 3, 40))
    return {
        "prompt": prompt,
        "max_tokens": rng.choice((8, 40, 120)),
        "temperature": rng.choice((0, 0.8, 1.2)),
        "seed": number,
        "stop": rng.choice(([], ["."], ["\n"])),
    }


async def ask(
    client: httpx.AsyncClient, body: dict[str, Any], stream: bool, leave_after: int | None = None
) -> Any:
    """The text of an answer; the status if it was refused; None if it broke off, or was left."""
    if not stream:
        answer = await client.post("/v1/completions", json=body)
        return answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.status_code
    pieces: list[str] = []
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            return answer.status_code
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return "".join(pieces)
            if line:
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return event["error"]["code"]
                pieces.append(event["choices"][0]["text"])
            if leave_after is not None and len(pieces) > leave_after:
                return None
    return None


async def client_loop(
    url: str, number: int, expected: list[str], tally: Tally, until: float, stopping: asyncio.Event
) -> None:
    """One client, until the time is over or the server ends."""
    rng = random.Random(1000 + number)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        while time.monotonic() < until:
            index = rng.randrange(len(expected))
            leave_after = rng.randrange(5) if rng.random() < 0.1 else None
            stream = leave_after is not None or rng.random() < 0.5
            begin = time.monotonic()
            try:
                answer = await ask(client, request(index), stream, leave_after)
            except httpx.HTTPError as error:
                tally.counts[
                    "connection ended" if stopping.is_set() else f"failed: {type(error).__name__}"
                ] += 1
                return
            if answer == 429:
                tally.counts["refused: queue full"] += 1
                await asyncio.sleep(rng.random())
            elif answer in (503, "shutting_down") and stopping.is_set():
                tally.counts["refused: shutting down"] += 1
                return
            elif answer is None and leave_after is not None:
                tally.counts["left"] += 1
            elif answer == expected[index]:
                tally.counts["answered"] += 1
                tally.latencies.append(time.monotonic() - begin)
            else:
                tally.wrong.append(f"request {index}: {answer!r} instead of {expected[index]!r}")
                await asyncio.sleep(0.1)


async def memory_samples(process: psutil.Process, samples: list[int], until: float) -> None:
    """Resident memory, once a second."""
    while time.monotonic() < until:
        samples.append(process.memory_info().rss)
        await asyncio.sleep(1)


async def metrics(url: str) -> dict[str, float]:
    """What the server counted."""
    async with httpx.AsyncClient(base_url=url) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def inconsistencies(counted: dict[str, float], tally: Tally, solo: int) -> list[str]:
    """Where the server's counts are not the clients'."""
    finished = sum(
        value for name, value in counted.items() if name.startswith("elutq_requests_finished_total")
    )
    pairs = {
        "finished": (finished, solo + tally.counts["answered"] + tally.counts["left"]),
        "rejected": (counted["elutq_requests_rejected_total"], tally.counts["refused: queue full"]),
        "running": (counted["elutq_requests_running"], 0),
        "queued": (counted["elutq_requests_queued"], 0),
    }
    return [
        f"{name}: server {ours:g}, clients {theirs}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]


async def load(url: str, process: psutil.Process, clients: int, minutes: float) -> dict[str, Any]:
    """All of it."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        expected = [await ask(client, request(index), stream=False) for index in range(60)]
    tally, samples = Tally(), list[int]()
    begin = time.monotonic()
    until = begin + 60 * minutes
    stopping = asyncio.Event()
    await asyncio.gather(
        memory_samples(process, samples, until),
        *(client_loop(url, i, expected, tally, until, stopping) for i in range(clients)),
    )
    seconds = time.monotonic() - begin
    await asyncio.sleep(1)  # the last who left are noticed at the next step
    counted = await metrics(url)
    problems = inconsistencies(counted, tally, len(expected)) + tally.wrong
    during = dict(tally.counts)

    # Warm-up ends after a fifth of the time.
    flat = samples[len(samples) // 5 :]
    half = len(flat) // 2
    growth = statistics.median(flat[half:]) / statistics.median(flat[:half]) - 1
    if growth > 0.02:
        problems.append(f"memory grew by {growth:.1%}")

    ending = Tally()
    crowd = asyncio.gather(
        *(client_loop(url, i, expected, ending, time.monotonic() + 60, stopping) for i in range(clients))
    )
    await asyncio.sleep(2)
    stopping.set()
    process.send_signal(signal.SIGTERM)
    terminated = time.monotonic()
    await crowd
    status = await asyncio.to_thread(process.wait, _DRAIN_SECONDS + 15)
    problems += ending.wrong + ([f"exit status {status}"] if status else [])
    return {
        "clients": clients,
        "seconds": round(seconds, 1),
        "counts": during,
        "requests_per_second": round(during.get("answered", 0) / seconds, 1),
        "completion_tokens_per_second": round(counted["elutq_completion_tokens_total"] / seconds, 1),
        "cancelled": counted.get('elutq_requests_finished_total{reason="cancelled"}', 0),
        "latency_median": round(statistics.median(tally.latencies), 3),
        "latency_p99": round(statistics.quantiles(tally.latencies, n=100)[-1], 3),
        "rss_mb": [round(rss / 1e6, 1) for rss in samples[:: max(len(samples) // 10, 1)]],
        "rss_growth": round(growth, 4),
        "counts_at_end": dict(ending.counts),
        "seconds_to_end": round(time.monotonic() - terminated, 2),
        "problems": problems[:20],
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(bundled_model()))
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    command = [sys.executable, "-m", "elutq", "serve", options.model, "--port", "0", "--cache", "16"]
    command += ["--parallel", str(_PARALLEL), "--queue", str(_QUEUE), "--drain", str(_DRAIN_SECONDS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            url = next(
                found.group(1) for line in server.stderr if (found := re.search(r"(http://\S+)", line))
            )
            next(line for line in server.stderr if "Started server" in line)
            threading.Thread(target=server.stderr.read, daemon=True).start()  # or its pipe fills
            result = asyncio.run(load(url, psutil.Process(server.pid), options.clients, options.minutes))
        finally:
            server.kill()
    print(json.dumps(result, indent=2))
    raise SystemExit(bool(result["problems"]))


if __name__ == "__main__":
    main()
