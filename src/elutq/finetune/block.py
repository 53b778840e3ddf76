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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elutq.finetune.objective import Heads, add, mean
from elutq.finetune.quantized_block import Tuned, autocast, fill, result
from elutq.finetune.task import TuningTask, Windows, get, put
from elutq.finetune.tuning import Tuning
from elutq.layerwise import Activations, HeldOut, may_round

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


class BlockTuner:
    """Walks through the blocks of a quantized model and tunes them.

    Args:
        task: the models, the text and what to do.
    """

    def __init__(self, task: TuningTask) -> None:
        self._task, self._world = task, task.world
        self._windows = Windows(task.text, task.options, task.world)
        # Residual streams of this process's windows, and what the full model's block makes of its own.
        learned = self._windows.train_count + self._windows.held_count
        rounded = range(learned if may_round(task.world.device) else 0)
        self._full, self._tuned, self._targets = (Activations(task.place, rounded) for _ in range(3))
        task.embed_both(self._windows, self._full, self._tuned)
        self._targets_of: int | None = None

    def tune(self, index: int) -> tuple[Tuned, TunedOutcome]:
        """Tune block `index`; the streams must have come past those before it.

        Raises:
            TensorValueError: it diverged.
        """
        task, device, full_share = self._task, self._world.device, self._task.options.full_share
        position = self._position(index)
        norm = self._find_targets(index)
        block, seed = task.trainable(index), task.seed + index
        tuning = Tuning(block.modules.values(), self._windows.train_count, task.options, seed, self._world)

        def error(windows: Sequence[int], inputs: Tensor) -> Tensor:
            with autocast(device):
                outputs = block(inputs, *position)
            return (outputs.float() - get(self._targets, windows, device)).square().sum() / norm

        def loss(batch: list[int]) -> Tensor:
            windows = self._windows.trained_in(batch)
            inputs = get(self._tuned, windows, device)
            if full_share:
                rng = np.random.default_rng([task.seed, index, tuning.step])
                chosen = dict(zip(batch, rng.random(len(batch)) < full_share, strict=True))
                for i, window in enumerate(windows):
                    if chosen[window]:
                        inputs[i] = self._full[window]
            return error(windows, inputs)

        def held_out() -> float:
            pieces = self._windows.pieces(self._windows.held_out)
            own = sum(float(error(piece, get(self._tuned, piece, device))) for piece in pieces)
            return self._world.totals(own)[0] / self._windows.held_count

        tuning.run(loss, held_out)
        return result(block), TunedOutcome(index, tuning.start or 0.0, tuning.best, tuning.step)

    @torch.no_grad()
    def advance(self, index: int, tuned: Tuned) -> None:
        """Move both streams past block `index`, which was tuned to be this."""
        device = self._world.device
        if self._targets_of != index:
            self._find_targets(index)
        block, position = self._task.reader.block(index), self._position(index)
        fill(block, tuned)
        for piece in self._windows.pieces(self._windows.own):
            put(self._tuned, piece, block(get(self._tuned, piece, device), *position))
        self._full, self._targets = self._targets, self._full

    @torch.no_grad()
    def evaluate(self, head: NDArray[np.float32] | None = None) -> HeldOut | None:
        """Both models on the windows of the report, after the last block; None when there are none.

        Args:
            head: float32 [vocab_size, hidden_size], of the tuned model if it is another one.
        """
        reader = self._task.reader
        full_head = reader.head()
        heads = Heads(full_head, full_head if head is None else torch.from_numpy(head).to(full_head))
        sums = HeldOut(0.0, 0.0, 0.0, 0)
        for window in self._windows.report:
            full, tuned = (
                reader.head_input(stream[window].to(self._world.device))
                for stream in (self._full, self._tuned)
            )
            sums = add(sums, heads.compare(full, tuned, self._windows.ids[window]))
        return mean(sums, self._world)

    @torch.no_grad()
    def _find_targets(self, index: int) -> float:
        """Outputs of the full model's block; returns their squared deviation from the mean, per window."""
        device = self._world.device
        block, position = self._task.reader.block(index), self._position(index)
        total, squares, tokens = torch.zeros(0, dtype=torch.float64), 0.0, 0
        for piece in self._windows.pieces(self._windows.own):
            target = block(get(self._full, piece, device), *position)
            put(self._targets, piece, target)
            sums = target.sum((0, 1), dtype=torch.float64).cpu()
            total = sums if not tokens else total + sums
            squares += float(target.square().sum(dtype=torch.float64))
            tokens += target.shape[0] * target.shape[1]
        self._world.sum_(total)
        all_squares, all_tokens = self._world.totals(squares, tokens)
        self._targets_of = index
        variance = all_squares - float(total.square().sum()) / all_tokens
        # Tokens that are all the same have none, but for what float32 loses.
        return float(max(variance, _LEAST_VARIANCE * all_squares, 1e-30) / all_tokens * self._windows.length)

    def _position(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        reader, length = self._task.reader, self._windows.length
        return reader.positions(length), reader.mask(index, length)
