"""Options for every part of a model, and one choice of each: the least loss that a budget of bits allows.

A multiple-choice knapsack. With a price on bits, every unit on its own takes the option of least
loss + price * bits, a corner of the lower convex hull of its options. As the price falls, units step from
corner to corner,

    slope of a step = (loss before - loss after) / (bits after - bits before)        steepest first

and what has been chosen after any number of steps is optimal for exactly the bits it takes. `allocate` takes
steps until one no longer fits. It then changes at most two units' options, of all changes that fit the best,
both without that step and with it.

    gap         the loss is above the optimum's by less than what the step that did not fit would have saved
    monotone    a larger budget never gives a larger loss: between two steps the changes to choose from are
                the same and more of them fit, and after each step the choice is optimal
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from elutq.errors import InvalidArgumentError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@dataclass(frozen=True)
class Option:
    """What a unit may become: its size in bits, and an estimate, finite, of what that loses."""

    bits: int
    loss: float


@dataclass(frozen=True)
class _Step:
    slope: float
    unit: int
    target: int


@dataclass(frozen=True)
class _Change:
    """Unit `unit` takes option `target`: that many more bits, that much more loss."""

    bits: int
    loss: float
    unit: int
    target: int


def allocate(units: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose an option for every unit, to the least summed loss that `budget` bits allow.

    Time is O(n log n) in the number of options. The result depends on nothing but the arguments.

    Args:
        units: the options of each, at least one, in any order.
        budget: bits for all of them together. What no option needs is left.

    Returns:
        The index of each unit's option.

    Raises:
        InvalidArgumentError: the smallest options together take more than the budget.
    """
    chosen = [min(range(len(options)), key=lambda i: _size(options[i])) for options in units]
    room = budget - sum(options[i].bits for options, i in zip(units, chosen, strict=True))
    if room < 0:
        raise InvalidArgumentError(f"a budget of {budget} bits is below the {budget - room} bits needed")
    steps = [step for unit, start in enumerate(chosen) for step in _hull(units[unit], unit, start)]
    starts = []
    for step in sorted(steps, key=lambda step: -step.slope):  # stable: a unit's own steps stay in order
        options = units[step.unit]
        more = options[step.target].bits - options[chosen[step.unit]].bits
        if more > room:
            beyond = [*chosen]
            beyond[step.unit] = step.target
            starts.append((beyond, room - more))
            break
        room -= more
        chosen[step.unit] = step.target
    starts.append((chosen, room))
    finished = [_improve(units, start, left) for start, left in starts]
    return min(
        (choice for choice in finished if choice is not None),
        key=lambda choice: sum(options[i].loss for options, i in zip(units, choice, strict=True)),
    )


def _size(option: Option) -> tuple[int, float]:
    return option.bits, option.loss


def _hull(options: Sequence[Option], unit: int, start: int) -> list[_Step]:
    """The lower convex hull of a unit's options from its smallest one on, as steps of falling slope."""
    steps: list[_Step] = []
    slope = math.inf
    while True:
        here = options[start]
        ahead = [
            ((here.loss - option.loss) / (option.bits - here.bits), option.bits, i)
            for i, option in enumerate(options)
            if option.bits > here.bits and option.loss < here.loss
        ]
        if not ahead:
            return steps
        steepest, _, start = max(ahead)
        slope = min(slope, steepest)  # as it is, but for rounding
        steps.append(_Step(slope, unit, start))


def _improve(units: Sequence[Sequence[Option]], chosen: Sequence[int], room: int) -> list[int] | None:
    """`chosen` with the options of at most two units changed, to the least loss that takes `room` bits more.

    Returns:
        None if `room` is negative and no two changes save as much.
    """
    changes = [
        _Change(option.bits - options[now].bits, option.loss - options[now].loss, unit, target)
        for unit, (options, now) in enumerate(zip(units, chosen, strict=True))
        for target, option in enumerate(options)
        if target != now
    ]
    changes += [_Change(0, 0.0, nobody, 0) for nobody in (-1, -2)]  # so that a pair may be of one, or none
    changes.sort(key=lambda change: change.bits)
    sizes = [change.bits for change in changes]
    # The best change among the first i, and the best of another unit than that.
    leaders: list[tuple[_Change, ...]] = [()]
    for change in changes:
        if len(leaders[-1]) == 2 and change.loss >= leaders[-1][1].loss:
            leaders.append(leaders[-1])
            continue
        others = [leader for leader in leaders[-1] if leader.unit != change.unit]
        same = [leader for leader in leaders[-1] if leader.unit == change.unit]
        kept = min([*same, change], key=lambda one: one.loss)
        leaders.append(tuple(sorted([*others, kept], key=lambda one: one.loss)[:2]))
    pairs = [
        (change, other)
        for change in changes
        for other in leaders[bisect_right(sizes, room - change.bits)]
        if other.unit != change.unit
    ]
    if not pairs:
        return None
    result = [*chosen]
    for change in min(pairs, key=lambda pair: pair[0].loss + pair[1].loss):
        if change.unit >= 0:
            result[change.unit] = change.target
    return result


@dataclass(frozen=True)
class Target:
    """How large a model may be.

    Args:
        bits_per_weight: of the matrices in the blocks, as `ModelSummary.linear_bits_per_weight` counts them.
        file_bytes: or of all weight files.

    Raises:
        InvalidArgumentError: none of the two is given, or both, or it is not a positive number.
    """

    bits_per_weight: float | None = None
    file_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.bits_per_weight, self.file_bytes) if value is not None]
        if len(given) != 1:
            raise InvalidArgumentError("give either target_bpw or target_bytes")
        if not (math.isfinite(given[0]) and given[0] > 0):
            raise InvalidArgumentError(f"a target size must be a positive number, not {given[0]!r}")


def parse_size(text: str) -> int:
    """Bytes meant by "2.0GB", "800 MB", "1.5GiB" or "2000000000".

    Units are those of B, decimal (KB, MB, GB, TB) or binary (KiB, MiB, GiB, TiB), in any case; parts of a
    byte are dropped.

    Raises:
        InvalidArgumentError: it is no such text, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]I?B|B)?\s*", text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise InvalidArgumentError(f"{text!r:.80} is no size; write it like 2.0GB, 800MB or 1.5GiB")
    number, unit = match.groups()
    size = int(Fraction(number) * _UNITS[(unit or "").upper()])
    if size < 1:
        raise InvalidArgumentError(f"a size must be at least one byte, not {text!r:.80}")
    return size
