"""End-to-end tuning: the whole quantized model is tuned to predict what the full model predicts.

The loss is KL(full || tuned) of the next token's distribution, or the likelihood of the text itself.
Scales, zeros, norms and biases are trained (EfficientQAT, arXiv 2407.11062) and, with a `latent_rate`, codes.
The full model runs once: what its head reads is kept, [tokens, hidden_size], which is less than its logits
and gives them exactly.

    memory     the quantized model in float32 parameters and byte codes (9 bytes more per weight with latent
               weights and Adam's moments), and one block's activations where they are recomputed
    processes  each has some windows; gradients are summed in every step
    resuming   parameters and the optimizer's state are saved now and then, in one file
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from elutq.architectures import FINAL_NORM, EngineConfig
from elutq.blocks import DecoderBlock
from elutq.finetune.objective import Heads, add, mean
from elutq.finetune.options import TuneOptions
from elutq.finetune.quantized_block import Tuned, autocast, result, set_vectors, to_numpy, vectors
from elutq.finetune.task import TuningTask, Windows, get, put
from elutq.finetune.tuning import Tuning
from elutq.layerwise import Activations, HeldOut
from elutq.world import World

#: Activations of a step are recomputed, block by block, when there are more bytes of them.
_KEPT_BYTES = 4 << 30


@dataclass(frozen=True)
class EndToEndOutcome:
    """How end-to-end tuning went.

    Attributes:
        before: loss on the windows held out, in nats per token.
        after: the same of the tuned model.
        steps: of the optimizer.
    """

    before: float
    after: float
    steps: int


def activation_bytes(engine: EngineConfig, tokens: int) -> int:
    """What one block keeps of so many tokens for the way back, roughly."""
    return 4 * (16 * engine.hidden_size + 4 * engine.intermediate_size) * tokens


def recomputes(engine: EngineConfig, length: int, options: TuneOptions, world: World) -> bool:
    """Whether a step with windows of `length` tokens runs blocks again on the way back."""
    tokens = -(-options.batch // world.size) * length
    return activation_bytes(engine, tokens) * engine.num_hidden_layers > _KEPT_BYTES


class EndToEndTuner:
    """A quantized model in torch, to be tuned as a whole.

    Args:
        task: the models, the text and what to do.
        objective: "kl" or "lm", the likelihood of the text.
        shard: each process holds a share of the model's parameters, and all of a block's while it runs.
        head_tuned: float32 [vocab_size, hidden_size], the quantized model's head, if it is another one.
        progress: called with the share of the steps that is done.
    """

    def __init__(
        self,
        task: TuningTask,
        *,
        objective: str = "kl",
        shard: bool = False,
        head_tuned: NDArray[np.float32] | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._task, self._world, self._device = task, task.world, task.world.device
        self._objective, self._shard, self._progress = objective, shard, progress
        self._windows = Windows(task.text, task.options, task.world)
        reader, engine, length = task.reader, task.reader.engine, self._windows.length
        self._positions = reader.positions(length)
        self._masks = [reader.mask(index, length) for index in range(engine.num_hidden_layers)]
        self._inputs, self._full = Activations(task.place), Activations(task.place)
        with torch.no_grad():
            task.embed_both(self._windows, self._full, self._inputs)
            self._run_full()
        head = reader.head()
        self._heads = Heads(head, head if head_tuned is None else torch.from_numpy(head_tuned).to(head))
        self._blocks, self._modules = [], []
        for index in range(engine.num_hidden_layers):  # one at a time in float32, and whole
            block = task.trainable(index)
            self._blocks.append(block)
            self._modules.append(_BlockModule(block))
            if shard:
                fully_shard(self._modules[-1], mesh=self._world.mesh)
        self._norm = {FINAL_NORM.removesuffix(".weight"): reader.final_norm()}
        set_vectors(self._norm, {FINAL_NORM: task.model.read_float32(FINAL_NORM)})
        self._recompute = recomputes(engine, length, task.options, task.world)

    def tune(self, state: Path, save_seconds: float) -> tuple[Tuned, EndToEndOutcome]:
        """Tune the model.

        Args:
            state: begins the name of the file, one for each process, in which the state is saved and from
                which work goes on.
            save_seconds: how often.

        Raises:
            TensorValueError: it diverged.
        """
        task, world = self._task, self._world
        parts = [*self._modules, *self._norm.values()]
        tuning = Tuning(parts, self._windows.train_count, task.options, task.seed, world)
        state = self._file(state)
        saved = torch.load(state, "cpu") if state.exists() else None
        steps = set(world.gather_objects(saved and saved["step"]))
        if len(steps) == 1 and saved is not None:  # a kill may have come while some had saved
            tuning.restore(saved)
        last = time.monotonic()

        def after_step() -> None:
            nonlocal last
            self._progress(tuning.step / tuning.steps)
            if world.from_main(lambda: time.monotonic() - last >= save_seconds):
                state.parent.mkdir(parents=True, exist_ok=True)
                partial = state.with_suffix(".partial")
                torch.save(tuning.state(), partial)
                partial.replace(state)
                last = time.monotonic()

        tuning.run(self._loss, self._held_out_loss, after_step)
        return self._result(), EndToEndOutcome(tuning.start or 0.0, tuning.best, tuning.step)

    def forget(self, state: Path) -> None:
        """Delete what `tune` saved; its result is stored elsewhere."""
        self._file(state).unlink(missing_ok=True)

    def _file(self, state: Path) -> Path:
        return state.with_name(f"{state.name}.{self._world.rank}-of-{self._world.size}.state")

    @torch.no_grad()
    def evaluate(self) -> HeldOut | None:
        """Both models on the windows of the report; None when there are none."""
        sums = HeldOut(0.0, 0.0, 0.0, 0)
        for windows, counts in self._in_turn(self._windows.report, self._windows.report_count):
            both = get(self._full, windows, self._device), self._hidden(windows)
            if counts:
                for window, full, tuned in zip(windows, *both, strict=True):
                    sums = add(sums, self._heads.compare(full, tuned, self._windows.ids[window]))
        return mean(sums, self._world)

    def _run_full(self) -> None:
        reader, own = self._task.reader, self._windows.own
        for index in range(reader.engine.num_hidden_layers):
            block = reader.block(index)
            for window in own:
                hidden = get(self._full, [window], self._device)
                put(self._full, [window], block(hidden, self._positions, self._masks[index]))
        for window in own:
            put(self._full, [window], reader.head_input(get(self._full, [window], self._device))[None])

    def _hidden(self, windows: Sequence[int]) -> Tensor:
        """What the tuned model's head reads, [windows, length, hidden_size]."""
        hidden = get(self._inputs, windows, self._device)
        with autocast(self._device):
            for block, mask in zip(self._modules, self._masks, strict=True):
                if self._recompute and torch.is_grad_enabled():
                    hidden = checkpoint(block, hidden, self._positions, mask, use_reentrant=False)
                else:
                    hidden = block(hidden, self._positions, mask)
            (norm,) = self._norm.values()
            normalized: Tensor = norm(hidden)
        return normalized

    def _loss(self, batch: list[int]) -> Tensor:
        """Mean loss per token of each window, summed over this process's windows."""
        return self._loss_of(self._windows.trained_in(batch))

    def _loss_of(self, windows: Sequence[int]) -> Tensor:
        hidden, length = self._hidden(windows), self._windows.length
        if self._objective == "lm":
            next_tokens = self._windows.ids[windows, 1:].flatten().to(self._device)
            nll = self._heads.nll(hidden[:, :-1].flatten(0, 1), next_tokens)
            return nll.div(length - 1)
        full = get(self._full, windows, self._device)
        return self._heads.kl(full.flatten(0, 1), hidden.flatten(0, 1)).div(length)

    def _held_out_loss(self) -> float:
        turns = self._in_turn(self._windows.held_out, self._windows.held_count)
        own = sum(float(self._loss_of(windows)) * counts for windows, counts in turns)
        return self._world.totals(own)[0] / self._windows.held_count

    def _in_turn(self, own: Sequence[int], count: int) -> Iterator[tuple[Sequence[int], bool]]:
        """This process's windows of `count`, some at a time, and that they count.

        Where blocks are sharded, all processes run them together: one with fewer windows runs another, which
        does not count.
        """
        pieces = list(self._windows.pieces(own))
        most = -(-count // self._world.size)  # windows of one process
        turns = -(-most // self._windows.at_once) if self._shard else len(pieces)
        spare = self._windows.training[:1]
        for turn in range(turns):
            yield (pieces[turn], True) if turn < len(pieces) else (spare, False)

    def _result(self) -> Tuned:
        tuned = []
        for block, module in zip(self._blocks, self._modules, strict=True):
            with _whole(module):
                tuned.append(result(block))
        return Tuned(
            {name: matrix for block in tuned for name, matrix in block.matrices.items()},
            {name: vector for block in tuned for name, vector in block.vectors.items()}
            | {name: to_numpy(vector) for name, vector in vectors(self._norm).items()},
        )


class _BlockModule(nn.Module):
    """A block as one module."""

    def __init__(self, block: DecoderBlock) -> None:
        super().__init__()
        self._run = block
        self._parts = nn.ModuleList(block.modules.values())

    def forward(self, hidden: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """The block itself, once its parameters are in place."""
        return self._run(hidden, positions, mask)


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """All parameters of a module, if it is sharded, in every process."""
    if isinstance(module, FSDPModule):
        module.unshard()
    yield
    if isinstance(module, FSDPModule):
        module.reshard()
