"""Choosing options under a budget, against exhaustive search and the linear relaxation."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elutq.budget import Option, allocate, parse_size
from elutq.errors import InvalidArgumentError

Units = list[list[Option]]

OPTIONS = st.builds(Option, st.integers(1, 40), st.integers(0, 1000).map(lambda i: i / 8))
UNITS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=5)


def bits(units: Units, chosen: list[int]) -> int:
    return sum(options[i].bits for options, i in zip(units, chosen, strict=True))


def loss(units: Units, chosen: list[int]) -> float:
    return sum(options[i].loss for options, i in zip(units, chosen, strict=True))


def smallest(units: Units) -> int:
    return sum(min(option.bits for option in options) for options in units)


def optimum(units: Units, budget: int) -> float:
    choices = (list(choice) for choice in itertools.product(*(range(len(options)) for options in units)))
    return min(loss(units, choice) for choice in choices if bits(units, choice) <= budget)


def largest_saving(units: Units) -> float:
    return max(max(option.loss for option in options) - min(o.loss for o in options) for options in units)


@given(UNITS, st.integers(0, 200))
def test_close_to_the_optimum_and_within_the_budget(units: Units, room: int) -> None:
    budget = smallest(units) + room
    chosen = allocate(units, budget)
    assert bits(units, chosen) <= budget
    best = optimum(units, budget)
    assert best <= loss(units, chosen) <= best + largest_saving(units)
    if len(units) <= 2:
        assert loss(units, chosen) == best


@settings(max_examples=30)
@given(UNITS)
def test_a_larger_budget_never_loses_more(units: Units) -> None:
    least = smallest(units)
    losses = [loss(units, allocate(units, least + room)) for room in range(41 * len(units))]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == sum(min(option.loss for option in options) for options in units)


@given(UNITS)
def test_too_small_a_budget(units: Units) -> None:
    with pytest.raises(InvalidArgumentError, match=f"the {smallest(units)} bits needed"):
        allocate(units, smallest(units) - 1)


def model_like(units: int, rng: np.random.Generator) -> Units:
    """Options as a transformer's matrices have them: 6 sizes, losses that fall about fourfold per bit."""
    result = []
    for unit in range(units):
        weights = (4096 * 4096, 4096 * 1024, 4096 * 11008)[unit % 3]
        scale = float(np.exp(rng.normal(0, 1.5)))
        result.append(
            [
                Option(int(weights * (b + 16 * (b + 1) / g)), scale * 4.0**-b * (1 if g == 128 else 0.9))
                for b in (2, 3, 4)
                for g in (128, 64)
            ]
        )
    return result


def dynamic_program(units: Units, budget: int) -> float:
    """The optimum, for sizes that have a large common divisor."""
    least = [min(option.bits for option in options) for options in units]
    unit = math.gcd(*(o.bits - low for options, low in zip(units, least, strict=True) for o in options))
    best = np.zeros((budget - sum(least)) // unit + 1)
    for options, low in zip(units, least, strict=True):
        after = np.full(len(best), np.inf)
        for option in options:
            more = (option.bits - low) // unit
            after[more:] = np.minimum(after[more:], best[: max(0, len(best) - more)] + option.loss)
        best = after
    return float(best[-1])


def at_share(units: Units, share: float) -> int:
    low, high = smallest(units), sum(max(option.bits for option in options) for options in units)
    return int(low + share * (high - low))


@pytest.mark.parametrize(("count", "gap"), [(20, 0.01), (56, 0.01), (300, 0.001)])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_close_to_the_optimum_of_models(count: int, gap: float, share: float) -> None:
    units = model_like(count, np.random.default_rng(0))
    budget = at_share(units, share)
    chosen = allocate(units, budget)
    assert bits(units, chosen) <= budget
    best = dynamic_program(units, budget)
    assert best * (1 - 1e-9) <= loss(units, chosen) <= best * (1 + gap)


def test_ten_thousand_units() -> None:
    """Against max over prices of sum_u min_i (loss + price * bits) - price * budget, which is no more."""
    units = model_like(10_000, np.random.default_rng(0))
    budget = at_share(units, 0.3)
    started = time.process_time()
    chosen = allocate(units, budget)
    assert time.process_time() - started < 10
    sizes, losses = (np.array([[getattr(o, name) for o in u] for u in units]) for name in ("bits", "loss"))
    prices = np.geomspace(1e-10, 1e-8, 1000)
    bound = max((losses + price * sizes).min(1).sum() - price * budget for price in prices)
    assert bits(units, chosen) <= budget
    assert bound <= loss(units, chosen) <= bound * 1.001


def test_what_is_left_is_spent() -> None:
    # After the steep step of the first unit, 5 bits are left: too few for the next, enough for two others.
    units = [
        [Option(0, 100.0), Option(10, 0.0)],
        [Option(0, 30.0), Option(6, 0.0)],
        [Option(0, 8.0), Option(2, 0.0)],
        [Option(0, 5.0), Option(3, 0.0)],
    ]
    assert allocate(units, 15) == [1, 0, 1, 1]
    assert allocate(units, 16) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2.0GB", 2_000_000_000),
        ("800MB", 800_000_000),
        ("1.5GiB", 3 << 29),
        ("1.5 gib", 3 << 29),
        ("123456", 123456),
        ("123456B", 123456),
        ("0.1GB", 100_000_000),
        (".5kb", 500),
        ("1.3KiB", 1331),
        ("2.TB", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "2G", "-1GB", "1e9", "2,5GB", "nan", "inf", "2 G B", "0", "0.1B", "٣GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="size"):
        parse_size(text)
