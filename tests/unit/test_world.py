"""The processes of a job: shares, a process alone, and that it does not need torch."""

import subprocess
import sys

import pytest

from elutq import errors
from elutq.world import World


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 6, 7, 128])
def test_shares_are_balanced_and_follow_each_other(size: int, count: int) -> None:
    shares = [World(rank=rank, size=size).share(count) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_every_call_is_the_identity() -> None:
    torch = pytest.importorskip("torch")
    with World.join("cpu") as world:
        assert (world.rank, world.size, world.is_main, world.threads) == (0, 1, True, None)
        assert world.device == torch.device("cpu")
        tensor = torch.ones(3)
        world.sum_(tensor)
        world.broadcast_(tensor)
        assert tensor.tolist() == [1, 1, 1]
        assert world.totals(1, 0.1) == [1, 0.1]
        assert world.gather_objects("a") == ["a"]
        assert (
            world.broadcast_object("a") == world.on_main(lambda: "a") == world.from_main(lambda: "a") == "a"
        )


def test_alone_an_error_is_its_own() -> None:
    def fail() -> None:
        raise errors.OutputExistsError("there is something")

    with pytest.raises(errors.OutputExistsError) as raised:
        World().from_main(fail)
    assert not raised.value.elsewhere


def test_processes_of_a_machine_divide_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    assert World(size=3, local_size=3).threads == 2
    assert World(size=16, local_size=16).threads == 1
    assert World(size=2, local_size=1).threads is None


def test_a_process_alone_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from elutq.world import World\n"
        "with World.join() as world: print(world.from_main(lambda: world.size))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
