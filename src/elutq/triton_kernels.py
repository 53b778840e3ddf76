"""Hot loops of the quantizers on GPUs, in Triton: one launch and one pass over memory each.

Each does what its callers, `elutq.group_problem` and `elutq.finetune.soft_weights`, say and spell out in
torch, where it would be launch after launch: a column takes ten of them, and there are hundreds of thousands.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 8  # of one warp: with 128 columns, 32 numbers in each thread
_WIDEST = 1024  # part of a group that a warp works on at a time
_LEAST_GAP = tl.constexpr(1e-9)  # as in `soft_weights`


def choose_columns(
    ascending: Tensor,
    order: Tensor,
    matrix: Tensor,
    base: Tensor,
    pull: Tensor,
    values: Tensor,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """For each column j in turn: q_j = the level nearest to b_j + p_j / D_jj, then p += D_j (b_j - q_j).

    Args:
        ascending: levels of each row, float32 [levels, rows].
        order: their codes, uint8, likewise.
        matrix: D, float32 [columns, columns]; of more than 128 columns, registers would not hold the tile.
        base: b, float32 [columns, rows].
        pull: p, likewise; changed.
        values: q, likewise; written.
        codes: of the levels chosen, uint8; written.
        errors: b - q, float32; written.
    """
    count, rows = base.shape
    grid = (triton.cdiv(rows, _ROWS),)
    columns = max(16, triton.next_power_of_2(count))
    arrays = ascending, order, matrix.contiguous(), base, pull, values, codes, errors
    with torch.cuda.device_of(base):
        _choose_columns[grid](*arrays, count, rows, len(ascending), columns, _ROWS, num_warps=1)


@triton.jit
def _choose_columns(
    ascending,
    order,
    matrix,
    base,
    pull,
    values,
    codes,
    errors,
    count: tl.constexpr,
    rows,
    levels: tl.constexpr,
    columns: tl.constexpr,
    rows_at_once: tl.constexpr,
):
    row = tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once)
    column = tl.arange(0, columns)
    inside, present = row < rows, column < count
    tile = column[:, None] * rows + row[None, :]
    p = tl.load(pull + tile, mask=present[:, None] & inside[None, :], other=0.0)
    for j in range(count):
        own = tl.sum(tl.where(column[:, None] == j, p, 0.0), 0)
        here = j * rows + row
        b = tl.load(base + here, mask=inside, other=0.0)
        wanted = b + own / tl.load(matrix + j * count + j)
        value = tl.load(ascending + row, mask=inside, other=0.0)
        below, rank = value, tl.zeros_like(row)
        for k in tl.static_range(1, levels):
            level = tl.load(ascending + k * rows + row, mask=inside, other=0.0)
            above = wanted > (below + level) / 2
            value = tl.where(above, level, value)
            rank += above.to(tl.int32)
            below = level
        error = b - value
        tl.store(values + here, value, mask=inside)
        tl.store(codes + here, tl.load(order + rank * rows + row, mask=inside, other=0), mask=inside)
        tl.store(errors + here, error, mask=inside)
        p += tl.load(matrix + j * count + column, mask=present, other=0.0)[:, None] * error[None, :]
    tl.store(pull + tile, p, mask=present[:, None] & inside[None, :])


def soft_values(latent: Tensor, levels: Tensor, temperature: float, values: Tensor) -> None:
    """Write soft weights; arguments as in `elutq.finetune.soft_weights`."""
    _of_groups(_soft_values, latent, levels, values, slope=2 / temperature)


def soft_gradients(
    latent: Tensor,
    levels: Tensor,
    temperature: float,
    gradient: Tensor,
    for_latent: Tensor,
    for_levels: Tensor,
) -> None:
    """Write gradients for latent weights and levels from the weights' own."""
    arrays = gradient.contiguous(), for_latent, for_levels
    _of_groups(_soft_gradients, latent, levels, *arrays, slope=2 / temperature)


def settle(latent: Tensor, levels: Tensor, distance: float) -> None:
    """Move each latent weight to the level nearest to it, by at most `distance`."""
    _of_groups(_settle, latent, levels, distance=distance)


def _of_groups(kernel: Any, latent: Tensor, levels: Tensor, *others: Tensor, **numbers: float) -> None:
    """Launch a kernel, a warp for each group."""
    columns = latent.shape[-1]
    arrays = latent, levels.contiguous(), *others
    sizes = {"count": levels.shape[-1], "at_once": min(_WIDEST, triton.next_power_of_2(columns))}
    with torch.cuda.device_of(latent):
        grid = (latent.numel() // columns,)
        kernel[grid](*arrays, **numbers, columns=columns, **sizes, num_warps=1)


@triton.jit
def _between(z, levels, slope, count: tl.constexpr):
    """Rank of the level below, it, the step to the next, the sigmoid's argument and its slope."""
    below = tl.load(levels)
    step = tl.load(levels + 1) - below
    gap = tl.maximum((tl.load(levels + count - 1) - below) / (count - 1), _LEAST_GAP)
    below, step = below + tl.zeros_like(z), step + tl.zeros_like(z)
    rank = tl.zeros_like(z).to(tl.int32)
    for k in tl.static_range(1, count - 1):
        level = tl.load(levels + k)
        above = z > level
        rank += above.to(tl.int32)
        below = tl.where(above, level, below)
        step = tl.where(above, tl.load(levels + k + 1) - level, step)
    steepness = step * (slope / (gap * gap))
    return rank, below, step, (z - below - step / 2) * steepness, steepness


@triton.jit
def _soft_values(
    latent,
    levels,
    values,
    slope,
    columns: tl.constexpr,
    count: tl.constexpr,
    at_once: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    levels += group * count
    for first in range(0, columns, at_once):
        column = first + tl.arange(0, at_once)
        inside, here = column < columns, group * columns + column
        z = tl.load(latent + here, mask=inside, other=0.0)
        _, below, step, x, _ = _between(z, levels, slope, count)
        tl.store(values + here, below + step * tl.sigmoid(x), mask=inside)


@triton.jit
def _soft_gradients(
    latent,
    levels,
    gradient,
    for_latent,
    for_levels,
    slope,
    columns: tl.constexpr,
    count: tl.constexpr,
    at_once: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    levels += group * count
    level = tl.arange(0, count)
    total = tl.zeros([count], tl.float32)
    for first in range(0, columns, at_once):
        column = first + tl.arange(0, at_once)
        inside, here = column < columns, group * columns + column
        z = tl.load(latent + here, mask=inside, other=0.0)
        rank, _, step, x, steepness = _between(z, levels, slope, count)
        given = tl.load(gradient + here, mask=inside, other=0.0)
        to_above, rest = given * tl.sigmoid(x), tl.sigmoid(-x)
        to_below = given * rest
        tl.store(for_latent + here, step * steepness * rest * to_above, mask=inside)
        for k in tl.static_range(count):
            own = tl.where(rank == k, to_below, 0.0) + tl.where(rank == k - 1, to_above, 0.0)
            total += tl.where(level == k, tl.sum(own, 0), 0.0)
    tl.store(for_levels + group * count + level, total)


@triton.jit
def _settle(
    latent,
    levels,
    distance,
    columns: tl.constexpr,
    count: tl.constexpr,
    at_once: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    levels += group * count
    for first in range(0, columns, at_once):
        column = first + tl.arange(0, at_once)
        inside, here = column < columns, group * columns + column
        z = tl.load(latent + here, mask=inside, other=0.0)
        below = tl.load(levels)
        nearest = below + tl.zeros_like(z)
        for k in tl.static_range(1, count):
            level = tl.load(levels + k)
            nearest = tl.where(z > (below + level) / 2, level, nearest)
            below = level
        tl.store(latent + here, z + tl.clamp(nearest - z, -distance, distance), mask=inside)
