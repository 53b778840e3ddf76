"""Text that a model samples from its own distribution: in its domain by construction, and nothing to ship."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elutq.errors import InvalidArgumentError

if TYPE_CHECKING:
    from elutq.runtime import LanguageModel

#: Keys and values of all sequences that are sampled at once.
_CACHE_BYTES = 2 << 30
_MOST_SEQUENCES = 64


def sample_text(
    model: "LanguageModel",
    sequences: int,
    length: int,
    seed: int | np.random.Generator,
    *,
    documents: bool = False,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.int32]:
    """Sample from the model's own distribution, nothing cut off: int32 [sequences, length].

    Every sequence begins with the token that stands before each document in training: the one that begins a
    sequence, or the one that ends a text, or, where neither exists, a random ordinary one.

    Args:
        model: the model; its context holds `length - 1` tokens or more.
        sequences: sampled side by side.
        length: tokens of each.
        seed: of the draws, or where they come from.
        documents: make rows of documents that know nothing of each other: a stop token ends one, and the next
            is sampled from an empty context. No other special token is drawn, and none the tokenizer lacks.
        progress: called with the number of tokens drawn, after each step.
    """
    rng = np.random.default_rng(seed)
    tokenizer = model.tokenizer
    vocab = model.config.vocab_size
    stops = sorted(tokenizer.eos_token_ids)
    bias = np.zeros(vocab)
    if documents:
        bias[~_ordinary(model)] = -np.inf
        bias[stops] = 0
    ids = np.empty((sequences, length), np.int32)
    first = tokenizer.special_token_id("bos_token")
    if first is None and stops:
        first = stops[0]
    ids[:, 0] = rng.choice(np.flatnonzero(_ordinary(model)), sequences) if first is None else first
    caches = [model.new_sequence() for _ in range(sequences)]
    for position in range(1, length):
        last = ids[:, position - 1]
        if documents:
            ended = np.isin(last, stops)
            for i in np.flatnonzero(ended):
                caches[i].truncate(0)
            last = np.where(ended, ids[:, 0], last)
        logits = model.step([(cache, [int(token)]) for cache, token in zip(caches, last, strict=True)])
        # Gumbel's trick: the argmax of logits + noise is a draw from their softmax.
        noise = rng.gumbel(size=(sequences, vocab))
        ids[:, position] = (np.asarray(logits).reshape(sequences, -1) + noise + bias).argmax(axis=1)
        if progress is not None:
            progress(position * sequences)
    return ids


def self_windows(
    model: "LanguageModel",
    count: int,
    length: int,
    rng: np.random.Generator,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.int64]:
    """Windows of documents that the model samples, without the tokens to begin with: int64 [count, length].

    Raises:
        InvalidArgumentError: the model's context is shorter than a window.
    """
    if length > model.context:
        raise InvalidArgumentError(
            f"the model's context is {model.context} tokens: it cannot write windows of {length}; "
            "give a smaller calibration length"
        )
    cache_bytes = model.bytes_per_token(length) - model.bytes_per_token(0)
    batch = max(1, min(_MOST_SEQUENCES, _CACHE_BYTES // cache_bytes))
    windows = np.empty((count, length), np.int64)
    for first in range(0, count, batch):
        rows = windows[first : first + batch]

        def report(drawn: int, done: int = first * length) -> None:
            if progress is not None:
                progress(done + drawn)

        rows[:] = sample_text(model, len(rows), length + 1, rng, documents=True, progress=report)[:, 1:]
    return windows


def _ordinary(model: "LanguageModel") -> NDArray[np.bool_]:
    """Which ids are tokens of text, bool [vocab_size]."""
    tokenizer = model.tokenizer
    special = tokenizer.special_token_ids
    return np.array([i not in special and tokenizer.is_known(i) for i in range(model.config.vocab_size)])
