"""The data-free importances against sampled activations of the layers they model."""

import numpy as np
import pytest

from elutq.architectures import block_linears, engine_config, vectors
from elutq.errors import TensorValueError
from elutq.importance import input_importance

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}
ENGINE = engine_config(CONFIG)
BLOCK = "model.layers.0"


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    found = {
        f"{name}.weight": 0.1 * rng.standard_normal((rows, cols))
        for name, rows, cols in block_linears(ENGINE)
    }
    found |= {v.name: rng.uniform(0.2, 2.0, v.size) for v in vectors(ENGINE)}
    return {name: values.astype(np.float32) for name, values in found.items()}


@pytest.fixture
def read(tensors):
    return lambda name, rows: tensors[name][rows]


@pytest.fixture
def normalized():
    """Isotropic activations as they leave an RMSNorm without weight: [tokens, hidden_size]."""
    x = np.random.default_rng(1).standard_normal((20_000, ENGINE.hidden_size))
    return x / np.sqrt(np.square(x).mean(axis=1, keepdims=True))


def assert_proportional(estimate, energy, tolerance):
    assert estimate.dtype == np.float32
    assert estimate.max() == 1
    np.testing.assert_allclose(estimate, energy / energy.max(), rtol=tolerance)


@pytest.mark.parametrize(
    ("module", "norm"),
    [
        (f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.input_layernorm.weight"),
        (f"{BLOCK}.self_attn.v_proj", f"{BLOCK}.input_layernorm.weight"),
        (f"{BLOCK}.mlp.up_proj", f"{BLOCK}.post_attention_layernorm.weight"),
        ("lm_head", "model.norm.weight"),
    ],
)
def test_after_a_norm_it_is_the_squared_norm_weight(module, norm, tensors, read, normalized):
    energy = np.square(normalized * tensors[norm]).mean(axis=0)
    assert_proportional(input_importance(module, ENGINE, read), energy, 0.06)


def test_o_proj_sees_the_energy_of_its_value_channel_in_every_head_that_shares_it(tensors, read, normalized):
    value = f"{BLOCK}.self_attn.v_proj"
    x = normalized * tensors[f"{BLOCK}.input_layernorm.weight"]
    energy = np.square(x @ tensors[f"{value}.weight"].T + tensors[f"{value}.bias"]).mean(axis=0)
    per_head = np.concatenate([energy[:8]] * 3 + [energy[8:]] * 3)
    assert_proportional(input_importance(f"{BLOCK}.self_attn.o_proj", ENGINE, read), per_head, 0.06)


def test_down_proj_sees_the_product_of_gate_and_up(tensors, read, normalized):
    x = normalized * tensors[f"{BLOCK}.post_attention_layernorm.weight"]
    energy = 1.0
    for name in ("gate_proj", "up_proj"):
        energy = energy * np.square(
            x @ tensors[f"{BLOCK}.mlp.{name}.weight"].T + tensors[f"{BLOCK}.mlp.{name}.bias"]
        ).mean(axis=0)
    assert_proportional(input_importance(f"{BLOCK}.mlp.down_proj", ENGINE, read), energy, 0.1)


@pytest.mark.parametrize(
    ("family", "block", "names"),
    [
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
    ],
)
def test_an_expert_is_estimated_as_the_mlp_it_is(family, block, names, tensors, read):
    counts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 80}
    engine = engine_config({**CONFIG, "model_type": family, **counts})
    dense = engine_config({**CONFIG, "mlp_bias": False})
    expert, mlp = f"{BLOCK}.{block}.experts.1", f"{BLOCK}.mlp"
    pairs = list(zip(names, ("gate_proj", "up_proj", "down_proj"), strict=True))
    for name, kind in pairs:
        tensors[f"{expert}.{name}.weight"] = tensors[f"{mlp}.{kind}.weight"]
    for name, kind in pairs:
        expected = input_importance(f"{mlp}.{kind}", dense, read)
        assert np.array_equal(input_importance(f"{expert}.{name}", engine, read), expected)
    assert input_importance(f"{BLOCK}.{block}.gate", engine, read) is None


def test_the_embedding_has_none_and_neither_has_a_dead_norm(tensors, read):
    assert input_importance("model.embed_tokens", ENGINE, read) is None
    tensors["model.norm.weight"][:] = 0
    assert input_importance("lm_head", ENGINE, read) is None


def test_nan_is_an_error_that_names_the_module(tensors, read):
    tensors[f"{BLOCK}.input_layernorm.weight"][3] = np.nan
    with pytest.raises(TensorValueError, match=r"o_proj.*NaN"):
        input_importance(f"{BLOCK}.self_attn.o_proj", ENGINE, read)
