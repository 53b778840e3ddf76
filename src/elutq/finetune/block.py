"""Block reconstruction: each decoder block is tuned to do what the full model's block does.

Two streams of activations go through the blocks side by side, as in `elutq.layerwise`: the full model's, h,
and the tuned model's, h^. A block f is quantized, as f~, already; what f~ is made of is tuned to make

    E ||f~(h^) - f(h)||^2  /  E ||f(h) - E f(h)||^2

small (BRECQ, arXiv 2102.05426; with latent weights and parameters trained together: EfficientQAT, arXiv
2407.11062), so that a block makes up for what is lost inside it and before it.

    memory     one block with gradients and Adam's moments, three tensors [tokens, hidden_size]
    processes  each has some windows and their streams; gradients are summed in every step
    resuming   tuned blocks are read back and both streams computed again, to the same bits
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elutq.blocks import BlockReader
from elutq.errors import InvalidArgumentError
from elutq.finetune.objective import Heads, add, mean
from elutq.finetune.options import TuneOptions
from elutq.finetune.quantized_block import QuantizedModel, Tuned, autocast, fill, make_trainable, result
from elutq.finetune.tuning import Tuning
from elutq.layerwise import Activations, HeldOut
from elutq.world import World

#: Tokens that go through a block together where nothing is trained.
_FORWARD_TOKENS = 4096
#: Of a block's outputs, relative to their squares: errors are relative to no less.
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class TunedOutcome:
    """How the tuning of a block went.

    Attributes:
        index: of the block.
        before: relative squared error of its outputs on the windows held out.
        after: the same of the tuned block.
        steps: of the optimizer.
    """

    index: int
    before: float
    after: float
    steps: int


class Streams:
    """Residual streams of some windows in the full and the tuned model; of this process's windows alone.

    Args:
        reader: of the full model.
        windows: int64 [windows, length], token ids.
        own: those of this process.
        offload: folder for activations; None keeps them in memory.
        embed_tuned: the embedding that the tuned model has, if it is another one.
    """

    def __init__(
        self,
        reader: BlockReader,
        windows: NDArray[np.int64],
        own: Sequence[int],
        offload: Path | None,
        embed_tuned: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.own = own
        self.full, self.tuned, self.targets = (Activations(offload) for _ in range(3))
        self._length = windows.shape[1]
        ids = torch.from_numpy(windows)
        for piece in self.pieces():
            put(self.full, piece, reader.embed(ids[piece]))
            put(self.tuned, piece, (embed_tuned or reader.embed)(ids[piece]))

    def pieces(self) -> Iterator[list[int]]:
        """The windows, some at a time."""
        return pieces(self.own, self._length)


def pieces(windows: Sequence[int], length: int) -> Iterator[list[int]]:
    """As many windows of such a length at a time as may go through a block together."""
    step = max(1, _FORWARD_TOKENS // length)
    return (list(windows[i : i + step]) for i in range(0, len(windows), step))


def put(stream: Activations, windows: Sequence[int], values: Tensor) -> None:
    """Store one tensor for each window."""
    for window, value in zip(windows, values.cpu(), strict=True):
        stream.overwrite(window, value)


def get(stream: Activations, windows: Sequence[int], device: torch.device) -> Tensor:
    """What is stored for some windows, [windows, ...]."""
    return torch.stack([stream[window] for window in windows]).to(device)


class BlockTuner:
    """Walks through the blocks of a quantized model and tunes them.

    Args:
        reader: of the full model.
        model: the quantized one.
        quantized: names of its quantized modules.
        windows: int64 [windows, length], token ids to train on.
        held_out: int64 [held, length], token ids that decide what is best.
        report: int64 [windows, length], token ids that `evaluate` judges by.
        options: what to do.
        seed: of the order of the windows.
        world: the processes that share the windows.
        offload: folder for activations; None keeps them in memory.
        embed_tuned: the embedding that the quantized model has, if it is another one.
    """

    def __init__(
        self,
        reader: BlockReader,
        model: QuantizedModel,
        quantized: Collection[str],
        windows: NDArray[np.int64],
        held_out: NDArray[np.int64],
        report: NDArray[np.int64],
        options: TuneOptions,
        *,
        seed: int,
        world: World,
        offload: Path | None = None,
        embed_tuned: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._reader, self._model, self._quantized = reader, model, quantized
        self._options, self._seed, self._world = options, seed, world
        self._count, self._length = windows.shape
        self._training = set(own_windows(self._count, options, world))
        self._held_out = [self._count + i for i in world.share(len(held_out))]
        self._held_count = len(held_out)
        self._report = [self._count + len(held_out) + i for i in world.share(len(report))]
        self._ids = np.concatenate([windows, held_out, report])
        own = [*sorted(self._training), *self._held_out, *self._report]
        self._streams = Streams(reader, self._ids, own, offload, embed_tuned)
        self._targets_of: int | None = None

    def tune(self, index: int) -> tuple[Tuned, TunedOutcome]:
        """Tune block `index`; the streams must have come past those before it.

        Raises:
            TensorValueError: it diverged.
        """
        streams, device = self._streams, self._world.device
        position = self._position(index)
        norm = self._find_targets(index)
        block = self._reader.block(index)
        make_trainable(
            block,
            self._model,
            self._quantized,
            device,
            train_codes=self._options.latent_rate > 0,
            uniform=self._options.uniform,
        )
        tuning = Tuning(block.modules.values(), self._count, self._options, self._seed + index, self._world)

        def error(windows: list[int], inputs: Tensor) -> Tensor:
            with autocast(device):
                outputs = block(inputs, *position)
            return (outputs.float() - get(streams.targets, windows, device)).square().sum() / norm

        def loss(batch: list[int]) -> Tensor:
            windows = [window for window in batch if window in self._training]
            inputs = get(streams.tuned, windows, device)
            if self._options.full_share:
                rng = np.random.default_rng([self._seed, index, tuning.step])
                chosen = dict(zip(batch, rng.random(len(batch)) < self._options.full_share, strict=True))
                for i, window in enumerate(windows):
                    if chosen[window]:
                        inputs[i] = streams.full[window]
            return error(windows, inputs)

        def held_out() -> float:
            own = (float(error([w], get(streams.tuned, [w], device))) for w in self._held_out)
            return self._world.totals(sum(own))[0] / self._held_count

        tuning.run(loss, held_out)
        return result(block), TunedOutcome(index, tuning.start or 0.0, tuning.best, tuning.step)

    @torch.no_grad()
    def advance(self, index: int, tuned: Tuned) -> None:
        """Move both streams past block `index`, which was tuned to be this."""
        streams, device = self._streams, self._world.device
        if self._targets_of != index:
            self._find_targets(index)
        block, position = self._reader.block(index), self._position(index)
        fill(block, tuned)
        for piece in streams.pieces():
            put(streams.tuned, piece, block(get(streams.tuned, piece, device), *position))
        streams.full, streams.targets = streams.targets, streams.full

    @torch.no_grad()
    def evaluate(self, head: NDArray[np.float32] | None = None) -> HeldOut | None:
        """Both models on the windows of the report, after the last block; None when there are none.

        Args:
            head: float32 [vocab_size, hidden_size], of the tuned model if it is another one.
        """
        full_head = self._reader.head()
        heads = Heads(full_head, full_head if head is None else torch.from_numpy(head).to(full_head))
        sums = HeldOut(0.0, 0.0, 0.0, 0)
        for window in self._report:
            full, tuned = (
                self._reader.head_input(stream[window].to(self._world.device))
                for stream in (self._streams.full, self._streams.tuned)
            )
            sums = add(sums, heads.compare(full, tuned, torch.from_numpy(self._ids[window])))
        return mean(sums, self._world)

    @torch.no_grad()
    def _find_targets(self, index: int) -> float:
        """Outputs of the full model's block; returns their squared deviation from the mean, per window."""
        streams, device = self._streams, self._world.device
        block, position = self._reader.block(index), self._position(index)
        total, squares, tokens = torch.zeros(0, dtype=torch.float64), 0.0, 0
        for piece in streams.pieces():
            target = block(get(streams.full, piece, device), *position)
            put(streams.targets, piece, target)
            sums = target.sum((0, 1), dtype=torch.float64).cpu()
            total = sums if not tokens else total + sums
            squares += float(target.square().sum(dtype=torch.float64))
            tokens += target.shape[0] * target.shape[1]
        self._world.sum_(total)
        all_squares, all_tokens = self._world.totals(squares, tokens)
        self._targets_of = index
        variance = all_squares - float(total.square().sum()) / all_tokens
        # Tokens that are all the same have none, but for what float32 loses.
        return float(max(variance, _LEAST_VARIANCE * all_squares, 1e-30) / all_tokens * self._length)

    def _position(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        return self._reader.positions(self._length), self._reader.mask(index, self._length)


def own_windows(count: int, options: TuneOptions, world: World) -> list[int]:
    """Those of `count` windows that this process trains on: some of every batch (see `Tuning`).

    Raises:
        InvalidArgumentError: there are more processes than windows in a batch, or no whole batch.
    """
    if world.size > options.batch:
        raise InvalidArgumentError(
            f"{world.size} processes cannot share batches of {options.batch} windows; take larger batches"
        )
    if count < options.batch:
        raise InvalidArgumentError(f"{count} windows are no batch of {options.batch}; take more windows")
    strata = world.share(options.batch)
    return [window for window in range(count - count % options.batch) if window % options.batch in strata]
