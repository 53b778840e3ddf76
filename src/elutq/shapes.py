"""Configs of well-known models, for measuring speed at their shapes without their weights."""

from collections.abc import Mapping
from typing import Any

from elutq.architectures import EngineConfig, engine_config
from elutq.errors import InvalidArgumentError

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _config(
    model_type: str, sizes: tuple[int, int, int, int, int], vocabulary: int, positions: int, **others: Any
) -> dict[str, Any]:
    """A `config.json`; sizes are layers, hidden, intermediate, query heads, key-value heads."""
    layers, hidden, intermediate, heads, kv_heads = sizes
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        **others,
    }


def _llama3(sizes: tuple[int, int, int, int, int], tied: bool) -> dict[str, Any]:
    rope = {"rope_theta": 5e5, "rope_scaling": _LLAMA3_ROPE}
    return _config("llama", sizes, 128256, 131072, tie_word_embeddings=tied, **rope)


def _qwen3(sizes: tuple[int, int, int, int, int], tied: bool) -> dict[str, Any]:
    return _config("qwen3", sizes, 151936, 40960, tie_word_embeddings=tied, head_dim=128, rope_theta=1e6)


#: Name -> `config.json`.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": _config("llama", (32, 4096, 11008, 32, 32), 32000, 4096),
    "llama-2-13b": _config("llama", (40, 5120, 13824, 40, 40), 32000, 4096),
    "llama-3-8b": _llama3((32, 4096, 14336, 32, 8), tied=False),
    "llama-3.2-1b": _llama3((16, 2048, 8192, 32, 8), tied=True),
    "llama-3.2-3b": _llama3((28, 3072, 8192, 24, 8), tied=True),
    "mistral-7b": _config("mistral", (32, 4096, 14336, 32, 8), 32768, 32768, sliding_window=None),
    "qwen2.5-0.5b": _config("qwen2", (24, 896, 4864, 14, 2), 151936, 32768, tie_word_embeddings=True),
    "qwen2.5-7b": _config("qwen2", (28, 3584, 18944, 28, 4), 152064, 131072),
    "qwen3-0.6b": _qwen3((28, 1024, 3072, 16, 8), tied=True),
    "qwen3-1.7b": _qwen3((28, 2048, 6144, 16, 8), tied=True),
    "qwen3-8b": _qwen3((36, 4096, 12288, 32, 8), tied=False),
    "smollm-135m": _config("llama", (30, 576, 1536, 9, 3), 49152, 2048, tie_word_embeddings=True),
    "tinyllama-1.1b": _config("llama", (22, 2048, 5632, 32, 4), 32000, 2048),
}


def shape_config(name: str) -> EngineConfig:
    """The config of a model in `SHAPES`.

    Raises:
        InvalidArgumentError: it is not there.
    """
    if name not in SHAPES:
        raise InvalidArgumentError(f"shape {name!r:.80} is not known; choose one of {', '.join(SHAPES)}")
    return engine_config(SHAPES[name])
