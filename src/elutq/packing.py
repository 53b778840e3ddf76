"""One quantized matrix, and bit planes <-> codes.

A code is the integer `sum_p bit_p * 2**p`; the planes hold its bits, plane p first to last, least significant
column first (`docs/format.md`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class HlqMatrix:
    """An HLQ matrix of shape (out_features, in_features): `w = zeros + sum_p scales[p] * bit_p` per group.

    Attributes:
        planes: uint8 [bits, out_features, ceil(in_features / 8)]; bit k % 8 (least significant first) of byte
            k // 8 belongs to column k. Bits past in_features are zero.
        scales: float16 [out_features, groups, bits].
        zeros: float16 [out_features, groups].
        in_features: columns of the matrix.
        group_size: columns per group, -1 for a whole row.
    """

    planes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.float16]
    in_features: int
    group_size: int

    @property
    def bits(self) -> int:
        """Bit planes per weight."""
        return int(self.planes.shape[0])

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return int(self.planes.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of planes, scales and zeros together."""
        return self.planes.nbytes + self.scales.nbytes + self.zeros.nbytes


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
