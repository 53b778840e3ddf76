import numpy as np
import pytest

from elutq.server.pacing import PrefillPace


def settle(pace: PrefillPace, fixed: float, per_token: float, steps: int = 80) -> list[float]:
    """Seconds of steps of a machine that takes fixed + per_token * n."""
    seconds = []
    for _ in range(steps):
        seconds.append(fixed + per_token * pace.tokens)
        pace.record(pace.tokens, seconds[-1])
    return seconds


@pytest.mark.parametrize(
    ("fixed", "per_token"), [(0.09, 0.016), (0.0, 0.016), (0.15, 0.001), (0.02, 0.0005), (0.1, 0.02)]
)
def test_steps_come_to_take_the_time_they_may(fixed: float, per_token: float) -> None:
    pace = PrefillPace(0.2)
    seconds = settle(pace, fixed, per_token)
    assert all(s <= max(0.2 + per_token, seconds[0]) for s in seconds), "it comes from below"
    most = fixed + per_token * 512
    assert min(0.2, most) - 2 * per_token <= seconds[-1] <= 0.2 + per_token


def test_it_follows_a_machine_that_slows_down_and_recovers() -> None:
    pace = PrefillPace(0.2)
    settle(pace, 0.05, 0.001)
    fast = pace.tokens
    slow = settle(pace, 0.05, 0.01)
    assert sum(s > 0.21 for s in slow) <= 4
    settle(pace, 0.05, 0.001)
    assert pace.tokens == pytest.approx(fast, rel=0.05)


def test_it_stays_near_the_wanted_time_on_a_noisy_machine() -> None:
    random = np.random.default_rng(0)
    pace = PrefillPace(0.2)
    seconds = []
    for _ in range(300):
        seconds.append((0.05 + 0.01 * pace.tokens) * random.uniform(0.9, 1.3))
        pace.record(pace.tokens, seconds[-1])
    assert 0.15 < np.median(seconds[20:]) < 0.22


def test_a_machine_that_is_too_slow_still_gets_tokens() -> None:
    pace = PrefillPace(0.2)
    settle(pace, 0.5, 0.1)
    assert pace.tokens == 4


def test_the_end_of_a_prompt_teaches_nothing() -> None:
    pace = PrefillPace(0.2)
    settle(pace, 0.0, 0.001)
    before = pace.tokens
    pace.record(3, 0.05)
    assert pace.tokens == before
    pace.record(3, 0.4)
    assert pace.tokens < before
