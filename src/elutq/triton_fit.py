"""The data-free solver of `elutq.hlq` on GPUs, in Triton: one launch from the starts to what is stored.

A lane of a warp keeps some codes of one row, and all columns pass by in every round, so that nothing is
sorted. Sums over columns are float32, of one code's weights each, which keeps the normal equations
consistent; what is made of them, parameters and least squares, is float64.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from elutq import hlq

_COLUMNS = 16  # loaded at a time
_LANES = 32  # of a warp
_FEWEST_ROWS = 8  # of a warp, so that it reads whole sectors of memory
_HALF_MAX = tl.constexpr(hlq.HALF_MAX)
_PROXIMITY = tl.constexpr(hlq.PROXIMITY)
_FIXED = tl.constexpr(hlq.FIXED)


def fit_groups(target: Tensor, importance: Tensor, bits: int, method: str) -> Tensor:
    """Quantize each row of a matrix as one group; what `hlq.fit` finds, but for the rounding of sums.

    Args:
        target: float32 [columns, rows], within fp16's range.
        importance: of each column, float32 [columns], finite and >= 0; all zero counts as all equal.
        bits: bit planes, 1 to 4.
        method: "hlq" or "ao".

    Returns:
        Scales, >= 0 and ascending, and the zero, float32 [bits + 1, rows], representable in fp16.

    Raises:
        TensorValueError: the target holds NaN, infinity, or values beyond fp16's range.
    """
    hlq.check_range(float(target.abs().max()), "weight")
    columns, rows = target.shape
    largest = importance.max()
    share = torch.where(largest > 0, importance / largest, 1.0)
    starts = torch.stack(_starts(target, share.double(), bits, method))
    kicks, rounds, paces = _plan(bits, method, target.device)
    found = target.new_empty((bits + 1, rows))
    arrays = target.contiguous(), share, starts, kicks, rounds, paces, found
    constants = sizes(bits)
    with torch.cuda.device_of(target):
        grid = (triton.cdiv(rows, constants["rows_at_once"]),)
        _fit[grid](*arrays, columns, rows, len(starts), len(rounds), **constants, num_warps=1)
    return found


def sizes(bits: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {
        "bits": bits,
        "store_rounds": hlq.STORE_ROUNDS,
        "columns_at_once": _COLUMNS,
        "rows_at_once": max(_FEWEST_ROWS, _LANES >> bits),
    }


def _starts(x: Tensor, a: Tensor, bits: int, method: str) -> list[Tensor]:
    """Parameters that alternating optimization begins with, each float64 [bits + 1, rows]."""
    low, high = x.amin(0).double(), x.amax(0).double()

    def grid(clip: float) -> Tensor:
        ends = torch.stack([clip * low, clip * high])
        step = (ends.amax(0) - ends.amin(0)) / (2**bits - 1)
        return torch.stack([step * 2**p for p in range(bits)] + [ends.amin(0)])

    def shaped(shape: tuple[float, ...], deviation: Tensor, center: Tensor) -> Tensor:
        scales = torch.stack([deviation * size for size in shape])
        return torch.cat([scales, (center - scales.sum(0) / 2)[None]])

    if method == "ao":
        return [grid(1.0)]
    mean = a @ x.double() / a.sum()
    deviation = (a @ (x - mean).square() / a.sum()).sqrt()
    starts = [grid(clip) for clip in hlq.START_CLIPS]
    starts += [shaped(shape, deviation, mean) for shape in hlq.START_SHAPES[bits - 1]]
    if bits > 1:
        lower, upper = (x.kthvalue(len(x) * part // 4 + 1, 0).values.double() for part in (1, 3))
        middle = (lower + upper) / 2
        bulk = shaped(hlq.START_SHAPES[bits - 2][0], (upper - lower) / hlq.NORMAL_QUARTILES, middle)
        above, below = high - middle, middle - low
        zero = bulk[-1] - torch.where(above < below, below, 0)
        starts.append(torch.cat([bulk[:-1], torch.maximum(above, below)[None], zero[None]]))
    return starts


@lru_cache
def _plan(bits: int, method: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each stage of the search: its kick [bits + 1], how many rounds it has, and their pace.

    A kick is relative: to each scale, and for the zero to the sum of scales. The last one changes nothing,
    and those of stages with a start of their own are not used.
    """
    if method == "ao":
        kicks, rounds, paces = [[0.0] * (bits + 1)], [hlq.AO_ROUNDS], [1.0]
    else:
        starts = len(hlq.START_CLIPS) + len(hlq.START_SHAPES[bits - 1]) + (bits > 1)
        count = hlq.KICKS[bits - 1]
        sizes = [hlq.KICK_SIZE] * bits + [hlq.KICK_SHIFT[bits - 1]]
        kicks = [[0.0] * (bits + 1)] * starts
        kicks += [(hlq.kick_direction(kick, bits) * sizes).tolist() for kick in range(count)]
        kicks += [[0.0] * (bits + 1)]
        rounds = [hlq.START_ROUNDS] * starts + [hlq.KICK_ROUNDS[bits - 1]] * count + [hlq.FINAL_ROUNDS]
        paces = [hlq.PACE] * (starts + count) + [1.0]
    return (
        torch.tensor(kicks, dtype=torch.float64, device=device),
        torch.tensor(rounds, dtype=torch.int32, device=device),
        torch.tensor(paces, dtype=torch.float64, device=device),
    )


# Parameters are tuples of scales and the zero, each float64 [rows at once]; tiles are [codes, rows at once].


@triton.jit
def _fit(
    target,
    importance,
    starts,
    kicks,
    rounds,
    paces,
    found,
    columns,
    rows,
    start_count,
    stages,
    bits: tl.constexpr,
    store_rounds: tl.constexpr,
    columns_at_once: tl.constexpr,
    rows_at_once: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * rows_at_once + tl.arange(0, rows_at_once)
    inside = row < rows
    infinity = tl.full([rows_at_once], float("inf"), tl.float64)
    best = (tl.zeros_like(infinity),) * (bits + 1)
    error = infinity
    for stage in range(stages):
        p = _kicked(best, kicks + stage * (bits + 1), bits)
        given = ()
        for i in tl.static_range(bits + 1):
            start = starts + (stage * (bits + 1) + i) * rows + row
            given += (tl.load(start, mask=row < tl.where(stage < start_count, rows, 0), other=0.0),)
        p = _where(stage < start_count, given, p, bits)
        pace = tl.load(paces + stage)
        for _ in range(tl.load(rounds + stage)):
            p = _canonical(p, bits)
            mass, residual, here = _select(
                target, importance, p, row, columns, rows, bits, columns_at_once, rows_at_once
            )
            reached, gain = _reconstruct(mass, residual, p, bits, False)
            left = tl.maximum(here - gain, 0.0)  # rounding would let a start that fits exactly be beaten
            better = left < error
            error = tl.where(better, left, error)
            best = _where(better, reached, best, bits)
            further = ()
            for i in tl.static_range(bits + 1):
                further += (p[i] + pace * (reached[i] - p[i]),)
            p = further

    p = best
    error = infinity
    for visit in range(store_rounds + 1):  # the first with parameters that are not rounded yet
        p = _canonical(p, bits)
        mass, residual, here = _select(
            target, importance, p, row, columns, rows, bits, columns_at_once, rows_at_once
        )
        better = (here < error) & (visit > 0)
        error = tl.where(better, here, error)
        best = _where(better, p, best, bits)
        p, _ = _reconstruct(mass, residual, p, bits, True)
    for i in tl.static_range(bits + 1):
        tl.store(found + i * rows + row, best[i].to(tl.float32), mask=inside)


@triton.jit
def _where(condition, chosen, others, bits: tl.constexpr):
    result = ()
    for i in tl.static_range(bits + 1):
        result += (tl.where(condition, chosen[i], others[i]),)
    return result


@triton.jit
def _kicked(p, kick, bits: tl.constexpr):
    """The scales changed, with the middle of the levels where it is, then the zero."""
    result = ()
    zero, span = p[bits], tl.zeros_like(p[bits])
    for i in tl.static_range(bits):
        change = tl.load(kick + i) * p[i]
        result += (p[i] + change,)
        zero -= change / 2
        span += p[i]
    result += (zero + tl.load(kick + bits) * span,)
    return result


@triton.jit
def _canonical(p, bits: tl.constexpr):
    """The same levels with scales >= 0 and ascending."""
    zero = p[bits]
    ascending = ()
    for i in tl.static_range(bits):
        zero += tl.minimum(p[i], 0.0)
        size = tl.abs(p[i])
        longer = ()
        for j in tl.static_range(i):
            longer += (tl.minimum(ascending[j], size),)
            size = tl.maximum(ascending[j], size)
        longer += (size,)
        ascending = longer
    ascending += (zero,)
    return ascending


@triton.jit
def _select(
    target,
    importance,
    p,
    row,
    columns,
    rows,
    bits: tl.constexpr,
    columns_at_once: tl.constexpr,
    rows_at_once: tl.constexpr,
):
    """Of the weights whose nearest level is a code's: sums of a and of a (x - level), two tiles. And E.

    Of two equally near levels, the lower one counts; of two equal ones, that of the lower code.
    """
    code = tl.arange(0, 1 << bits)[:, None]
    level = tl.zeros([1 << bits, rows_at_once], tl.float64) + p[bits][None, :]
    for i in tl.static_range(bits):
        level += tl.where((code >> i) & 1 == 1, p[i][None, :], 0.0)
    below = tl.full([1 << bits, rows_at_once], float("-inf"), tl.float64)
    above = -below
    for c in tl.static_range(1 << bits):
        other = p[bits]
        for i in tl.static_range(bits):
            if (c >> i) & 1 == 1:
                other += p[i]
        other = other[None, :]
        lower = (other < level) | ((other == level) & (c < code))
        below = tl.where(lower, tl.maximum(below, other), below)
        above = tl.where(lower | (code == c), above, tl.minimum(above, other))
    low, high = ((below + level) / 2).to(tl.float32), ((level + above) / 2).to(tl.float32)
    level = level.to(tl.float32)

    mass, residual, error = tl.zeros_like(level), tl.zeros_like(level), tl.zeros_like(level)
    for first in range(0, columns, columns_at_once):
        column = first + tl.arange(0, columns_at_once)
        present = column < columns
        tile = column[:, None] * rows.to(tl.int64) + row[None, :]
        x = tl.load(target + tile, mask=present[:, None] & (row < rows)[None, :], other=0.0)[:, None, :]
        a = tl.load(importance + column, mask=present, other=0.0)[:, None, None]
        share = tl.where((x > low[None, :, :]) & (x <= high[None, :, :]), a, 0.0)
        distance = x - level[None, :, :]
        pull = share * distance
        mass += tl.sum(share, 0)
        residual += tl.sum(pull, 0)
        error += tl.sum(pull * distance, 0)
    return mass.to(tl.float64), residual.to(tl.float64), tl.sum(error, 0).to(tl.float64)


@triton.jit
def _reconstruct(mass, residual, p, bits: tl.constexpr, half: tl.constexpr):
    """The parameters of least E for the codes as they are, near p where E is flat, and by how much E falls.

    With `half` each is rounded to fp16 as soon as it is known, the zero first and the scales from the largest
    down, so that those still free make up for it; scales at the limit of fp16 stay there.
    """
    code = tl.arange(0, 1 << bits)[:, None]
    total = tl.sum(mass, 0)
    # The normal equations' matrix is L D L^T. `products` is L D, row after row; `forward` is L^-1 right.
    products, inverses, rights, forward = (), (), (), ()
    for i in tl.static_range(bits + 1):
        of_i = (1 << i) % (1 << bits)  # bits of the codes that parameter i is part of; any, if it is the zero
        rights += (tl.sum(tl.where((code & of_i) == of_i, residual, 0.0), 0),)
        ahead = rights[i]
        for j in tl.static_range(i + 1):
            both = of_i | ((1 << j) % (1 << bits))
            product = tl.sum(tl.where((code & both) == both, mass, 0.0), 0)
            if i == j:
                product += _PROXIMITY * total
                if half and i < bits:
                    product += tl.where(p[i] < _HALF_MAX, 0.0, _FIXED * total)
            for k in tl.static_range(j):
                product -= products[i * (i + 1) // 2 + k] * inverses[k] * products[j * (j + 1) // 2 + k]
            products += (product,)
            if j < i:
                ahead -= product * inverses[j] * forward[j]
        inverses += (1.0 / products[i * (i + 1) // 2 + i],)
        forward += (ahead,)
    steps, moved = (), ()  # those of the zero first
    gain = tl.zeros_like(total)
    for i in tl.static_range(bits, -1, -1):
        step = forward[i]
        for k in tl.static_range(i + 1, bits + 1):
            step -= products[k * (k + 1) // 2 + i] * steps[bits - k]
        step *= inverses[i]
        to = p[i] + step
        if half:
            if i < bits:
                to = tl.maximum(to, 0.0)
            to = tl.minimum(tl.maximum(to, -_HALF_MAX), _HALF_MAX).to(tl.float16).to(tl.float64)
            step = to - p[i]
        gain += rights[i] * step
        moved += (to,)
        steps += (step,)
    reached = ()
    for i in tl.static_range(bits + 1):
        reached += (moved[bits - i],)
    return reached, gain
