"""The compiled kernels as Python sees them: every instruction set against NumPy."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from elutq import _core
from elutq.hlq import dequantize
from elutq.packing import HlqMatrix, pack_codes

ISAS = _core.available_isas()


def random_matrix(out: int, columns: int, bits: int, group_size: int, param_bits: int = 16) -> HlqMatrix:
    rng = np.random.default_rng(out + columns + bits + group_size)
    groups = -(-columns // group_size)
    planes = pack_codes(rng.integers(0, 2**bits, (out, columns), dtype=np.uint8), bits)
    if param_bits == 16:
        scales = rng.normal(0, 0.02, (out, groups, bits)).astype(np.float16)
        zeros = rng.normal(0, 0.02, (out, groups)).astype(np.float16)
        return HlqMatrix(planes, scales, zeros, columns, group_size)
    return HlqMatrix(
        planes,
        rng.integers(0, 256, (out, groups, bits), dtype=np.uint8),
        rng.integers(-128, 128, (out, groups), dtype=np.int8),
        columns,
        group_size,
        rng.uniform(1e-5, 2e-4, out).astype(np.float16),
    )


def multiply(isa: str, matrix: HlqMatrix, x: NDArray, threads: int = 1, exact: bool = False) -> NDArray:
    runner = _core.LinearRunner(isa, threads, exact)
    return _core.PackedLinear(runner, matrix).multiply(x)


@pytest.mark.parametrize("param_bits", [16, 8])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("out", "columns", "bits", "group_size"),
    [(1, 5, 1, 5), (33, 100, 2, 32), (100, 320, 2, 128), (64, 1003, 3, 1003), (70, 700, 4, 256)],
)
def test_products_match_numpy(
    isa: str, out: int, columns: int, bits: int, group_size: int, param_bits: int
) -> None:
    matrix = random_matrix(out, columns, bits, group_size, param_bits)
    x = np.random.default_rng(1).normal(size=(5, columns)).astype(np.float32)
    expected = x.astype(np.float64) @ dequantize(matrix).astype(np.float64).T
    exact = multiply(isa, matrix, x, threads=2, exact=True)
    assert np.abs(exact - expected).max() < 1e-4
    rounded = multiply(isa, matrix, x, threads=2)
    assert np.linalg.norm(rounded - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("param_bits", [16, 8])
@pytest.mark.parametrize("exact", [False, True])
def test_every_instruction_set_gives_the_same_bits(exact: bool, param_bits: int) -> None:
    matrix = random_matrix(150, 600, 2, 128, param_bits)
    x = np.random.default_rng(2).normal(size=(9, 600)).astype(np.float32)
    first = multiply("scalar", matrix, x, exact=exact)
    for isa in ISAS:
        assert np.array_equal(first, multiply(isa, matrix, x, threads=2, exact=exact)), isa
        assert np.array_equal(first[3:4], multiply(isa, matrix, x[3:4], exact=exact)), isa


def test_wrong_shapes_are_refused() -> None:
    halves, in_bytes = random_matrix(8, 64, 2, 32), random_matrix(8, 64, 2, 32, 8)
    x = np.zeros((1, 64), np.float32)
    with pytest.raises(ValueError, match="x must be"):
        multiply("", halves, x[:, :60].copy())
    for matrix in (halves, in_bytes):
        with pytest.raises(ValueError, match="planes must be"):
            multiply("", replace(matrix, planes=matrix.planes[:, :, :7]), x)
        with pytest.raises(ValueError, match="scales must be"):
            multiply("", replace(matrix, scales=matrix.scales[:, :1]), x)
        with pytest.raises(ValueError, match="zeros must be"):
            multiply("", replace(matrix, zeros=matrix.zeros.T), x)
    with pytest.raises(ValueError, match="row_scales must be"):
        multiply("", replace(in_bytes, row_scales=in_bytes.row_scales[:7]), x)
    with pytest.raises(ValueError, match="HLQ groups have"):
        multiply("", random_matrix(8, 64, 2, 31), x)
    with pytest.raises(ValueError, match="'sse9' cannot run on this machine; available are: scalar"):
        multiply("sse9", halves, x)


def test_types_of_the_other_width_are_refused() -> None:
    halves, in_bytes = random_matrix(8, 64, 2, 32), random_matrix(8, 64, 2, 32, 8)
    x = np.zeros((1, 64), np.float32)
    with pytest.raises(ValueError, match="scales must be"):
        multiply("", replace(halves, row_scales=in_bytes.row_scales), x)
    with pytest.raises(ValueError, match="scales must be"):
        multiply("", replace(in_bytes, row_scales=None), x)
    with pytest.raises(ValueError, match="zeros must be"):
        multiply("", replace(in_bytes, zeros=in_bytes.zeros.view(np.uint8)), x)


def test_arrays_may_be_views() -> None:
    """What is not contiguous is copied."""
    matrix = random_matrix(16, 64, 2, 32, 8)
    x = np.random.default_rng(4).normal(size=(2, 64)).astype(np.float32)
    odd = replace(
        matrix,
        planes=matrix.planes[:, 1::2],
        scales=matrix.scales[1::2],
        zeros=matrix.zeros[1::2],
        row_scales=matrix.row_scales[1::2],
    )
    assert np.array_equal(multiply("", odd, x), multiply("", matrix, x)[:, 1::2])


def test_long_texts_are_multiplied_in_pieces() -> None:
    matrix = random_matrix(40, 96, 2, 32)
    x = np.random.default_rng(3).normal(size=(300, 96)).astype(np.float32)
    whole = multiply("", matrix, x, threads=2)
    assert np.array_equal(
        whole, np.concatenate([multiply("", matrix, x[i : i + 75]) for i in range(0, 300, 75)])
    )
    assert multiply("", matrix, x[:0]).shape == (0, 40)


def test_the_machine_is_described() -> None:
    assert ISAS[0] == "scalar"
    assert _core.cpu_model_name()
    assert 0.1 < _core.read_bandwidth(threads=1, bytes=1 << 24, passes=2) < 10_000
