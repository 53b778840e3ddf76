"""Decoder blocks with random weights, to measure quantization on: where they are read from, where they go."""

import re
import zlib

import numpy as np
from numpy.typing import NDArray

from elutq import hlq
from elutq.architectures import block_linears, engine_config
from elutq.layerwise import Outcome
from elutq.packing import HlqMatrix
from elutq.shapes import SHAPES


class RandomModel:
    """Blocks of a shape, all alike, as a source of weights.

    Attributes:
        quantized: matrices by module of the first block; those not in it are quantized without data, once
            they are read.
    """

    def __init__(self, shape: str, blocks: int = 1) -> None:
        self.config = {**SHAPES[shape], "num_hidden_layers": blocks}
        self.engine = engine_config(self.config)
        self._shapes = {
            f"{name}.weight": (rows, columns) for name, rows, columns in block_linears(self.engine)
        }
        outer = (self.engine.vocab_size, self.engine.hidden_size)
        self.quantized: dict[str, HlqMatrix] = {}
        self._kept: dict[str, NDArray[np.float32]] = {}
        self._shapes |= {"model.embed_tokens.weight": outer, "lm_head.weight": outer}

    def read_float32(self, name: str, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Normal numbers that keep outputs as large as inputs, others for each first row; ones for a norm."""
        name = _in_first_block(name)
        if name not in self._shapes:
            return np.ones(self.engine.hidden_size, np.float32)[rows]
        if rows != slice(None):
            return self._draw(name, rows)
        if name not in self._kept:
            self._kept[name] = self._draw(name, rows)
        return self._kept[name]

    def _draw(self, name: str, rows: slice) -> NDArray[np.float32]:
        count, columns = self._shapes[name]
        first, stop, _ = rows.indices(count)
        random = np.random.default_rng([zlib.crc32(name.encode()), first])
        return random.standard_normal((stop - first, columns), np.float32) * np.float32(columns**-0.5)

    def read_hlq(self, module: str) -> HlqMatrix:
        """The same, quantized without data on a uniform grid; kept."""
        module = _in_first_block(module)
        if module not in self.quantized:
            weight = self.read_float32(f"{module}.weight")
            self.quantized[module] = hlq.fit(weight, 2, 128, method="uniform")
        return self.quantized[module]

    def release(self, name: str) -> None:
        """Nothing is kept."""


def _in_first_block(name: str) -> str:
    return re.sub(r"^model\.layers\.\d+\.", "model.layers.0.", name)


class Memory:
    """A store of matrices that is no file."""

    def __init__(self) -> None:
        self.matrices: dict[str, HlqMatrix] = {}

    def __contains__(self, module: object) -> bool:
        return module in self.matrices

    def get(self, module: str) -> HlqMatrix | None:
        """A matrix, if it is here."""
        return self.matrices.get(module)

    def put(self, module: str, matrix: HlqMatrix, outcome: Outcome, error: tuple[float, float]) -> None:
        """Keep it."""
        self.matrices[module] = matrix

    def outcome(self, module: str) -> Outcome:
        """Not kept."""
        raise KeyError(module)

    def flush(self) -> None:
        """Nothing to do."""
