"""The compiled kernels as Python sees them: every instruction set against NumPy."""

import numpy as np
import pytest
from numpy.typing import NDArray

from elutq import _core
from elutq.packing import pack_codes

ISAS = _core.available_isas()


def random_matrix(
    out: int, columns: int, bits: int, group_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16], NDArray[np.float64]]:
    """Planes, scales and zeros of a random matrix, and the matrix itself in double."""
    rng = np.random.default_rng(out + columns + bits + group_size)
    groups = -(-columns // group_size)
    codes = rng.integers(0, 2**bits, (out, columns), dtype=np.uint8)
    scales = rng.normal(0, 0.02, (out, groups, bits)).astype(np.float16)
    zeros = rng.normal(0, 0.02, (out, groups)).astype(np.float16)
    group = np.arange(columns) // group_size
    weight = zeros.astype(np.float64)[:, group]
    for p in range(bits):
        weight = weight + scales.astype(np.float64)[:, group, p] * ((codes >> p) & 1)
    return pack_codes(codes, bits), scales, zeros, weight


def multiply(
    isa: str, matrix: tuple[NDArray, ...], group_size: int, x: NDArray, threads: int = 1, exact: bool = False
) -> NDArray:
    planes, scales, zeros, weight = matrix
    bits = (array.view(np.uint16) for array in (scales, zeros))
    runner = _core.LinearRunner(isa, threads, exact)
    return _core.PackedLinear(runner, planes, *bits, weight.shape[1], group_size).multiply(x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("out", "columns", "bits", "group_size"),
    [(1, 5, 1, 5), (33, 100, 2, 32), (100, 320, 2, 128), (64, 1003, 3, 1003), (70, 700, 4, 256)],
)
def test_products_match_numpy(isa: str, out: int, columns: int, bits: int, group_size: int) -> None:
    matrix = random_matrix(out, columns, bits, group_size)
    x = np.random.default_rng(1).normal(size=(5, columns)).astype(np.float32)
    expected = x.astype(np.float64) @ matrix[3].T
    exact = multiply(isa, matrix, group_size, x, threads=2, exact=True)
    assert np.abs(exact - expected).max() < 1e-4
    rounded = multiply(isa, matrix, group_size, x, threads=2)
    assert np.linalg.norm(rounded - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("exact", [False, True])
def test_every_instruction_set_gives_the_same_bits(exact: bool) -> None:
    matrix = random_matrix(150, 600, 2, 128)
    x = np.random.default_rng(2).normal(size=(9, 600)).astype(np.float32)
    first = multiply("scalar", matrix, 128, x, exact=exact)
    for isa in ISAS:
        assert np.array_equal(first, multiply(isa, matrix, 128, x, threads=2, exact=exact)), isa
        assert np.array_equal(first[3:4], multiply(isa, matrix, 128, x[3:4], exact=exact)), isa


def test_wrong_shapes_are_refused() -> None:
    planes, scales, zeros, weight = random_matrix(8, 64, 2, 32)
    x = np.zeros((1, 64), np.float32)
    with pytest.raises(ValueError, match="x must be"):
        multiply("", (planes, scales, zeros, weight), 32, x[:, :60].copy())
    with pytest.raises(ValueError, match="scales must be"):
        multiply("", (planes, scales[:, :1].copy(), zeros, weight), 32, x)
    with pytest.raises(ValueError, match="HLQ groups have"):
        multiply("", random_matrix(8, 64, 2, 31), 31, x)
    with pytest.raises(ValueError, match="'sse9' cannot run on this machine; available are: scalar"):
        multiply("sse9", (planes, scales, zeros, weight), 32, x)


def test_long_texts_are_multiplied_in_pieces() -> None:
    matrix = random_matrix(40, 96, 2, 32)
    x = np.random.default_rng(3).normal(size=(300, 96)).astype(np.float32)
    whole = multiply("", matrix, 32, x, threads=2)
    assert np.array_equal(
        whole, np.concatenate([multiply("", matrix, 32, x[i : i + 75]) for i in range(0, 300, 75)])
    )
    assert multiply("", matrix, 32, x[:0]).shape == (0, 40)


def test_the_machine_is_described() -> None:
    assert ISAS[0] == "scalar"
    assert _core.cpu_model_name()
    assert 0.1 < _core.read_bandwidth(threads=1, bytes=1 << 24, passes=2) < 10_000
