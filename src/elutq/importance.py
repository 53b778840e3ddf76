"""How much each input column of a linear matters, estimated from the weights alone.

The error that a perturbed weight matrix W + D makes on inputs x is E||D x||^2. With uncorrelated inputs that
is sum_k a_k ||D[:, k]||^2, a_k = E[x_k^2]: the importance of column k. Calibration measures it; without data
it follows from what produces x, taking normalized activations n (RMSNorm without its weight g) for isotropic,
E[n_k^2] = 1:

    after an RMSNorm (q, k, v, gate, up, head)   x = g n            a_k = g_k^2
    o_proj     x_k averages a channel of v       v = V (g n) + b    a_k = sum_j (V_kj g_j)^2 + b_k^2
    down_proj  x_k = silu(gate_k) up_k           leading order      a_k = E[gate_k^2] E[up_k^2], each as for v

An expert is taken for an MLP that sees every token. Only ratios inside a group of columns count. Real
activations are not isotropic, so this is an estimate; what it gains is in `docs/accuracy.md`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from elutq.architectures import FINAL_NORM, EngineConfig, kind_of, mlp_of
from elutq.errors import TensorValueError

Read = Callable[[str, slice], NDArray[np.float32]]
"""(tensor name, rows) -> those rows in float32."""

_WEIGHTS_AT_ONCE = 1 << 22
_ALL = slice(None)


def input_importance(module: str, engine: EngineConfig, read: Read) -> NDArray[np.float32] | None:
    """Importances of the input columns of a linear module, float32 (in_features,), the largest being 1.

    Args:
        module: name of a linear module of the model, without `.weight`.
        engine: the model's numbers.
        read: reads rows of a tensor of the model.

    Returns:
        None for the embedding, whose columns are outputs, and where the estimate is zero throughout.

    Raises:
        TensorValueError: a tensor that the estimate is made from holds NaN or infinity.
    """
    kind = kind_of(module)
    layer = ".".join(module.split(".")[:3])  # model.layers.N
    if kind in ("q_proj", "k_proj", "v_proj"):
        energy = _after_norm(f"{layer}.input_layernorm.weight", read)
    elif kind in ("gate_proj", "up_proj"):
        energy = _after_norm(f"{layer}.post_attention_layernorm.weight", read)
    elif kind == "head":
        energy = _after_norm(FINAL_NORM, read)
    elif kind == "o_proj":
        norm, bias = f"{layer}.input_layernorm.weight", engine.attention_bias_qkv
        value = _after_linear(f"{layer}.self_attn.v_proj", bias, norm, read)
        shared = engine.num_attention_heads // engine.num_key_value_heads
        energy = value.reshape(-1, engine.head_dim).repeat(shared, axis=0).reshape(-1)
    elif mlp := mlp_of(module):
        gate, up, _ = mlp
        norm, bias = f"{layer}.post_attention_layernorm.weight", engine.mlp_bias
        energy = _after_linear(gate, bias, norm, read) * _after_linear(up, bias, norm, read)
    else:
        return None
    largest = energy.max()
    if not np.isfinite(largest):
        raise TensorValueError(
            f"the norms or projections in front of {module} hold NaN or infinity; check the source model"
        )
    return (energy / largest).astype(np.float32) if largest > 0 else None


def _after_norm(norm: str, read: Read) -> NDArray[np.float64]:
    return np.square(read(norm, _ALL).astype(np.float64))


def _after_linear(module: str, bias: bool, norm: str, read: Read) -> NDArray[np.float64]:
    """E[(W g n + b)^2] of each output, float64 (out_features,)."""
    energy = np.square(read(f"{module}.bias", _ALL).astype(np.float64)) if bias else 0.0
    column_energy = _after_norm(norm, read).astype(np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // column_energy.size)
    pieces, first = [], 0
    while (rows := read(f"{module}.weight", slice(first, first + step))).size:
        pieces.append((np.square(rows) @ column_energy).astype(np.float64))
        first += step
    return np.concatenate(pieces) + energy
