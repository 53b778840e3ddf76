import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from elutq import hlq
from elutq.errors import InvalidArgumentError, TensorShapeError, TensorValueError
from elutq.packing import unpack_codes

BITS = (1, 2, 3, 4)
GROUP_SIZES = (32, 64, 128, 256, -1)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def heavy_tailed(*shape, seed=0):
    return np.random.default_rng(seed).standard_t(4, shape).astype(np.float32)


def same(a, b):
    """All three parts of two HLQ matrices are equal bit for bit."""
    return all(np.array_equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


def parts(matrix):
    return matrix.planes, matrix.scales.view(np.uint16), matrix.zeros.view(np.uint16)


def group_errors(weight, matrix, importance=None):
    """E of each full group of 128, float64 [rows, groups]."""
    squares = (weight.astype(np.float64) - hlq.dequantize(matrix)) ** 2
    squares *= 1 if importance is None else importance
    return squares.reshape(len(weight), -1, 128).sum(2)


# ---- Quality ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sample", [normal, heavy_tailed])
def test_hlq_beats_the_published_start_and_the_best_clipped_grid(sample, bits):
    weight = sample(64, 1024, seed=bits)
    error = {
        m: hlq.relative_error(weight, hlq.fit(weight, bits, method=m))
        for m in ("hlq", "ao", "uniform", "rtn")
    }
    assert error["hlq"] < error["ao"]
    assert error["hlq"] < 0.99 * error["uniform"]
    assert error["uniform"] < error["rtn"]


@pytest.mark.parametrize(("bits", "most"), [(1, 0.354), (2, 0.108), (3, 0.0282), (4, 0.0068)])
def test_error_on_normal_weights(bits, most):
    weight = normal(128, 1024)
    assert hlq.relative_error(weight, hlq.fit(weight, bits)) < most


@pytest.mark.parametrize("bits", BITS)
def test_hardly_a_group_is_worse_than_the_best_clipped_grid(bits):
    weight = heavy_tailed(128, 1024)
    ratio = group_errors(weight, hlq.fit(weight, bits)) / group_errors(
        weight, hlq.fit(weight, bits, method="uniform")
    )
    assert (ratio > 1.0001).mean() < 0.01
    assert ratio.max() < 1.1


@pytest.mark.parametrize("bits", BITS)
def test_hlq_is_within_half_a_percent_of_64_random_restarts(bits):
    weight = np.concatenate([normal(24, 128), heavy_tailed(24, 128)])
    weight /= weight.std(axis=1, keepdims=True)
    x, rng = weight.astype(np.float64), np.random.default_rng(bits)
    best = hlq._Best(x, np.ones_like(x))
    for _ in range(64):
        low, high = (x.min(1), x.max(1)) * rng.uniform(0.2, 1, (2, len(x)))
        s = np.sort(rng.uniform(0.05, 1, (len(x), bits)), axis=1)
        hlq._alternate(best, s / s.sum(1, keepdims=True) * (high - low)[:, None], low, 20)
    found = group_errors(weight, hlq.fit(weight, bits)).sum()
    assert found <= 1.005 * best.error.sum()


@pytest.mark.parametrize("bits", BITS)
def test_hlq_beats_the_best_clipped_grid_on_trained_weights(bits, trained_weight):
    error = {
        m: hlq.relative_error(trained_weight, hlq.fit(trained_weight, bits, method=m))
        for m in ("hlq", "uniform")
    }
    assert error["hlq"] < 0.98 * error["uniform"]


@pytest.fixture(scope="module")
def trained_weight():
    from elutq.checkpoint import Checkpoint
    from elutq.models import bundled_model

    with Checkpoint.open(bundled_model()) as checkpoint:
        return checkpoint.read_float32("model.layers.3.mlp.up_proj.weight").copy()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_gradient_variant_comes_near_alternating_optimization(bits):
    weight = normal(16, 256)
    error = {m: hlq.relative_error(weight, hlq.fit(weight, bits, method=m)) for m in ("adam", "ao", "rtn")}
    assert error["adam"] < 1.03 * error["ao"]
    assert error["adam"] < error["rtn"]


# ---- Exhaustive search on tiny groups -----------------------------------------------------------------


def optimum(x, a, bits):
    """Least E over every assignment of patterns, by least squares for each."""
    least = np.inf
    for codes in itertools.product(range(2**bits), repeat=len(x)):
        design = (
            np.array([[c >> p & 1 for p in range(bits)] + [1] for c in codes], float) * np.sqrt(a)[:, None]
        )
        target = x * np.sqrt(a)
        solution = np.linalg.lstsq(design, target, rcond=None)[0]
        least = min(least, float(((design @ solution - target) ** 2).sum()))
    return least


@pytest.mark.parametrize(("bits", "columns"), [(1, 9), (2, 6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_tiny_groups_reach_the_exhaustive_optimum(bits, columns, weighted):
    weight = normal(6, columns, seed=bits)
    importance = np.linspace(1, 0.1, columns).astype(np.float32) if weighted else np.ones(columns, np.float32)
    matrix = hlq.fit(weight, bits, -1, weights=importance)
    found = (importance * (weight.astype(np.float64) - hlq.dequantize(matrix)) ** 2).sum(1)
    least = np.array([optimum(row.astype(np.float64), importance.astype(np.float64), bits) for row in weight])
    rounding = 1e-5 * (importance * weight**2).sum(1)  # of the parameters to fp16
    assert (found >= least - 1e-12).all()
    assert (found <= 1.02 * least + rounding).all()


# ---- The two backends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hlq", "ao", "uniform", "rtn"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("weighted", [False, True])
def test_backends_agree(method, bits, weighted):
    weight = heavy_tailed(24, 300, seed=bits)
    importance = np.random.default_rng(1).exponential(size=300).astype(np.float32) if weighted else None
    core, numpy = (
        hlq.fit(weight, bits, weights=importance, method=method, backend=b) for b in ("core", "numpy")
    )
    agree = [c == n for c, n in zip(parts(core)[1:], parts(numpy)[1:], strict=True)]
    assert min(a.mean() for a in agree) > 0.95  # rounding may lead a group to another local minimum
    assert hlq.relative_error(weight, core) == pytest.approx(hlq.relative_error(weight, numpy), rel=1e-4)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("columns", [1, 7, 31, 129, 264, 515])
def test_backends_agree_on_every_group_size_and_tail(group_size, columns):
    weight = normal(19, columns)
    core, numpy = (hlq.fit(weight, 2, group_size, backend=b) for b in ("core", "numpy"))
    assert core.planes.shape == (2, 19, -(-columns // 8))
    assert core.scales.shape == numpy.scales.shape
    assert hlq.relative_error(weight, core) == pytest.approx(
        hlq.relative_error(weight, numpy), rel=1e-3, abs=1e-7
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_weights_are_converted_exactly(dtype):
    weight = normal(16, 256).astype(dtype)
    assert same(hlq.fit(weight, 3), hlq.fit(weight.astype(np.float32), 3))
    assert same(hlq.fit(weight, 3, backend="numpy"), hlq.fit(weight.astype(np.float32), 3, backend="numpy"))


def test_weights_need_not_be_contiguous():
    weight = normal(256, 32)
    assert same(hlq.fit(weight.T, 2), hlq.fit(np.ascontiguousarray(weight.T), 2))


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("group_size", [32, -1])
def test_result_does_not_depend_on_threads(threads, group_size):
    weight = normal(300, 200)
    assert same(hlq.fit(weight, 3, group_size, threads=threads), hlq.fit(weight, 3, group_size, threads=1))


def test_a_row_does_not_depend_on_its_neighbors():
    weight = normal(40, 200)
    whole, alone = hlq.fit(weight, 3), hlq.fit(weight[17:18], 3)
    assert_array_equal(whole.planes[:, 17:18], alone.planes)
    assert_array_equal(whole.scales[17:18], alone.scales)
    assert_array_equal(whole.zeros[17:18], alone.zeros)


# ---- Form and invariances -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", hlq.BACKENDS)
@pytest.mark.parametrize("method", hlq.METHODS)
def test_result_is_canonical_and_codes_are_the_nearest_stored_levels(method, backend):
    weight = heavy_tailed(8, 256)
    matrix = hlq.fit(weight, 3, method=method, backend=backend)
    scales = matrix.scales.astype(np.float64)
    assert (scales >= 0).all()
    assert (np.diff(scales, axis=2) >= 0).all()
    patterns = np.arange(8)[:, None] >> np.arange(3) & 1
    levels = np.repeat(matrix.zeros.astype(np.float64)[:, :, None] + scales @ patterns.T, 128, axis=1)
    distance = np.abs(weight[:, :, None] - levels)
    chosen = np.take_along_axis(distance, unpack_codes(matrix.planes, 256)[:, :, None].astype(int), axis=2)[
        ..., 0
    ]
    assert_array_equal(chosen, distance.min(2))


@pytest.mark.parametrize("method", ["uniform", "rtn"])
def test_uniform_grids_are_stored_with_doubling_scales(method):
    scales = hlq.fit(normal(8, 256), 4, method=method).scales.astype(np.float32)
    assert_array_equal(scales, scales[:, :, :1] * 2.0 ** np.arange(4, dtype=np.float32))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(-6, 6), st.integers(0, 1000))
def test_scaling_by_a_power_of_two_scales_the_parameters(bits, exponent, seed):
    weight = normal(3, 96, seed=seed)
    matrix, scaled = hlq.fit(weight, bits, 32), hlq.fit(weight * np.float32(2.0**exponent), bits, 32)
    expected, found = hlq.dequantize(matrix) * 2.0**exponent, hlq.dequantize(scaled)
    np.testing.assert_allclose(found, expected, atol=2e-3 * 2.0**exponent, rtol=0)  # fp16 subnormals differ


@pytest.mark.parametrize("bits", BITS)
def test_shifting_the_weights_shifts_the_zero(bits):
    weight = normal(64, 128)
    error, shifted = (
        np.square(w - hlq.dequantize(hlq.fit(w, bits))).sum() for w in (weight, weight + np.float32(2))
    )
    assert shifted == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("bits", BITS)
def test_negation_does_not_change_the_error(bits):
    weight = np.abs(heavy_tailed(64, 128))
    positive, negative = (hlq.relative_error(w, hlq.fit(w, bits)) for w in (weight, -weight))
    assert negative == pytest.approx(positive, rel=0.02)


# ---- Importances --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_importances_lower_the_weighted_error(bits):
    weight = normal(64, 256)
    importance = np.random.default_rng(0).exponential(size=256).astype(np.float32) ** 2
    plain, weighted = (
        group_errors(weight, hlq.fit(weight, bits, weights=w), importance) for w in (None, importance)
    )
    assert weighted.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("backend", hlq.BACKENDS)
def test_importances_matter_only_relative_to_each_other(backend):
    weight = normal(4, 200)
    importance = np.random.default_rng(0).integers(0, 8, 200).astype(np.float32)
    fitted = [hlq.fit(weight, 2, weights=importance * np.float32(f), backend=backend) for f in (1, 2.0**60)]
    assert same(*fitted)


@pytest.mark.parametrize("backend", hlq.BACKENDS)
def test_a_group_without_importance_counts_evenly(backend):
    weight = normal(4, 256)
    importance = np.ones(256, np.float32)
    importance[128:] = 0
    plain = hlq.fit(weight, 2, backend=backend)
    weighted = hlq.fit(weight, 2, weights=importance, backend=backend)
    assert hlq.relative_error(weight, weighted) == pytest.approx(hlq.relative_error(weight, plain), rel=1e-6)


def test_columns_without_importance_do_not_move_the_parameters():
    weight, importance = normal(8, 128), np.ones(128, np.float32)
    importance[::4] = 0
    other = weight.copy()
    other[:, ::4] *= 0.5  # inside the range of the others, which sets the clipped starts
    a, b = (hlq.fit(w, 2, weights=importance) for w in (weight, other))
    errors = [group_errors(w, m, importance).sum() for w, m in ((weight, a), (other, b))]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


# ---- Hard values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", hlq.BACKENDS)
@pytest.mark.parametrize("method", hlq.METHODS)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.5, -3.25, 65504.0, -65504.0, 2.0**-24])
def test_constant_groups_are_exact(value, method, backend):
    weight = np.full((3, 40), value, np.float32)
    for bits in BITS:
        assert_array_equal(hlq.dequantize(hlq.fit(weight, bits, 32, method=method, backend=backend)), weight)


def test_a_constant_that_fp16_lacks_is_rounded():
    weight = np.full((2, 128), 0.1, np.float32)
    np.testing.assert_allclose(hlq.dequantize(hlq.fit(weight, 2)), weight, rtol=2**-11)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_as_many_values_as_levels_are_exact(bits):
    weight = np.random.default_rng(0).integers(0, 2**bits, (16, 128)).astype(np.float32) - 1
    for method in ("ao", "rtn"):
        assert hlq.relative_error(weight, hlq.fit(weight, bits, method=method)) == 0
    assert hlq.relative_error(weight, hlq.fit(weight, bits)) < 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_outlier_costs_one_plane(bits):
    """A weight of 1e4 among ordinary ones takes a plane; the others are as good as with a bit less."""
    weight = normal(64, 128)
    fewer = group_errors(weight, hlq.fit(weight, bits - 1)).sum()
    weight[:, 5] = 1e4
    errors = np.square(weight.astype(np.float64) - hlq.dequantize(hlq.fit(weight, bits)))
    assert errors.sum() < 1.15 * fewer
    assert errors[:, 5].max() < 16


@pytest.mark.parametrize("bits", BITS)
def test_weights_at_the_limits_of_fp16(bits):
    rng = np.random.default_rng(0)
    edges = (np.sign(normal(32, 128)) * 65504).astype(np.float32)
    spread = rng.uniform(-65504, 65504, (32, 128)).astype(np.float32)
    for weight in (edges, spread):
        matrix = hlq.fit(weight, bits)
        assert np.isfinite(matrix.scales).all()
        assert np.isfinite(matrix.zeros).all()
        error, grid = (
            hlq.relative_error(weight, matrix),
            hlq.relative_error(weight, hlq.fit(weight, bits, method="uniform")),
        )
        assert error <= grid
    if bits > 1:
        assert hlq.relative_error(edges, hlq.fit(edges, bits)) == 0


@pytest.mark.parametrize("scale", [1e-5, 1e-6])
def test_subnormal_fp16_parameters(scale):
    weight = normal(32, 128) * np.float32(scale)
    assert hlq.relative_error(weight, hlq.fit(weight, 2)) < 0.115


def test_weights_too_small_for_fp16_become_zero():
    weight = (normal(4, 128) * 1e-39).astype(np.float32)
    assert not hlq.dequantize(hlq.fit(weight, 4)).any()


@pytest.mark.parametrize("offset", [10, 1000])
def test_a_common_offset_costs_no_more_than_the_zeros_rounding(offset):
    weight = normal(64, 128) + np.float32(offset)
    error = hlq.relative_error(weight, hlq.fit(weight, 3))
    assert error < hlq.relative_error(weight, hlq.fit(weight, 3, method="uniform"))


# ---- Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", hlq.BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(value, dtype, backend):
    weight = np.ones((2, 64), dtype)
    weight[1, 63] = value
    with pytest.raises(TensorValueError, match=r"^model\.q_proj holds NaN or infinity"):
        hlq.fit(weight, 2, name="model.q_proj", backend=backend)


@pytest.mark.parametrize("backend", hlq.BACKENDS)
def test_values_beyond_fp16_are_refused_by_name(backend):
    weight = np.ones((2, 64), np.float32)
    weight[0, 1] = -65505
    with pytest.raises(TensorValueError, match=r"^model\.q_proj holds 65505, .* keep it in 16 bits$"):
        hlq.fit(weight, 2, name="model.q_proj", backend=backend)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (8,), (2, 2, 2)])
def test_only_matrices_are_quantized(shape):
    with pytest.raises(TensorShapeError, match="weight has shape"):
        hlq.fit(np.zeros(shape, np.float32), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits must be 1 to 4"),
        ({"group_size": 48}, "group_size must be one of"),
        ({"method": "gptq"}, "method must be one of hlq"),
        ({"backend": "cuda"}, "backend must be one of core"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"weights": np.ones(7, np.float32)}, r"one per column is needed: \(64,\)"),
        ({"weights": np.full(64, -1, np.float32)}, "finite and at least 0"),
        ({"weights": np.full(64, np.nan, np.float32)}, "finite and at least 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        hlq.fit(np.ones((2, 64), np.float32), **{"bits": 2, **arguments})


@pytest.mark.parametrize("dtype", [np.float64, np.int8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(InvalidArgumentError, match="convert it to float32"):
        hlq.fit(np.ones((2, 64), dtype), 2)


# ---- Reading back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, -1])
def test_dequantize_adds_the_scales_of_the_set_bits(group_size):
    matrix = hlq.fit(normal(3, 70), 3, group_size)
    codes = unpack_codes(matrix.planes, 70)
    for row, column in itertools.product(range(3), range(70)):
        group = 0 if group_size == -1 else column // group_size
        level = np.float32(matrix.zeros[row, group])
        for p in range(3):
            level += np.float32(matrix.scales[row, group, p]) * (codes[row, column] >> p & 1)
        assert hlq.dequantize(matrix)[row, column] == level


def test_relative_error_of_zeros():
    zeros = np.zeros((2, 64), np.float32)
    matrix = hlq.fit(zeros, 2)
    assert hlq.relative_error(zeros, matrix) == 0
    ones = hlq.fit(zeros + 1, 2)
    assert hlq.relative_error(zeros, ones) == float("inf")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_squared_error_agrees_with_relative_error(dtype):
    weight = normal(33, 300).astype(dtype)
    matrix = hlq.fit(weight, 2)
    error, norm = hlq.squared_error(weight, matrix, threads=2)
    assert error / norm == pytest.approx(hlq.relative_error(weight, matrix), rel=1e-9)
    assert (error, norm) == hlq.squared_error(weight, matrix, threads=1)


# ---- 8-bit parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "most"), [(1, 1.001), (2, 1.004), (3, 1.015), (4, 1.06)])
@pytest.mark.parametrize("sample", [normal, heavy_tailed])
def test_8_bit_parameters_cost_little(sample, bits, most):
    weight = sample(64, 1024, seed=bits) * np.repeat(np.linspace(0.5, 1.5, 8, dtype=np.float32), 128)
    fine = hlq.fit(weight, bits)
    coarse = hlq.to_8bit(weight, fine)
    assert hlq.relative_error(weight, coarse) < most * hlq.relative_error(weight, fine)


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("columns", [5, 64, 103])
def test_8_bit_parameters_have_the_types_of_the_format(columns, group_size):
    weight = normal(9, columns)
    weight[3] = 0
    matrix = hlq.to_8bit(weight, hlq.fit(weight, 3, group_size))
    groups = 1 if group_size == -1 else -(-columns // group_size)
    found = {name: (array.dtype.name, array.shape) for name, array in matrix.arrays.items()}
    assert found == {
        "planes": ("uint8", (3, 9, -(-columns // 8))),
        "scales": ("uint8", (9, groups, 3)),
        "zeros": ("int8", (9, groups)),
        "row_scales": ("float16", (9,)),
    }
    assert (matrix.row_scales > 0).all()
    assert (np.diff(matrix.scales.astype(int), axis=2) >= 0).all()
    assert not hlq.dequantize(matrix)[3].any()


@pytest.mark.parametrize("group_size", [32, -1])
def test_8_bit_matrices_are_dequantized_by_their_integers(group_size):
    weight = normal(5, 70)
    matrix = hlq.to_8bit(weight, hlq.fit(weight, 4, group_size))
    codes = unpack_codes(matrix.planes, 70).astype(int)
    values = hlq.dequantize(matrix)
    for row, column in itertools.product(range(5), range(70)):
        group = 0 if group_size == -1 else column // group_size
        total = int(matrix.zeros[row, group])
        total += sum(int(matrix.scales[row, group, p]) * (codes[row, column] >> p & 1) for p in range(4))
        assert values[row, column] == float(matrix.row_scales[row]) * total


def test_8_bit_codes_are_those_of_the_nearest_levels():
    weight = heavy_tailed(16, 256)
    matrix = hlq.to_8bit(weight, hlq.fit(weight, 2))
    integers = matrix.zeros.astype(int)[:, :, None] + matrix.scales.astype(int) @ [[0, 1, 0, 1], [0, 0, 1, 1]]
    levels = integers * matrix.row_scales.astype(np.float64)[:, None, None]
    distance = np.abs(weight.reshape(16, 2, 128, 1) - levels[:, :, None, :])
    error = np.abs(weight - hlq.dequantize(matrix)).reshape(16, 2, 128)
    assert_array_equal(error, distance.min(axis=3).astype(np.float32))


def test_8_bit_parameters_heed_importances():
    weight = heavy_tailed(32, 512)
    importance = np.random.default_rng(1).uniform(0, 1, 512).astype(np.float32) ** 4
    importance[:128] *= 1000
    fine = hlq.fit(weight, 2, weights=importance)
    heeded = group_errors(weight, hlq.to_8bit(weight, fine, importance), importance).sum()
    ignored = group_errors(weight, hlq.to_8bit(weight, fine), importance).sum()
    assert heeded < ignored
    assert heeded < 1.01 * group_errors(weight, fine, importance).sum()


@pytest.mark.parametrize("size", [1e-9, 2e-7, 1e-4, 6e4])
def test_8_bit_parameters_reach_the_limits_of_fp16(size):
    weight = np.random.default_rng(0).uniform(-size, size, (8, 256)).astype(np.float32)
    fine = hlq.fit(weight, 2)
    coarse = hlq.to_8bit(weight, fine)
    assert np.isfinite(coarse.row_scales).all()
    if size > 1e-5:
        assert hlq.relative_error(weight, coarse) < 1.01 * hlq.relative_error(weight, fine)
    else:  # the smallest fp16 number is the unit
        assert np.abs(weight - hlq.dequantize(coarse)).max() < max(size, 2.0**-24)


def test_8_bit_parameters_do_not_depend_on_threads_or_pieces(monkeypatch):
    weight, importance = normal(33, 300), np.arange(300, dtype=np.float32)
    fine = hlq.fit(weight, 2, weights=importance)
    whole = hlq.to_8bit(weight, fine, importance, threads=1)
    monkeypatch.setattr(hlq, "_CHUNK", 700)
    pieces = hlq.to_8bit(weight, fine, importance, threads=3)
    for name, values in whole.arrays.items():
        assert_array_equal(values, pieces.arrays[name])


def test_scales_in_any_order_are_taken_for_8_bit_parameters():
    """Another writer's scales may be negative (F23)."""
    weight = normal(4, 128)
    fine = hlq.fit(weight, 2)
    flipped = replace(
        fine,
        planes=fine.planes ^ np.array([255, 0], np.uint8)[:, None, None],
        scales=fine.scales * np.array([-1, 1], np.float16),
        zeros=(fine.zeros.astype(np.float32) + fine.scales[:, :, 0]).astype(np.float16),
    )
    error = hlq.relative_error(weight, hlq.to_8bit(weight, flipped))
    assert error < 1.01 * hlq.relative_error(weight, fine)


def test_what_is_not_fp16_or_does_not_fit_is_not_made_8_bit():
    weight = normal(4, 128)
    fine = hlq.fit(weight, 2)
    coarse = hlq.to_8bit(weight, fine)
    with pytest.raises(InvalidArgumentError, match="already"):
        hlq.to_8bit(weight, coarse)
    with pytest.raises(TensorShapeError, match="shape"):
        hlq.to_8bit(weight[:, :64], fine)
    with pytest.raises(InvalidArgumentError, match="importances"):
        hlq.to_8bit(weight, fine, np.ones(3, np.float32))
    assert hlq.squared_error(weight, coarse)[0] / hlq.squared_error(weight, coarse)[1] == pytest.approx(
        hlq.relative_error(weight, coarse), rel=1e-9
    )
