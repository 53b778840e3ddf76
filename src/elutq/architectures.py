"""What the engine must know about a model family: one row each, and everything else from `config.json`.

All supported families are one decoder: RMSNorm, rotary grouped-query attention, RMSNorm, SwiGLU, under the
names of Hugging Face's Llama. They differ in biases, query and key norms, sliding windows, and mixtures of
experts in place of the one SwiGLU, which is what a row states.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from elutq.config_reader import ConfigReader
from elutq.errors import ConfigError, UnsupportedArchitectureError
from elutq.rope import MAX_POSITIONS, rotary_frequencies

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm.weight"

_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
_ROUTER = "gate"

# Bounds that every real model is far inside of. They keep a hostile config from asking for absurd work before
# the tensors' own shapes are checked.
_MAX_LAYERS = 1024
_MAX_FEATURES = 1 << 20
_MAX_VOCABULARY = 1 << 24
_MAX_EXPERTS = 1024  # of a layer
_MAX_EXPERTS_IN_ALL = 1 << 16


class LinearSpec(NamedTuple):
    """A linear module: `name` (without `.weight`) and its shape."""

    name: str
    out_features: int
    in_features: int


class VectorSpec(NamedTuple):
    """A norm weight or bias: full tensor name and length."""

    name: str
    size: int


@dataclass(frozen=True)
class EngineConfig:
    """Everything the decoder needs to know of a model, checked.

    Attributes:
        model_type: Hugging Face's name of the family.
        rope_inv_freq: rotary inverse frequencies [head_dim / 2], float32 values, scaling already applied.
        rope_attention_factor: what the rotary cosines and sines are multiplied by (1 but for yarn).
        sliding_windows: per layer, how many positions a token sees, its own included; 0 means all.
        sparse_layers: per layer, whether it has a mixture of experts in place of the one MLP.
        num_experts: of a sparse layer; 0 in a dense model, whose next five are of no meaning.
        moe_intermediate_size: intermediate size of an expert.
        norm_topk_prob: whether the probabilities of a token's experts are made to add up to 1.
        moe_block: the module of a sparse layer that holds the router, `gate`, and `experts`.
        expert_linears: names of an expert's gate, up and down projection.
        The others are as Hugging Face names them; `attention_bias` is split in two.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias_qkv: bool
    attention_bias_o: bool
    mlp_bias: bool
    qk_norm: bool
    rope_inv_freq: tuple[float, ...]
    rope_attention_factor: float
    sliding_windows: tuple[int, ...]
    sparse_layers: tuple[bool, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    moe_block: str
    expert_linears: tuple[str, str, str]


@dataclass(frozen=True)
class _Mixture:
    """How the experts of a family are named and configured.

    `intermediate_size` is the config key of an expert's size; `norm_topk_prob` is True, or the key.
    """

    moe_block: str
    expert_linears: tuple[str, str, str]
    intermediate_size: str
    norm_topk_prob: bool | str
    sparse_layers: Callable[[ConfigReader, int], tuple[bool, ...]]


@dataclass(frozen=True)
class _Family:
    """How one `model_type` differs. A bias is True, False, or the config key that decides.

    `defaults` are what transformers' config class supplies for keys that `config.json` leaves out.
    """

    attention_bias_qkv: bool | str
    attention_bias_o: bool | str
    mlp_bias: bool | str
    qk_norm: bool
    sliding_windows: Callable[[ConfigReader, int], tuple[int, ...]]
    defaults: Mapping[str, Any]
    mixture: _Mixture | None = None


def _no_windows(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    return (0,) * layers


def _mistral_windows(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    if reader.get("sliding_window") is None:
        return (0,) * layers
    return (reader.integer("sliding_window", MAX_POSITIONS),) * layers


def _qwen_windows(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    """`layer_types` where it is given, else the layers from `max_window_layers` on."""
    window = 0
    if reader.flag("use_sliding_window") and reader.get("sliding_window") is not None:
        window = reader.integer("sliding_window", MAX_POSITIONS)
    types = reader.get("layer_types")
    if types is None:
        first = reader.integer("max_window_layers", _MAX_LAYERS, low=0)
        return tuple(window if layer >= first else 0 for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        raise ConfigError(f"config.json: layer_types must be a list of num_hidden_layers = {layers} names")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise UnsupportedArchitectureError(
                f"layer type {name!r:.80} is not supported; only full_attention and sliding_attention are"
            )
        if name == "sliding_attention" and window == 0:
            raise ConfigError(
                "config.json: layer_types names sliding_attention layers, "
                "but use_sliding_window or sliding_window is off"
            )
    return tuple(window if name == "sliding_attention" else 0 for name in types)


def _qwen_moe_windows(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    """All layers or none: transformers reads neither `layer_types` nor `max_window_layers` here."""
    return _mistral_windows(reader, layers) if reader.flag("use_sliding_window") else (0,) * layers


def _all_sparse(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    return (True,) * layers


def _qwen_sparse_layers(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer that is not in `mlp_only_layers`."""
    step = reader.integer("decoder_sparse_step", _MAX_LAYERS)
    dense = [] if reader.get("mlp_only_layers") is None else reader.get("mlp_only_layers")
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigError("config.json: mlp_only_layers must be a list of layer numbers")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


_COMMON_DEFAULTS: Mapping[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_QWEN_DEFAULTS = {
    **_COMMON_DEFAULTS,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, _Family] = {
    # Also TinyLlama, SmolLM and other models that say model_type "llama".
    "llama": _Family(
        attention_bias_qkv="attention_bias",
        attention_bias_o="attention_bias",
        mlp_bias="mlp_bias",
        qk_norm=False,
        sliding_windows=_no_windows,
        defaults={**_COMMON_DEFAULTS, "max_position_embeddings": 2048},
    ),
    "mistral": _Family(
        attention_bias_qkv=False,
        attention_bias_o=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=_mistral_windows,
        defaults={**_COMMON_DEFAULTS, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": _Family(
        attention_bias_qkv=True,
        attention_bias_o=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=_qwen_windows,
        defaults=_QWEN_DEFAULTS,
    ),
    "qwen3": _Family(
        attention_bias_qkv="attention_bias",
        attention_bias_o="attention_bias",
        mlp_bias=False,
        qk_norm=True,
        sliding_windows=_qwen_windows,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    "qwen3_moe": _Family(
        attention_bias_qkv="attention_bias",
        attention_bias_o="attention_bias",
        mlp_bias=False,
        qk_norm=True,
        sliding_windows=_qwen_moe_windows,
        defaults={**_QWEN_DEFAULTS, "decoder_sparse_step": 1},
        mixture=_Mixture(
            moe_block="mlp",
            expert_linears=_MLP_LINEARS,
            intermediate_size="moe_intermediate_size",
            norm_topk_prob="norm_topk_prob",
            sparse_layers=_qwen_sparse_layers,
        ),
    ),
    "mixtral": _Family(
        attention_bias_qkv=False,
        attention_bias_o=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=_mistral_windows,
        defaults={
            **_COMMON_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
        },
        mixture=_Mixture(
            moe_block="block_sparse_moe",
            expert_linears=("w1", "w3", "w2"),
            intermediate_size="intermediate_size",
            norm_topk_prob=True,
            sparse_layers=_all_sparse,
        ),
    ),
}

#: How the projections of MLPs are named, in the order of `_MLP_LINEARS`.
_MLP_NAMES = {_MLP_LINEARS, *(row.mixture.expert_linears for row in FAMILIES.values() if row.mixture)}


def engine_config(config: Mapping[str, Any]) -> EngineConfig:
    """Read a Hugging Face `config.json`, in the spelling of transformers 4 or 5.

    Args:
        config: the parsed JSON, untrusted.

    Raises:
        UnsupportedArchitectureError: another family, or an option that the engine does not run.
        ConfigError: a required key is missing, malformed, out of range, or contradicts another.
    """
    if not isinstance(config, Mapping):
        raise ConfigError("config.json must hold a JSON object")
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedArchitectureError(_unsupported_family(config))

    reader = ConfigReader(config, family.defaults, "config.json")
    activation = reader.text("hidden_act")
    if activation != "silu":
        raise UnsupportedArchitectureError(f"hidden_act {activation!r:.80} is not supported; only 'silu' is")

    hidden_size = reader.integer("hidden_size", _MAX_FEATURES)
    layers = reader.integer("num_hidden_layers", _MAX_LAYERS)
    heads = reader.integer("num_attention_heads", _MAX_FEATURES)
    if reader.get("num_key_value_heads") is None:
        kv_heads = heads  # Llama 1 configs have none
    else:
        kv_heads = reader.integer("num_key_value_heads", _MAX_FEATURES)
    if heads % kv_heads != 0:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = _head_dim(reader, hidden_size, heads)
    max_positions = reader.integer("max_position_embeddings", MAX_POSITIONS)
    inv_freq, attention_factor = rotary_frequencies(reader, head_dim, max_positions)

    return EngineConfig(
        model_type=str(model_type),
        vocab_size=reader.integer("vocab_size", _MAX_VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size", _MAX_FEATURES),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=reader.number("rms_norm_eps", 0.0, 1.0),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        attention_bias_qkv=reader.boolean(family.attention_bias_qkv),
        attention_bias_o=reader.boolean(family.attention_bias_o),
        mlp_bias=reader.boolean(family.mlp_bias),
        qk_norm=family.qk_norm,
        rope_inv_freq=inv_freq,
        rope_attention_factor=attention_factor,
        sliding_windows=family.sliding_windows(reader, layers),
        **_experts(reader, family.mixture, layers),
    )


def block_linears(config: EngineConfig) -> list[LinearSpec]:
    """The linear modules of all decoder blocks, in the order the engine uses them; routers apart."""
    hidden = config.hidden_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    attention = (
        LinearSpec("self_attn.q_proj", q_size, hidden),
        LinearSpec("self_attn.k_proj", kv_size, hidden),
        LinearSpec("self_attn.v_proj", kv_size, hidden),
        LinearSpec("self_attn.o_proj", hidden, q_size),
    )

    def mlp(block: str, names: tuple[str, str, str], intermediate: int) -> list[LinearSpec]:
        gate, up, down = (f"{block}.{name}" for name in names)
        return [
            LinearSpec(gate, intermediate, hidden),
            LinearSpec(up, intermediate, hidden),
            LinearSpec(down, hidden, intermediate),
        ]

    dense = mlp("mlp", _MLP_LINEARS, config.intermediate_size)
    experts = [
        linear
        for expert in range(config.num_experts)
        for linear in mlp(
            f"{config.moe_block}.experts.{expert}", config.expert_linears, config.moe_intermediate_size
        )
    ]
    return [
        linear._replace(name=f"model.layers.{layer}.{linear.name}")
        for layer, sparse in enumerate(config.sparse_layers)
        for linear in (*attention, *(experts if sparse else dense))
    ]


def routers(config: EngineConfig) -> list[LinearSpec]:
    """The linear modules that choose each token's experts, one per sparse layer. They are never quantized."""
    shape = (config.num_experts, config.hidden_size)
    return [
        LinearSpec(f"model.layers.{layer}.{config.moe_block}.{_ROUTER}", *shape)
        for layer, sparse in enumerate(config.sparse_layers)
        if sparse
    ]


def mlp_of(module: str) -> tuple[str, str, str] | None:
    """Full names of the gate, up and down projection of the MLP or expert that a linear module is part of.

    Returns:
        None if it is not part of any.
    """
    block, _, name = module.rpartition(".")
    for names in _MLP_NAMES:
        if name in names:
            gate, up, down = names
            return f"{block}.{gate}", f"{block}.{up}", f"{block}.{down}"
    return None


def kind_of(module: str) -> str:
    """What a linear module does, in the same words for all families.

    Returns:
        "embedding", "head", "router", or "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
        "down_proj".
    """
    if mlp := mlp_of(module):
        return _MLP_LINEARS[mlp.index(module)]
    name = module.rpartition(".")[2]
    return {EMBEDDING: "embedding", HEAD: "head"}.get(module, "router" if name == _ROUTER else name)


def outer_linears(config: EngineConfig) -> list[LinearSpec]:
    """The embedding (vocab_size, hidden_size) and, unless it is tied to it, the head."""
    embedding = LinearSpec(EMBEDDING, config.vocab_size, config.hidden_size)
    if config.tie_word_embeddings:
        return [embedding]
    return [embedding, LinearSpec(HEAD, config.vocab_size, config.hidden_size)]


def vectors(config: EngineConfig) -> list[VectorSpec]:
    """Norm weights and biases of the whole model."""
    result = []
    with_bias = {
        "q_proj": config.attention_bias_qkv,
        "k_proj": config.attention_bias_qkv,
        "v_proj": config.attention_bias_qkv,
        "o_proj": config.attention_bias_o,
        "gate_proj": config.mlp_bias,
        "up_proj": config.mlp_bias,
        "down_proj": config.mlp_bias,
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        result.append(VectorSpec(f"{prefix}.input_layernorm.weight", config.hidden_size))
        result.append(VectorSpec(f"{prefix}.post_attention_layernorm.weight", config.hidden_size))
        if config.qk_norm:
            result.append(VectorSpec(f"{prefix}.self_attn.q_norm.weight", config.head_dim))
            result.append(VectorSpec(f"{prefix}.self_attn.k_norm.weight", config.head_dim))
    result.extend(
        VectorSpec(f"{linear.name}.bias", linear.out_features)
        for linear in block_linears(config)
        if with_bias[kind_of(linear.name)]
    )
    result.append(VectorSpec(FINAL_NORM, config.hidden_size))
    return result


def _unsupported_family(config: Mapping[str, Any]) -> str:
    supported = ", ".join(FAMILIES)
    if config.get("model_type") is None:
        what = "config.json has no model_type"
    else:
        what = f"model_type {config['model_type']!r:.80} is not supported"
    return f"{what}; use a causal language model of one of the families {supported}"


def _experts(reader: ConfigReader, mixture: _Mixture | None, layers: int) -> dict[str, Any]:
    """The part of an EngineConfig that describes experts."""
    if mixture is None:
        return {
            "sparse_layers": (False,) * layers,
            "num_experts": 0,
            "num_experts_per_tok": 0,
            "moe_intermediate_size": 0,
            "norm_topk_prob": False,
            "moe_block": "mlp",
            "expert_linears": _MLP_LINEARS,
        }
    sparse = mixture.sparse_layers(reader, layers)
    # transformers 5 writes num_local_experts for every family, Qwen's own configs say num_experts.
    counts = [
        reader.integer(key, _MAX_EXPERTS)
        for key in ("num_local_experts", "num_experts")
        if reader.get(key) is not None
    ]
    experts = counts[0] if counts else reader.integer("num_local_experts", _MAX_EXPERTS)
    if counts[1:] not in ([], [experts]):
        raise ConfigError(
            f"config.json: num_local_experts {experts} is not num_experts {counts[1]}; they must agree"
        )
    if sum(sparse) * experts > _MAX_EXPERTS_IN_ALL:
        raise ConfigError(
            f"config.json: {sum(sparse)} layers of num_experts {experts} exceed {_MAX_EXPERTS_IN_ALL} experts"
        )
    return {
        "sparse_layers": sparse,
        "num_experts": experts,
        "num_experts_per_tok": reader.integer("num_experts_per_tok", experts),
        "moe_intermediate_size": reader.integer(mixture.intermediate_size, _MAX_FEATURES),
        "norm_topk_prob": reader.boolean(mixture.norm_topk_prob),
        "moe_block": mixture.moe_block,
        "expert_linears": mixture.expert_linears,
    }


def _head_dim(reader: ConfigReader, hidden_size: int, heads: int) -> int:
    if reader.get("head_dim") is not None:
        head_dim = reader.integer("head_dim", _MAX_FEATURES)
    elif hidden_size % heads == 0:
        head_dim = hidden_size // heads
    else:
        raise ConfigError(
            f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
        )
    if head_dim % 8 != 0:
        raise UnsupportedArchitectureError(
            f"head_dim {head_dim} is not supported; it must be a multiple of 8"
        )
    if heads * head_dim > _MAX_FEATURES:
        raise ConfigError(
            f"config.json: num_attention_heads x head_dim = {heads * head_dim} exceeds {_MAX_FEATURES}"
        )
    return head_dim
