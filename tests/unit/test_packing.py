import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from elutq.packing import HlqMatrix, pack_codes, unpack_codes


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 4))
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 40)))
    return draw(arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1))), bits


@given(codes_and_bits())
def test_unpacking_undoes_packing(case):
    codes, bits = case
    planes = pack_codes(codes, bits)
    assert planes.shape == (bits, codes.shape[0], -(-codes.shape[1] // 8))
    np.testing.assert_array_equal(unpack_codes(planes, codes.shape[1]), codes)


@given(codes_and_bits())
def test_bit_k_of_byte_j_is_column_8j_plus_k(case):
    codes, bits = case
    planes = pack_codes(codes, bits)
    for p in range(bits):
        for k in range(codes.shape[1]):
            np.testing.assert_array_equal(planes[p, :, k // 8] >> (k % 8) & 1, codes[:, k] >> p & 1)


@given(codes_and_bits())
def test_bits_past_the_last_column_are_zero(case):
    codes, bits = case
    last = pack_codes(codes, bits)[:, :, -1]
    used = (codes.shape[1] - 1) % 8 + 1
    assert not (last >> used).any()


def test_an_hlq_matrix_knows_its_size():
    matrix = HlqMatrix(
        planes=np.zeros((3, 5, 13), np.uint8),
        scales=np.zeros((5, 4, 3), np.float16),
        zeros=np.zeros((5, 4), np.float16),
        in_features=100,
        group_size=32,
    )
    assert (matrix.bits, matrix.out_features) == (3, 5)
    assert matrix.nbytes == 3 * 5 * 13 + 2 * 5 * 4 * 3 + 2 * 5 * 4


def test_an_hlq_matrix_with_row_scales_is_smaller():
    matrix = HlqMatrix(
        planes=np.zeros((3, 5, 13), np.uint8),
        scales=np.zeros((5, 4, 3), np.uint8),
        zeros=np.zeros((5, 4), np.int8),
        in_features=100,
        group_size=32,
        row_scales=np.ones(5, np.float16),
    )
    assert (matrix.bits, matrix.param_bits) == (3, 8)
    assert matrix.nbytes == 3 * 5 * 13 + 5 * 4 * 3 + 5 * 4 + 2 * 5
    assert list(matrix.arrays) == ["planes", "scales", "zeros", "row_scales"]
