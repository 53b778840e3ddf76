"""One quantized matrix, and bit planes <-> codes.

A code is the integer `sum_p bit_p * 2**p`; the planes hold its bits, plane p first to last, least significant
column first (`docs/format.md`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class HlqMatrix:
    """An HLQ matrix of shape (out_features, in_features): `w = zeros + sum_p scales[p] * bit_p` per group.

    Parameters of 8 bits are integers, and `w` is that sum times the row's scale.

    Attributes:
        planes: uint8 [bits, out_features, ceil(in_features / 8)]; bit k % 8 (least significant first) of byte
            k // 8 belongs to column k. Bits past in_features are zero.
        scales: float16 [out_features, groups, bits]; uint8 with row scales.
        zeros: float16 [out_features, groups]; int8 with row scales.
        in_features: columns of the matrix.
        group_size: columns per group, -1 for a whole row.
        row_scales: float16 [out_features], or None when scales and zeros are float16.
    """

    planes: NDArray[np.uint8]
    scales: NDArray[np.float16] | NDArray[np.uint8]
    zeros: NDArray[np.float16] | NDArray[np.int8]
    in_features: int
    group_size: int
    row_scales: NDArray[np.float16] | None = None

    @property
    def bits(self) -> int:
        """Bit planes per weight."""
        return int(self.planes.shape[0])

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return int(self.planes.shape[1])

    @property
    def param_bits(self) -> int:
        """Bits of a scale or zero, 16 or 8."""
        return 16 if self.row_scales is None else 8

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is stored: planes, scales, zeros and, if there are any, row_scales, by these names."""
        stored = {"planes": self.planes, "scales": self.scales, "zeros": self.zeros}
        return stored if self.row_scales is None else {**stored, "row_scales": self.row_scales}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(array.nbytes for array in self.arrays.values())


def join_rows(matrices: Sequence[HlqMatrix]) -> HlqMatrix:
    """Matrices of the same columns, groups and bits, one below the other; at least one."""
    if len(matrices) == 1:
        return matrices[0]
    arrays: dict[str, Any] = {
        name: np.concatenate([matrix.arrays[name] for matrix in matrices], axis=1 if name == "planes" else 0)
        for name in matrices[0].arrays
    }
    return replace(matrices[0], **arrays)


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes uint8 (out_features, in_features), below 2**bits -> planes uint8 [bits, out_features, bytes]."""
    shifts = np.arange(bits, dtype=np.uint8)[:, None, None]
    return np.packbits((codes[None] >> shifts) & 1, axis=-1, bitorder="little")


def unpack_codes(planes: NDArray[np.uint8], in_features: int) -> NDArray[np.uint8]:
    """Planes uint8 [bits, out_features, bytes] -> codes uint8 (out_features, in_features)."""
    bits = np.unpackbits(planes, axis=-1, count=in_features, bitorder="little")
    shifts = np.arange(planes.shape[0], dtype=np.uint8)[:, None, None]
    codes: NDArray[np.uint8] = np.bitwise_or.reduce(bits << shifts, axis=0)
    return codes


def patterns(bits: int) -> NDArray[np.float64]:
    """The bits of every code, [2**bits, bits], 0 or 1."""
    return (np.arange(2**bits)[:, None] >> np.arange(bits) & 1).astype(np.float64)
