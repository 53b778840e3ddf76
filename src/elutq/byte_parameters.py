"""Rounding the parameters of solved groups to bytes under one factor per row: what `hlq.to_8bit` rests on.

With the factor r of a row, a group's levels are r (z + sum_p s_p b_p) with integers z from -128 to 127 and
s_p from 0 to 255. As in the solver, codes and parameters are chosen in turns, the parameters by least
squares; but each is rounded as soon as it is known, the zero first and the scales from the largest down, so
that those still free make up for it (Babai's nearest plane, "On Lovasz' lattice reduction and the nearest
lattice point problem", 1986).

Codes are never stored here: a group's weights are sorted once, and the sums over the weights nearest to each
level follow from running sums.

Shapes: m groups in all, those of a row one after the other; q bits, c = 2**q codes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elutq.packing import patterns

Floats = NDArray[np.float64]

#: A row's factor is tried at these fractions of the least one that clips no parameter.
FRACTIONS = (1.0, 0.75, 0.5)
ROUNDS = 2
#: Weight of the previous parameters, relative to the group's importance: it decides only what codes leave
#: undetermined.
PROXIMITY = 1e-7
_HALF_TINY = 2.0**-24


def round_to_bytes(
    x: NDArray[np.float32], a: Floats, shares: Floats, s: Floats, z: Floats
) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.float16]]:
    """Parameters for whole rows of weights, from a solution without rounding or with a finer one.

    Args:
        x: the weights, [rows, groups, columns].
        a: importance of the columns within their group, [groups, columns], not all zero in any.
        shares: importance of the groups within a row, [groups].
        s: scales, [rows, groups, q], at least 0 and ascending.
        z: zeros, [rows, groups].

    Returns:
        Scales, ascending, and zeros, of the same shapes; and the factor of each row, positive, [rows].
    """
    rows, groups, columns = x.shape
    q = s.shape[2]
    data = _SortedGroups(x.reshape(-1, columns), np.broadcast_to(a, x.shape).reshape(-1, columns))
    reach = np.maximum(s.max(axis=2) / 255, np.where(z < 0, z / -128, z / 127)).max(axis=1)
    s, z = s.reshape(-1, q), z.reshape(-1)
    start = data.sums(s, z)

    scales, zeros = np.zeros((rows, groups, q), np.uint8), np.zeros((rows, groups), np.int8)
    factors, least = np.ones(rows, np.float16), np.full(rows, np.inf)
    for fraction in FRACTIONS:
        factor = np.maximum(fraction * reach, _HALF_TINY).astype(np.float16)
        unit = np.repeat(factor.astype(np.float64), groups)
        found_s, found_z, error = _round(data, start, s / unit[:, None], z / unit, unit)
        total = (error.reshape(rows, groups) * shares).sum(axis=1)
        better = total < least
        least[better], factors[better] = total[better], factor[better]
        scales[better] = found_s.reshape(scales.shape)[better]
        zeros[better] = found_z.reshape(zeros.shape)[better]
    return scales, zeros, factors


class _SortedGroups:
    """Groups of weights [m, columns] with importances, ready to be summed over intervals."""

    def __init__(self, x: NDArray[np.float32], a: Floats) -> None:
        order = np.argsort(x, axis=1)
        x, a = _pick(x, order), _pick(a, order)
        self._x = x
        self._counts = _running_sums(a)
        self._sums = _running_sums(a * x)
        self.squares = (a * np.square(x, dtype=np.float64)).sum(axis=1)

    def sums(self, s: Floats, z: Floats) -> tuple[Floats, Floats]:
        """Sums of a and of a x over the weights nearest to each code's level, each [m, c]."""
        levels = _levels(s, z)
        order = np.argsort(levels, axis=1, kind="stable")
        levels = _pick(levels, order)
        edges = self._count_at_most((levels[:, :-1] + levels[:, 1:]) / 2)
        edges = np.pad(edges, ((0, 0), (1, 0)))
        edges = np.concatenate([edges, np.full((len(edges), 1), self._x.shape[1])], axis=1)
        result = []
        for running in (self._counts, self._sums):
            by_code = np.empty_like(levels)
            np.put_along_axis(by_code, order, np.diff(_pick(running, edges), axis=1), axis=1)
            result.append(by_code)
        return result[0], result[1]

    def _count_at_most(self, bounds: Floats) -> NDArray[np.intp]:
        """How many weights of its group are at most each bound, [m, bounds], by bisection."""
        columns = self._x.shape[1]
        count = np.zeros(bounds.shape, np.intp)
        step = 1 << (columns.bit_length() - 1)
        while step:
            further = count + step
            inside = np.minimum(further, columns)
            below = (further <= columns) & (_pick(self._x, inside - 1) <= bounds)
            count = np.where(below, further, count)
            step >>= 1
        return count


def _pick(values: NDArray[Any], columns: NDArray[np.intp]) -> NDArray[Any]:
    """`np.take_along_axis(values, columns, 1)` of contiguous values, faster and without Python's lock."""
    first = np.arange(len(values))[:, None] * values.shape[1]
    picked: NDArray[Any] = np.take(values.reshape(-1), first + columns)
    return picked


def _running_sums(values: Floats) -> Floats:
    """Sums of the first 0, 1, ... values of each row, [m, columns + 1]."""
    sums = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums


def _levels(s: Floats, z: Floats) -> Floats:
    """What each code stands for, [m, c]."""
    return z[:, None] + s @ patterns(s.shape[1]).T


def _round(
    data: _SortedGroups, sums: tuple[Floats, Floats], s: Floats, z: Floats, unit: Floats
) -> tuple[Floats, Floats, Floats]:
    """The best integer scales [m, q] and zeros [m] seen in some rounds, in units [m], and their errors [m].

    `sums` are those of (s, z), where the rounds begin.
    """
    best_s, best_z, least = np.zeros_like(s), np.zeros_like(z), np.full(len(z), np.inf)
    for _ in range(ROUNDS):
        s, z = _reconstruct(*sums, s, z, unit)
        sums = data.sums(s * unit[:, None], z * unit)
        levels = _levels(s, z) * unit[:, None]
        error = data.squares + (levels * (levels * sums[0] - 2 * sums[1])).sum(axis=1)
        better = error < least
        best_s[better], best_z[better], least[better] = s[better], z[better], error[better]
    return best_s, best_z, least


def _reconstruct(counts: Floats, sums: Floats, s: Floats, z: Floats, unit: Floats) -> tuple[Floats, Floats]:
    """Integer parameters for the present codes: weighted least squares, rounded one by one."""
    q = s.shape[1]
    design = np.column_stack([patterns(q), np.ones(1 << q)])
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)
    normal = (counts @ products).reshape(-1, q + 1, q + 1)
    normal += PROXIMITY * counts.sum(axis=1)[:, None, None] * np.eye(q + 1)
    right = (sums / unit[:, None] - counts * _levels(s, z)) @ design
    # normal = lower lower'; forward substitution, then backward with each step rounded before the next.
    lower = np.linalg.cholesky(normal)
    for i in range(q + 1):
        right[:, i] = (right[:, i] - (lower[:, i, :i] * right[:, :i]).sum(axis=1)) / lower[:, i, i]
    parameters = np.column_stack([s, z])
    steps = np.zeros_like(parameters)
    for i in range(q, -1, -1):
        free = (right[:, i] - (lower[:, i + 1 :, i] * steps[:, i + 1 :]).sum(axis=1)) / lower[:, i, i]
        lowest, highest = (-128, 127) if i == q else (0, 255)
        rounded = np.clip(np.rint(parameters[:, i] + free), lowest, highest)
        steps[:, i] = rounded - parameters[:, i]
    parameters += steps
    return np.sort(parameters[:, :q], axis=1), parameters[:, q]
