"""Writes the golden folders from the text of docs/format.md alone: none of the package's code is used.

Run it only when the format gets a new version:  python tests/golden/make_golden.py
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "hlq-v1"
FOLDER_V2 = Path(__file__).parent / "hlq-v2"

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, VOCABULARY = 40, 36, 5, 8, 11

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "hlq",
        "version": 1,
        "bits": 2,
        "group_size": 32,
        "modules": {
            "lm_head": {"bits": 4, "group_size": 128},
            "model.layers.0.mlp.up_proj": {"bits": 1, "group_size": 64},
            "model.layers.0.self_attn.q_proj": {"bits": 3, "group_size": -1},
        },
        "modules_to_not_convert": ["model.layers.0.self_attn.o_proj"],
    },
}

LAYER = "model.layers.0"
#: The same model in version 2: `up_proj` has parameters of 16 bits, all other matrices of 8.
CONFIG_V2 = {
    **CONFIG,
    "quantization_config": {
        "quant_method": "hlq",
        "version": 2,
        "bits": 2,
        "group_size": 32,
        "param_bits": 8,
        "modules": {
            "lm_head": {"bits": 4, "group_size": 128, "param_bits": 8},
            "model.layers.0.mlp.up_proj": {"bits": 1, "group_size": 64},
            "model.layers.0.self_attn.q_proj": {"bits": 3, "group_size": -1, "param_bits": 8},
        },
        "modules_to_not_convert": ["model.layers.0.self_attn.o_proj"],
    },
}
HALF_MODULES_V2 = (f"{LAYER}.mlp.up_proj",)

#: name, out_features, in_features, bits, columns per group
QUANTIZED = (
    (f"{LAYER}.self_attn.q_proj", 40, 40, 3, 40),
    (f"{LAYER}.self_attn.k_proj", 8, 40, 2, 32),
    (f"{LAYER}.self_attn.v_proj", 8, 40, 2, 32),
    (f"{LAYER}.mlp.gate_proj", 36, 40, 2, 32),
    (f"{LAYER}.mlp.up_proj", 36, 40, 1, 64),
    (f"{LAYER}.mlp.down_proj", 40, 36, 2, 32),
    ("lm_head", 11, 40, 4, 128),
)


def code(module: int, row: int, column: int, bits: int) -> int:
    """The bits of a weight, plane 0 lowest: any fixed pattern without symmetry."""
    return (module * 7 + row * 5 + column * 3 + row * column) % (1 << bits)


def scale(module: int, row: int, group: int, plane: int) -> np.float16:
    """Small dyadic numbers, some of them negative, so that float16 and float32 sums are exact."""
    return np.float16((module + 2 * row + 3 * group + 1) % 13 / 64 * 2**plane * (-1 if row % 7 == 6 else 1))


def zero(module: int, row: int, group: int) -> np.float16:
    return np.float16(((module + row + 5 * group) % 17 - 8) / 32)


def byte_scale(module: int, row: int, group: int, plane: int) -> int:
    """A scale of 8 bits, anything from 0 to 255; rows 10, 21, 32 are zero."""
    return 0 if row % 11 == 10 else (31 * module + 7 * row + 3 * group + 61 * plane) % 256


def byte_zero(module: int, row: int, group: int) -> int:
    return 0 if row % 11 == 10 else (17 * module + 5 * row + 11 * group) % 256 - 128


def row_scale(module: int, row: int) -> np.float16:
    """Of few bits and many, the smallest there is, and 0 for a row of zeros."""
    if row % 11 == 10:
        return np.float16(0)
    return np.float16(2.0**-24 if row == 7 else (module + 1 + row / 1024) / 512)


def quantized_tensors(version: int = 1) -> dict[str, tuple[str, list[int], bytes]]:
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for module, (name, rows, columns, bits, width) in enumerate(QUANTIZED):
        groups = -(-columns // width)
        row_bytes = -(-columns // 8)
        planes = bytearray(bits * rows * row_bytes)
        for plane in range(bits):
            for row in range(rows):
                for k in range(columns):
                    bit = code(module, row, k, bits) >> plane & 1
                    planes[(plane * rows + row) * row_bytes + k // 8] |= bit << k % 8
        in_bytes = version == 2 and name not in HALF_MODULES_V2
        scale_of, zero_of = (byte_scale, byte_zero) if in_bytes else (scale, zero)
        scale_type, zero_type = (("U8", "u1"), ("I8", "i1")) if in_bytes else (("F16", "<f2"), ("F16", "<f2"))
        scales = [
            scale_of(module, row, g, plane)
            for row in range(rows)
            for g in range(groups)
            for plane in range(bits)
        ]
        zeros = [zero_of(module, row, g) for row in range(rows) for g in range(groups)]
        tensors[f"{name}.planes"] = ("U8", [bits, rows, row_bytes], bytes(planes))
        tensors[f"{name}.scales"] = (
            scale_type[0],
            [rows, groups, bits],
            np.array(scales, scale_type[1]).tobytes(),
        )
        tensors[f"{name}.zeros"] = (zero_type[0], [rows, groups], np.array(zeros, zero_type[1]).tobytes())
        if in_bytes:
            row_scales = np.array([row_scale(module, row) for row in range(rows)], "<f2")
            tensors[f"{name}.row_scales"] = ("F16", [rows], row_scales.tobytes())
    return tensors


def other_tensors() -> dict[str, tuple[str, list[int], bytes]]:
    embedding = (
        np.arange(VOCABULARY * HIDDEN, dtype="<u2") % 97 + 0x3C00
    )  # bit patterns of bfloat16 below 0.01
    output = np.sin(np.arange(HIDDEN * HIDDEN)).reshape(HIDDEN, HIDDEN).round(2)
    norm = np.linspace(0.5, 1.5, HIDDEN)
    return {
        "model.embed_tokens.weight": ("BF16", [VOCABULARY, HIDDEN], embedding.tobytes()),
        f"{LAYER}.self_attn.o_proj.weight": ("F16", [HIDDEN, HIDDEN], output.astype("<f2").tobytes()),
        f"{LAYER}.input_layernorm.weight": ("F32", [HIDDEN], norm.astype("<f4").tobytes()),
        f"{LAYER}.post_attention_layernorm.weight": ("F16", [HIDDEN], norm.astype("<f2").tobytes()),
        "model.norm.weight": ("F32", [HIDDEN], norm[::-1].astype("<f4").tobytes()),
    }


def weight(module: int, row: int, column: int, version: int = 1) -> float:
    """The value of a quantized weight, naively."""
    name, _, _, bits, width = QUANTIZED[module]
    group = column // width
    if version == 2 and name not in HALF_MODULES_V2:
        total = byte_zero(module, row, group)
        for plane in range(bits):
            total += byte_scale(module, row, group, plane) * (code(module, row, column, bits) >> plane & 1)
        return float(np.float32(row_scale(module, row)) * np.float32(total))
    value = np.float32(zero(module, row, group))
    for plane in range(bits):
        if code(module, row, column, bits) >> plane & 1:
            value += np.float32(scale(module, row, group, plane))
    return float(value)


def encode(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file of name -> (dtype, shape, data), in this order."""
    header = {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def decode(file: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """The reverse of `encode`."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], file[start + begin : start + end])
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def main() -> None:
    for version, folder, config in ((1, FOLDER, CONFIG), (2, FOLDER_V2, CONFIG_V2)):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {**other_tensors(), **quantized_tensors(version)}
        width = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}
        ordered = dict(sorted(tensors.items(), key=lambda item: (-width[item[1][0]], item[0])))
        (folder / "model.safetensors").write_bytes(encode(ordered))


if __name__ == "__main__":
    main()
