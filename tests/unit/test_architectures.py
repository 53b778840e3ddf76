import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elutq.architectures import (
    EMBEDDING,
    FAMILIES,
    HEAD,
    EngineConfig,
    block_linears,
    engine_config,
    kind_of,
    mlp_of,
    outer_linears,
    routers,
    vectors,
)
from elutq.checkpoint.safetensors import SafetensorsFile
from elutq.errors import ConfigError, UnsupportedArchitectureError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1003,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}

#: What mixtures of experts need beside.
EXPERTS: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 256,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "beta_fast": 24,
        "beta_slow": 2,
        "truncate": False,
    },
}


def with_keys(**keys: Any) -> dict[str, Any]:
    return {**LLAMA, **keys}


def test_llama_defaults() -> None:
    config = engine_config(LLAMA)
    assert config.head_dim == 16
    assert config.rms_norm_eps == 1e-6
    assert not config.tie_word_embeddings
    assert not any((config.attention_bias_qkv, config.attention_bias_o, config.mlp_bias, config.qk_norm))
    assert config.sliding_windows == (0, 0)
    assert len(config.rope_inv_freq) == 8
    assert config.rope_inv_freq[0] == 1.0
    assert config.rope_attention_factor == 1.0


def test_key_value_heads_default_to_heads() -> None:
    assert engine_config(with_keys(num_key_value_heads=None)).num_key_value_heads == 4


def test_biases_and_norms_of_each_family() -> None:
    def of(**keys: Any) -> tuple[bool, ...]:
        c = engine_config(with_keys(**keys))
        return c.attention_bias_qkv, c.attention_bias_o, c.mlp_bias, c.qk_norm

    assert of(attention_bias=True) == (True, True, False, False)
    assert of(mlp_bias=True) == (False, False, True, False)
    assert of(model_type="mistral", attention_bias=True) == (False, False, False, False)
    assert of(model_type="qwen2") == (True, False, False, False)
    assert of(model_type="qwen3") == (False, False, False, True)
    assert of(model_type="qwen3", attention_bias=True) == (True, True, False, True)


def test_sliding_windows_of_each_family() -> None:
    def of(**keys: Any) -> tuple[int, ...]:
        return engine_config(with_keys(**keys)).sliding_windows

    assert of(model_type="llama", sliding_window=8) == (0, 0)
    assert of(model_type="mistral", sliding_window=8) == (8, 8)
    for family in ("qwen2", "qwen3"):
        assert of(model_type=family, sliding_window=8) == (0, 0)
        assert of(model_type=family, sliding_window=8, use_sliding_window=True) == (0, 0)
        assert of(model_type=family, sliding_window=8, use_sliding_window=True, max_window_layers=1) == (0, 8)
        layer_types = ["sliding_attention", "full_attention"]
        keys = {"sliding_window": 8, "use_sliding_window": True, "layer_types": layer_types}
        assert of(model_type=family, **keys) == (8, 0)
        with pytest.raises(ConfigError, match="sliding_attention"):
            of(model_type=family, **{**keys, "use_sliding_window": False})
        with pytest.raises(ConfigError, match="layer_types"):
            of(model_type=family, **{**keys, "layer_types": layer_types[:1]})
        with pytest.raises(UnsupportedArchitectureError, match="chunked_attention"):
            of(model_type=family, **{**keys, "layer_types": ["chunked_attention", "full_attention"]})


def test_module_names_and_shapes() -> None:
    config = engine_config(
        with_keys(model_type="qwen3", head_dim=24, attention_bias=True, tie_word_embeddings=True)
    )
    linears = block_linears(config)
    assert len(linears) == 14
    assert linears[0] == ("model.layers.0.self_attn.q_proj", 96, 64)
    assert linears[1] == ("model.layers.0.self_attn.k_proj", 48, 64)
    assert linears[3] == ("model.layers.0.self_attn.o_proj", 64, 96)
    assert linears[13] == ("model.layers.1.mlp.down_proj", 64, 96)
    assert outer_linears(config) == [(EMBEDDING, 1003, 64)]
    untied = engine_config(LLAMA)
    assert outer_linears(untied) == [(EMBEDDING, 1003, 64), (HEAD, 1003, 64)]

    sizes = dict(vectors(config))
    assert sizes["model.norm.weight"] == 64
    assert sizes["model.layers.1.input_layernorm.weight"] == 64
    assert sizes["model.layers.1.self_attn.q_norm.weight"] == 24
    assert sizes["model.layers.0.self_attn.v_proj.bias"] == 48
    assert sizes["model.layers.0.self_attn.o_proj.bias"] == 64
    assert "model.layers.0.mlp.up_proj.bias" not in sizes
    assert dict(vectors(engine_config(with_keys(mlp_bias=True))))["model.layers.0.mlp.up_proj.bias"] == 96
    assert len(vectors(untied)) == 5


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("rope", sorted(ROPES))
@pytest.mark.parametrize("spelling", [4, 5])
def test_agrees_with_transformers(family: str, rope: str, spelling: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    keys = with_keys(model_type=family)
    if FAMILIES[family].mixture:
        keys |= {**EXPERTS, "head_dim": 16}  # which transformers' own yarn needs of Mixtral
    if spelling == 4:
        keys |= {"rope_theta": 500000.0, "rope_scaling": ROPES[rope] or None}
    else:
        keys |= {"rope_parameters": {"rope_theta": 500000.0, **ROPES[rope]}}
    ours = engine_config(keys)
    config = transformers.AutoConfig.for_model(**copy.deepcopy(keys))
    model = transformers.AutoModelForCausalLM.from_config(config)

    rotary = model.model.rotary_emb
    assert ours.rope_inv_freq == pytest.approx(rotary.inv_freq.tolist(), rel=1e-6, abs=0)
    assert ours.rope_attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-7)
    model.save_pretrained(tmp_path)  # which undoes what transformers fuses in memory
    expected = {
        name: info.shape for name, info in SafetensorsFile(tmp_path / "model.safetensors").tensors.items()
    }
    shapes: dict[str, tuple[int, ...]] = {name: (size,) for name, size in vectors(ours)}
    for name, out_features, in_features in block_linears(ours) + routers(ours) + outer_linears(ours):
        shapes[f"{name}.weight"] = (out_features, in_features)
    assert shapes == expected
    assert engine_config(config.to_dict()) == ours


def test_qwen3_moe() -> None:
    def of(**keys: Any) -> EngineConfig:
        return engine_config(with_keys(model_type="qwen3_moe", **{**EXPERTS, **keys}))

    config = of(num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3])
    assert config.sparse_layers == (False, True, False, False)
    assert (config.num_experts, config.num_experts_per_tok) == (3, 2)
    assert (config.intermediate_size, config.moe_intermediate_size) == (96, 40)
    assert config.qk_norm
    assert not config.norm_topk_prob
    assert of(norm_topk_prob=True).norm_topk_prob
    assert of().sparse_layers == (True, True)
    assert of(mlp_only_layers=None).sparse_layers == (True, True)
    assert of(num_experts=None, num_local_experts=5).num_experts == 5
    assert of(sliding_window=8).sliding_windows == (0, 0)
    assert of(sliding_window=8, use_sliding_window=True, max_window_layers=1).sliding_windows == (8, 8)
    names = [linear.name for linear in block_linears(config)]
    assert names[7:14] == [
        *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
        *(f"model.layers.1.mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")),
    ]
    assert block_linears(config)[13] == ("model.layers.1.mlp.experts.0.down_proj", 64, 40)
    assert names[19] == "model.layers.1.mlp.experts.2.down_proj"
    assert len(names) == 3 * 7 + 4 + 3 * 3
    assert routers(config) == [("model.layers.1.mlp.gate", 3, 64)]
    assert len(vectors(config)) == 4 * 4 + 1


def test_mixtral() -> None:
    config = engine_config(
        with_keys(model_type="mixtral", num_local_experts=3, num_experts_per_tok=1, sliding_window=8)
    )
    assert config.sparse_layers == (True, True)
    assert (config.num_experts, config.moe_intermediate_size, config.norm_topk_prob) == (3, 96, True)
    assert config.rms_norm_eps == 1e-5
    assert config.sliding_windows == (8, 8)
    expert = "model.layers.0.block_sparse_moe.experts.0"
    assert block_linears(config)[4:7] == [
        (f"{expert}.w1", 96, 64),
        (f"{expert}.w3", 96, 64),
        (f"{expert}.w2", 64, 96),
    ]
    assert routers(config)[1] == ("model.layers.1.block_sparse_moe.gate", 3, 64)


def test_kinds_of_linears() -> None:
    layer = "model.layers.0"
    assert kind_of(EMBEDDING) == "embedding"
    assert kind_of(HEAD) == "head"
    assert kind_of(f"{layer}.self_attn.q_proj") == "q_proj"
    assert kind_of(f"{layer}.mlp.gate") == kind_of(f"{layer}.block_sparse_moe.gate") == "router"
    assert kind_of(f"{layer}.mlp.experts.11.gate_proj") == "gate_proj"
    expert = f"{layer}.block_sparse_moe.experts.1"
    assert [kind_of(f"{expert}.{name}") for name in ("w1", "w2", "w3")] == [
        "gate_proj",
        "down_proj",
        "up_proj",
    ]
    assert mlp_of(f"{expert}.w2") == (f"{expert}.w1", f"{expert}.w3", f"{expert}.w2")
    assert mlp_of(f"{layer}.mlp.gate") is None


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"num_experts": None}, "num_local_experts"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 1025}, "num_experts"),
        ({"num_experts": 1024, "num_hidden_layers": 65}, "65 layers.*65536"),
        ({"num_local_experts": 4}, "num_local_experts 4 is not num_experts 3"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": 1}, "mlp_only_layers"),
        ({"mlp_only_layers": [0.5]}, "mlp_only_layers"),
    ],
)
def test_bad_mixtures(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        engine_config(with_keys(model_type="qwen3_moe", **{**EXPERTS, **keys}))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"model_type": "gpt2"}, "gpt2.*llama, mistral"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": ["llama"]}, "not supported"),
        ({"model_type": "qwen2_moe", "num_experts": 8}, "qwen2_moe.*qwen3_moe"),
        ({"hidden_act": "gelu"}, "gelu.*silu"),
        ({"head_dim": 12}, "multiple of 8"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "layer type"),
    ],
)
def test_unsupported(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=match):
        engine_config(with_keys(**keys))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": 66}, "multiple of num_attention_heads"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"type": 3}}, "rope_type"),
        ({"rope_scaling": {**ROPES["llama3"], "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"head_dim": 1 << 19}, "head_dim"),
    ],
)
def test_bad_values(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        engine_config(with_keys(**keys))


def test_config_must_be_an_object() -> None:
    with pytest.raises(ConfigError, match="object"):
        engine_config([])  # type: ignore[arg-type]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
KEYS = [*LLAMA, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types"]
KEYS += [*EXPERTS, "num_local_experts", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"]
KEYS += ["use_sliding_window", "max_window_layers", "partial_rotary_factor", "hidden_act", "attention_bias"]
ROPE_KEYS = [
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "beta_fast",
    "mscale",
    "mscale_all_dim",
    "truncate",
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(st.sampled_from(KEYS[1:]), JUNK, max_size=3),
    st.sampled_from(sorted(ROPES)),
    st.dictionaries(st.sampled_from(ROPE_KEYS), JUNK, max_size=2),
)
def test_hostile_configs_give_our_errors_only(
    family: str, junk: dict[str, Any], rope: str, rope_junk: dict[str, Any]
) -> None:
    scaling = {**ROPES[rope], **rope_junk}
    keys = with_keys(model_type=family, rope_scaling=scaling, use_sliding_window=True, **EXPERTS)
    try:
        config = engine_config({**keys, **junk})
    except (ConfigError, UnsupportedArchitectureError) as error:
        assert len(str(error)) < 1000  # noqa: PT017
    else:
        assert all(0 < f < float("inf") for f in config.rope_inv_freq)
