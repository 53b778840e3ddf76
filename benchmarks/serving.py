"""What many clients get together, against what one gets; and how long a long prompt keeps the others waiting.

    python benchmarks/serving.py [--shape tinyllama-1.1b] [--bits 2] [--threads 2] [--clients 1 8]
    python benchmarks/serving.py --url http://127.0.0.1:8000 [--clients 1 8]

Every client sends one request after the other, each with a random prompt of its own. Numbers of clients take
turns, --repeat times; figures are medians. Without --url, requests go to the scheduler of a model of random
weights, and the steps are timed while a prompt of --long tokens arrives beside running texts; with it, to a
running server's /v1/completions. Prints one JSON object.
"""

import argparse
import http.client
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from elutq.bench import source_commit
from elutq.generation import GenerationRequest
from elutq.runtime import LanguageModel, cpu_name, random_model
from elutq.server.scheduler import Event, Scheduler
from elutq.shapes import SHAPES

#: Sends a prompt, waits for the answer, returns the number of its tokens.
Send = Callable[[list[int]], int]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="of a running server; by default a model is made")
    parser.add_argument("--shape", default="tinyllama-1.1b", choices=SHAPES)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=1, help="of each client in a turn")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--long", type=int, default=512)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()

    report: dict[str, Any] = {"cpu": cpu_name(), "commit": source_commit(), "arguments": vars(args)}
    if args.url:
        models = json.loads(call_http(args.url, "GET", "/v1/models"))
        name = models["data"][0]["id"]
        report["clients"] = measure_clients(lambda prompt: send_http(args.url, name, prompt, args.gen), args)
    else:
        with random_model(args.shape, args.bits, threads=args.threads) as model:
            scheduler = Scheduler(model, parallel=max(args.clients), cache_bytes=0)
            report["isa"] = model.isa
            report["clients"] = measure_clients(
                lambda prompt: send_to_scheduler(scheduler, prompt, args.gen), args
            )
            scheduler.close()
            report["steps"] = measure_steps(model, max(args.clients), args.prompt, args.long)
    print(json.dumps(report, indent=2))


def measure_clients(send: Send, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens per second of all clients together, by their number."""
    random = np.random.default_rng(0)

    def turn(clients: int) -> float:
        # Tokens of the smallest vocabulary that a server is likely to have.
        prompts = random.integers(3, 4096, (clients, args.requests, args.prompt)).tolist()
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            tokens = sum(pool.map(lambda mine: sum(map(send, mine)), prompts))
        return float(tokens / (time.perf_counter() - started))

    turn(1)  # warms up
    turns = [[turn(clients) for clients in args.clients] for _ in range(args.repeat)]
    results = {}
    for clients, rates in zip(args.clients, zip(*turns, strict=True), strict=True):
        ratios = [rate / first for rate, (first, *_) in zip(rates, turns, strict=True)]
        results[str(clients)] = {
            "tokens_per_second": round(median(rates), 2),
            f"times_that_of_{args.clients[0]}": round(median(ratios), 2),
        }
    return results


def send_to_scheduler(scheduler: Scheduler, prompt: list[int], gen: int) -> int:
    """One request to a scheduler."""
    done = threading.Event()
    last: list[Event] = []

    def on_event(event: Event) -> None:
        if event.finish_reason is not None:
            last.append(event)
            done.set()

    scheduler.submit(GenerationRequest(prompt, gen, ignore_eos=True), on_event)
    done.wait()
    assert last[0].usage is not None
    return last[0].usage.completion_tokens


def call_http(url: str, method: str, path: str, body: Any = None) -> bytes:
    """The answer of a server."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=600)
    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {content.decode()}")
    return content


def send_http(url: str, model: str, prompt: list[int], gen: int) -> int:
    """One streamed request to a server."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": gen,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = call_http(url, "POST", "/v1/completions", body)
    events = [line[6:] for line in content.splitlines() if line.startswith(b"data: {")]
    usages = [usage for event in events if (usage := json.loads(event).get("usage"))]
    return int(usages[-1]["completion_tokens"])


def measure_steps(model: LanguageModel, parallel: int, prompt: int, long: int) -> dict[str, float]:
    """Milliseconds of steps of running texts alone, and of those that a prompt shares."""
    alone: list[float] = []
    shared: list[float] = []
    step = model.step

    def timed(batch: Any, all_logits: bool = False) -> Any:
        started = time.perf_counter()
        result = step(batch, all_logits)
        sizes = [len(tokens) for _, tokens in batch]
        if 1 in sizes:
            (alone if max(sizes) == 1 else shared).append(1e3 * (time.perf_counter() - started))
        return result

    model.step = timed  # type: ignore[method-assign]
    scheduler = Scheduler(model, parallel=parallel, cache_bytes=0)
    random = np.random.default_rng(1)
    done = threading.Event()
    for _ in range(parallel - 1):
        ids = random.integers(3, 4096, prompt).tolist()
        scheduler.submit(GenerationRequest(ids, 1000, ignore_eos=True), lambda event: None)
    while len(alone) < 5:
        time.sleep(0.01)
    ids = random.integers(3, 4096, long).tolist()
    scheduler.submit(GenerationRequest(ids, 1, ignore_eos=True), lambda event: done.set())
    done.wait()
    scheduler.close()
    model.step = step  # type: ignore[method-assign]
    return {
        "running_texts": parallel - 1,
        "alone_median_ms": round(median(alone), 1),
        "beside_a_prompt_steps": len(shared),
        "beside_a_prompt_median_ms": round(median(shared), 1),
        "beside_a_prompt_longest_ms": round(max(shared), 1),
    }


if __name__ == "__main__":
    main()
