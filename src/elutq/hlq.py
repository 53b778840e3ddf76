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
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from elutq.byte_parameters import round_to_bytes
from elutq.errors import InvalidArgumentError, TensorShapeError, TensorValueError
from elutq.packing import HlqMatrix, pack_codes, patterns
from elutq.scheme import QuantScheme

Floats = NDArray[np.float64]

#: hlq: alternating optimization from several starts, best kept per group. ao: the published single min-max
#: start, 10 rounds. adam: the published gradient variant. uniform: the best-clipped uniform grid. rtn: the
#: min-max grid.
METHODS = ("hlq", "ao", "adam", "uniform", "rtn")
BACKENDS = ("core", "numpy")

HALF_MAX = 65504.0
#: The uniform baseline tries every pair of these fractions of a group's minimum and maximum.
CLIP_RATIOS = tuple(1.0 - 0.05 * i for i in range(15))
AO_ROUNDS = 10
ADAM_STEPS = 300
ADAM_RATE = 0.02
#: Weight of the previous (s, z) in a reconstruction, relative to the group's importance: it decides only what
#: the patterns leave undetermined, such as the scale of a plane that no weight uses.
PROXIMITY = 1e-7
#: The same for a scale that is to stay where it is.
FIXED = 1e6
STORE_ROUNDS = 3

# The plan of method="hlq", the same as in cpp/solver/search_plan.h; docs/lab.md says how it was found.
#: Length of a step, in steps of least squares. The full step minimizes E for the present patterns only; twice
#: that far E is back where it was, but the patterns have moved on, and rounds are saved.
PACE = 2.0
START_ROUNDS = 4
FINAL_ROUNDS = 2
START_CLIPS = (1.0, 0.8, 0.5)
NORMAL_QUARTILES = 1.349  #: between the quartiles of a normal distribution, in standard deviations
#: Scales of further starts around the mean, in standard deviations, by bits.
START_SHAPES: tuple[tuple[tuple[float, ...], ...], ...] = (
    ((1.6,),),
    ((1.04, 2.0),),
    ((0.86, 1.51, 1.97), (1.5, 2.26, 2.99)),
    ((0.54, 1.03, 1.32, 2.07), (1.61, 1.96, 2.35, 2.98)),
)
KICKS = (8, 8, 16, 24)  #: by bits, like the next two
KICK_ROUNDS = (3, 4, 6, 6)
KICK_SHIFT = (0.2, 0.15, 0.1, 0.03)  #: most that a kick moves the zero by, relative to the sum of scales
KICK_SIZE = 0.4  #: most that a kick changes a scale by, relative to it
_CHUNK = 1 << 18  # weights that the NumPy backend works on at once


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
    if threads is not None and threads < 1:
        raise InvalidArgumentError(f"threads must be at least 1, not {threads}")
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


def to_8bit(
    weight: NDArray[np.float32],
    matrix: HlqMatrix,
    weights: NDArray[np.float32] | None = None,
    *,
    threads: int | None = None,
) -> HlqMatrix:
    """The same matrix with 8-bit scales and zeros under one fp16 factor per row.

    Of several factors per row the one with the least error is kept. Parameters are rounded one by one, those
    still free fitted anew around them, and codes are chosen again for what is stored.

    Args:
        weight: float32, float16 or bfloat16 (out_features, in_features): what `matrix` stands for.
        matrix: a solution with fp16 parameters, of any method; where the search begins.
        weights: importance of each column, (in_features,), as in `fit`. Across the groups of a row, too.
        threads: all CPUs by default. The result does not depend on it.

    Raises:
        InvalidArgumentError: `matrix` has 8-bit parameters already, or `weights` is outside what is
            supported.
        TensorShapeError: the shapes differ.
    """
    if matrix.row_scales is not None:
        raise InvalidArgumentError("the matrix has 8-bit parameters already")
    _check_same_shape(weight, matrix)
    rows, columns = weight.shape
    scheme = QuantScheme(matrix.bits, matrix.group_size)
    group, groups = scheme.columns_per_group(columns), scheme.groups(columns)
    importance = _importance(weights, columns, scheme, "weight")
    # Columns that fill the last group up count for nothing.
    a = np.zeros((groups, group))
    a.reshape(-1)[:columns] = 1 if importance is None else importance
    shares = np.ones(groups)
    if weights is not None and weights.any():
        shares = np.maximum.reduceat(weights.astype(np.float64), np.arange(0, columns, group))

    def convert(first: int) -> HlqMatrix:
        some = slice(first, first + step)
        x = np.zeros((len(weight[some]), groups * group), np.float32)
        x[:, :columns] = weight[some]
        s, z = _canonical(
            matrix.scales[some].reshape(-1, matrix.bits).astype(np.float64),
            matrix.zeros[some].reshape(-1).astype(np.float64),
        )
        scales, zeros, factors = round_to_bytes(
            x.reshape(-1, groups, group), a, shares, s.reshape(-1, groups, matrix.bits), z.reshape(-1, groups)
        )
        unit = np.repeat(factors.astype(np.float64), groups)
        codes = _select(
            x.reshape(-1, group).astype(np.float64),
            scales.reshape(-1, matrix.bits) * unit[:, None],
            zeros.reshape(-1) * unit,
        )
        planes = pack_codes(codes.reshape(-1, groups * group)[:, :columns], matrix.bits)
        return HlqMatrix(planes, scales, zeros, columns, matrix.group_size, factors)

    step = max(1, _CHUNK // columns)
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        parts = list(pool.map(convert, range(0, rows, step)))
    arrays = {
        name: np.concatenate([part.arrays[name] for part in parts], axis=1 if name == "planes" else 0)
        for name in parts[0].arrays
    }
    return HlqMatrix(**arrays, in_features=columns, group_size=matrix.group_size)


def dequantize(matrix: HlqMatrix, *, threads: int | None = None) -> NDArray[np.float32]:
    """The matrix w = zeros + sum_p scales[p] * bit_p, times the row's scale if there is one.

    Args:
        matrix: the quantized form.
        threads: all CPUs by default.

    Returns:
        float32 (out_features, in_features), by rules F28 and F34 of the format.
    """
    from elutq import _core

    values = np.empty((matrix.out_features, matrix.in_features), np.float32)
    _core.dequantize(matrix, values, threads or len(os.sched_getaffinity(0)))
    return values


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

    _check_same_shape(weight, matrix)
    values = np.ascontiguousarray(weight)
    error, norm = _core.squared_error(
        values if values.dtype == np.float32 else values.view(np.uint16),
        values.dtype.name,
        matrix,
        threads or len(os.sched_getaffinity(0)),
    )
    return error, norm


def _check_same_shape(weight: NDArray[np.float32], matrix: HlqMatrix) -> None:
    if weight.shape != (matrix.out_features, matrix.in_features):
        raise TensorShapeError(
            f"weight has shape {weight.shape}, its quantized form {(matrix.out_features, matrix.in_features)}"
        )


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


def check_range(largest: float, name: str) -> None:
    """Check the largest magnitude of a matrix that is to be quantized.

    Raises:
        TensorValueError: it is NaN, infinity, or beyond fp16's range.
    """
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
    check_range(largest, name)
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
    check_range(float(np.abs(weight.astype(np.float32)).max()), name)
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
        return _store_uniform(*_uniform_grid(x, bits))
    if method == "uniform":
        return _store_uniform(*_best_clipped(x, a, bits))
    best = _Best(x, a)
    if method == "ao":
        _alternate(best, *_uniform_grid(x, bits), AO_ROUNDS)
    elif method == "adam":
        _adam(best, *_uniform_grid(x, bits))
    else:
        _search(best, bits)
    return _store(x, a, best.s, best.z)


class _Best:
    """The least E seen of each group and the (s, z) it came with; the earlier one on a tie."""

    def __init__(self, x: Floats, a: Floats) -> None:
        self.x, self.a = x, a
        self.s, self.z = np.zeros((len(x), 0)), np.zeros(len(x))
        self.error = np.full(len(x), np.inf)

    def offer(self, s: Floats, z: Floats, codes: NDArray[np.uint8]) -> None:
        error = (self.a * (self.x - _levels_of(codes, s, z)) ** 2).sum(1)
        better = error < self.error
        if not self.s.size:
            self.s = s.copy()
        self.s[better], self.z[better], self.error[better] = s[better], z[better], error[better]


def _levels_of(codes: NDArray[np.uint8], s: Floats, z: Floats) -> Floats:
    """What each code stands for, z + sum_p s_p b_p, [groups, columns]."""
    levels = z[:, None] + s @ patterns(s.shape[1]).T
    return np.take_along_axis(levels, codes.astype(np.intp), axis=1)


def _select(x: Floats, s: Floats, z: Floats) -> NDArray[np.uint8]:
    """Bit-pattern selection: the code of the nearest level; of two equally near ones, the lower level's."""
    levels = z[:, None] + s @ patterns(s.shape[1]).T
    order = np.argsort(levels, axis=1, kind="stable").astype(np.uint8)
    levels = np.sort(levels, axis=1)
    rank = np.zeros(x.shape, np.intp)
    for lower, upper in zip(levels.T[:-1], levels.T[1:], strict=True):
        rank += x > ((lower + upper) / 2)[:, None]
    return np.take_along_axis(order, rank, axis=1)


def _reconstruct(
    x: Floats, a: Floats, codes: NDArray[np.uint8], s: Floats, z: Floats, half: bool = False
) -> tuple[Floats, Floats]:
    """Linear reconstruction: argmin over (s, z) of E, staying at the given (s, z) where E is flat.

    With `half`, each parameter is rounded to fp16 as soon as it is known, the zero first and the scales from
    the largest down, so that those still free make up for the rounding, and scales at the limit of fp16 stay
    there.
    """
    q = s.shape[1]
    design = np.concatenate([patterns(q)[codes], np.ones((*x.shape, 1))], axis=2)
    weighted = (design * a[:, :, None]).transpose(0, 2, 1)
    normal = weighted @ design + PROXIMITY * a.sum(1)[:, None, None] * np.eye(q + 1)
    right = weighted @ (x - _levels_of(codes, s, z))[:, :, None]
    if not half:
        step = np.linalg.solve(normal, right)[:, :, 0]
        return s + step[:, :q], z + step[:, q]
    parameters = np.concatenate([s, z[:, None]], axis=1)
    for i in range(q):
        normal[:, i, i] += np.where(s[:, i] < HALF_MAX, 0, FIXED * a.sum(1))
    for i in range(q, -1, -1):
        free = np.linalg.solve(normal[:, : i + 1, : i + 1], right[:, : i + 1])[:, i, 0]
        moved = parameters[:, i] + free
        rounded = _to_half(moved if i == q else np.maximum(moved, 0))
        right = right - normal[:, :, i : i + 1] * (rounded - parameters[:, i])[:, None, None]
        parameters[:, i] = rounded
    return parameters[:, :q], parameters[:, q]


def _canonical(s: Floats, z: Floats) -> tuple[Floats, Floats]:
    """The same levels with scales >= 0 and ascending."""
    return np.sort(np.abs(s), axis=1), z + np.minimum(s, 0).sum(1)


def _alternate(best: _Best, s: Floats, z: Floats, rounds: int, pace: float = 1.0) -> None:
    """Alternating optimization from (s, z), in steps `pace` times as long as least squares asks for."""
    for _ in range(rounds):
        s, z = _canonical(s, z)
        codes = _select(best.x, s, z)
        reached_s, reached_z = _reconstruct(best.x, best.a, codes, s, z)
        best.offer(reached_s, reached_z, codes)
        s, z = s + pace * (reached_s - s), z + pace * (reached_z - z)


def _search(best: _Best, bits: int) -> None:
    """Starts of fixed shapes, then kicks: the best parameters so far, disturbed, are the next start."""
    x, a = best.x, best.a
    for clip in START_CLIPS:
        _alternate(best, *_uniform_grid(x, bits, clip, clip), START_ROUNDS, PACE)
    mean = (a * x).sum(1) / a.sum(1)
    deviation = np.sqrt(np.maximum((a * x * x).sum(1) / a.sum(1) - mean**2, 0))
    for shape in START_SHAPES[bits - 1]:
        _alternate(best, *_shaped(shape, deviation, mean), START_ROUNDS, PACE)
    if bits > 1:
        _alternate(best, *_outlier_start(x, bits), START_ROUNDS, PACE)
    for kick in range(KICKS[bits - 1]):
        direction = kick_direction(kick, bits)
        change = KICK_SIZE * direction[:bits] * best.s
        shift = KICK_SHIFT[bits - 1] * direction[bits] * best.s.sum(1)
        _alternate(best, best.s + change, best.z - change.sum(1) / 2 + shift, KICK_ROUNDS[bits - 1], PACE)
    _alternate(best, best.s, best.z, FINAL_ROUNDS)


def _shaped(shape: tuple[float, ...], deviation: Floats, center: Floats) -> tuple[Floats, Floats]:
    """Scales of the given shape, in units of `deviation`, with the middle of their levels at `center`."""
    s = deviation[:, None] * np.array(shape)
    return s, center - s.sum(1) / 2


def _outlier_start(x: Floats, bits: int) -> tuple[Floats, Floats]:
    """A start for groups with an outlier: one plane reaches out to it, the others share the bulk."""
    ascending = np.sort(x, axis=1)
    lower, upper = ascending[:, x.shape[1] // 4], ascending[:, x.shape[1] * 3 // 4]
    middle = (lower + upper) / 2
    s, z = _shaped(START_SHAPES[bits - 2][0], (upper - lower) / NORMAL_QUARTILES, middle)
    above, below = ascending[:, -1] - middle, middle - ascending[:, 0]
    return np.column_stack([s, np.maximum(above, below)]), z - np.where(above < below, below, 0)


def kick_direction(kick: int, bits: int) -> Floats:
    """Directions in [-1, 1) of the scales and the zero, [bits + 1]; successive kicks fill the cube evenly.

    An additive recurrence (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences") with
    powers of the root of x^6 = x + 1.
    """
    steps = (
        0.8812714616335696,
        0.7766393890897683,
        0.6844301295853427,
        0.6031687406857283,
        0.5315553977157914,
    )
    return 2 * np.mod(0.5 + (kick + 1) * np.array(steps[: bits + 1]), 1) - 1


def _adam(best: _Best, s: Floats, z: Floats) -> None:
    """The gradient variant: Adam on (s, z) in units of the group's range, patterns chosen anew each step."""
    q = s.shape[1]
    unit = np.maximum(np.ptp(best.x, axis=1), np.finfo(np.float32).tiny)[:, None]
    parameters = np.concatenate([s, z[:, None]], axis=1) / unit
    first, second = np.zeros_like(parameters), np.zeros_like(parameters)
    for step in range(1, ADAM_STEPS + 1):
        s, z = parameters[:, :q] * unit, parameters[:, q] * unit[:, 0]
        codes = _select(best.x, s, z)
        best.offer(s, z, codes)
        design = np.concatenate([patterns(q)[codes], np.ones((*best.x.shape, 1))], axis=2)
        residual = best.a * (_levels_of(codes, s, z) - best.x) / unit
        gradient = 2 * (residual[:, None, :] @ design)[:, 0] / best.a.sum(1)[:, None]
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rate = ADAM_RATE * (1 - step / (ADAM_STEPS + 1))
        parameters = parameters - rate * (first / (1 - 0.9**step)) / (
            np.sqrt(second / (1 - 0.999**step)) + 1e-8
        )


def _uniform_grid(x: Floats, bits: int, low: float = 1.0, high: float = 1.0) -> tuple[Floats, Floats]:
    """The uniform grid from low * min to high * max."""
    ends = np.stack([low * x.min(1), high * x.max(1)])
    z = ends.min(0)  # a ratio below 1 can bring the ends of a one-signed group past each other
    return ((ends.max(0) - z) / (2**bits - 1))[:, None] * 2.0 ** np.arange(bits), z


def _best_clipped(x: Floats, a: Floats, bits: int) -> tuple[Floats, Floats]:
    """The best uniform grid over all pairs of CLIP_RATIOS."""
    best = _Best(x, a)
    for low in CLIP_RATIOS:
        for high in CLIP_RATIOS:
            s, z = _uniform_grid(x, bits, low, high)
            best.offer(s, z, _select(x, s, z))
    return best.s, best.z


def _to_half(value: Floats) -> Floats:
    return np.clip(value, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float64)


def _store_uniform(s: Floats, z: Floats) -> tuple[Floats, Floats]:
    """Round a uniform grid to fp16 and keep it uniform: scales[p] = 2**p * scales[0]."""
    planes = 2.0 ** np.arange(s.shape[1])
    step = _to_half(np.minimum(s[:, 0], HALF_MAX / planes[-1]))
    return step[:, None] * planes, _to_half(z)


def _store(x: Floats, a: Floats, s: Floats, z: Floats) -> tuple[Floats, Floats]:
    """Round to fp16 in canonical form, so that least is lost."""
    best = _Best(x, a)
    for _ in range(STORE_ROUNDS):
        s, z = _canonical(s, z)
        s, z = _canonical(*_reconstruct(x, a, _select(x, s, z), s, z, half=True))
        best.offer(s, z, _select(x, s, z))
    return best.s, best.z
