import numpy as np
import pytest

from elutq import hlq
from elutq.errors import TensorValueError


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
