"""GGUF models of a known shape with random weights, for llama.cpp and its forks.

Follows the specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), version 3. Every block
linear has one type, the head Q4_K, the embedding Q4_0: no wider than what the programs would mix in
themselves.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elutq.architectures import EngineConfig, block_linears

_ALIGNMENT = 32
_F32 = 0

BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class BlockType:
    """A quantized type. Any bits but those of floating-point scales are valid weights.

    Attributes:
        number: its number in GGUF files.
        values: weights of a block.
        nbytes: bytes of a block.
        halves: offsets of a block's fp16 scales.
        row_scale: a scale at the start of each row instead, as numpy dtype.
    """

    number: int
    values: int
    nbytes: int
    halves: tuple[int, ...] = ()
    row_scale: str | None = None

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        scale = np.dtype(self.row_scale).itemsize if self.row_scale else 0
        return scale + columns // self.values * self.nbytes

    def random(self, random: np.random.Generator, rows: int, columns: int) -> NDArray[np.uint8]:
        """A matrix of small weights, uint8 [rows, bytes of a row]."""
        matrix = np.frombuffer(random.bytes(rows * self.row_bytes(columns)), np.uint8).copy()
        matrix = matrix.reshape(rows, -1)
        blocks = matrix[:, -(columns // self.values) * self.nbytes :]
        for offset in self.halves:
            for byte, value in enumerate(np.float16(0.0025).tobytes()):
                blocks[:, offset + byte :: self.nbytes] = value
        if self.row_scale:
            scale = np.frombuffer(np.array(0.0025, self.row_scale).tobytes(), np.uint8)
            matrix[:, : scale.size] = scale
        return matrix


#: Those of llama.cpp, then those that ik_llama.cpp adds.
TYPES = {
    "Q4_0": BlockType(2, 32, 18, (0,)),
    "Q2_K": BlockType(10, 256, 84, (80, 82)),
    "Q3_K": BlockType(11, 256, 110, (108,)),
    "Q4_K": BlockType(12, 256, 144, (0, 2)),
    "TQ2_0": BlockType(35, 256, 66, (64,)),
    "IQ2_K": BlockType(137, 256, 76, (0,)),
    "IQ3_K": BlockType(138, 256, 110, (0,)),
    "IQ4_K": BlockType(139, 256, 144, (0,)),
    "IQ4_KS": BlockType(144, 256, 136, row_scale="<f4"),
    "IQ2_KS": BlockType(145, 256, 70, row_scale="<f2"),
}


def token_bytes(config: EngineConfig, kind: str) -> int:
    """Bytes of weights that a decoded token reads: all, but one row of an embedding that is not the head."""
    row_of = None if config.tie_word_embeddings else "token_embd.weight"
    return sum(
        _nbytes(1 if name == row_of else rows, columns, block)
        for name, rows, columns, block in _tensors(config, kind)
    )


def write_random_gguf(config: EngineConfig, kind: str, path: Path) -> None:
    """Write a Llama of this shape.

    Args:
        config: the shape.
        kind: type of the block linears, a name in `TYPES`.
        path: the file to make.
    """
    tensors = list(_tensors(config, kind))
    header = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields := _fields(config))))
    for key, value in fields.items():
        header += _string(key) + value
    offset = 0
    for name, rows, columns, block in tensors:
        shape = (columns, rows) if block else (columns,)
        number = block.number if block else _F32
        header += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)
        offset += _padded(_nbytes(rows, columns, block))
    header += bytes(_padded(len(header)) - len(header))

    random = np.random.Generator(np.random.SFC64(0))
    with path.open("wb") as file:
        file.write(header)
        for _, rows, columns, block in tensors:
            data = block.random(random, rows, columns) if block else np.ones((rows, columns), np.float32)
            file.write(data.data)
            file.write(bytes(_padded(data.nbytes) - data.nbytes))


def _tensors(config: EngineConfig, kind: str) -> Iterator[tuple[str, int, int, BlockType | None]]:
    """Name, rows, columns and type of every tensor; vectors are one row of float32."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    yield "token_embd.weight", vocabulary, hidden, TYPES["Q4_0"]
    if not config.tie_word_embeddings:
        yield "output.weight", vocabulary, hidden, TYPES["Q4_K"]
    yield "output_norm.weight", 1, hidden, None
    for name, rows, columns in block_linears(config):
        layer, module = name.removeprefix("model.layers.").split(".", 1)
        yield f"blk.{layer}.{BLOCK_NAMES[module]}.weight", rows, columns, TYPES[kind]
    for layer in map(str, range(config.num_hidden_layers)):
        yield f"blk.{layer}.attn_norm.weight", 1, hidden, None
        yield f"blk.{layer}.ffn_norm.weight", 1, hidden, None


def _fields(config: EngineConfig) -> dict[str, bytes]:
    """The model's metadata: key -> type and value."""

    def text(value: str) -> bytes:
        return struct.pack("<I", 8) + _string(value)

    def integer(value: int) -> bytes:
        return struct.pack("<II", 4, value)

    return {
        "general.architecture": text("llama"),
        "tokenizer.ggml.model": text("no_vocab"),
        "llama.vocab_size": integer(config.vocab_size),
        "llama.context_length": integer(config.max_position_embeddings),
        "llama.embedding_length": integer(config.hidden_size),
        "llama.block_count": integer(config.num_hidden_layers),
        "llama.feed_forward_length": integer(config.intermediate_size),
        "llama.attention.head_count": integer(config.num_attention_heads),
        "llama.attention.head_count_kv": integer(config.num_key_value_heads),
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", 6, config.rms_norm_eps),
        "llama.rope.dimension_count": integer(config.head_dim),
    }


def _string(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _nbytes(rows: int, columns: int, block: BlockType | None) -> int:
    return rows * (block.row_bytes(columns) if block else columns * 4)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
