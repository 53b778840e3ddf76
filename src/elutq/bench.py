"""Speed of a model on this machine: prefill, decode, and decode's share of what the memory allows."""

import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elutq import __version__
from elutq.errors import InvalidArgumentError
from elutq.scheme import QuantScheme

if TYPE_CHECKING:
    from elutq.runtime import LanguageModel

#: Called with repeats done and repeats in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BenchResult:
    """Medians over the repeats. Tokens per second are of one sequence; GB are 1e9 bytes.

    Attributes:
        prefill_tok_s: prompt tokens per second, given all at once.
        decode_tok_s: tokens per second after the prompt, one at a time.
        read_bandwidth_gb_s: what the same threads read from memory, measured in turn with the repeats.
        decode_bytes_per_token: what a token must read, weights and cache, at the mean context of the run.
        decode_roofline_fraction: decode_bytes_per_token * decode_tok_s over the bandwidth; 1 is the limit.
        isa: kernels that ran.
        load_s: seconds to load or make the model.
        peak_rss_bytes: most memory the process ever held.
        cpu: the processor's name.
        threads: threads that ran.
        bits: bits per weight of the decoder blocks, 16 if they are not quantized.
        group_size: columns per group, None if they are not quantized.
        prompt: tokens of the prompt.
        gen: tokens after it.
        repeat: number of repeats.
        version: of this package.
        commit: of the checkout it runs from, None once installed.
    """

    prefill_tok_s: float
    decode_tok_s: float
    read_bandwidth_gb_s: float
    decode_bytes_per_token: float
    decode_roofline_fraction: float
    isa: str
    load_s: float
    peak_rss_bytes: int
    cpu: str
    threads: int
    bits: int
    group_size: int | None
    prompt: int
    gen: int
    repeat: int
    version: str
    commit: str | None


def bench(
    model: "LanguageModel",
    scheme: QuantScheme | None,
    *,
    prompt: int = 128,
    gen: int = 64,
    repeat: int = 3,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure a loaded model on random tokens.

    Each repeat times prefill, decode and the memory's read bandwidth one after the other, so that a machine
    whose speed drifts drifts for all three.

    Args:
        model: the model.
        scheme: how its decoder blocks are quantized, for the record; None if they are not.
        prompt: tokens of the prompt, 1 or more.
        gen: tokens to generate after it, 1 or more.
        repeat: repeats, after a short run to warm up.
        progress: called after each repeat.

    Raises:
        InvalidArgumentError: a count is below 1, or prompt and gen together exceed the model's limit.
    """
    from elutq.runtime import cpu_name, read_bandwidth

    for name, value in (("prompt", prompt), ("gen", gen), ("repeat", repeat)):
        if value < 1:
            raise InvalidArgumentError(f"{name} must be at least 1, not {value}")
    limit = model.config.max_position_embeddings
    if prompt + gen > limit:
        raise InvalidArgumentError(
            f"prompt and gen are {prompt + gen} tokens together, but the model's limit is {limit}"
        )
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, prompt).tolist()
    time_generation(model, ids[:8], min(gen, 4))
    prefill, decode, bandwidth = [], [], []
    for done in range(repeat):
        prefill_seconds, decode_seconds = time_generation(model, ids, gen)
        prefill.append(prompt / prefill_seconds)
        decode.append(gen / decode_seconds)
        bandwidth.append(read_bandwidth(model.threads))
        if progress is not None:
            progress(done + 1, repeat)
    bytes_per_token = float(model.bytes_per_token(prompt + gen // 2))
    decode_tok_s, bandwidth_gb_s = statistics.median(decode), statistics.median(bandwidth)
    return BenchResult(
        prefill_tok_s=statistics.median(prefill),
        decode_tok_s=decode_tok_s,
        read_bandwidth_gb_s=bandwidth_gb_s,
        decode_bytes_per_token=bytes_per_token,
        decode_roofline_fraction=bytes_per_token * decode_tok_s / (bandwidth_gb_s * 1e9),
        isa=model.isa,
        load_s=model.load_seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        cpu=cpu_name(),
        threads=model.threads,
        bits=16 if scheme is None else scheme.bits,
        group_size=None if scheme is None else scheme.group_size,
        prompt=prompt,
        gen=gen,
        repeat=repeat,
        version=__version__,
        commit=source_commit(),
    )


def time_generation(model: "LanguageModel", prompt: list[int], gen: int) -> tuple[float, float]:
    """Seconds for the prompt, and for `gen` greedy tokens after it; a sequence of its own."""
    sequence = model.new_sequence()
    start = time.perf_counter()
    token = int(model.step([(sequence, prompt)])[0].argmax())
    middle = time.perf_counter()
    for _ in range(gen):
        token = int(model.step([(sequence, [token])])[0].argmax())
    return middle - start, time.perf_counter() - middle


def source_commit() -> str | None:
    """Commit of the checkout that this file belongs to, None once installed."""
    package = Path(__file__).resolve().parent
    checkout = package.parent.parent
    if not (checkout / ".git").exists() or package != checkout / "src" / "elutq":
        return None
    try:
        found = subprocess.run(
            ["git", "-C", os.fspath(checkout), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
