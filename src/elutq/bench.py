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
    from elutq.runtime import LanguageModel, SequenceState

#: Called with repeats done and repeats in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BenchResult:
    """Medians over the repeats. Tokens per second are of all sequences together; GB are 1e9 bytes.

    Attributes:
        prefill_tok_s: prompt tokens per second, given all at once.
        decode_tok_s: tokens per second after the prompt, one at a time for each sequence.
        read_bandwidth_gb_s: what the same threads read from memory, measured in turn with the repeats.
        decode_bytes_per_token: what a token must read at the mean context of the run: its cache, and a share
            of the weights, which the sequences read once. Of a mixture of experts it counts those of one
            token, the least that several may share.
        decode_roofline_fraction: decode_bytes_per_token * decode_tok_s over the bandwidth; 1 is the limit.
        context_decode_tok_s: tokens per second after `context` tokens, None when that was not asked for.
        isa: kernels that ran.
        load_s: seconds to load or make the model.
        peak_rss_bytes: most memory the process ever held.
        cpu: the processor's name.
        threads: threads that ran.
        bits: bits per weight of the decoder blocks, 16 if they are not quantized.
        group_size: columns per group, None if they are not quantized.
        prompt: tokens of the prompt.
        gen: tokens after it.
        batch: sequences that ran together.
        context: tokens before those of context_decode_tok_s.
        kv_cache: how keys and values are kept.
        repeat: number of repeats.
        version: of this package.
        commit: of the checkout it runs from, None once installed.
    """

    prefill_tok_s: float
    decode_tok_s: float
    read_bandwidth_gb_s: float
    decode_bytes_per_token: float
    decode_roofline_fraction: float
    context_decode_tok_s: float | None
    isa: str
    load_s: float
    peak_rss_bytes: int
    cpu: str
    threads: int
    bits: int
    group_size: int | None
    prompt: int
    gen: int
    batch: int
    context: int | None
    kv_cache: str
    repeat: int
    version: str
    commit: str | None


def bench(
    model: "LanguageModel",
    scheme: QuantScheme | None,
    *,
    prompt: int = 128,
    gen: int = 64,
    batch: int = 1,
    context: int | None = None,
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
        batch: sequences to run together, 1 or more, all of the same length.
        context: also time `gen` tokens after so many, in the same repeats. A real text of that length goes
            through the model first, once.
        repeat: repeats, after a short run to warm up.
        progress: called after each repeat.

    Raises:
        InvalidArgumentError: a count is below 1, or prompt or context exceeds, with gen, the model's limit.
    """
    from elutq.runtime import cpu_name, read_bandwidth

    counts = {"prompt": prompt, "gen": gen, "batch": batch, "context": context, "repeat": repeat}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InvalidArgumentError(f"{name} must be at least 1, not {value}")
    limit = model.config.max_position_embeddings
    for name, before in (("prompt", prompt), ("context", context or 0)):
        if before + gen > limit:
            raise InvalidArgumentError(
                f"{name} and gen are {before + gen} tokens together, but the model's limit is {limit}"
            )
    random = np.random.default_rng(0)
    ids = random.integers(0, model.config.vocab_size, (batch, prompt)).tolist()
    time_generation(model, [sequence[:8] for sequence in ids], min(gen, 4))
    deep = [] if context is None else [model.new_sequence() for _ in range(batch)]
    for sequence in deep:
        model.step([(sequence, random.integers(0, model.config.vocab_size, context).tolist())])
    prefill, decode, deep_decode, bandwidth = [], [], [], []
    for done in range(repeat):
        prefill_seconds, decode_seconds = time_generation(model, ids, gen)
        prefill.append(batch * prompt / prefill_seconds)
        decode.append(batch * gen / decode_seconds)
        if context is not None:
            deep_decode.append(batch * gen / _time_decode(model, deep, [[0]] * batch, gen))
            for sequence in deep:
                sequence.truncate(context)
        bandwidth.append(read_bandwidth(model.threads))
        if progress is not None:
            progress(done + 1, repeat)
    weight_bytes = model.bytes_per_token(0)
    cache_bytes = model.bytes_per_token(prompt + gen // 2) - weight_bytes
    bytes_per_token = weight_bytes / batch + cache_bytes
    decode_tok_s, bandwidth_gb_s = statistics.median(decode), statistics.median(bandwidth)
    return BenchResult(
        prefill_tok_s=statistics.median(prefill),
        decode_tok_s=decode_tok_s,
        read_bandwidth_gb_s=bandwidth_gb_s,
        decode_bytes_per_token=bytes_per_token,
        decode_roofline_fraction=bytes_per_token * decode_tok_s / (bandwidth_gb_s * 1e9),
        context_decode_tok_s=statistics.median(deep_decode) if deep_decode else None,
        isa=model.isa,
        load_s=model.load_seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        cpu=cpu_name(),
        threads=model.threads,
        bits=16 if scheme is None else scheme.bits,
        group_size=None if scheme is None else scheme.group_size,
        prompt=prompt,
        gen=gen,
        batch=batch,
        context=context,
        kv_cache=model.kv_cache,
        repeat=repeat,
        version=__version__,
        commit=source_commit(),
    )


def time_generation(model: "LanguageModel", prompts: list[list[int]], gen: int) -> tuple[float, float]:
    """Seconds for the prompts, and for `gen` greedy tokens after each; new sequences that run together."""
    sequences = [model.new_sequence() for _ in prompts]
    start = time.perf_counter()
    tokens = _step(model, sequences, prompts)
    return time.perf_counter() - start, _time_decode(model, sequences, tokens, gen)


def _time_decode(
    model: "LanguageModel", sequences: list["SequenceState"], tokens: list[list[int]], gen: int
) -> float:
    """Seconds for `gen` greedy tokens of each sequence after `tokens`, which they do not hold yet."""
    start = time.perf_counter()
    for _ in range(gen):
        tokens = _step(model, sequences, tokens)
    return time.perf_counter() - start


def _step(
    model: "LanguageModel", sequences: list["SequenceState"], tokens: list[list[int]]
) -> list[list[int]]:
    """The token that follows, for each sequence."""
    logits = model.step(list(zip(sequences, tokens, strict=True)))
    return [[int(row.argmax())] for row in logits]


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
