"""Rotary frequencies from a `config.json`, in every scaling that the engine runs."""

import math
import struct
from collections.abc import Mapping

from elutq.config_reader import ConfigReader
from elutq.errors import ConfigError, UnsupportedArchitectureError

MAX_POSITIONS = 1 << 24
"""float32 holds every position exactly, as transformers' rotary embedding needs."""


def _float32(value: float) -> float:
    """Nearest float32: frequencies are rounded where transformers rounds them."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def rotary_frequencies(
    reader: ConfigReader, head_dim: int, max_positions: int
) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies [head_dim / 2] and the factor on cosines and sines.

    With theta the base and i = 0 .. head_dim/2 - 1 (Su et al. 2021; Hugging Face's `modeling_rope_utils`):

        default   f_i = theta ** (-2 i / head_dim)
        linear    f_i / factor
        llama3    f_i                   for wavelengths 2 pi / f_i below original / high_freq_factor,
                  f_i / factor          for those above original / low_freq_factor,
                  ((1 - s) / factor + s) * f_i between, s = (original * f_i / (2 pi) - low) / (high - low)
        yarn      (r_i / factor + 1 - r_i) * f_i, r a linear ramp between the dimensions that turn beta_fast
                  and beta_slow times within the original context (Peng et al. 2023); cosines and sines are
                  multiplied by 0.1 ln(factor) + 1, unless the config states the factor

    `original` is original_max_position_embeddings. Both spellings are read: `rope_scaling` beside
    `rope_theta` (transformers 4) and `rope_parameters` (transformers 5).
    """
    section = reader.section("rope_scaling") or reader.section("rope_parameters")
    if any(isinstance(value, Mapping) for value in section.values()):
        raise UnsupportedArchitectureError(
            "rotary parameters that differ by layer type are not supported; use a model with one set"
        )
    inherited = {
        "rope_theta": reader.get("rope_theta"),
        "partial_rotary_factor": reader.get("partial_rotary_factor"),
        "rope_type": section.get("type", "default"),
        "original_max_position_embeddings": max_positions,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }
    stated = {key: value for key, value in section.items() if value is not None}
    rope = ConfigReader(stated, inherited, "config.json: rope_parameters")
    theta = rope.number("rope_theta", 1.0001, 1e30)
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UnsupportedArchitectureError(
            f"partial_rotary_factor {rope.get('partial_rotary_factor')!r:.80} is not supported; "
            "all of a head must be rotated"
        )
    base = [_float32(theta ** (2 * i / head_dim)) for i in range(head_dim // 2)]
    rope_type = rope.text("rope_type")
    if rope_type == "default":
        return tuple(_float32(1.0 / b) for b in base), 1.0
    if rope_type == "linear":
        factor = rope.number("factor", 1.0, 1e6)
        return tuple(_float32(_float32(1.0 / b) / factor) for b in base), 1.0
    if rope_type == "llama3":
        return tuple(_llama3(rope, [_float32(1.0 / b) for b in base])), 1.0
    if rope_type == "yarn":
        return _yarn(rope, head_dim, theta, base)
    raise UnsupportedArchitectureError(
        f"rope_type {rope_type!r:.80} is not supported; default, linear, llama3 and yarn are"
    )


def _llama3(rope: ConfigReader, frequencies: list[float]) -> list[float]:
    factor = rope.number("factor", 1.0, 1e6)
    low = rope.number("low_freq_factor", 1e-6, 1e6)
    high = rope.number("high_freq_factor", 1e-6, 1e6)
    original = rope.integer("original_max_position_embeddings", MAX_POSITIONS)
    if high <= low:
        raise ConfigError(
            f"config.json: rope_parameters: high_freq_factor {high:g} must exceed low_freq_factor {low:g}"
        )

    def scaled(frequency: float) -> float:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            return frequency
        if wavelength > original / low:
            return frequency / factor
        smooth = (original / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    return [_float32(scaled(frequency)) for frequency in frequencies]


def _yarn(
    rope: ConfigReader, head_dim: int, theta: float, base: list[float]
) -> tuple[tuple[float, ...], float]:
    factor = rope.number("factor", 1.0, 1e6)
    original = rope.integer("original_max_position_embeddings", MAX_POSITIONS)

    def dimension(rotations: float) -> float:
        """The dimension that makes this many turns within the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = dimension(rope.number("beta_fast", 1e-6, 1e6))
    last = dimension(rope.number("beta_slow", 1e-6, 1e6))
    if rope.flag("truncate"):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001

    def scaled(i: int) -> float:
        ramp = min(max((i - first) / width, 0.0), 1.0)
        return ramp / (factor * base[i]) + (1 - ramp) / base[i]

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        attention = rope.number("attention_factor", 1e-6, 1e6)
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        mscale, mscale_all_dim = rope.number("mscale", 0.0, 1e6), rope.number("mscale_all_dim", 0.0, 1e6)
        attention = magnitude(mscale) / magnitude(mscale_all_dim)
    else:
        attention = magnitude(1.0)
    return tuple(_float32(scaled(i)) for i in range(head_dim // 2)), attention
