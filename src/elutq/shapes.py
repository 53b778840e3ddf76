"""Configs of well-known models and random weights to go with them, for measuring speed."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elutq.architectures import EngineConfig, block_linears, engine_config, outer_linears, routers
from elutq.errors import InvalidArgumentError
from elutq.packing import HlqMatrix
from elutq.scheme import OUTER_SCHEME, QuantScheme

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
    "mixtral-8x7b": _config(
        "mixtral", (32, 4096, 14336, 32, 8), 32000, 32768, num_local_experts=8, num_experts_per_tok=2
    ),
    "qwen2.5-0.5b": _config("qwen2", (24, 896, 4864, 14, 2), 151936, 32768, tie_word_embeddings=True),
    "qwen2.5-7b": _config("qwen2", (28, 3584, 18944, 28, 4), 152064, 131072),
    "qwen3-0.6b": _qwen3((28, 1024, 3072, 16, 8), tied=True),
    "qwen3-1.7b": _qwen3((28, 2048, 6144, 16, 8), tied=True),
    "qwen3-8b": _qwen3((36, 4096, 12288, 32, 8), tied=False),
    "qwen3-30b-a3b": _config(
        "qwen3_moe",
        (48, 2048, 6144, 32, 4),
        151936,
        40960,
        head_dim=128,
        rope_theta=1e6,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
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


def random_linears(config: EngineConfig, scheme: QuantScheme, seed: int) -> Iterator[tuple[str, HlqMatrix]]:
    """Every quantized linear of a model with random weights, by module name.

    Args:
        config: the model.
        scheme: of the decoder blocks; embedding and head have `OUTER_SCHEME`, with parameters as wide.
        seed: of the random bits.
    """
    random = np.random.Generator(np.random.SFC64(seed))
    outer_scheme = replace(OUTER_SCHEME, param_bits=scheme.param_bits)
    for linears, linear_scheme in ((outer_linears(config), outer_scheme), (block_linears(config), scheme)):
        for name, out_features, in_features in linears:
            yield name, _random_matrix(random, out_features, in_features, linear_scheme)


def random_routers(config: EngineConfig, seed: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every router of a model with random weights, float32 (num_experts, hidden_size), by module name."""
    random = np.random.Generator(np.random.SFC64(seed))
    for name, out_features, in_features in routers(config):
        weight = random.standard_normal((out_features, in_features), np.float32)
        yield name, weight * np.float32(in_features**-0.5)


def _random_matrix(
    random: np.random.Generator, out_features: int, in_features: int, scheme: QuantScheme
) -> HlqMatrix:
    """Evenly spaced levels of mean 0 and variance 1 / in_features, so that outputs are as large as inputs."""
    shape = (scheme.bits, out_features, -(-in_features // 8))
    words = random.integers(0, 1 << 64, -(-np.prod(shape) // 8), np.uint64)
    planes = words.view(np.uint8)[: np.prod(shape)].reshape(shape)
    if in_features % 8:
        planes[..., -1] &= (1 << in_features % 8) - 1
    step = (12 / (in_features * (4**scheme.bits - 1))) ** 0.5
    in_bytes = scheme.param_bits == 8
    unit = step / 16 if in_bytes else 1.0  # the largest zero, of 4 bits, is then -120
    scales = step / unit * 2.0 ** np.arange(scheme.bits)
    zeros = np.full((out_features, scheme.groups(in_features)), -scales.sum() / 2)
    return HlqMatrix(
        planes=planes,
        scales=np.tile(scales.astype(np.uint8 if in_bytes else np.float16), (*zeros.shape, 1)),
        zeros=zeros.astype(np.int8) if in_bytes else zeros.astype(np.float16),
        in_features=in_features,
        group_size=scheme.group_size,
        row_scales=np.full(out_features, unit, np.float16) if in_bytes else None,
    )
