import ml_dtypes
import numpy as np
import pytest

from elutq import hlq
from elutq.errors import TensorShapeError, TensorValueError


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_hlq_is_at_or_below_the_best_clipped_uniform_grid(bits):
    weight = np.random.default_rng(bits).standard_normal((32, 256)).astype(np.float32)
    errors = {
        m: hlq.relative_error(weight, hlq.fit(weight, bits, method=m)) for m in ("hlq", "uniform", "rtn")
    }
    assert errors["hlq"] <= errors["uniform"] <= errors["rtn"]


def test_nan_is_refused_by_name():
    weight = np.ones((2, 64), np.float32)
    weight[1, 3] = np.nan
    with pytest.raises(TensorValueError, match=r"model\.q_proj holds NaN"):
        hlq.fit(weight, 2, name="model.q_proj")


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 36), (33, 257)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_squared_error_is_that_of_the_dequantized_matrix(
    bits: int, shape: tuple[int, int], kind: type[np.generic]
) -> None:
    weight = np.random.default_rng(bits).normal(size=shape).astype(kind)
    for group_size in (32, -1):
        matrix = hlq.fit(weight, bits, group_size, method="rtn")
        error, norm = hlq.squared_error(weight, matrix, threads=1)
        exact = weight.astype(np.float64)
        np.testing.assert_allclose(error, np.square(exact - hlq.dequantize(matrix)).sum(), rtol=1e-12)
        np.testing.assert_allclose(norm, np.square(exact).sum(), rtol=1e-12)
        assert hlq.squared_error(weight, matrix, threads=2) == (error, norm)


def test_squared_error_needs_the_same_shape() -> None:
    matrix = hlq.fit(np.ones((2, 8), np.float32), 1, -1)
    with pytest.raises(TensorShapeError, match=r"\(2, 9\)"):
        hlq.squared_error(np.ones((2, 9), np.float32), matrix)
