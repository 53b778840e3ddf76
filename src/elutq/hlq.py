"""HLQ, hierarchical linear quantization, without data: one matrix in, bit planes and fp16 parameters out.

A group of consecutive columns of one row is stored as

    w_k  ~=  z + sum_p s_p * b_pk        b_pk in {0, 1},  p = 0 .. q-1

and the solver minimizes

    E(s, z, b) = sum_k a_k (w_k - z - sum_p s_p b_pk)^2        a_k: importance of column k, 1 by default

Alternating optimization (ELUTQ, arXiv 2510.19482) repeats two exact steps, neither of which can raise E:

    bit-pattern selection   b_k    = the pattern whose level  z + sum_p s_p b_p  is nearest to w_k
    linear reconstruction   (s, z) = weighted least squares with the patterns fixed

It stops in the local minimum its start leads to, so the start decides. `method="hlq"` runs it from several
starts and keeps the best of each group; `method="ao"` is the published single start. (BPDQ, arXiv 2602.04163,
alternates the same two steps in the metric of a calibration Hessian.)

Canonical form: 0 <= s_0 <= s_1 <= ..., which loses nothing, since flipping plane p turns (s_p, z) into
(-s_p, z + s_p) and planes may be permuted. Codes are always chosen for the parameters as stored, that is,
after rounding to fp16.
"""

import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from elutq.errors import InvalidArgumentError, TensorShapeError, TensorValueError
from elutq.packing import HlqMatrix, pack_codes, unpack_codes
from elutq.scheme import QuantScheme

Floats = NDArray[np.float64]

#: hlq: alternating optimization from several starts, best kept per group. ao: the published single min-max
#: start, 10 rounds. adam: the published gradient variant. uniform: the best-clipped uniform grid. rtn: the
#: min-max grid.
METHODS = ("hlq", "ao", "adam", "uniform", "rtn")
BACKENDS = ("core", "numpy")

HALF_MAX = 65504.0
#: The uniform baseline tries every pair of these fractions of a group's minimum and maximum.
CLIP_RATIOS = np.linspace(0.3, 1.0, 15)
START_RATIOS = (1.0, 0.8, 0.6, 0.45)
AO_ROUNDS = 10
HLQ_ROUNDS = 15
ADAM_STEPS = 200
ADAM_RATE = 0.01
#: Weight of the previous (s, z) in a reconstruction, relative to the group's importance: it decides only
#: what the patterns leave undetermined, such as the scale of a plane that no weight uses.
PROXIMITY = 1e-7
_CHUNK = 1 << 20  # weights that the NumPy backend works on at once


def fit(
    weight: NDArray[np.float32],
    bits: int,
    group_size: int = 128,
    *,
    weights: NDArray[np.float32] | None = None,
    method: str = "hlq",
    threads: int | None = None,
    backend: str = "core",
    name: str = "weight",
) -> HlqMatrix:
    """Quantize one matrix.

    Args:
        weight: float32, float16 or bfloat16 (out_features, in_features); converted to float32 first.
        bits: bit planes, 1 to 4.
        group_size: columns that share scales and zero: 32, 64, 128, 256, or -1 for a whole row.
        weights: importance of each column, (in_features,), finite and >= 0. A group whose importances are
            all zero counts as equally important throughout.
        method: one of METHODS.
        threads: threads of the core backend, all CPUs by default. The result does not depend on it.
        backend: "core" (C++) or "numpy" (the reference).
        name: what error messages call the tensor.

    Raises:
        InvalidArgumentError: an option or `weights` is outside what is supported.
        TensorShapeError: `weight` is not a matrix, or has no rows or columns.
        TensorValueError: `weight` holds NaN, infinity, or values beyond fp16's range of +-65504.
    """
    scheme = QuantScheme(bits, group_size)
    if method not in METHODS:
        raise InvalidArgumentError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if backend not in BACKENDS:
        raise InvalidArgumentError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise TensorShapeError(
            f"{name} has shape {weight.shape}; only matrices with rows and columns can be quantized"
        )
    if weight.dtype.name not in ("float32", "float16", "bfloat16"):
        raise InvalidArgumentError(
            f"{name} is {weight.dtype}; convert it to float32, float16 or bfloat16 first"
        )
    importance = _importance(weights, weight.shape[1], scheme, name)
    if backend == "numpy" or method == "adam":
        return _fit_numpy(weight, scheme, importance, method, name)
    return _fit_core(weight, scheme, importance, method, threads, name)


def dequantize(matrix: HlqMatrix) -> NDArray[np.float32]:
    """The matrix w = zeros + sum_p scales[p] * bit_p, float32 (out_features, in_features)."""
    columns = np.arange(matrix.in_features)
    group = columns // (matrix.in_features if matrix.group_size == -1 else matrix.group_size)
    codes = unpack_codes(matrix.planes, matrix.in_features)
    result = matrix.zeros.astype(np.float32)[:, group]
    for p in range(matrix.bits):
        result += matrix.scales[:, :, p].astype(np.float32)[:, group] * (codes >> p & 1)
    return result


def relative_error(weight: NDArray[np.float32], matrix: HlqMatrix) -> float:
    """||W - W~||^2 / ||W||^2, 0 when both are zero."""
    exact = weight.astype(np.float64)
    error = float(np.square(exact - dequantize(matrix)).sum())
    norm = float(np.square(exact).sum())
    return error / norm if norm > 0 else (0.0 if error == 0 else float("inf"))


def squared_error(
    weight: NDArray[np.float32], matrix: HlqMatrix, *, threads: int | None = None
) -> tuple[float, float]:
    """||W - W~||^2 and ||W||^2, summed in float64 by the core: `relative_error` at the solver's speed.

    Args:
        weight: float32, float16 or bfloat16 (out_features, in_features), finite.
        matrix: its quantized form.
        threads: all CPUs by default. The result does not depend on it.

    Raises:
        TensorShapeError: the shapes differ.
    """
    from elutq import _core

    if weight.shape != (matrix.out_features, matrix.in_features):
        raise TensorShapeError(
            f"weight has shape {weight.shape}, its quantized form {(matrix.out_features, matrix.in_features)}"
        )
    values = np.ascontiguousarray(weight)
    error, norm = _core.squared_error(
        values if values.dtype == np.float32 else values.view(np.uint16),
        values.dtype.name,
        matrix.in_features if matrix.group_size == -1 else matrix.group_size,
        matrix.planes,
        matrix.scales.view(np.uint16),
        matrix.zeros.view(np.uint16),
        threads or len(os.sched_getaffinity(0)),
    )
    return error, norm


def _importance(
    weights: NDArray[np.float32] | None, in_features: int, scheme: QuantScheme, name: str
) -> NDArray[np.float32] | None:
    """Importances between 0 and 1, the largest of each group 1."""
    if weights is None:
        return None
    importance = np.array(weights, dtype=np.float32)
    if importance.shape != (in_features,):
        raise InvalidArgumentError(
            f"importances of {name} have shape {importance.shape}; one per column is needed: ({in_features},)"
        )
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise InvalidArgumentError(f"importances of {name} must be finite and at least 0")
    for begin in range(0, in_features, scheme.columns_per_group(in_features)):
        group = importance[begin : begin + scheme.columns_per_group(in_features)]
        group[:] = group / group.max() if group.any() else 1
    return importance


def _check_range(largest: float, name: str) -> None:
    if not np.isfinite(largest):
        raise TensorValueError(
            f"{name} holds NaN or infinity and cannot be quantized; check the source model"
        )
    if largest > HALF_MAX:
        raise TensorValueError(
            f"{name} holds {largest:g}, beyond the fp16 range of +-{HALF_MAX:g} of HLQ parameters; "
            "keep it in 16 bits"
        )


def _fit_core(
    weight: NDArray[np.float32],
    scheme: QuantScheme,
    importance: NDArray[np.float32] | None,
    method: str,
    threads: int | None,
    name: str,
) -> HlqMatrix:
    from elutq import _core

    rows, columns = weight.shape
    groups = scheme.groups(columns)
    planes = np.empty((scheme.bits, rows, -(-columns // 8)), np.uint8)
    scales = np.empty((rows, groups, scheme.bits), np.float16)
    zeros = np.empty((rows, groups), np.float16)
    values = np.ascontiguousarray(weight)
    largest = _core.fit_hlq(
        values if values.dtype == np.float32 else values.view(np.uint16),
        values.dtype.name,
        scheme.columns_per_group(columns),
        method,
        importance,
        planes,
        scales.view(np.uint16),
        zeros.view(np.uint16),
        threads or len(os.sched_getaffinity(0)),
    )
    _check_range(largest, name)
    return HlqMatrix(planes, scales, zeros, columns, scheme.group_size)


# ---- The NumPy reference ----------------------------------------------------------------------------------
#
# Shapes: x, a: float64 [groups, columns], the weights and their importances; s: [groups, q]; z: [groups];
# codes: [groups, columns], the integer sum_p b_p 2^p.


def _fit_numpy(
    weight: NDArray[np.float32],
    scheme: QuantScheme,
    importance: NDArray[np.float32] | None,
    method: str,
    name: str,
) -> HlqMatrix:
    rows, columns = weight.shape
    _check_range(float(np.abs(weight.astype(np.float32)).max()), name)
    group = scheme.columns_per_group(columns)
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, scheme.groups(columns), scheme.bits), np.float16)
    zeros = np.empty((rows, scheme.groups(columns)), np.float16)
    at_once = max(1, _CHUNK // group)
    for g in range(scheme.groups(columns)):
        begin, end = g * group, min((g + 1) * group, columns)
        a = np.ones(end - begin) if importance is None else importance[begin:end].astype(np.float64)
        for row in range(0, rows, at_once):
            some = slice(row, row + at_once)
            x = weight[some, begin:end].astype(np.float64)
            s, z = _solve(x, np.broadcast_to(a, x.shape), scheme.bits, method)
            codes[some, begin:end] = _select(x, s, z)
            scales[some, g], zeros[some, g] = s, z
    return HlqMatrix(pack_codes(codes, scheme.bits), scales, zeros, columns, scheme.group_size)


def _solve(x: Floats, a: Floats, bits: int, method: str) -> tuple[Floats, Floats]:
    """The parameters to store, float64 but fp16-representable: scales [groups, bits] and zeros [groups]."""
    if method == "rtn":
        return _store_uniform(*_min_max(x, bits))
    if method == "uniform":
        return _store_uniform(*_best_clipped(x, a, bits))
    if method == "ao":
        return _store(x, a, *_alternate(x, a, *_min_max(x, bits), AO_ROUNDS))
    if method == "adam":
        return _store(x, a, *_adam(x, a, *_min_max(x, bits)))
    return _store(x, a, *_best(x, a, (_alternate(x, a, s, z, HLQ_ROUNDS) for s, z in _starts(x, a, bits))))


def _starts(x: Floats, a: Floats, bits: int) -> Iterable[tuple[Floats, Floats]]:
    yield _best_clipped(x, a, bits)
    for ratio in START_RATIOS:
        yield _min_max(x, bits, ratio, ratio)


def _patterns(bits: int) -> Floats:
    """The bits of every code, [2**bits, bits]."""
    return (np.arange(2**bits)[:, None] >> np.arange(bits) & 1).astype(np.float64)


def _select(x: Floats, s: Floats, z: Floats) -> NDArray[np.uint8]:
    """Bit-pattern selection: the code of the nearest level; of two equally near ones, the lower level's."""
    levels = z[:, None] + s @ _patterns(s.shape[1]).T
    order = np.argsort(levels, axis=1, kind="stable")
    levels = np.take_along_axis(levels, order, axis=1)
    rank = np.zeros(x.shape, np.intp)
    for lower, upper in zip(levels.T[:-1], levels.T[1:], strict=True):
        rank += x > ((lower + upper) / 2)[:, None]
    return np.take_along_axis(order, rank, axis=1).astype(np.uint8)


def _reconstruct(
    x: Floats, a: Floats, codes: NDArray[np.uint8], s: Floats, z: Floats
) -> tuple[Floats, Floats]:
    """Linear reconstruction: argmin over (s, z) of E, staying at the previous (s, z) where E is flat."""
    q = s.shape[1]
    design = np.concatenate([_patterns(q)[codes], np.ones((*x.shape, 1))], axis=2)
    weighted = design * a[:, :, None]
    normal = weighted.transpose(0, 2, 1) @ design
    normal += PROXIMITY * a.sum(1)[:, None, None] * np.eye(q + 1)
    residual = x - z[:, None] - (design[:, :, :q] @ s[:, :, None])[:, :, 0]
    step = np.linalg.solve(normal, weighted.transpose(0, 2, 1) @ residual[:, :, None])[:, :, 0]
    return s + step[:, :q], z + step[:, q]


def _alternate(x: Floats, a: Floats, s: Floats, z: Floats, rounds: int) -> tuple[Floats, Floats]:
    """Alternating optimization from the start (s, z)."""
    for _ in range(rounds):
        s, z = _reconstruct(x, a, _select(x, s, z), s, z)
    return s, z


def _adam(x: Floats, a: Floats, s: Floats, z: Floats) -> tuple[Floats, Floats]:
    """The gradient variant: Adam on (s, z) in units of the group's range, patterns chosen anew each step."""
    q = s.shape[1]
    unit = np.maximum(np.ptp(x, axis=1), np.finfo(np.float32).tiny)[:, None]
    parameters = np.concatenate([s, z[:, None]], axis=1) / unit
    first, second = np.zeros_like(parameters), np.zeros_like(parameters)
    y = x / unit
    for step in range(1, ADAM_STEPS + 1):
        s, z = parameters[:, :q], parameters[:, q]
        design = np.concatenate([_patterns(q)[_select(y, s, z)], np.ones((*x.shape, 1))], axis=2)
        residual = (design @ parameters[:, :, None])[:, :, 0] - y
        gradient = 2 * ((a * residual)[:, None, :] @ design)[:, 0] / a.sum(1)[:, None]
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rate = ADAM_RATE * (1 - step / (ADAM_STEPS + 1))
        parameters = parameters - rate * (first / (1 - 0.9**step)) / (
            np.sqrt(second / (1 - 0.999**step)) + 1e-8
        )
    return parameters[:, :q] * unit, parameters[:, q] * unit[:, 0]


def _error(x: Floats, a: Floats, s: Floats, z: Floats) -> Floats:
    """E of each group, [groups], with the best patterns for (s, z)."""
    levels = z[:, None] + s @ _patterns(s.shape[1]).T
    return (a * (x - np.take_along_axis(levels, _select(x, s, z).astype(np.intp), axis=1)) ** 2).sum(1)


def _best(x: Floats, a: Floats, candidates: Iterable[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Of several (s, z), the one of least E for each group; the earlier one on a tie."""
    best_s = best_z = least = None
    for s, z in candidates:
        error = _error(x, a, s, z)
        if least is None or best_s is None or best_z is None:
            best_s, best_z, least = s.copy(), z.copy(), error
        else:
            better = error < least
            best_s[better], best_z[better], least[better] = s[better], z[better], error[better]
    assert best_s is not None
    assert best_z is not None
    return best_s, best_z


def _min_max(x: Floats, bits: int, low_ratio: float = 1.0, high_ratio: float = 1.0) -> tuple[Floats, Floats]:
    """The uniform grid from low_ratio * min to high_ratio * max."""
    low, high = low_ratio * x.min(1), high_ratio * x.max(1)
    swapped = low > high  # a ratio below 1 can bring the ends of a one-signed group past each other
    low, high = np.where(swapped, high, low), np.where(swapped, low, high)
    return ((high - low) / (2**bits - 1))[:, None] * 2.0 ** np.arange(bits), low


def _best_clipped(x: Floats, a: Floats, bits: int) -> tuple[Floats, Floats]:
    """The best uniform grid over all pairs of CLIP_RATIOS."""
    return _best(
        x, a, (_min_max(x, bits, low, high) for low in CLIP_RATIOS[::-1] for high in CLIP_RATIOS[::-1])
    )


def _to_half(value: Floats) -> Floats:
    return np.clip(value, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float64)


def _store_uniform(s: Floats, z: Floats) -> tuple[Floats, Floats]:
    """Round a uniform grid to fp16 and keep it uniform: scales[p] = 2**p * scales[0]."""
    planes = 2.0 ** np.arange(s.shape[1])
    step = _to_half(np.minimum(s[:, 0], HALF_MAX / planes[-1]))
    return step[:, None] * planes, _to_half(z)


def _store(x: Floats, a: Floats, s: Floats, z: Floats) -> tuple[Floats, Floats]:
    """Canonical form, rounded to fp16."""
    z = z + np.minimum(s, 0).sum(1)
    return _to_half(np.sort(np.abs(s), axis=1)), _to_half(z)
