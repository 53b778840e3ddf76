"""What a stage of finetuning works on: two models, and windows of text that processes share."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elutq.blocks import BlockReader, DecoderBlock
from elutq.errors import InvalidArgumentError
from elutq.finetune.options import TuneOptions, TuningText
from elutq.finetune.quantized_block import QuantizedModel, make_trainable
from elutq.layerwise import MEMORY, Activations, Place
from elutq.world import World

#: Tokens that go through a block together where nothing is trained.
_FORWARD_TOKENS = 4096


@dataclass(frozen=True)
class TuningTask:
    """The work of one stage, alike in all processes.

    Attributes:
        reader: of the full model.
        model: the quantized one.
        quantized: names of the quantized modules in its blocks.
        text: to train on, to choose by and to judge by.
        options: what to do.
        seed: of the order of the windows.
        world: the processes that share the windows.
        place: where activations are kept.
        embed_tuned: the embedding that the quantized model has, if it is another one.
    """

    reader: BlockReader
    model: QuantizedModel
    quantized: Collection[str]
    text: TuningText
    options: TuneOptions
    seed: int
    world: World
    place: Place = MEMORY
    embed_tuned: Callable[[Tensor], Tensor] | None = None

    def trainable(self, index: int) -> DecoderBlock:
        """Block `index` of the quantized model, in a form that can be trained."""
        block = self.reader.block(index)
        make_trainable(
            block,
            self.model,
            self.quantized,
            self.world.device,
            train_codes=self.options.latent_rate > 0,
            uniform=self.options.uniform,
        )
        return block

    def embed_both(self, windows: "Windows", full: Activations, tuned: Activations) -> None:
        """Store the residual streams before the first block, of the full model and of the quantized one."""
        for piece in windows.pieces(windows.own):
            ids = windows.ids[piece]
            put(full, piece, self.reader.embed(ids))
            put(tuned, piece, (self.embed_tuned or self.reader.embed)(ids))


class Windows:
    """All windows of a text, numbered through, and which of them are this process's.

    Args:
        text: the windows.
        options: how they are batched.
        world: the processes that share them.

    Attributes:
        ids: int64 [windows, length]: those to train on, those held out, those of the report.
        length: tokens in each.
        at_once: how many go through a block together where nothing is trained.
        train_count: how many there are to train on, in all processes; the other counts likewise.
        training: which of them are this process's; so are the other lists.

    Raises:
        InvalidArgumentError: there are more processes than windows in a batch, or no whole batch.
    """

    def __init__(self, text: TuningText, options: TuneOptions, world: World) -> None:
        self.ids = torch.from_numpy(np.concatenate([text.train, text.held_out, text.report]))
        self.length: int = self.ids.shape[1]
        self.at_once = max(1, _FORWARD_TOKENS // self.length)
        self.train_count, self.held_count, self.report_count = map(
            len, (text.train, text.held_out, text.report)
        )
        self.training = own_windows(self.train_count, options, world)
        self._trained = frozenset(self.training)
        first = self.train_count
        self.held_out = [first + i for i in world.share(self.held_count)]
        first += self.held_count
        self.report = [first + i for i in world.share(self.report_count)]

    @property
    def own(self) -> list[int]:
        """All that are this process's."""
        return [*self.training, *self.held_out, *self.report]

    def trained_in(self, batch: Sequence[int]) -> list[int]:
        """Those of a batch that are this process's."""
        return [window for window in batch if window in self._trained]

    def pieces(self, windows: Sequence[int]) -> Iterator[Sequence[int]]:
        """As many windows at a time as may go through a block together where nothing is trained."""
        return (windows[i : i + self.at_once] for i in range(0, len(windows), self.at_once))


def put(stream: Activations, windows: Sequence[int], values: Tensor) -> None:
    """Store one tensor for each window."""
    for window, value in zip(windows, values, strict=True):
        stream.overwrite(window, value)


def get(stream: Activations, windows: Sequence[int], device: torch.device) -> Tensor:
    """What is stored for some windows, [windows, ...]."""
    return torch.stack([stream.on(window, device) for window in windows])


def own_windows(count: int, options: TuneOptions, world: World) -> list[int]:
    """Those of `count` windows that this process trains on: some of every batch (see `Tuning`).

    Raises:
        InvalidArgumentError: there are more processes than windows in a batch, or no whole batch.
    """
    options.check_processes(world.size)
    if count < options.batch:
        raise InvalidArgumentError(f"{count} windows are no batch of {options.batch}; take more windows")
    strata = world.share(options.batch)
    return [window for window in range(count - count % options.batch) if window % options.batch in strata]
