"""The processes that share a job: one, or those that torchrun started.

Every process runs the same program and meets the others in the collective calls below, in the same order.
Alone, each of them is nothing or the identity, and torch is not needed.
"""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from elutq.errors import ElutqError, InvalidArgumentError, WorkerLostError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

# The first process may work alone for long. A process that ends is noticed at once, not by this.
_PATIENCE = timedelta(days=30)


class World:
    """A process and the others of its job. `World()` is alone; `World.join` finds the others.

    Attributes:
        rank: which of the processes this is.
        size: how many there are.
        local_rank: which of those on this machine it is.
        local_size: how many are on this machine.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
    ) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._device = device
        self._ending = self._made = False
        self._before: Any = None  # what was done at SIGTERM

    @classmethod
    def join(cls, device: str | None = None) -> "World":
        """Meet the other processes, if torchrun started this one or torch.distributed is initialized.

        A context manager: at the end it closes the connections that it made. By gloo on CPUs; on GPUs, one
        for each process, tensors go by NCCL.

        Args:
            device: where work is done, such as "cuda"; by default a GPU if there is one.

        Raises:
            InvalidArgumentError: torch does not know the device, or cannot use it.
            WorkerLostError: the others cannot be reached.
        """
        made = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ
        if not made and "torch.distributed" not in sys.modules:
            return cls(device)
        import torch.distributed as dist

        ready = dist.is_available() and dist.is_initialized()
        if not made and not ready:
            return cls(device)
        world = cls(
            device,
            rank=dist.get_rank() if ready else int(os.environ["RANK"]),
            size=dist.get_world_size() if ready else int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )
        if not ready:
            world._connect()
        return world

    def _connect(self) -> None:
        import torch
        import torch.distributed as dist

        # Its functions' defaults are the group that there is when they are imported: later, they would be
        # ours and keep it.
        import torch.distributed.nn.functional

        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
        with self._meeting():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
        self._made = True
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._told_to_end)

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            # torchrun ends the processes that outlive another; one that ends with an error may say so first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if error else self._before)
        if self._made:
            import torch.distributed as dist

            # Nothing may keep the group, and with it gloo's threads, which can crash when they outlive the
            # interpreter. Sharded modules would, which are cycles, and with newer versions of torch a mesh,
            # which DTensor never forgets.
            if "mesh" in vars(self):
                getattr(self.mesh, "_pg_registry", {}).clear()
                gc.collect()
            dist.destroy_process_group()
            self._made = False

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which alone writes and speaks."""
        return self.rank == 0

    @cached_property
    def device(self) -> "torch.device":
        """Where this process works; of several GPUs, its own.

        Raises:
            InvalidArgumentError: torch does not know the device, or cannot use it.
        """
        chosen = choose_device(self._device)
        if self.size > 1 and chosen.type == "cuda" and chosen.index is None:
            return choose_device(f"cuda:{self.local_rank}")
        return chosen

    @cached_property
    def mesh(self) -> "DeviceMesh":
        """All processes in a row, for modules whose weights they share out."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.size,))

    @property
    def threads(self) -> int | None:
        """This process's share of the CPUs; None if it has them to itself."""
        if self.local_size == 1:
            return None
        return max(1, len(os.sched_getaffinity(0)) // self.local_size)

    def share(self, count: int) -> range:
        """Which of `count` items are this process's: shares differ by one at most and follow each other."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, *tensors: "Tensor") -> None:
        """Replace tensors by their sums over all processes, the same bits everywhere.

        Raises:
            WorkerLostError: another process ended; so do all methods below.
        """
        if self.size > 1:
            import torch.distributed as dist

            with self._meeting():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def totals(self, *numbers: float) -> list[float]:
        """Each number's sum over all processes, in float64."""
        import torch

        sums = torch.tensor(numbers, dtype=torch.float64)
        self.sum_(sums)
        return sums.tolist()

    def broadcast_(self, *tensors: "Tensor", source: int = 0) -> None:
        """Replace tensors by those of process `source`."""
        if self.size > 1:
            import torch.distributed as dist

            with self._meeting():
                for tensor in tensors:
                    dist.broadcast(tensor, source)

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """What process `source` gives; anything that can be pickled."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        with self._meeting():
            dist.broadcast_object_list(values, source)
        return values[0]

    def gather_objects(self, value: T) -> list[T]:
        """What each process gives, in order of rank; anything that can be pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self._meeting():
            dist.all_gather_object(values, value)
        return values

    def everywhere(self, work: Callable[[], T]) -> T:
        """Do work that may fail and meets nobody; what fails in one process is raised in all.

        Raises:
            ElutqError: of the first process that failed, which gives its message to a person; in the others
                it is marked `elsewhere`.
        """
        result: T
        error: ElutqError | None = None
        try:
            result = work()
        except ElutqError as raised:
            error = raised
        errors = self.gather_objects(error)
        failed = [rank for rank, found in enumerate(errors) if found]
        if not failed:
            return result
        self._ending = True
        reported = error if failed[0] == self.rank else errors[failed[0]]
        assert reported is not None
        reported.elsewhere = failed[0] != self.rank
        raise reported

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do work in the first process while the others wait; None in those. Errors are raised in all."""
        return self.everywhere(lambda: work() if self.is_main else None)

    def from_main(self, work: Callable[[], T]) -> T:
        """Do work in the first process and give all what it returns, which can be pickled."""
        result: Any = self.on_main(work)
        shared: T = self.broadcast_object(result)
        return shared

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._ending = True
            raise self._lost(str(error).splitlines()[0]) from error

    def _told_to_end(self, *_: Any) -> None:
        """SIGTERM is what torchrun sends when another process ended, or when it is told to end itself."""
        if not self._ending:
            self._ending = True
            raise self._lost("SIGTERM")

    def _lost(self, reason: str) -> WorkerLostError:
        return WorkerLostError(
            f"process {self.rank} of {self.size} gives up, as another one of this job ended ({reason}); see "
            "its message, then run the same command again: finished work is kept"
        )


def choose_device(name: str | None) -> "torch.device":
    """The device of that name; by default a GPU if there is one.

    Raises:
        InvalidArgumentError: torch does not know it, or cannot use it.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgumentError(f"device {name!r} cannot be used: {reason}; try cpu or cuda") from None
    return device
