from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from elutq import _core

OFF: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "logit_bias": [],
    "seed": 0,
}
NO_CONTEXT = np.zeros(0, np.int32)


class Sampler:
    """The core's, with everything off that is not named."""

    def __init__(self, **options: Any) -> None:
        self._core = _core.Sampler(**{**OFF, **options})

    def sample(
        self,
        logits: NDArray[np.float32],
        tokens: NDArray[np.int32] = NO_CONTEXT,
        prompt_length: int | None = None,
        allowed: NDArray[np.int32] | None = None,
    ) -> int:
        return self._core.sample(
            logits, tokens, len(tokens) if prompt_length is None else prompt_length, allowed
        )


def sampler(**options: Any) -> Sampler:
    return Sampler(**options)


def random_logits(size: int = 200, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    p = np.exp(logits.astype(np.float64) - logits.max())
    return p / p.sum()


def splitmix64(seed: int, n: int) -> float:
    """Draw n as sampler.h documents it."""
    mask = (1 << 64) - 1
    x = (seed + (n + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return float((x ^ (x >> 31)) >> 11) * 2.0**-53


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([0, 3, 1, 3, -1], np.float32)
    assert sampler(temperature=0.0).sample(logits, NO_CONTEXT) == 1


def test_draws_are_the_documented_sequence() -> None:
    logits = random_logits()
    cumulative = np.cumsum(softmax(logits))
    own = sampler(seed=123456789)
    for n in range(200):
        assert own.sample(logits, NO_CONTEXT) == np.searchsorted(
            cumulative, splitmix64(123456789, n), "right"
        )


def test_frequencies_are_the_probabilities() -> None:
    logits = random_logits(8)
    own = sampler(temperature=0.7, seed=5)
    counts = Counter(own.sample(logits, NO_CONTEXT) for _ in range(20000))
    expected = softmax(logits / 0.7)
    for token in range(8):
        assert counts[token] / 20000 == pytest.approx(expected[token], abs=0.015)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 10},
        {"top_k": 500},
        {"top_p": 0.9},
        {"top_p": 0.3, "temperature": 1.7},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.1, "temperature": 0.8},
        {"repetition_penalty": 1.5, "top_k": 5},
        {"repetition_penalty": 0.5, "top_p": 0.5},
    ],
)
def test_filters_keep_what_transformers_keeps(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = random_logits(seed=3)
    context = np.array([3, 7, 7, 120, 50, int(logits.argmax())], np.int32)
    processors = transformers.LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        processors.append(transformers.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        processors.append(transformers.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(transformers.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(transformers.MinPLogitsWarper(options["min_p"]))
    scores = processors(torch.from_numpy(context)[None].long(), torch.from_numpy(logits.copy())[None])[0]
    cumulative = np.cumsum(softmax(scores.numpy()))
    own = sampler(seed=9, **options)
    for n in range(300):
        expected = np.searchsorted(cumulative, splitmix64(9, n), "right")
        assert own.sample(logits, context) == expected


def test_penalty_applies_once_per_token_and_by_sign() -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.2], np.float32)
    greedy = sampler(temperature=0.0, repetition_penalty=1.5)
    assert greedy.sample(logits, np.array([0, 0, 0], np.int32)) == 1  # 2 / 1.5 < 1.5
    assert greedy.sample(logits, np.array([0, 1], np.int32)) == 0  # 1.33 and 1
    only_negative = np.array([-1.0, -1.2], np.float32)
    assert greedy.sample(only_negative, np.array([0], np.int32)) == 1  # -1.5 < -1.2


def test_top_k_keeps_ties() -> None:
    logits = np.array([1, 5, 5, 5, 0], np.float32)
    own = sampler(top_k=2)
    assert {own.sample(logits, NO_CONTEXT) for _ in range(100)} == {1, 2, 3}


def test_infinite_logits() -> None:
    logits = np.array([-np.inf, 0, -np.inf], np.float32)
    assert sampler().sample(logits, NO_CONTEXT) == 1
    for bad in (np.nan, np.inf):
        with pytest.raises(RuntimeError, match="logits"):
            sampler(temperature=0.0).sample(np.array([0, bad], np.float32), NO_CONTEXT)
    with pytest.raises(RuntimeError, match="finite"):
        sampler().sample(np.full(3, -np.inf, np.float32), NO_CONTEXT)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("frequency_penalty", float("inf")),
        ("presence_penalty", float("nan")),
        ("logit_bias", [(-1, 1.0)]),
        ("logit_bias", [(1, float("nan"))]),
        ("logit_bias", [(1, float("inf"))]),
    ],
)
def test_options_out_of_range_are_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        sampler(**{option: value})


def brute_force_top_p(logits: NDArray[np.float32], top_p: float) -> NDArray[np.float64]:
    """Probabilities after top_p, from a full sort."""
    p = softmax(logits)
    order = np.argsort(-p, kind="stable")
    above = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
    p[order[above >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(("spread", "top_p"), [(0.5, 0.95), (2.0, 0.9), (4.0, 0.999), (8.0, 0.5), (0.0, 0.3)])
def test_top_p_of_a_large_vocabulary(spread: float, top_p: float) -> None:
    logits = np.random.default_rng(1).normal(0, spread, 50_000).astype(np.float32)
    cumulative = np.cumsum(brute_force_top_p(logits, top_p))
    own = sampler(top_p=top_p, seed=4)
    for n in range(50):
        expected = np.searchsorted(cumulative, splitmix64(4, n), "right")
        # Near the boundary between two tokens, rounding may decide.
        assert abs(own.sample(logits) - expected) <= (0 if spread else 1)


def test_frequency_and_presence_count_generated_tokens_only() -> None:
    logits = np.array([3.0, 2.9, 2.0], np.float32)
    text = np.array([0, 0, 0, 1, 1], np.int32)
    assert sampler(temperature=0.0, frequency_penalty=1.0).sample(logits, text, prompt_length=5) == 0
    assert sampler(temperature=0.0, frequency_penalty=0.2).sample(logits, text, prompt_length=0) == 1
    assert (
        sampler(temperature=0.0, frequency_penalty=0.5).sample(logits, text, prompt_length=2) == 0
    )  # 2.5, 1.9
    assert sampler(temperature=0.0, presence_penalty=0.5).sample(logits, text, prompt_length=3) == 0
    assert sampler(temperature=0.0, presence_penalty=2.0).sample(logits, text, prompt_length=0) == 2
    again = sampler(temperature=0.0, presence_penalty=0.95, repetition_penalty=1.01)
    assert [again.sample(logits, text, prompt_length=0) for _ in range(3)] == [0, 0, 0]  # 2.02, 1.92, 2.0


def test_logit_bias() -> None:
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    assert sampler(temperature=0.0, logit_bias=[(2, 2.5)]).sample(logits) == 2
    assert sampler(temperature=0.0, logit_bias=[(0, float("-inf"))]).sample(logits) == 1
    assert sampler(logit_bias=[(1, 100.0)]).sample(logits) == 1
    assert sampler(temperature=0.0, logit_bias=[(99, 5.0)]).sample(logits) == 0
    with pytest.raises(ValueError, match="forbid all"):
        sampler(logit_bias=[(t, float("-inf")) for t in range(3)]).sample(logits)


def packed(allowed: list[int], size: int) -> NDArray[np.int32]:
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[allowed] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.5}])
def test_only_allowed_tokens_come(options: dict[str, Any]) -> None:
    logits = random_logits(1000)
    allowed = [0, 31, 32, 500, 999]
    own = sampler(**options)
    seen = {own.sample(logits, allowed=packed(allowed, 1000)) for _ in range(200)}
    assert seen <= set(allowed)
    best = max(allowed, key=lambda token: logits[token])
    assert best in seen
    assert {own.sample(logits, allowed=packed([7], 1000)) for _ in range(5)} == {7}


def test_tokens_beyond_a_short_mask_are_not_allowed() -> None:
    logits = np.arange(100, dtype=np.float32)
    assert sampler(temperature=0.0).sample(logits, allowed=np.array([-1], np.int32)) == 31
    with pytest.raises(ValueError, match="forbid all"):
        sampler().sample(logits, allowed=np.zeros(4, np.int32))


def test_log_probabilities_are_of_the_unmodified_logits() -> None:
    logits = random_logits(3000)
    logits[[5, 9]] = logits.max() + 1  # equals: the lower id comes first
    logits[17] = -np.inf
    expected = np.log(np.maximum(softmax(logits), 1e-300))
    (token, logprob), *best = _core.log_probabilities(logits, 1234, 20)
    assert token == 1234
    assert logprob == pytest.approx(expected[1234], abs=1e-5)
    order = np.argsort(-expected, kind="stable")[:20]
    assert [t for t, _ in best] == order.tolist()
    np.testing.assert_allclose([p for _, p in best], expected[order], atol=1e-5)
    assert _core.log_probabilities(logits, 17, 0) == [(17, -np.inf)]
    assert len(_core.log_probabilities(logits[:3], 0, 10)) == 4
    with pytest.raises(ValueError, match="vocabulary"):
        _core.log_probabilities(logits, 3000, 1)


def test_exponentials_are_accurate() -> None:
    gaps = np.linspace(0, 80, 400, dtype=np.float32)
    for gap in gaps:
        (_, logprob), *_ = _core.log_probabilities(np.array([0, -gap], np.float32), 0, 0)
        assert logprob == pytest.approx(-np.log1p(np.exp(-float(gap))), rel=3e-7, abs=3e-8)
