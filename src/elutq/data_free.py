"""Carries tensors from a checkpoint to a writer: matrices quantized on their own, the rest as it is."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from elutq import hlq
from elutq.checkpoint import Checkpoint, CheckpointWriter, Part
from elutq.errors import TensorValueError
from elutq.importance import input_importance
from elutq.report import SquaredError
from elutq.rotation import RotatedCheckpoint
from elutq.world import World

_PIECE = 1 << 24  # weights in work at once

#: Called with weights done, weights in all, and the name of the tensor in work.
Progress = Callable[[int, int, str], None]


class DataFreeJob:
    """The parts of one model, those that the writer has not got yet. Of several processes, the first works.

    Args:
        world: the processes, which call this alike.
        checkpoint: the full model, perhaps rotated.
        writer: takes the tensors; None in processes but the first.
        parts: everything the new model consists of.
        method: one of `hlq.METHODS`.
        importance: weigh columns by what `importance.input_importance` estimates of their inputs.
        threads: of the solver; None for all CPUs.
        progress: called after every piece.

    Attributes:
        known_importance: module -> importance of its columns, where it was measured.
        quantized: weights quantized so far.
    """

    def __init__(
        self,
        world: World,
        checkpoint: Checkpoint | RotatedCheckpoint,
        writer: CheckpointWriter | None,
        parts: Iterable[Part],
        method: str,
        importance: bool,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self._world = world
        self._checkpoint = checkpoint
        self._writer = writer
        self._method = method
        self._importance = importance
        self._threads = threads
        self._progress = progress
        self.known_importance: dict[str, NDArray[np.float32]] = {}
        self.quantized = 0
        weights = {part.name: math.prod(part.shape) for part in parts}
        self._total = sum(weights.values())
        self._done = sum(count for name, count in weights.items() if writer and name in writer.done)

    def advance(self, weights: int, name: str) -> None:
        """Count weights that somebody quantized."""
        self._done += weights
        self.quantized += weights
        self._progress(self._done, self._total, name)

    def run(self, parts: Iterable[Part]) -> None:
        """Write those of the parts that are not written yet."""
        self._world.on_main(lambda: self._run(parts))

    def _run(self, parts: Iterable[Part]) -> None:
        waiting = [part for part in parts if part.name not in self._own.done]
        for part, following in zip_longest(waiting, waiting[1:]):
            if following:
                self._checkpoint.prefetch(following.source)
            if part.scheme:
                for count in self._quantize(part):
                    self.advance(count, part.name)
            else:
                for count in self._copy(part):
                    self._done += count
                    self._progress(self._done, self._total, part.name)

    def _quantize(self, part: Part) -> Iterator[int]:
        """Quantize a matrix; yields the weights done after each piece."""
        assert part.scheme is not None
        rows, columns = part.shape
        importance = self._input_importance(part)
        measured = SquaredError(0.0, 0.0)
        for piece in _row_pieces(rows, columns):
            weight = self._checkpoint.read(part.source, piece)
            matrix = hlq.fit(
                weight,
                part.scheme.bits,
                part.scheme.group_size,
                weights=importance,
                method=self._method,
                threads=self._threads,
                name=part.source,
            )
            if part.scheme.param_bits == 8:
                matrix = hlq.to_8bit(weight, matrix, importance, threads=self._threads)
            measured += SquaredError(*hlq.squared_error(weight, matrix, threads=self._threads))
            for name, array in matrix.arrays.items():
                of_rows = array if name == "planes" else array[None]  # [planes or 1, rows, ...]
                for plane, values in enumerate(of_rows):
                    first = (plane * rows + piece.start) * values[0].size
                    self._own.write(f"{part.name}.{name}", values, at=first)
            self._checkpoint.release(part.source)
            yield weight.size
        self._own.commit(part.name, part.tensors, asdict(measured))

    def _input_importance(self, part: Part) -> NDArray[np.float32] | None:
        if part.name in self.known_importance:
            return self.known_importance[part.name]
        if not self._importance:
            return None

        def read(name: str, rows: slice) -> NDArray[np.float32]:
            values = self._checkpoint.read_float32(name, rows)
            self._checkpoint.release(name)
            return values

        return input_importance(part.name, self._checkpoint.engine, read)

    def _copy(self, part: Part) -> Iterator[int]:
        """Copy a matrix or vector as it is; yields the weights done after each piece."""
        columns = part.shape[1] if len(part.shape) == 2 else 1
        for piece in _row_pieces(part.shape[0], columns):
            values = self._checkpoint.read(part.source, piece)
            if not np.isfinite(values).all():
                raise TensorValueError(f"{part.source} holds NaN or infinity; check the source model")
            self._own.write(part.source, values, at=piece.start * columns)
            self._checkpoint.release(part.source)
            yield values.size
        self._own.commit(part.name, part.tensors, {})

    @property
    def _own(self) -> CheckpointWriter:
        """The writer, which the first process has."""
        assert self._writer is not None
        return self._writer


def _row_pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole rows, of at most `_PIECE` weights where a row is not longer."""
    step = max(1, _PIECE // columns)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
