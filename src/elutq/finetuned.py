"""The finetuning half of the pipeline: joins a quantized folder, text and a writer to `elutq.finetune`.

Each stage reads the folder that the stage before it made and writes another one, so that every stage can be
killed, resumed and judged on its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elutq import hlq
from elutq.architectures import EMBEDDING, HEAD, EngineConfig, block_linears
from elutq.blocks import BlockReader, WeightSource
from elutq.calibrated import embedder, torch_settings
from elutq.checkpoint import Checkpoint, CheckpointWriter, Part
from elutq.finetune.block import BlockTuner, TunedOutcome
from elutq.finetune.end_to_end import EndToEndOutcome, EndToEndTuner
from elutq.finetune.options import FinetuneOptions, TuneOptions, TuningText
from elutq.finetune.quantized_block import Tuned
from elutq.finetune.task import TuningTask
from elutq.layerwise import HeldOut, Place
from elutq.packing import HlqMatrix
from elutq.report import SquaredError
from elutq.world import World


class FinetuneJob:
    """One stage; all processes of `world` together, which call it alike.

    Args:
        source: the full model.
        base: the quantized model to begin with; of the first process, others have None.
        parts: of both quantized models.
        writer: takes the tuned one; of the first process, too.
        text: what to train on.
        options: how.
        seed: of the order of the windows.
        world: the processes that share the work, and their devices.
        place: where activations are kept.
        threads: of each process; by default its share of the CPUs.
        progress: called with the share that is done, from 0 to 1, and what is in work.
    """

    def __init__(
        self,
        source: WeightSource,
        base: Checkpoint | None,
        parts: Sequence[Part],
        writer: CheckpointWriter | None,
        text: TuningText,
        options: TuneOptions,
        *,
        seed: int,
        world: World,
        place: Place,
        threads: int | None,
        progress: Callable[[float, str], None],
    ) -> None:
        self._source, self._base, self._parts, self._writer = source, base, parts, writer
        self._text, self._options, self._seed, self._world = text, options, seed, world
        self._place, self._progress = place, progress
        self._threads = threads or world.threads
        self._engine: EngineConfig = source.engine
        in_blocks = {linear.name for linear in block_linears(self._engine)}
        self._quantized = [part.name for part in parts if part.scheme and part.name in in_blocks]
        self._outer = {part.name for part in parts if part.scheme and part.name not in in_blocks}
        self._model = _SharedModel(world, base)

    def blocks(self) -> tuple[list[TunedOutcome], HeldOut | None]:
        """Block reconstruction: how each block went, and how both models do in the end."""
        with torch_settings(self._threads, self._world.device):
            tuner = BlockTuner(self._task())
            outcomes = []
            count = self._engine.num_hidden_layers
            for index in range(count):
                self._progress(index / count, f"block {index + 1} of {count}")
                outcomes.append(self._block(tuner, index))
            held_out = tuner.evaluate(self._head())
            self._world.on_main(self._copy_rest)
        return outcomes, held_out

    def end_to_end(self, state: Path, options: FinetuneOptions) -> tuple[EndToEndOutcome, HeldOut | None]:
        """End-to-end tuning: how it went, and how both models do in the end.

        Args:
            state: begins the name of the file that a killed run goes on from, one for each process.
            options: of the objective, sharding and saving.

        Raises:
            TensorValueError: it diverged.
        """
        stored: dict[str, Any] | None = self._world.from_main(lambda: self._own.done.get("model"))
        if stored is None:
            outcome, held_out = self._tune_model(state, options)
        else:
            outcome = EndToEndOutcome(**stored["outcome"])
            held_out = stored["held_out"] and HeldOut(**stored["held_out"])
        self._world.on_main(self._copy_rest)
        return outcome, held_out

    def _tune_model(self, state: Path, options: FinetuneOptions) -> tuple[EndToEndOutcome, HeldOut | None]:
        with torch_settings(self._threads, self._world.device):
            tuner = EndToEndTuner(
                self._task(),
                objective=options.objective,
                shard=options.shard and self._world.size > 1,
                head_tuned=self._head(),
                progress=lambda share: self._progress(share, "end to end"),
            )
            tuned, outcome = tuner.tune(state, options.save_seconds)
            held_out = tuner.evaluate()
            record = {"outcome": asdict(outcome), "held_out": held_out and asdict(held_out)}
            self._world.on_main(lambda: self._store("model", tuned, record))
            tuner.forget(state)
        return outcome, held_out

    def _block(self, tuner: BlockTuner, index: int) -> TunedOutcome:
        key = f"block {index}"
        stored: dict[str, Any] | None = self._world.from_main(lambda: self._own.done.get(key))
        if stored is None:
            tuned, outcome = tuner.tune(index)
            self._world.on_main(lambda: self._store(key, tuned, {"outcome": asdict(outcome)}))
        else:
            tuned, outcome = (
                self._world.from_main(lambda: self._stored(index)),
                TunedOutcome(**stored["outcome"]),
            )
        tuner.advance(index, tuned)
        return outcome

    def _task(self) -> TuningTask:
        return TuningTask(
            BlockReader(self._source, self._world.device),
            self._model,
            self._quantized,
            self._text,
            self._options,
            self._seed,
            self._world,
            self._place,
            self._embedding(),
        )

    def _embedding(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        if EMBEDDING not in self._outer:
            return None
        return embedder(self._model.read_hlq(EMBEDDING), self._world.device)

    def _head(self) -> NDArray[np.float32] | None:
        name = EMBEDDING if self._engine.tie_word_embeddings else HEAD
        return hlq.dequantize(self._model.read_hlq(name)) if name in self._outer else None

    def _store(self, key: str, tuned: Tuned, record: dict[str, Any]) -> None:
        errors, names = {}, list(tuned.vectors)
        for name, vector in tuned.vectors.items():
            self._own.write(name, vector)
        for module, matrix in tuned.matrices.items():
            for name, array in matrix.arrays.items():
                self._own.write(f"{module}.{name}", array)
                names.append(f"{module}.{name}")
            errors[module] = hlq.squared_error(self._source.read_float32(f"{module}.weight"), matrix)
        self._own.commit(key, names, {**record, "errors": errors})
        self._own.sync()

    def _stored(self, index: int) -> Tuned:
        """A block of an earlier run."""
        prefix = f"model.layers.{index}."
        matrices, vectors = {}, {}
        for part in self._parts:
            if part.name.startswith(prefix) and part.name in self._quantized:
                assert part.scheme is not None
                arrays = {name.rpartition(".")[2]: self._own.read(name) for name in part.tensors}
                matrices[part.name] = HlqMatrix(
                    in_features=part.shape[1], group_size=part.scheme.group_size, **arrays
                )
            elif part.name.startswith(prefix) and len(part.shape) == 1:
                vectors[part.name] = self._own.read(part.name)
        return Tuned(matrices, vectors)

    def errors(self) -> dict[str, SquaredError]:
        """Squared error of each quantized matrix, against the full model's; for the first process."""
        found: dict[str, SquaredError] = {}
        for record in self._own.done.values():
            found |= {module: SquaredError(*error) for module, error in record["errors"].items()}
        return found

    def _copy_rest(self) -> None:
        """What is not tuned is the base's."""
        assert self._base is not None
        tuned = {name for part in self._parts for name in part.tensors if self._own.holds(name)}
        errors = {}
        for part in self._parts:
            for name in part.tensors:
                if name not in tuned:
                    array = self._base.read(name)
                    self._own.write(name, array.astype(np.float32) if len(part.shape) == 1 else array)
            if part.name in self._outer:
                weight = self._source.read_float32(part.source)
                errors[part.name] = hlq.squared_error(weight, self._base.read_hlq(part.name))
        rest = [name for part in self._parts for name in part.tensors if name not in tuned]
        self._own.commit("rest", rest, {"errors": errors})

    @property
    def _own(self) -> CheckpointWriter:
        """The writer, which the first process has."""
        assert self._writer is not None
        return self._writer


class _SharedModel:
    """A `QuantizedModel` that the first process reads for all."""

    def __init__(self, world: World, checkpoint: Checkpoint | None) -> None:
        self._world, self._checkpoint = world, checkpoint

    def read_hlq(self, module: str) -> HlqMatrix:
        return self._world.from_main(lambda: self._own.read_hlq(module))

    def read_float32(self, name: str) -> NDArray[np.float32]:
        return self._world.from_main(lambda: self._own.read_float32(name).copy())

    @property
    def _own(self) -> Checkpoint:
        assert self._checkpoint is not None
        return self._checkpoint
