import numpy as np
import pytest
from numpy.typing import NDArray

from elutq.architectures import engine_config
from elutq.generation import common_prefix
from elutq.runtime import LanguageModel, SequenceState, random_model
from elutq.server.prefix_cache import PrefixCache


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return random_model(engine_config(config), threads=1)


def text(count: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 300, count).astype(np.int32)


def computed(model: LanguageModel, tokens: NDArray[np.int32]) -> SequenceState:
    sequence = model.new_sequence()
    model.step([(sequence, tokens)])
    return sequence


def put(cache: PrefixCache, model: LanguageModel, tokens: NDArray[np.int32]) -> SequenceState:
    sequence = computed(model, tokens)
    cache.put(tokens, sequence)
    return sequence


def test_common_prefix() -> None:
    assert common_prefix(text(50), text(70)) == 50
    assert common_prefix(text(50), text(50, 1)) < 5
    assert common_prefix(text(0), text(50)) == 0


def test_the_longest_beginning_is_found(model: LanguageModel) -> None:
    cache = PrefixCache(1 << 30)
    first = put(cache, model, np.concatenate([text(40), text(30, 1)]))
    second = put(cache, model, np.concatenate([text(60), text(30, 2)]))
    assert cache.find(text(100)) == (60, second)
    assert cache.find(np.concatenate([text(40), text(60, 1)])) == (70, first)
    assert cache.find(text(60)) == (59, second)  # the last token's logits are wanted
    assert cache.find(text(100, 9)) == (0, None)
    assert cache.find(text(16)) == (0, None)  # fifteen are not worth it
    running = computed(model, text(80))
    assert cache.find(text(100), [(text(80), running)]) == (80, running)


def test_a_text_that_grows_replaces_itself(model: LanguageModel) -> None:
    cache = PrefixCache(1 << 30)
    put(cache, model, text(40))
    longer = put(cache, model, text(50))
    assert len(cache) == 1
    put(cache, model, text(30))
    assert len(cache) == 1
    assert cache.find(text(45)) == (44, longer)


def test_the_least_recently_used_is_forgotten(model: LanguageModel) -> None:
    page = computed(model, text(20)).memory_bytes
    for cache in (PrefixCache(3 * page), PrefixCache(1 << 30, entry_limit=3)):
        for seed in range(3):
            put(cache, model, text(20, seed))
        assert cache.find(text(20, 0))[0] == 19
        put(cache, model, text(20, 3))
        assert [cache.find(text(20, seed))[0] for seed in range(4)] == [19, 0, 19, 19]
        assert cache.memory_bytes == 3 * page
        cache.clear()
        assert (len(cache), cache.memory_bytes) == (0, 0)


def test_what_exceeds_the_memory_alone_is_not_kept(model: LanguageModel) -> None:
    cache = PrefixCache(100)
    put(cache, model, text(20))
    assert len(cache) == 0
